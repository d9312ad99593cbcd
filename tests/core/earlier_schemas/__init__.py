"""The schema as its earlier versions were: what databases hold that are to be upgraded.

``version_N.sql`` is what version N added, with the words that ``install.py`` fills in. They are kept as they were run,
and never changed: from version 6 on, the package has each function once, as it is now.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import psycopg

NEWEST = 6

_HEAD = """
do $$begin
    if to_regrole('pgbg_owner') is null then
        create role pgbg_owner nologin;
    end if;
    grant pgbg_owner to current_user;
end$$;
create schema pgbg authorization pgbg_owner;
set role pgbg_owner;
"""


def install(conninfo: str, version: int) -> None:
    """Install the schema in a database with the extension, as it was at ``version``."""
    with psycopg.connect(conninfo, autocommit=True) as conn, conn.transaction():
        conn.execute("set local search_path to pg_catalog, pg_temp")
        conn.execute(_HEAD)
        for number in range(1, version + 1):
            text = Path(__file__).with_name(f"version_{number}.sql").read_text(encoding="utf-8")
            conn.execute(text.replace("@schema@", "pgbg").replace("@owner@", "pgbg_owner").encode())
            checksum = hashlib.sha256(text.encode()).hexdigest()
            conn.execute("insert into pgbg.meta (version, checksum) values (%s, %s)", (number, checksum))
        conn.execute("reset role")
