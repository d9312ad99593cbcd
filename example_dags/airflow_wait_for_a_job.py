"""A job that someone else waits for: the sensor knows it by its label, whoever launched it, Airflow or not."""

from __future__ import annotations

from airflow.sdk import dag

from airflow_provider.operators import PgBackgroundOperator
from airflow_provider.sensors import PgBackgroundSensor


@dag(schedule=None, default_args={"retries": 2, "deferrable": True}, max_active_runs=1, tags=["pg_background"])
def airflow_wait_for_a_job() -> None:
    PgBackgroundOperator(task_id="load", label="load {{ run_id[-32:] }}", sql="select pg_sleep(3)")
    # In a DAG of its own this would be the only task; it needs no upstream.
    PgBackgroundSensor(
        task_id="loaded", label="load {{ run_id[-32:] }}", poll_interval=1, timeout=600
    ) >> PgBackgroundOperator(task_id="use", sql="select 'what was loaded'")


airflow_wait_for_a_job()
