"""Deliver notifications: NOTIFY goes out when a job commits, and only then, so once for each committed job."""

from __future__ import annotations

from airflow.sdk import dag

from airflow_provider.operators import PgBackgroundOperator


@dag(schedule=None, default_args={"retries": 2, "deferrable": True}, max_active_runs=1, tags=["pg_background"])
def airflow_notifications() -> None:
    queue = PgBackgroundOperator(
        task_id="queue",
        sql=[
            "create table if not exists outbox (id serial primary key, payload text, sent_at timestamptz)",
            "insert into outbox (payload) select 'order ' || n from generate_series(1, 10) as n",
        ],
    )
    deliver = PgBackgroundOperator(
        task_id="deliver",
        label="deliver orders",
        # Begins and ends in the triggerer, so it never needs a worker of Airflow's; that goes without retries only.
        start_from_trigger=True,
        end_from_trigger=True,
        retries=0,
        sql="""
            with sent as (
                update outbox set sent_at = now() where sent_at is null returning payload
            )
            select pg_notify('orders', payload) from sent
        """,
    )
    queue >> deliver


airflow_notifications()
