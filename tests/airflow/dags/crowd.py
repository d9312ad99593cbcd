"""Three hundred tasks at once: in a file of its own, since every task's process parses the file that it comes from."""

from __future__ import annotations

import os
from datetime import timedelta

from airflow.sdk import DAG

from airflow_provider.operators import PgBackgroundOperator

SQL = [f"insert into effect (run) values ('crowd-{n}'); select pg_sleep(5)" for n in range(300)]

# For the long form of the tests only: others need not parse it.
if os.environ.get("PGBG_LONG") == "1":
    # Each of these needs a process before it is deferred.
    with DAG(dag_id="crowd", schedule=None, max_active_tasks=300) as dag_crowd:
        PgBackgroundOperator.partial(
            task_id="job",
            deferrable=True,
            retries=3,
            retry_delay=timedelta(seconds=1),
            max_active_tis_per_dag=300,
        ).expand(sql=SQL)
