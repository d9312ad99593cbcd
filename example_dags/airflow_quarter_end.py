"""Quarter-end reconciliation: post the differences between two ledgers, once, however often a task is tried.

The statements of one job are one transaction: either the differences are posted and the quarter is closed, or neither.
"""

from __future__ import annotations

from datetime import timedelta

from airflow.sdk import Param, dag

from airflow_provider.operators import PgBackgroundOperator


@dag(
    schedule=None,
    params={"quarter": Param("2013Q1", type="string")},
    default_args={"retries": 3, "deferrable": True},
    tags=["pg_background"],
)
def airflow_quarter_end() -> None:
    prepare = PgBackgroundOperator(
        task_id="prepare",
        sql=[
            "create table if not exists ledger (quarter text, account int, amount numeric)",
            "create table if not exists bank (quarter text, account int, amount numeric)",
            "create table if not exists difference (quarter text, account int, amount numeric)",
            "create table if not exists closed_quarter (quarter text primary key, closed_at timestamptz)",
            "delete from closed_quarter where quarter = '{{ params.quarter }}'",
            "delete from difference where quarter = '{{ params.quarter }}'",
            "insert into ledger select '{{ params.quarter }}', a, a * 10 from generate_series(1, 1000) as a",
            "insert into bank select '{{ params.quarter }}', a, a * 10 + (a % 7) from generate_series(1, 1000) as a",
        ],
        # Two runs that create the same tables at the same moment would meet: the series of a run do not exclude those
        # of another, a lock does.
        settings={"lock_timeout": "1min"},
    )
    reconcile = PgBackgroundOperator(
        task_id="reconcile",
        label="reconcile {{ params.quarter }}",
        sql="sql/airflow_reconcile.sql",
        parameters={"quarter": "{{ params.quarter }}"},
        isolation="repeatable read",
        settings={"work_mem": "64MB"},
        execution_timeout=timedelta(hours=6),
    )
    prepare >> reconcile


airflow_quarter_end()
