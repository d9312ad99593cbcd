"""The triggers on a real server, in an event loop of the test's own; only Airflow's edges are stood in for."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import psycopg
import pytest
from airflow.triggers.base import TaskSuccessEvent

from airflow_provider.hook import PgBackgroundHook
from airflow_provider.operators import PgBackgroundBatchOperator
from airflow_provider.sensors import PgBackgroundSensor
from airflow_provider.task_driver import TaskDriver, TaskKilled
from airflow_provider.triggers import PgBackgroundBatchTrigger, PgBackgroundSensorTrigger, PgBackgroundTrigger
from airflow_provider.triggers.login import Login
from airflow_provider.triggers.task import GOES_ON
from airflow_provider.watch import Watch
from pgbg_orchestration import Job, Launcher, Outcome, errors
from tests.conftest import Database

pytestmark = [pytest.mark.airflow, pytest.mark.servers("real", "embedded"), pytest.mark.usefixtures("no_worker_left")]


@pytest.fixture(autouse=True)
def _connection(monkeypatch: pytest.MonkeyPatch, database: Database) -> None:
    """Every Airflow connection leads to the test's database, which has a table for what jobs did."""
    monkeypatch.setattr(PgBackgroundHook, "conninfo", lambda _self: database.conninfo)
    monkeypatch.setattr("airflow_provider.triggers.login._conninfos", {})
    monkeypatch.setattr("airflow_provider.triggers.task.RESUME_SECONDS", 0.0)
    with database.connect() as admin:
        admin.execute("create table effect (what text)")


def _job(job_id: str = "load#1", sql: str = "insert into effect values ('load')", **more: Any) -> dict[str, Any]:
    return {"id": job_id, "series": job_id.partition("#")[0], "generation": 1, "label": job_id, "sql": sql, **more}


def _rows(database: Database, query: str) -> list[tuple[Any, ...]]:
    with database.connect() as admin:
        return admin.execute(query.encode()).fetchall()


async def _event(trigger: Any) -> dict[str, Any]:
    """What a trigger fires, which must be one event."""
    fired = [event.payload async for event in trigger.run()]
    assert len(fired) == 1
    payload: dict[str, Any] = fired[0]
    return payload


async def _events(trigger: Any) -> list[Any]:
    """What a trigger fires in a triggerer, where it knows its task instance."""
    trigger.task_instance = SimpleNamespace(dag_id="books", task_id="load", run_id="q1", map_index=-1)
    return [event async for event in trigger.run()]


