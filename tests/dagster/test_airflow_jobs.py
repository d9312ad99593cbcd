"""A job of one orchestrator is awaited by the other, by its id: the provider's identity and triggers, no processes."""

import asyncio
import threading
from types import SimpleNamespace
from typing import Any

import pytest
from dagster import AssetExecutionContext, DagsterInstance, asset, materialize

from dagster_resource import PgBackgroundFailure, PgBackgroundResource
from tests.conftest import Database

pytest.importorskip("airflow")

from airflow_provider.hook import PgBackgroundHook
from airflow_provider.identity import Identity, identify
from airflow_provider.triggers import PgBackgroundSensorTrigger, PgBackgroundTrigger

pytestmark = [
    pytest.mark.airflow,
    pytest.mark.servers("real"),
    pytest.mark.usefixtures("no_worker_left"),
]

SQL = "create table loaded as select generate_series(1, 3) as n; select pg_sleep(0.3)"


@pytest.fixture(autouse=True)
def _connection(monkeypatch: pytest.MonkeyPatch, database: Database) -> None:
    """Every Airflow connection leads to the test's database."""
    monkeypatch.setattr(PgBackgroundHook, "conninfo", lambda _self: database.conninfo)
    monkeypatch.setattr("airflow_provider.triggers.login._conninfos", {})
    monkeypatch.setattr("airflow_provider.triggers.task.RESUME_SECONDS", 0.0)


def task_instance() -> Identity:
    """The identity of a task instance, as the operator asks for it."""
    ti = SimpleNamespace(dag_id="books", run_id="manual__2026-01-01", task_id="load", map_index=-1, max_tries=2)
    return identify({"ti": ti})


def fire(trigger: Any) -> dict[str, Any]:
    """Run a trigger; the payload of its only event."""

    async def events() -> list[Any]:
        return [event.payload async for event in trigger.run()]

    (payload,) = asyncio.run(events())
    return dict(payload)


def start_task(identity: Identity, sql: str) -> threading.Thread:
    """Run a task's trigger beside the test."""
    job = {"id": identity.job_id, "series": identity.series, "generation": identity.generation, "sql": sql}
    thread = threading.Thread(target=fire, args=[PgBackgroundTrigger(job=job)])
    thread.start()
    return thread


def test_dagster_waits_for_a_job_of_airflows(
    pg: PgBackgroundResource, database: Database, instance: DagsterInstance
) -> None:
    identity = task_instance()

    @asset
    def waits(context: AssetExecutionContext, pg: PgBackgroundResource) -> None:
        done = pg.wait_for(context, identity.job_id, timeout=60)
        assert (done.job_id, done.launched) == (identity.job_id, False)

    task = start_task(identity, SQL)
    try:
        assert materialize([waits], resources={"pg": pg}, instance=instance).success
    finally:
        task.join()
    with database.connect() as connection:
        assert connection.execute("select count(*) from loaded").fetchone() == (3,)


def test_dagster_is_told_how_a_job_of_airflows_failed(pg: PgBackgroundResource, instance: DagsterInstance) -> None:
    identity = task_instance()

    @asset
    def waits(context: AssetExecutionContext, pg: PgBackgroundResource) -> None:
        with pytest.raises(PgBackgroundFailure) as caught:
            pg.wait_for(context, identity.job_id, timeout=60)
        assert caught.value.sqlstate == "22012"

    start_task(identity, "select 1 / 0").join()
    assert materialize([waits], resources={"pg": pg}, instance=instance).success


def test_airflow_waits_for_a_job_of_dagsters(
    pg: PgBackgroundResource, database: Database, instance: DagsterInstance
) -> None:
    ids: list[str] = []

    @asset
    def loads(context: AssetExecutionContext, pg: PgBackgroundResource) -> None:
        ids.append(pg.submit(context, SQL))

    assert materialize([loads], resources={"pg": pg}, instance=instance).success
    event = fire(PgBackgroundSensorTrigger(job_id=ids[0], poll_interval=0.05))

    assert [(job["job_id"], job["state"]) for job in event["jobs"]] == [(ids[0], "committed")]
    with database.connect() as connection:
        assert connection.execute("select count(*) from loaded").fetchone() == (3,)


def test_airflow_is_told_how_a_job_of_dagsters_failed(pg: PgBackgroundResource, instance: DagsterInstance) -> None:
    @asset
    def fails(context: AssetExecutionContext, pg: PgBackgroundResource) -> None:
        pg.run(context, "select 1 / 0")

    run = materialize([fails], resources={"pg": pg}, instance=instance, raise_on_error=False)
    event = fire(PgBackgroundSensorTrigger(job_id=f"dagster/fails#{run.run_id}"))

    assert (event["error"], event["sqlstate"]) == ("WorkerError", "22012")
