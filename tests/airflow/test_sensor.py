"""The sensor on a real server: which jobs and workers it waits for, and what its log says of them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta, timezone
from types import SimpleNamespace
from typing import Any

import pytest
from airflow.sdk.exceptions import AirflowSensorTimeout, TaskDeferred

from airflow_provider import events
from airflow_provider.hook import PgBackgroundHook
from airflow_provider.sensors import PgBackgroundSensor
from airflow_provider.triggers import PgBackgroundSensorTrigger
from airflow_provider.watch import Watch, moment_of
from pgbg_orchestration import Job, Launcher, arun, errors
from tests.conftest import Database

pytestmark = [pytest.mark.airflow, pytest.mark.servers("real", "embedded"), pytest.mark.usefixtures("no_worker_left")]

LABELS = ["étape d'été", "tab\there", "x" * 60, "é" * 32, "100 %_", r"a\x41b", "日本語 12:3"]


@pytest.fixture(autouse=True)
def _connection(monkeypatch: pytest.MonkeyPatch, database: Database) -> None:
    monkeypatch.setattr(PgBackgroundHook, "conninfo", lambda _self: database.conninfo)
    monkeypatch.setattr(PgBackgroundHook, "check", lambda _self: None)
    monkeypatch.setattr("airflow_provider.triggers.login._conninfos", {})


@contextmanager
def by_hand(database: Database, label: str) -> Iterator[int]:
    """A worker at work that a person launched; gives its pid."""
    with database.connect() as session:
        call = f"select pid from {database.function('launch')}('select pg_sleep(60)', 65536, %s)"
        row = session.execute(call.encode(), [label]).fetchone()
        assert row is not None
        while not session.execute("select from pg_stat_activity where pid = %s and query <> ''", row).fetchall():
            pass
        yield row[0]
        session.execute("select pg_cancel_backend(%s)", row)


def in_run(began: datetime) -> Any:
    return {"dag_run": SimpleNamespace(start_date=began), "ti": SimpleNamespace(start_date=began)}


# Workers that somebody launched by hand -------------------------------------------------------------------------------


@pytest.mark.parametrize("label", LABELS)
async def test_a_worker_at_work_is_never_said_to_be_gone(database: Database, label: str) -> None:
    async with Launcher(database.conninfo) as launcher:
        watch = Watch(worker_label=label)
        with by_hand(database, label):
            assert await watch.look(launcher.ledger) is None
            assert await Watch(worker_label=label.replace(label[1], "?")).look(launcher.ledger) is None
            assert await Watch(worker_label=f"{label[:2]}*").look(launcher.ledger) is None
        while database.workers():
            await asyncio.sleep(0.05)
        assert await watch.look(launcher.ledger) == {"jobs": None}


@pytest.mark.parametrize(("label", "other"), [("étape", "etape"), ("étape", "étapes"), ("é", "?"), ("a\tb", "a b")])
async def test_another_label_is_not_waited_for(database: Database, label: str, other: str) -> None:
    if other == "?":
        label, other = "é?", "ée!"
    async with Launcher(database.conninfo) as launcher:
        with by_hand(database, other):
            assert await Watch(worker_label=label).look(launcher.ledger) == {"jobs": None}


@pytest.mark.parametrize("encoding", ["LATIN1", "SQL_ASCII"])
async def test_a_database_of_another_encoding(database: Database, encoding: str) -> None:
    name = f"{database.name}_other"
    with database.connect() as admin:
        admin.execute(f"create database {name} encoding '{encoding}' locale 'C' template template0".encode())
        try:
            other = Database(database.server, name)
            database.server.create_extension(name)
            async with Launcher(other.conninfo) as launcher:
                with by_hand(other, "étape"):
                    assert await Watch(worker_label="étape").look(launcher.ledger) is None
                    assert await Watch(worker_label="?tape").look(launcher.ledger) is None
                    assert await Watch(worker_label="étap").look(launcher.ledger) == {"jobs": None}
                if encoding == "LATIN1":
                    with pytest.raises(errors.InvalidJob, match="LATIN1"):
                        await Watch(worker_label="日本").look(launcher.ledger)
        finally:
            admin.execute(f"drop database {name} with (force)".encode())


async def test_the_log_says_which_worker_is_waited_for(database: Database) -> None:
    told: list[str] = []
    async with Launcher(database.conninfo) as launcher:
        watch = Watch(worker_label="by hand", log=told.append)
        with by_hand(database, "by hand") as pid:
            for _ in range(2):
                assert await watch.look(launcher.ledger) is None
    assert len(told) == 1
    assert "all workers labelled 'by hand'" in told[0]
    assert f"pid {pid}" in told[0]


# Jobs by their label --------------------------------------------------------------------------------------------------


async def ran(database: Database, job_id: str, sql: str = "select 1", **more: Any) -> None:
    try:
        await arun(database.conninfo, Job(sql, id=job_id, label="load", **more))
    except errors.WorkerError:
        assert sql == "select 1/0"


async def look(database: Database, since: datetime | None, **more: Any) -> tuple[Any, list[str]]:
    told: list[str] = []
    async with Launcher(database.conninfo) as launcher:
        return await Watch(label="load", since=since, log=told.append, **more).look(launcher.ledger), told


async def test_what_was_registered_before_does_not_count(database: Database) -> None:
    await ran(database, "yesterday")
    now = datetime.now(UTC)

    seen, told = await look(database, now)
    assert seen is None
    assert "no job (the newest before that: yesterday (committed)" in told[0]
    assert now.isoformat(" ", "seconds") in told[0]

    await ran(database, "today")
    seen, told = await look(database, now)
    assert [job["job_id"] for job in seen["jobs"]] == ["today"]
    assert "today (committed)" in told[0]
    assert "yesterday" not in told[0]

    seen, _ = await look(database, None)
    assert sorted(job["job_id"] for job in seen["jobs"]) == ["today", "yesterday"]


async def test_the_newest_job_of_each_series_decides(database: Database) -> None:
    now = datetime.now(UTC)
    await ran(database, "s#1", "select 1/0", series="s", generation=1)
    with pytest.raises(errors.WorkerError, match="division by zero") as caught:
        await look(database, now)
    assert "s#1" in str(caught.value)

    await ran(database, "s#2", series="s", generation=2)
    await ran(database, "other", series="t")
    seen, _ = await look(database, now)
    assert sorted(job["job_id"] for job in seen["jobs"]) == ["other", "s#2"]


async def test_an_old_failure_is_forgotten(database: Database) -> None:
    await ran(database, "yesterday", "select 1/0")
    now = datetime.now(UTC)
    await ran(database, "today")
    seen, _ = await look(database, now)
    assert [job["job_id"] for job in seen["jobs"]] == ["today"]


@pytest.mark.parametrize("deferrable", [True, False])
def test_by_default_the_dag_run_says_since_when(database: Database, deferrable: bool) -> None:
    asyncio.run(ran(database, "yesterday"))
    began = datetime.now(UTC)
    sensor = PgBackgroundSensor(task_id="wait", label="load", deferrable=deferrable, timeout=60)
    always = PgBackgroundSensor(task_id="all", label="load", since="1970-01-01T00:00:00Z", deferrable=deferrable)

    assert _is_there(sensor, began) is False
    assert _is_there(always, began) is True
    asyncio.run(ran(database, "today"))
    assert _is_there(sensor, began) is True


def _is_there(sensor: PgBackgroundSensor, began: datetime) -> bool:
    """Whether one look of the sensor, or of its trigger, ends the wait."""
    if not sensor.deferrable:
        return bool(sensor.poke(in_run(began)))
    with pytest.raises(TaskDeferred) as caught:
        sensor.execute(in_run(began))
    trigger: Any = caught.value.trigger
    _, arguments = trigger.serialize()
    again = PgBackgroundSensorTrigger(**{**arguments, "deadline": datetime.now(UTC), "end_task": False})

    async def fire() -> dict[str, Any]:
        (payload,) = [event.payload async for event in again.run()]
        return dict(payload)

    return bool(asyncio.run(fire())["status"] == events.COMMITTED)


def test_what_is_waited_for_in_vain_is_told(database: Database) -> None:
    asyncio.run(ran(database, "yesterday"))
    sensor = PgBackgroundSensor(task_id="wait", label="load", timeout=60)
    event = {"status": events.TIMED_OUT, "seen": "no job"}
    began = datetime.now(UTC)

    with pytest.raises(
        AirflowSensorTimeout, match="waited 60 s for the newest job of each series labelled 'load'"
    ) as it:
        sensor.execute_complete(in_run(began), event)
    assert began.isoformat(" ", "seconds") in str(it.value)
    assert str(it.value).endswith("last seen: no job")


@pytest.mark.parametrize("since", ["yesterday", "", "2013-01-01T00:00:00", datetime(2013, 1, 1)])  # noqa: DTZ001
def test_since_has_to_be_a_moment(since: Any) -> None:
    with pytest.raises(ValueError, match="since"):
        moment_of(since)


def test_since_goes_with_a_label() -> None:
    with pytest.raises(ValueError, match="since goes with a label"):
        PgBackgroundSensor(task_id="wait", job_id="a", since="2013-01-01T00:00:00Z")


def test_since_may_have_any_time_zone() -> None:
    moment = datetime(2013, 1, 1, 5, tzinfo=timezone(timedelta(hours=5)))
    assert moment_of(moment) == moment_of("2013-01-01T00:00:00Z") == datetime(2013, 1, 1, tzinfo=UTC)


async def test_the_triggers_log_tells_too(
    database: Database, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PgBackgroundSensorTrigger, "log", logging.getLogger("trigger"))
    await ran(database, "today")
    trigger = PgBackgroundSensorTrigger(label="load", deadline=datetime.now(UTC))
    with caplog.at_level(logging.INFO):
        assert [event.payload["status"] async for event in trigger.run()] == [events.COMMITTED]
    assert "labelled 'load' to be committed. Now: today (committed)." in caplog.text
