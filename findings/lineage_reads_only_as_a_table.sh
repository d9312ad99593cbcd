#!/bin/sh
# openlineage-sql 1.54.0: of "select * from only a" the parser tells a table named "only", and of REFRESH MATERIALIZED VIEW
# nothing but an error.
#
# What this package does: lineage is what the parser says; an error of it never fails a task (docs/airflow.md).
. "$(dirname "$0")/lib.sh"

install openlineage-sql==1.54.0
cat >"$folder/finding.py" <<'END'
from openlineage_sql import parse

for statement in ("select * from only a", "refresh materialized view a", "insert into b select * from a"):
    told = parse([statement], "postgres")
    tables = [[str(table) for table in side] for side in (told.in_tables, told.out_tables)]
    print(statement, "| from", *tables[0], "| to", *tables[1], "| errors:", len(told.errors))
END
"$folder/env/bin/python" "$folder/finding.py" | seen_is "select * from only a | from only | to | errors: 0
refresh materialized view a | from | to | errors: 1
insert into b select * from a | from a | to b | errors: 0"
