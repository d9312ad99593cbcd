#!/bin/sh
# The test suite, in two parts: PY=.venv/bin/python JOBS=4 sh scripts/test.sh [pytest's arguments]
#
# First all tests that start no process of an orchestrator, $JOBS at a time: most of them wait for a server. Then those
# that run a real Airflow, a real Dagster daemon and the demo, two at a time; those that share one Airflow are in one
# process (tests/conftest.py). With REPORT=FILE, FILE and FILE.processes are JUnit reports.
set -u

NOTHING_SELECTED=5

run() {
    marks=$1
    report=$2
    shift 2
    "$PY" -m pytest -m "$marks" ${REPORT:+--junitxml="$report"} "$@"
}

run "not chaos and not processes" "${REPORT:-}" -n "${JOBS:-4}" --dist loadfile "$@"
first=$?
run "processes and not chaos" "${REPORT:-}.processes" -n 2 --dist loadgroup "$@"
second=$?

if [ "$first" -eq "$NOTHING_SELECTED" ]; then
    exit "$second"
elif [ "$second" -eq "$NOTHING_SELECTED" ]; then
    exit "$first"
fi
exit $((first > second ? first : second))
