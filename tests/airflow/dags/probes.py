"""DAGs of the tests: one task each, whose SQL the test gives."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from airflow.providers.common.sql.hooks.handlers import fetch_all_handler
from airflow.sdk import DAG

from airflow_provider import compat
from airflow_provider.operators import PgBackgroundBatchOperator, PgBackgroundOperator
from airflow_provider.sensors import PgBackgroundSensor


def stalls_once(cursor: Any) -> Any:
    """A handler of a user's own that does not end the first time that it has these rows: a test kills its process."""
    rows = fetch_all_handler(cursor)
    assert rows
    mark = Path(os.environ["AIRFLOW_HOME"]) / f"handled-{rows[0][1]}"
    if not mark.exists():
        mark.touch()
        time.sleep(600)
    return rows


RETRIED: dict[str, Any] = {"retries": 3, "retry_delay": timedelta(seconds=1)}
PROBES: dict[str, dict[str, Any]] = {
    "deferred": {"deferrable": True},
    "deferred_waits": {"deferrable": True, "on_superseded": "wait"},
    "deferred_retried": {"deferrable": True, "retries": 3, "retry_delay": timedelta(seconds=1)},
    "deferred_times_out": {"deferrable": True, "execution_timeout": timedelta(seconds=12)},
    "deferred_timeout": {"deferrable": True, "timeout": 12},
    "deferred_resumed": {
        "deferrable": True, "end_from_trigger": False, "retries": 3, "retry_delay": timedelta(seconds=1),
    },
    "deferred_leaves": {"deferrable": True, "cancel_on_kill": False},
    "here": {"deferrable": False},
    "deferred_heard": {"deferrable": True, "enable_log_db_messages": True, "postgres_conn_id": "modest"},
    "here_heard": {"deferrable": False, "enable_log_db_messages": True, "postgres_conn_id": "modest"},
    "here_retried": {"deferrable": False, "retries": 3, "retry_delay": timedelta(seconds=1)},
    "deferred_rows": {"deferrable": True, "handler": fetch_all_handler, **RETRIED},
    "here_rows": {"deferrable": False, "handler": fetch_all_handler, **RETRIED},
    "deferred_rows_handled": {"deferrable": True, "handler": stalls_once, **RETRIED},
    "here_rows_handled": {"deferrable": False, "handler": stalls_once, **RETRIED},
    "here_timeout": {"deferrable": False, "timeout": 5},
    "here_times_out": {"deferrable": False, "execution_timeout": timedelta(seconds=10)},
    "no_extension": {"deferrable": True, "retries": 3, "retry_delay": timedelta(seconds=1), "database": "template1"},
    "to_delete": {"deferrable": True},
    "started": {"start_from_trigger": True},
    "started_ends": {"start_from_trigger": True, "end_from_trigger": True},
    "started_retried": {
        "start_from_trigger": True, "durable": False, "retries": 2, "retry_delay": timedelta(seconds=1),
    },
    "started_times_out": {"start_from_trigger": True, "execution_timeout": timedelta(seconds=15)},
}  # fmt: skip

# An Airflow before 3.3 has none of these; one refused would take the whole file along.
CAN_START = compat.HERE.starts_from_triggers

for name, options in PROBES.items():
    if options.get("start_from_trigger") and not CAN_START:
        continue
    with DAG(dag_id=name, schedule=None, params={"sql": "select 1"}) as dag:
        # The label names the run, so that a test finds its own workers.
        PgBackgroundOperator(task_id="job", sql="{{ params.sql }}", label="{{ run_id }}", **options)
    globals()[f"dag_{name}"] = dag

MANY = 24 if os.environ.get("PGBG_LONG") == "1" else 6

with DAG(dag_id="many", schedule=None, params={"sql": ["select 1"]}) as dag_many:
    PgBackgroundOperator.partial(task_id="job", deferrable=True, retries=3, retry_delay=timedelta(seconds=1)).expand(
        sql=[f"insert into effect (run) values ('many-{number}')" for number in range(MANY)]
    )

with DAG(
    dag_id="run_times_out", schedule=None, params={"sql": "select 1"}, dagrun_timeout=timedelta(seconds=15)
) as dag_run_times_out:
    PgBackgroundOperator(task_id="job", sql="{{ params.sql }}", label="{{ run_id }}", deferrable=True)

with DAG(dag_id="started_from_file", schedule=None, template_searchpath=str(Path(__file__).parent)) as dag_started_file:
    PgBackgroundOperator(
        task_id="job",
        sql="probe.sql",
        parameters={"run": "{{ run_id }}", "deep": ["{{ task.task_id }}"]},
        label="{{ run_id }}",
        settings={"work_mem": "{{ 4 }}MB"},
        start_from_trigger=CAN_START,
        end_from_trigger=True,
        deferrable=True,
    )

with DAG(dag_id="batch", schedule=None, params={"one": "select 1", "two": "select 2"}) as dag_batch:
    PgBackgroundBatchOperator(
        task_id="job",
        jobs={"one": "{{ params.one }}", "two": {"sql": "{{ params.two }}", "label": "two {{ run_id }}"}},
        poll_interval=1,
        deferrable=True,
        retries=3,
        retry_delay=timedelta(seconds=1),
    )

with DAG(dag_id="sensor", schedule=None, params={"label": "nobody"}) as dag_sensor:
    PgBackgroundSensor(
        task_id="job", label="{{ params.label }}", poll_interval=0.5, timeout=120, deferrable=True, retries=2
    )
