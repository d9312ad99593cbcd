"""DAGs of the tests: one task each, whose SQL the test gives."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from airflow.sdk import DAG

from airflow_provider.operators import PgBackgroundOperator

PROBES: dict[str, dict[str, Any]] = {
    "deferred": {"deferrable": True},
    "deferred_waits": {"deferrable": True, "on_superseded": "wait"},
    "deferred_retried": {"deferrable": True, "retries": 3, "retry_delay": timedelta(seconds=1)},
    "deferred_times_out": {"deferrable": True, "execution_timeout": timedelta(seconds=12)},
    "deferred_leaves": {"deferrable": True, "cancel_on_kill": False},
    "here": {"deferrable": False},
    "here_retried": {"deferrable": False, "retries": 3, "retry_delay": timedelta(seconds=1)},
    "here_times_out": {"deferrable": False, "execution_timeout": timedelta(seconds=5)},
    "no_extension": {"deferrable": True, "retries": 3, "retry_delay": timedelta(seconds=1), "database": "template1"},
    "to_delete": {"deferrable": True},
}

for name, options in PROBES.items():
    with DAG(dag_id=name, schedule=None, params={"sql": "select 1"}) as dag:
        # The label names the run, so that a test finds its own workers.
        PgBackgroundOperator(task_id="job", sql="{{ params.sql }}", label="{{ run_id }}", **options)
    globals()[f"dag_{name}"] = dag

with DAG(dag_id="many", schedule=None, params={"sql": ["select 1"]}) as dag_many:
    PgBackgroundOperator.partial(
        task_id="job", deferrable=True, do_xcom_push=False, retries=3, retry_delay=timedelta(seconds=1)
    ).expand(sql=[f"insert into effect (run) values ('many-{number}')" for number in range(24)])
