"""Parallel aggregates: several jobs side by side in one task, at most three workers at once."""

from __future__ import annotations

from airflow.sdk import dag

from airflow_provider.operators import PgBackgroundBatchOperator, PgBackgroundOperator

MEASURES = {"sum": "sum(value)", "mean": "avg(value)", "deviation": "stddev(value)", "largest": "max(value)"}


@dag(schedule=None, default_args={"retries": 2, "deferrable": True}, max_active_runs=1, tags=["pg_background"])
def airflow_parallel_aggregates() -> None:
    prepare = PgBackgroundOperator(
        task_id="prepare",
        sql=[
            "create table if not exists measurement (value numeric)",
            "create table if not exists aggregate (name text primary key, value numeric)",
            "truncate measurement, aggregate",
            "insert into measurement select n from generate_series(1, 50000) as n",
        ],
    )
    aggregates = PgBackgroundBatchOperator(
        task_id="aggregates",
        # The names are part of the jobs' ids: a retry runs those that did not commit, and no others.
        jobs={
            name: f"insert into aggregate select '{name}', {expression} from measurement"
            for name, expression in MEASURES.items()
        },
        at_once=3,
        fail_fast=True,
    )
    prepare >> aggregates


airflow_parallel_aggregates()
