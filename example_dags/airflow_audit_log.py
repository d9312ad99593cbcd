"""An audit log by autonomous transaction: what was tried stays on record although the work itself is rolled back.

Each job commits by itself in its own worker, so the entry is there whatever becomes of the transfer.
"""

from __future__ import annotations

from airflow.sdk import TriggerRule, dag

from airflow_provider.operators import PgBackgroundOperator

AUDIT = "insert into audit (run_id, what) values (%(run_id)s, %(what)s)"


@dag(schedule=None, default_args={"retries": 2, "deferrable": True}, max_active_runs=1, tags=["pg_background"])
def airflow_audit_log() -> None:
    prepare = PgBackgroundOperator(
        task_id="prepare",
        sql=[
            "create table if not exists audit (at timestamptz default clock_timestamp(), run_id text, what text)",
            "create table if not exists account (id int primary key, balance numeric check (balance >= 0))",
            "insert into account values (1, 100), (2, 0) on conflict (id) do update set balance = excluded.balance",
        ],
    )
    tried = PgBackgroundOperator(
        task_id="audit_tried", sql=AUDIT, parameters={"run_id": "{{ run_id }}", "what": "transfer tried"}
    )
    # Fails by the check constraint, SQLSTATE 23514: class 23 is not retried, whatever `retries` says.
    transfer = PgBackgroundOperator(
        task_id="transfer",
        sql=[
            "update account set balance = balance + 500 where id = 2",
            "update account set balance = balance - 500 where id = 1",
        ],
    )
    ended = PgBackgroundOperator(
        task_id="audit_failed",
        sql=AUDIT,
        parameters={"run_id": "{{ run_id }}", "what": "transfer failed and was rolled back"},
        trigger_rule=TriggerRule.ALL_FAILED,
    )
    prepare >> tried >> transfer >> ended


airflow_audit_log()
