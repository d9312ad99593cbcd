"""The named queries of ``sql/queries.sql``."""

from __future__ import annotations

from functools import cache

from psycopg import sql

from pgbg_orchestration.postgres.launch_message import AWAIT_NO_STANDBY
from pgbg_orchestration.statements import named

from .install import OFF_WORDS

QUERIES = named.queries(__package__, "sql", "queries.sql")


@cache
def query(name: str, schema: str) -> bytes:
    """Return a query for the package's schema of that name; raises ``KeyError`` where there is no such query."""
    return filled(name, schema)


def filled(name: str, schema: str, **parts: str) -> bytes:
    """Return a query with ``parts``, which are SQL, in its placeholders.

    Text, and not psycopg's ``Composed``, which would be put together anew with each call.
    """
    quoted = sql.Identifier(schema).as_string(None)
    return QUERIES[name].format(schema=quoted, await_no_standby=AWAIT_NO_STANDBY, off_words=OFF_WORDS, **parts).encode()
