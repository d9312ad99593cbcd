"""ETL of flights: extract, one mapped task for each carrier, then a summary; functions return the SQL."""

from __future__ import annotations

from typing import Any

from airflow.sdk import dag, task

from airflow_provider.operators import PgBackgroundOperator

CARRIERS = ["AA", "B6", "DL", "UA"]


@dag(schedule=None, default_args={"retries": 2, "deferrable": True}, max_active_runs=1, tags=["pg_background"])
def airflow_flights_etl() -> None:
    extract = PgBackgroundOperator(
        task_id="extract",
        sql=[
            "create table if not exists raw_flights (carrier text, day date, dep_delay int)",
            "create table if not exists delays (carrier text primary key, flights bigint, mean_delay numeric)",
            "truncate raw_flights, delays",
            """insert into raw_flights
               select (array['AA', 'B6', 'DL', 'UA'])[1 + n % 4], date '2013-01-01' + n % 365, n % 60 - 10
               from generate_series(1, 20000) as n""",
        ],
    )

    @task.pg_background
    def summarise(carrier: str) -> tuple[str, dict[str, Any]]:
        """Parameters are bound by the driver's own quoting, never pasted into the SQL."""
        sql = """
            insert into delays
            select carrier, count(*), avg(dep_delay) from raw_flights where carrier = %(carrier)s group by carrier
        """
        return sql, {"carrier": carrier}

    @task
    def report(outcomes: Any) -> int:
        """Each outcome is XCom: row_count, command_tag, label, job_id, worker_pid and times."""
        return sum(outcome["row_count"] for outcome in outcomes)

    summaries = summarise.expand(carrier=CARRIERS)
    extract >> summaries
    report(summaries)


airflow_flights_etl()
