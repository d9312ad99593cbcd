"""Nightly maintenance: VACUUM and REINDEX cannot run in a transaction, so each is a supervised job.

That is found by the SQL itself. A supervised job needs two of the server's worker slots.
"""

from __future__ import annotations

from airflow.sdk import dag

from airflow_provider.operators import PgBackgroundOperator


@dag(schedule=None, default_args={"deferrable": True}, max_active_runs=1, tags=["pg_background"])
def airflow_nightly_maintenance() -> None:
    prepare = PgBackgroundOperator(
        task_id="prepare",
        sql="create table if not exists visits (at timestamptz primary key); delete from visits;"
        " insert into visits select now() - n * interval '1 s' from generate_series(1, 1000) as n",
        retries=2,
    )
    vacuum = PgBackgroundOperator(
        task_id="vacuum",
        sql="vacuum (analyze) visits",
        # Where the outcome would stay unknown (the server was restarted, say), this tells whether the work is done.
        verify_sql="select last_vacuum > now() - interval '1 hour' from pg_stat_user_tables where relname = 'visits'",
    )
    # Never two at once: a label on each, so that whoever looks into pg_stat_activity knows what it is.
    reindex = PgBackgroundOperator(
        task_id="reindex", sql="reindex index concurrently visits_pkey", label="nightly reindex"
    )
    prune = PgBackgroundOperator(
        task_id="prune", sql="delete from visits where at < now() - interval '90 days'", retries=2
    )
    prepare >> prune >> vacuum >> reindex


airflow_nightly_maintenance()
