"""The same work as Airflow tasks in four ways: a DAG each. What they are run with comes from the environment."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from airflow.providers.common.sql.operators.sql import SQLExecuteQueryOperator
from airflow.providers.common.sql.triggers.sql import SQLExecuteQueryTrigger
from airflow.sdk import DAG, BaseOperator

from airflow_provider.operators import PgBackgroundOperator

CONN_ID = "postgres_default"
QUERIES = int(os.environ["PGBG_BENCH_QUERIES"])
ROWS = int(os.environ["PGBG_BENCH_ROWS"])


class TriggeredQuery(BaseOperator):
    """Defers at once to the trigger of common.sql, which has no operator of its own."""

    template_fields = ("sql",)

    def __init__(self, *, sql: str | list[str], **given: Any) -> None:
        super().__init__(**given)
        self.sql = sql

    def execute(self, context: Any) -> None:
        self.defer(trigger=SQLExecuteQueryTrigger(sql=self.sql, conn_id=CONN_ID), method_name="finish")

    def finish(self, context: Any, event: dict[str, Any]) -> None:
        if event["status"] != "success":
            raise RuntimeError(event["message"])


WAYS: dict[str, Callable[..., BaseOperator]] = {
    "ours_deferrable": lambda **given: PgBackgroundOperator(deferrable=True, **given),
    "ours_here": lambda **given: PgBackgroundOperator(deferrable=False, **given),
    "operator": lambda **given: SQLExecuteQueryOperator(conn_id=CONN_ID, split_statements=True, **given),
    "trigger": lambda **given: TriggeredQuery(**{**given, "sql": [*given["sql"].split(";"), "select 1"]}),
}
"""By DAG: what makes a task of SQL. The trigger fetches rows, so a statement that gives some stands last."""

for way, task in WAYS.items():
    with DAG(dag_id=way, schedule=None, max_active_tasks=QUERIES + 8) as dag:
        facts = task(
            task_id="facts",
            sql=f"drop table if exists {way}_facts; create table {way}_facts as select n, n % 100 as carrier,"
            f" n % 12 as month, n % 97 as delay from generate_series(1, {ROWS}) as n",
        )
        aggregates = [
            task(
                task_id=f"by_{column}",
                sql=f"drop table if exists {way}_by_{column}; create table {way}_by_{column} as"
                f" select {column}, avg(delay) as delay from {way}_facts group by {column}",
            )
            for column in ("carrier", "month")
        ]
        index = task(task_id="index", sql=f"create index on {way}_facts (carrier, month)")
        facts >> aggregates >> index
        for number in range(QUERIES):
            index >> task(task_id=f"query_{number}", sql="select pg_sleep(1)")
    globals()[way] = dag