@pytest.fixture
def xcoms(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The XComs that triggers stored."""
    stored: list[Any] = []

    async def push(ti: Any, value: Any) -> None:
        stored.append((ti, value))

    monkeypatch.setattr("airflow_provider.triggers.base.push_xcom", push)
    return stored


async def _until(there: Any) -> None:
    async with asyncio.timeout(30):
        while not await asyncio.to_thread(there):
            await asyncio.sleep(0.05)


def _state(monkeypatch: pytest.MonkeyPatch, state: str | None) -> None:
    async def answer(_ti: Any) -> str | None:
        return state

    monkeypatch.setattr("airflow_provider.triggers.base.state_of", answer)


class TestOneJob:
    async def test_an_outcome(self, database: Database) -> None:
        event = await _event(PgBackgroundTrigger(job=_job()))

        assert event["status"] == "committed"
        assert event["row_count"] == 1
        assert _rows(database, "select count(*) from effect") == [(1,)]

    async def test_a_task_can_be_ended_here(self, xcoms: list[Any]) -> None:
        (event,) = await _events(PgBackgroundTrigger(job=_job(), end_task=True))

        assert isinstance(event, TaskSuccessEvent)
        ((ti, value),) = xcoms
        assert ti.task_id == "load"
        assert value["row_count"] == 1
        assert "status" not in value

    async def test_a_task_without_xcom_is_ended_without(self, xcoms: list[Any]) -> None:
        (event,) = await _events(PgBackgroundTrigger(job=_job(), end_task=True, do_xcom_push=False))

        assert isinstance(event, TaskSuccessEvent)
        assert xcoms == []

    async def test_an_xcom_that_cannot_be_stored_here_is_left_to_a_worker(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def fail(_ti: Any, _value: Any) -> None:
            raise OSError("the bucket is away")

        monkeypatch.setattr("airflow_provider.triggers.base.push_xcom", fail)
        (event,) = await _events(PgBackgroundTrigger(job=_job(), end_task=True))

        assert not isinstance(event, TaskSuccessEvent)
        assert event.payload["status"] == "committed"

    async def test_a_batch_is_ended_here_when_all_of_it_committed(self, xcoms: list[Any]) -> None:
        jobs = {"a": _job("a#1"), "b": _job("b#1", "select 1/0")}
        (event,) = await _events(PgBackgroundBatchTrigger(jobs=jobs, end_task=True))
        assert not isinstance(event, TaskSuccessEvent)
        assert xcoms == []

        (event,) = await _events(PgBackgroundBatchTrigger(jobs={"a": jobs["a"]}, end_task=True))
        assert isinstance(event, TaskSuccessEvent)
        assert xcoms[0][1]["a"]["job_id"] == "a#1"

    async def test_in_dag_test_nobody_understands_a_task_that_ends_here(self) -> None:
        event = await _event(PgBackgroundTrigger(job=_job(), end_task=True))

        assert event["status"] == "committed"

    async def test_a_field_of_a_newer_release_is_not_left_out(self) -> None:
        event = await _event(PgBackgroundTrigger(job=_job() | {"something_new": True}))

        assert event["error"] == "InvalidJob"
        assert "another version of this package" in event["message"]

    async def test_an_error_resumes_the_task_all_the_same(self) -> None:
        event = await _event(PgBackgroundTrigger(job=_job(sql="select 1/0"), end_task=True))

        assert event["error"] == "WorkerError"

    async def test_an_error(self) -> None:
        event = await _event(PgBackgroundTrigger(job=_job(sql="select 1/0")))

        assert event["status"] == "failed"
        assert event["error"] == "WorkerError"
        assert event["fields"]["sqlstate"] == "22012"

    async def test_two_copies_do_the_work_once(self, database: Database) -> None:
        job = _job(sql="insert into effect values ('load'); select pg_sleep(0.5)")
        found = await asyncio.gather(*(_event(PgBackgroundTrigger(job=job)) for _ in range(2)))

        assert [event["status"] for event in found] == ["committed", "committed"]
        assert _rows(database, "select count(*) from effect") == [(1,)]

    async def test_a_triggerer_that_ends_leaves_the_worker_to_the_next(self, database: Database) -> None:
        job = _job(sql="insert into effect values ('load'); select pg_sleep(2)")
        first = asyncio.create_task(_event(PgBackgroundTrigger(job=job)))
        await _until(database.workers)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first

        event = await _event(PgBackgroundTrigger(job=job))

        assert event["status"] == "committed"
        assert event["launched"] is False
        assert _rows(database, "select count(*) from effect") == [(1,)]

    async def test_many_share_a_few_connections(self, database: Database) -> None:
        names = [f"job {number}#1" for number in range(40)]
        jobs = [_job(name, "insert into effect values ('x'); select pg_sleep(1)") for name in names]
        running = asyncio.gather(*(_event(PgBackgroundTrigger(job=job)) for job in jobs))
        counted: list[int] = []

        def count() -> bool:
            query = "select count(*) from pg_stat_activity where application_name like 'pgbg:%'"
            counted.append(_rows(database, query)[0][0])
            return running.done()

        await _until(count)

        assert [event["status"] for event in await running] == ["committed"] * 40
        assert 0 < max(counted) <= 8


class TestLogins:
    """A token of a connection may expire while its jobs run."""

    async def test_the_connection_is_asked_for_whenever_one_is_opened(
        self, database: Database, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked: list[str] = []

        def conninfo(_hook: PgBackgroundHook) -> str:
            asked.append(f"{database.conninfo} password=token{len(asked)}")
            return asked[-1]

        monkeypatch.setattr(PgBackgroundHook, "conninfo", conninfo)
        monkeypatch.setattr("airflow_provider.triggers.login.CONNECTION_SECONDS", 0.0)
        job = _job(sql="insert into effect values ('load'); select pg_sleep(1)")
        running = asyncio.create_task(_event(PgBackgroundTrigger(job=job)))
        await _until(database.workers)
        before = len(asked)
        _rows(database, "select pg_terminate_backend(pid) from pg_stat_activity where application_name like 'pgbg: %'")

        assert (await running)["status"] == "committed"
        assert len(asked) > before
        assert _rows(database, "select count(*) from effect") == [(1,)]

    async def test_triggers_share_sessions_whatever_the_token(self, monkeypatch: pytest.MonkeyPatch) -> None:
        tokens = iter(("first", "second", "third"))
        monkeypatch.setattr(PgBackgroundHook, "conninfo", lambda _self: f"host=db password={next(tokens)}")
        monkeypatch.setattr("airflow_provider.triggers.login.CONNECTION_SECONDS", 0.0)

        one, two = [await Login.of("books", None, None) for _ in range(2)]

        assert one == two
        assert "first" not in repr(one)
        assert await one() == "host=db password=third"

    async def test_a_connection_that_leads_elsewhere_is_another_login(self, monkeypatch: pytest.MonkeyPatch) -> None:
        places = iter(("host=old", "host=new", "host=new"))
        monkeypatch.setattr(PgBackgroundHook, "conninfo", lambda _self: next(places))
        monkeypatch.setattr("airflow_provider.triggers.login.CONNECTION_SECONDS", 0.0)

        old, new = [await Login.of("books", None, None) for _ in range(2)]

        assert old != new
        assert await old() == "host=old", "its jobs are there"

    async def test_an_airflow_that_is_away_keeps_nobody_from_the_server(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(PgBackgroundHook, "conninfo", lambda _self: "host=db password=old")
        monkeypatch.setattr("airflow_provider.triggers.login.CONNECTION_SECONDS", 0.0)
        login = await Login.of("books", None, None)

        def fail(_hook: PgBackgroundHook) -> str:
            raise OSError("no API server")

        monkeypatch.setattr(PgBackgroundHook, "conninfo", fail)

        assert await login() == "host=db password=old"


class TestOnKill:
    @pytest.mark.parametrize("state", ["failed", "success", "skipped", "removed", None])
    async def test_what_a_user_ended_is_cancelled(
        self, database: Database, monkeypatch: pytest.MonkeyPatch, state: str | None
    ) -> None:
        _state(monkeypatch, state)
        trigger = PgBackgroundTrigger(job=_job(sql="insert into effect values ('load'); select pg_sleep(60)"))
        running = asyncio.create_task(_event(trigger))
        await _until(database.workers)
        running.cancel()

        await trigger.on_kill()

        await _until(lambda: not database.workers())
        assert _rows(database, "select state, reason from pgbg.jobs") == [
            ("cancelled", f"the Airflow task is {state or 'gone'}")
        ]

    @pytest.mark.parametrize("state", GOES_ON)
    async def test_a_task_that_goes_on_keeps_its_worker(
        self, database: Database, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, state: str
    ) -> None:
        monkeypatch.setattr(PgBackgroundTrigger, "log", logging.getLogger("trigger"))
        caplog.set_level(logging.INFO)
        _state(monkeypatch, state)
        job = _job(sql="insert into effect values ('load'); select pg_sleep(1)")
        trigger = PgBackgroundTrigger(job=job)
        running = asyncio.create_task(_event(trigger))
        await _until(database.workers)
        running.cancel()

        await trigger.on_kill()

        assert "Its next try, if it was cleared, cancels the worker of load#1" in caplog.text
        assert (await _event(PgBackgroundTrigger(job=job)))["status"] == "committed"

    async def test_it_ends_although_airflow_cancels_it_again_and_again(
        self, database: Database, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def answer_late(_ti: Any) -> str:
            await asyncio.sleep(1)
            return "failed"

        monkeypatch.setattr("airflow_provider.triggers.base.state_of", answer_late)
        trigger = PgBackgroundTrigger(job=_job(sql="select pg_sleep(60)"))
        running = asyncio.create_task(_event(trigger))
        await _until(database.workers)
        running.cancel()
        killing = asyncio.create_task(trigger.on_kill())
        for _ in range(5):
            await asyncio.sleep(0.1)
            killing.cancel()

        await killing

        assert _rows(database, "select state from pgbg.jobs") == [("cancelled",)]

    async def test_it_can_be_refused(self, monkeypatch: pytest.MonkeyPatch, database: Database) -> None:
        _state(monkeypatch, "failed")
        trigger = PgBackgroundTrigger(job=_job(), cancel_on_kill=False)

        await trigger.on_kill()

        assert _rows(database, "select count(*) from pgbg.jobs") == [(0,)]


class TestBatch:
    async def test_each_job_has_its_end(self) -> None:
        jobs = {"good": _job("good#1"), "bad": _job("bad#1", "select 1/0")}
        ends = (await _event(PgBackgroundBatchTrigger(jobs=jobs, at_once=1)))["jobs"]

        assert {name: end["status"] for name, end in ends.items()} == {"good": "committed", "bad": "failed"}

    async def test_fail_fast_cancels_the_rest_and_a_retry_runs_it(self, database: Database) -> None:
        slow = _job("slow#1", "insert into effect values ('slow'); select pg_sleep(60)")
        jobs = {"slow": slow, "bad": _job("bad#1", "select pg_sleep(0.5); select 1/0")}
        ends = (await _event(PgBackgroundBatchTrigger(jobs=jobs, fail_fast=True)))["jobs"]

        assert ends["slow"]["error"] == "JobCancelled"
        assert ends["bad"]["error"] == "WorkerError"
        assert _rows(database, "select count(*) from effect") == [(0,)]

        mended = {"slow": {**slow, "sql": "insert into effect values ('slow')"}, "bad": _job("bad#1", "select 1")}
        ends = (await _event(PgBackgroundBatchTrigger(jobs=mended, fail_fast=True, try_number=2)))["jobs"]

        assert [end["status"] for end in ends.values()] == ["committed", "committed"]
        assert _rows(database, "select count(*) from effect") == [(1,)]

    async def test_on_kill_cancels_all_of_it(self, database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
        _state(monkeypatch, "failed")
        jobs = {name: _job(f"{name}#1", "select pg_sleep(60)") for name in ("a", "b", "c")}
        trigger = PgBackgroundBatchTrigger(jobs=jobs)
        running = asyncio.create_task(_event(trigger))
        await _until(lambda: len(database.workers()) == 3)
        running.cancel()

        await trigger.on_kill()

        assert _rows(database, "select distinct state from pgbg.jobs") == [("cancelled",)]


def _launch(session: psycopg.Connection[Any], label: str, seconds: int = 60) -> None:
    """Launch a worker by hand."""
    session.execute("select pg_background_launch(%s, 65536, %s)", (f"select pg_sleep({seconds})", label))


class TestSensor:
    async def test_waits_for_a_label(self) -> None:
        sensing = asyncio.create_task(_event(PgBackgroundSensorTrigger(label="load*", poll_interval=0.1)))
        await asyncio.sleep(0.3)
        assert not sensing.done()

        await _event(PgBackgroundTrigger(job=_job()))

        event = await sensing
        # Its launching side may write the row count down a moment later.
        assert [(job["job_id"], job["state"]) for job in event["jobs"]] == [("load#1", "committed")]

    async def test_fails_with_the_jobs_own_error(self) -> None:
        await _event(PgBackgroundTrigger(job=_job(sql="select 1/0")))
        event = await _event(PgBackgroundSensorTrigger(job_id="load#1"))
        sensor = PgBackgroundSensor(task_id="wait", job_id="load#1")

        with pytest.raises(errors.WorkerError, match="division by zero") as caught:
            sensor.execute_complete({}, event)
        assert caught.value.sqlstate == "22012"

    async def test_waits_for_a_worker_that_somebody_launched_by_hand(self, database: Database) -> None:
        with database.connect() as session:
            launch = f"select pid from {database.function('launch')}('select pg_sleep(1)')"
            row = session.execute(launch.encode()).fetchone()
            assert row is not None
            event = await _event(PgBackgroundSensorTrigger(worker_pid=row[0], poll_interval=0.1))

        assert event == {"status": "committed", "jobs": None}
        assert database.workers() == []

    @pytest.mark.parametrize("label", ["by hand", "by*", "b? hand"])
    async def test_waits_for_workers_of_a_label_that_somebody_launched(self, database: Database, label: str) -> None:
        with database.connect() as session:
            _launch(session, "by hand")
            _launch(session, "another")
            sensing = asyncio.create_task(_event(PgBackgroundSensorTrigger(worker_label=label, poll_interval=0.1)))
            await asyncio.sleep(0.5)
            assert not sensing.done()

            name = "pg_background:by hand:%"
            session.execute(
                "select pg_cancel_backend(pid) from pg_stat_activity where application_name like %s", [name]
            )
            event = await sensing
            session.execute("select pg_background_cancel_all()")

        assert event == {"status": "committed", "jobs": None}

    async def test_a_label_that_is_cut_off_is_waited_for_all_the_same(self, database: Database) -> None:
        with database.connect() as session:
            _launch(session, "x" * 60, 1)
            event = await _event(PgBackgroundSensorTrigger(worker_label="x" * 60, poll_interval=0.1))

        assert event["status"] == "committed"
        assert database.workers() == []

    async def test_a_worker_that_the_login_may_not_see_is_not_said_to_be_gone(self, database: Database) -> None:
        with database.connect() as admin:
            _launch(admin, "hidden")
            admin.execute("drop role if exists pgbg_blind")
            admin.execute("create role pgbg_blind login in role pgbackground_role")
            ((pid, *_),) = database.workers()
            assert isinstance(pid, int)
            async with Launcher(database.conninfo_as("pgbg_blind")) as launcher:
                for watch in (Watch(worker_pid=pid), Watch(worker_label="hidden")):
                    assert await watch.look(launcher.ledger) is None
            admin.execute("select pg_background_cancel_all()")

    async def test_a_task_that_was_cleared_is_waited_for_as_it_runs_now(self) -> None:
        old = {**_job("load#1"), "label": "load"}
        new = {**_job("load#2"), "generation": 2, "label": "load", "sql": "select 1"}
        await _event(PgBackgroundTrigger(job={**old, "sql": "select pg_sleep(60)"}, deadline=datetime.now(UTC)))
        await _event(PgBackgroundTrigger(job=new))

        event = await _event(PgBackgroundSensorTrigger(label="load"))

        assert [job["job_id"] for job in event["jobs"]] == ["load#2"]

    def test_one_thing_at_a_time(self) -> None:
        with pytest.raises(ValueError, match="one thing"):
            PgBackgroundSensor(task_id="wait", job_id="a", label="b")


class TestNotices:
    @pytest.mark.parametrize("enabled", [True, False])
    async def test_what_the_sql_raises_comes_into_the_log(
        self, caplog: pytest.LogCaptureFixture, enabled: bool
    ) -> None:
        sql = "do $$ begin raise notice 'step 1' using hint = 'go on'; raise warning 'step 2'; end $$"
        caplog.set_level(logging.INFO, logger="pgbg_orchestration")
        event = await _event(PgBackgroundTrigger(job=_job(sql=sql), enable_log_db_messages=enabled))

        assert event["status"] == "committed"
        found = [(r.levelname, r.getMessage()) for r in caplog.records if "step" in r.getMessage()]
        wanted = [("INFO", "job load#1: NOTICE: step 1\nHINT: go on"), ("WARNING", "job load#1: WARNING: step 2")]
        assert found == (wanted if enabled else [])

    def test_in_the_tasks_own_process_too(self, database: Database, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO, logger="pgbg_orchestration")
        trigger = PgBackgroundTrigger(
            job=_job(sql="do $$ begin raise notice 'here'; end $$"), enable_log_db_messages=True
        )
        trigger.in_task = True
        waiting: TaskDriver[dict[str, Any]] = TaskDriver(database.conninfo)
        assert waiting.run(trigger.work)["status"] == "committed"
        assert "NOTICE: here" in caplog.text

    def test_the_operator_hands_the_wish_on(self) -> None:
        operator = PgBackgroundBatchOperator(
            task_id="t", jobs={"a": "select 1"}, deferrable=True, enable_log_db_messages=True
        )
        assert operator._trigger_arguments()["enable_log_db_messages"] is True


class TestWaitingInTheTasksProcess:
    def test_errors_come_in_their_own_type(self, database: Database) -> None:
        with pytest.raises(errors.WorkerError, match="division by zero") as caught:
            TaskDriver[Outcome](database.conninfo).run(_run(Job("select 1/0", id="a")))

        assert caught.value.sqlstate == "22012"

    def test_a_kill_from_a_signal_cancels_the_sql(self, database: Database) -> None:
        waiting = TaskDriver[Outcome](database.conninfo)
        killer = threading.Thread(target=_kill, args=(waiting, database.workers))
        killer.start()
        with pytest.raises(TaskKilled):
            waiting.run(_run(Job("insert into effect values ('x'); select pg_sleep(60)", id="a")))
        killer.join()

        assert _rows(database, "select state from pgbg.jobs") == [("cancelled",)]
        # The next try was started to run it.
        again = Job("insert into effect values ('x')", id="a")
        options = {"retry_cancelled": True, "accept_changed_sql": True}
        outcome = TaskDriver[Outcome](database.conninfo).run(_run(again, **options))
        assert isinstance(outcome, Outcome)

    def test_a_kill_cancels_all_workers_of_the_session_at_one_blow(
        self, database: Database, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        counted: list[int] = []
        cancel_all = Launcher.cancel_all

        async def spy(launcher: Launcher) -> int:
            counted.append(await cancel_all(launcher))
            return counted[-1]

        monkeypatch.setattr(Launcher, "cancel_all", spy)
        operator = PgBackgroundBatchOperator(
            task_id="sums", jobs=dict.fromkeys("abc", "select pg_sleep(60)"), deferrable=False
        )

        def at_work() -> bool:
            return len(_rows(database, "select 1 from pgbg.jobs where running_pid is not null")) == 3

        killer = threading.Thread(target=_kill, args=(operator, at_work))
        killer.start()
        with pytest.raises(TaskKilled):
            operator.execute(CONTEXT)
        killer.join()

        assert counted == [3]
        assert _rows(database, "select distinct state from pgbg.jobs") == [("cancelled",)]

    def test_fail_fast_cancels_the_rest_and_a_retry_runs_it(self, database: Database) -> None:
        jobs = {"slow": "insert into effect values ('x'); select pg_sleep(60)", "bad": "select pg_sleep(0.5), 1/0"}
        operator = PgBackgroundBatchOperator(task_id="sums", jobs=jobs, fail_fast=True, deferrable=False)
        with pytest.raises(errors.WorkerError, match="division by zero") as caught:
            operator.execute(CONTEXT)
        assert any("slow" in note for note in caught.value.__notes__)
        assert _rows(database, "select count(*) from effect") == [(0,)]

        operator.jobs = {"slow": "insert into effect values ('x')", "bad": "select 1"}
        outcomes = operator.execute(CONTEXT)

        assert set(outcomes) == {"slow", "bad"}
        assert _rows(database, "select count(*) from effect") == [(1,)]


CONTEXT: Any = {
    "ti": SimpleNamespace(dag_id="books", run_id="q1", task_id="sums", map_index=-1, max_tries=1, try_number=1)
}


def _run(job: Job, **options: Any) -> Callable[[Launcher], Awaitable[Outcome]]:
    return lambda launcher: launcher.run(job, on_cancel="cancel", **options)


def _kill(victim: Any, at_work: Callable[[], object]) -> None:
    """End what waits as Airflow does, once it is at work."""
    while not at_work():
        time.sleep(0.05)
    (victim.kill if isinstance(victim, TaskDriver) else victim.on_kill)()
