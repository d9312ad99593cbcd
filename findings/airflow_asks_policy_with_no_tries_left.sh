#!/bin/sh
# apache-airflow 3.3.2 (task SDK 1.3.2): the retry policy of a task is asked on its last try too, and with retries=0.
#
# So a policy's reason that promises another try is untrue there. What this package does: it looks at the tries left.
. "$(dirname "$0")/lib.sh"

install apache-airflow==3.3.2 -c "$here/../tests/versions/airflow-3.3.2.txt"
export AIRFLOW_HOME=$folder AIRFLOW__CORE__LOAD_EXAMPLES=False AIRFLOW__LOGGING__LOGGING_LEVEL=ERROR
"$folder/env/bin/airflow" db migrate >/dev/null 2>&1
mkdir "$folder/dags"
cat >"$folder/dags/asked.py" <<'END'
import os
import datetime

from airflow.sdk import DAG, RetryPolicy, task
from airflow.sdk.definitions.retry_policy import RetryDecision


class Telling(RetryPolicy):
    def evaluate(self, exception, try_number, max_tries, context=None):
        with open(os.environ["TOLD"], "a") as told:
            told.write(f"asked: try {try_number} of a task with max_tries {max_tries}\n")
        return RetryDecision.default()


with DAG("asked", schedule=None, start_date=datetime.datetime(2026, 1, 1)) as dag:

    @task(retries=0, retry_policy=Telling())
    def fails():
        raise ValueError("as it should")

    fails()

if __name__ == "__main__":
    dag.test()
END
export TOLD="$folder/told" AIRFLOW__CORE__DAGS_FOLDER="$folder/dags"
"$folder/env/bin/airflow" dags reserialize >/dev/null 2>&1
(cd "$folder/dags" && "$folder/env/bin/python" asked.py >"$folder/log" 2>&1) || true
seen_is "asked: try 1 of a task with max_tries 0" <"$TOLD"
