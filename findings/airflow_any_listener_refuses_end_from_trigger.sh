#!/bin/sh
# apache-airflow 3.3.2: where any plugin brings a listener along, whatever that listens to, a DAG with a task of
# end_from_trigger=True is refused (DagBag.bag_dag asks whether there are listeners, and not for what).
#
# Here the listener only hears of components that start. What this package does: it has its own listener only in the
# process of a triggerer, which reads no DAGs.
. "$(dirname "$0")/lib.sh"

install apache-airflow==3.3.2 -c "$here/../tests/versions/airflow-3.3.2.txt"
export AIRFLOW_HOME=$folder AIRFLOW__LOGGING__LOGGING_LEVEL=CRITICAL AIRFLOW__CORE__LOAD_EXAMPLES=False
mkdir "$folder/dags" "$folder/plugins"
cat >"$folder/dags/waits.py" <<'PY'
from airflow.providers.standard.sensors.date_time import DateTimeSensorAsync
from airflow.sdk import DAG

with DAG("waits"):
    DateTimeSensorAsync(task_id="until", target_time="2030-01-01T00:00:00+00:00", end_from_trigger=True)
PY
cat >"$folder/finding.py" <<'PY'
import os

from airflow.dag_processing.dagbag import DagBag

errors = DagBag(os.path.join(os.environ["AIRFLOW_HOME"], "dags")).import_errors
print("refused" if any("end_from_trigger" in str(error) for error in errors.values()) else errors or "accepted")
PY
"$folder/env/bin/airflow" db migrate >/dev/null 2>&1
before=$("$folder/env/bin/python" "$folder/finding.py" 2>/dev/null)
cat >"$folder/plugins/hears.py" <<'PY'
import sys

from airflow.listeners import hookimpl
from airflow.plugins_manager import AirflowPlugin


@hookimpl
def on_starting(component):
    pass


class Hears(AirflowPlugin):
    name = "hears"
    listeners = [sys.modules[__name__]]
PY
after=$("$folder/env/bin/python" "$folder/finding.py" 2>/dev/null)
printf 'without a listener: %s\nwith one: %s\n' "$before" "$after" | seen_is "without a listener: accepted
with one: refused"
