"""Orphans are found and cancelled, and nothing else is: on a real server, with Airflow's answers stood in for."""

from __future__ import annotations

import asyncio
import logging
import runpy
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from types import SimpleNamespace
from typing import Any

import pytest

from airflow_provider import plugin, triggerer_listener
from airflow_provider import sweep as sweep_module
from airflow_provider.compat import AirflowNotFoundException
from airflow_provider.hook import PgBackgroundHook
from airflow_provider.sweep import ENDED, States, Sweeper, sweep, sweeping
from airflow_provider.triggers import PgBackgroundTrigger
from airflow_provider.triggers.task import GOES_ON
from pgbg_orchestration import Cause, Job, Launcher
from pgbg_orchestration.series import AirflowTask, of_airflow_task
from tests.conftest import Database

pytestmark = [pytest.mark.airflow, pytest.mark.servers("real", "embedded")]

LOAD = AirflowTask("books", "q1", "load", -1)


def _states(of: Mapping[AirflowTask, str]) -> States:
    async def answer(tasks: Collection[AirflowTask]) -> Mapping[AirflowTask, str]:
        return {task: of[task] for task in tasks if task in of}

    return answer


def _in_turn(*answers: str | BaseException) -> States:
    """What one question after the other is told of the task; the last answer stays."""
    left = list(answers)

    async def answer(_tasks: Collection[AirflowTask]) -> Mapping[AirflowTask, str]:
        told = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(told, BaseException):
            raise told
        return {LOAD: told}

    return answer


async def _until(there: Callable[[], Any] | Callable[[], Awaitable[Any]]) -> None:
    async with asyncio.timeout(30):
        while True:
            found = there()
            if await found if isinstance(found, Awaitable) else found:
                return
            await asyncio.sleep(0.05)


async def _orphan(
    database: Database, task: AirflowTask = LOAD, *, name: str = "", number: str = "1.0", **options: Any
) -> str:
    """Leave a job at work, whose launcher is gone; returns its id."""
    series = of_airflow_task(*task)
    job = Job(
        "select pg_sleep(300)",
        id=f"{series}#{number}{name}",
        series=f"{series}{name}",
        generation=1,
        label=f"{task.task_id}{name}",
    )
    said = {"when_orphaned": "cancel", **options}
    async with Launcher(database.conninfo) as launcher:
        running = asyncio.create_task(launcher.run(job, on_cancel="leave", **said))
        await _until(lambda: _state_of(database, job.id or "") == "running")
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    with database.connect() as admin:
        await _until(
            lambda: (
                admin.execute("select not has_launcher from pgbg.jobs where job_id = %s", (job.id,)).fetchone()
                == (True,)
            )
        )
    return job.id or ""


def _state_of(database: Database, job_id: str) -> str | None:
    with database.connect() as admin:
        row = admin.execute("select state from pgbg.jobs where job_id = %s", (job_id,)).fetchone()
        return None if row is None else row[0]


async def _sweep(database: Database, states: States, told: set[str] | None = None) -> None:
    async with Launcher(database.conninfo) as launcher:
        await sweep(launcher, states, set() if told is None else told)


async def _end(database: Database, *job_ids: str) -> None:
    """End what a test left at work on purpose."""
    async with Launcher(database.conninfo) as launcher:
        for job_id in job_ids:
            await launcher.cancel(job_id)


@pytest.mark.usefixtures("no_worker_left")
class TestOrphans:
    @pytest.mark.parametrize("state", sorted(ENDED))
    async def test_a_task_that_has_ended(
        self, database: Database, state: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        job_id = await _orphan(database)

        await _sweep(database, _states({LOAD: state}))

        assert _state_of(database, job_id) == "cancelled"
        with database.connect() as admin:
            cause, reason = admin.execute("select cause, reason from pgbg.jobs").fetchone() or ("", "")
        assert cause == Cause.RUN_GONE
        assert f"the Airflow task is {state}, and the launcher " in reason
        assert f"its task is {state}" in caplog.text
        assert "cancelled now" in caplog.text

    @pytest.mark.parametrize("state", [*GOES_ON, "a state of a newer Airflow"])
    async def test_a_task_that_goes_on(self, database: Database, state: str) -> None:
        job_id = await _orphan(database)

        await _sweep(database, _states({LOAD: state}))

        assert _state_of(database, job_id) == "running"
        await _end(database, job_id)

    async def test_a_task_that_this_airflow_does_not_know(self, database: Database) -> None:
        """It may be another Airflow's, in the same database."""
        job_id = await _orphan(database)

        await _sweep(database, _states({}))

        assert _state_of(database, job_id) == "running"
        await _end(database, job_id)

    async def test_a_job_of_which_nothing_was_said(self, database: Database) -> None:
        """A submission that nobody waits for, or a launch of a release before this."""
        job_id = await _orphan(database, when_orphaned=None)

        await _sweep(database, _states({LOAD: "failed"}))

        assert _state_of(database, job_id) == "running"
        await _end(database, job_id)

    async def test_a_task_that_leaves_its_worker(self, database: Database, caplog: pytest.LogCaptureFixture) -> None:
        job_id = await _orphan(database, when_orphaned="leave")
        told: set[str] = set()

        for _ in range(3):
            await _sweep(database, _states({LOAD: "failed"}), told)

        assert _state_of(database, job_id) == "running"
        assert caplog.text.count("left at work (cancel_on_kill=False)") == 1
        await _end(database, job_id)
        await _sweep(database, _states({LOAD: "failed"}), told)
        assert told == set(), "what has ended is forgotten"

    async def test_the_members_of_a_batch(self, database: Database) -> None:
        jobs = [await _orphan(database, name=name) for name in ("/one", "/two/-1/3")]
        other = await _orphan(database, AirflowTask("books", "q1", "load", 0), name="/one")

        await _sweep(database, _states({LOAD: "success"}))

        assert [_state_of(database, job_id) for job_id in (*jobs, other)] == ["cancelled", "cancelled", "running"]
        await _end(database, other)

    async def test_a_job_of_nobody_in_airflow(self, database: Database) -> None:
        async with Launcher(database.conninfo) as launcher:
            running = asyncio.create_task(
                launcher.run(Job("select pg_sleep(300)", id="mine"), on_cancel="leave", when_orphaned="cancel")
            )
            await _until(lambda: _state_of(database, "mine") == "running")
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

        await _sweep(database, _states({LOAD: "failed"}))

        assert _state_of(database, "mine") == "running"
        await _end(database, "mine")

    async def test_a_task_that_is_cleared_at_the_last_moment(self, database: Database) -> None:
        job_id = await _orphan(database)

        await _sweep(database, _in_turn("failed", "none"))

        assert _state_of(database, job_id) == "running"
        await _end(database, job_id)

    async def test_a_job_that_is_launched_again_at_the_last_moment(self, database: Database) -> None:
        """The word for its launcher is asked again too."""
        job_id = await _orphan(database)
        asked = 0

        async def answer(_tasks: Collection[AirflowTask]) -> Mapping[AirflowTask, str]:
            nonlocal asked
            asked += 1
            with database.connect() as admin:
                admin.execute("update pgbg.job set launcher_pid = (select pid from pg_stat_activity where"
                              " application_name = 'pgbg: listing' limit 1)")  # fmt: skip
            return {LOAD: "failed"}

        await _sweep(database, answer)

        assert (asked, _state_of(database, job_id)) == (1, "running")
        await _end(database, job_id)

    async def test_two_that_sweep_at_once(self, database: Database, caplog: pytest.LogCaptureFixture) -> None:
        jobs = [await _orphan(database, AirflowTask("books", f"q{n}", "load", -1)) for n in range(4)]
        states = _states({AirflowTask("books", f"q{n}", "load", -1): "failed" for n in range(4)})

        await asyncio.gather(*(_sweep(database, states) for _ in range(4)))

        assert {_state_of(database, job_id) for job_id in jobs} == {"cancelled"}
        assert "could not be cancelled" not in caplog.text
        with database.connect() as admin:
            assert admin.execute("select count(*) from pgbg.receipt").fetchone() == (4,)

    async def test_what_has_ended_meanwhile(self, database: Database) -> None:
        job_id = await _orphan(database)

        async def answer(_tasks: Collection[AirflowTask]) -> Mapping[AirflowTask, str]:
            await _end(database, job_id)
            return {LOAD: "failed"}

        await _sweep(database, answer)

        with database.connect() as admin:
            assert admin.execute("select cause from pgbg.receipt").fetchall() == [("asked",)]

    async def test_a_cancel_that_fails(
        self, database: Database, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        """The others are cancelled all the same, and the next look tries it again."""
        other = AirflowTask("books", "q2", "load", -1)
        first, second = await _orphan(database), await _orphan(database, other)
        cancel = Launcher.cancel

        async def fails(self: Launcher, job_id: str, **named: Any) -> Any:
            if job_id == first:
                raise OSError("the network")
            return await cancel(self, job_id, **named)

        monkeypatch.setattr(Launcher, "cancel", fails)
        await _sweep(database, _states({LOAD: "failed", other: "failed"}))
        assert [_state_of(database, job_id) for job_id in (first, second)] == ["running", "cancelled"]
        assert f"The orphan {first} could not be cancelled: the network" in caplog.text

        monkeypatch.undo()
        await _sweep(database, _states({LOAD: "failed", other: "failed"}))
        assert _state_of(database, first) == "cancelled"

    async def test_a_database_without_the_schema(self, extension_database: Database) -> None:
        """Sensors of workers that were launched by hand need none."""
        await _sweep(extension_database, _states({LOAD: "failed"}))


@pytest.mark.usefixtures("no_worker_left")
class TestWhatIsHealthy:
    """A task that was marked has its worker cancelled by its own trigger: as long as that lives, nobody else does."""

    async def test_a_launcher_that_lives(self, database: Database) -> None:
        series = of_airflow_task(*LOAD)
        async with Launcher(database.conninfo) as launcher:
            job = Job("select pg_sleep(300)", id=f"{series}#1.0", series=series, generation=1)
            running = asyncio.create_task(launcher.run(job, when_orphaned="cancel"))
            await _until(lambda: _state_of(database, job.id or "") == "running")

            await _sweep(database, _states({LOAD: "failed"}))

            assert _state_of(database, job.id or "") == "running"
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    @pytest.mark.parametrize("days", [-400, 400])
    async def test_a_clock_that_is_wrong(self, database: Database, monkeypatch: pytest.MonkeyPatch, days: int) -> None:
        """Attached to by another process, after its launcher died: nothing that a clock says is asked."""
        job_id = await _orphan(database)
        now = time.time()
        monkeypatch.setattr(time, "time", lambda: now + days * 86_400)

        await _sweep(database, _states({LOAD: "deferred"}))
        assert _state_of(database, job_id) == "running"

        await _sweep(database, _states({LOAD: "failed"}))
        assert _state_of(database, job_id) == "cancelled"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A minute is a tenth of a second."""
    monkeypatch.setattr(sweep_module, "ORPHANS_SECONDS", 0.1)


@pytest.mark.usefixtures("no_worker_left")
class TestNowAndThen:
    async def test_it_goes_on_while_it_is_held(self, database: Database, quick: None) -> None:
        sweeper = Sweeper(database.conninfo, "pgbg", _in_turn("deferred", "deferred", "deferred", "failed"))
        job_id = await _orphan(database)

        with sweeper.held():
            await _until(lambda: _state_of(database, job_id) == "cancelled")

    async def test_a_failing_look_is_made_again(
        self, database: Database, quick: None, caplog: pytest.LogCaptureFixture
    ) -> None:
        sweeper = Sweeper(database.conninfo, "pgbg", _in_turn(*[OSError("Airflow is away")] * 3, "failed"))
        job_id = await _orphan(database)

        with sweeper.held():
            await _until(lambda: _state_of(database, job_id) == "cancelled")

        told = [record for record in caplog.records if "Airflow is away" in record.getMessage()]
        assert [record.levelname for record in told if record.levelno > logging.DEBUG] == ["WARNING"], "once"

    async def test_many_share_one_look_a_minute(self, database: Database) -> None:
        looks = 0

        async def count(_tasks: Collection[AirflowTask]) -> Mapping[AirflowTask, str]:
            nonlocal looks
            looks += 1
            return {LOAD: "deferred"}

        job_id = await _orphan(database)
        for _ in range(3):
            with sweeping(database.conninfo, "pgbg", count), sweeping(database.conninfo, "pgbg", count):
                await _until(lambda: looks)
                await asyncio.sleep(0.1)
        assert looks == 1
        await _end(database, job_id)

    async def test_a_look_is_let_end(self, database: Database) -> None:
        """Short jobs, each of which is there alone, would otherwise never have one made."""
        begun, go_on = asyncio.Event(), asyncio.Event()

        async def slow(_tasks: Collection[AirflowTask]) -> Mapping[AirflowTask, str]:
            begun.set()
            await go_on.wait()
            return {LOAD: "failed"}

        job_id = await _orphan(database)
        with sweeping(database.conninfo, "pgbg", slow):
            await begun.wait()
        go_on.set()

        await _until(lambda: _state_of(database, job_id) == "cancelled")

    async def test_nothing_is_left_of_it(self, database: Database) -> None:
        before = asyncio.all_tasks()
        with sweeping(database.conninfo, "pgbg", _states({})):
            await asyncio.sleep(0.5)
            assert asyncio.all_tasks() > before

        await _until(lambda: asyncio.all_tasks() == before)


@pytest.mark.usefixtures("no_worker_left")
class TestTriggers:
    @pytest.fixture(autouse=True)
    def _connection(self, monkeypatch: pytest.MonkeyPatch, database: Database) -> None:
        monkeypatch.setattr(PgBackgroundHook, "conninfo", lambda _self: database.conninfo)
        monkeypatch.setattr("airflow_provider.triggers.login._conninfos", {})
        monkeypatch.setattr("airflow_provider.triggers.task.RESUME_SECONDS", 0.0)

    def _trigger(self, sql: str, *, in_triggerer: bool = True, **options: Any) -> PgBackgroundTrigger:
        series = of_airflow_task("books", "q9", "other")
        job = {"id": f"{series}#1.0", "series": series, "generation": 1, "label": "other", "sql": sql}
        trigger = PgBackgroundTrigger(job=job, **options)
        if in_triggerer:
            ti: Any = SimpleNamespace(dag_id="books", task_id="other", run_id="q9", map_index=-1)
            trigger.task_instance = ti
        return trigger

    async def _fired(self, trigger: PgBackgroundTrigger) -> dict[str, Any]:
        (event,) = [event async for event in trigger.run()]
        payload: dict[str, Any] = event.payload
        return payload

    @pytest.mark.parametrize(("cancel_on_kill", "said"), [(True, "cancel"), (False, "leave")])
    async def test_what_is_to_become_of_an_orphan(self, database: Database, cancel_on_kill: bool, said: str) -> None:
        await self._fired(self._trigger("select 1", cancel_on_kill=cancel_on_kill))

        with database.connect() as admin:
            assert admin.execute("select when_orphaned from pgbg.job").fetchall() == [(said,)]

    async def test_any_trigger_of_ours_looks_for_orphans(
        self, database: Database, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        job_id = await _orphan(database)
        monkeypatch.setattr("airflow_provider.triggers.base.states_of", _states({LOAD: "failed"}))
        trigger = self._trigger("select pg_sleep(2)")

        assert (await self._fired(trigger))["status"] == "committed"

        await _until(lambda: _state_of(database, job_id) == "cancelled")

    async def test_a_look_that_fails_fails_no_task(self, database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
        job_id = await _orphan(database)
        monkeypatch.setattr("airflow_provider.triggers.base.states_of", _in_turn(OSError("Airflow is away")))

        assert (await self._fired(self._trigger("select pg_sleep(1)")))["status"] == "committed"

        await _end(database, job_id)

    async def test_what_it_logs_is_no_tasks(
        self, database: Database, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        """In the context of a trigger it would stand in the log of that trigger's task."""
        import contextvars

        of_trigger = contextvars.ContextVar[str]("of_trigger", default="none")
        seen: list[str] = []

        class Seeing(logging.Filter):
            def filter(self, _record: logging.LogRecord) -> bool:
                seen.append(of_trigger.get())
                return True

        monkeypatch.setattr("airflow_provider.triggers.base.states_of", _states({LOAD: "failed"}))
        job_id = await _orphan(database)
        of_trigger.set("a trigger's")
        filtering = Seeing()
        sweep_module.logger.addFilter(filtering)
        try:
            await self._fired(self._trigger("select pg_sleep(1)"))
            await _until(lambda: _state_of(database, job_id) == "cancelled" and seen)
        finally:
            sweep_module.logger.removeFilter(filtering)
        assert set(seen) == {"none"}

    async def test_outside_of_a_triggerer_nobody_looks(
        self, database: Database, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        job_id = await _orphan(database)
        monkeypatch.setattr("airflow_provider.triggers.base.states_of", _states({LOAD: "failed"}))

        assert (await self._fired(self._trigger("select pg_sleep(1)", in_triggerer=False)))["status"] == "committed"

        assert _state_of(database, job_id) == "running"
        await _end(database, job_id)


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], object]]:
    """What is to be done after a fork, in the process that forked; and no thread is started by it."""
    hooks: list[Callable[[], object]] = []

    def register(*, after_in_parent: Callable[[], object], after_in_child: Callable[[], object]) -> None:
        hooks.append(after_in_parent)
        assert callable(after_in_child)

    monkeypatch.setattr("os.register_at_fork", register)
    monkeypatch.setattr(triggerer_listener, "_waiting", [])
    return hooks


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The threads that are started."""
    started: list[dict[str, Any]] = []

    class Thread:
        def __init__(self, **named: Any) -> None:
            self._named = named

        def start(self) -> None:
            started.append(self._named)

    monkeypatch.setattr("airflow_provider.triggerer_listener.Thread", Thread)
    return started


class TestStarting:
    """A triggerer looks from its start on; whether a trigger of ours runs in it or not."""

    def test_a_triggerer(self, forked: list[Callable[[], object]], threads: list[dict[str, Any]]) -> None:
        component = SimpleNamespace(job_type=None)  # it is told later
        triggerer_listener.on_starting(component)
        component.job_type = "TriggererJob"
        assert threads == [], "nothing is begun before it has forked"

        for _ in range(3):
            for hook in forked:
                hook()

        (thread,) = threads
        assert (thread["args"], thread["daemon"]) == ((["postgres_default"],), True)

    @pytest.mark.parametrize("job_type", ["SchedulerJob", "DagProcessorJob", None])
    def test_any_other_component(
        self, forked: list[Callable[[], object]], threads: list[dict[str, Any]], job_type: str | None
    ) -> None:
        triggerer_listener.on_starting(SimpleNamespace(job_type=job_type))
        for hook in forked:
            hook()
        assert threads == []

    def test_a_tasks_own_process(self, forked: list[Callable[[], object]]) -> None:
        triggerer_listener.on_starting(object())
        assert forked == []

    def test_where_no_connection_is_to_be_swept(
        self, forked: list[Callable[[], object]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("AIRFLOW__PG_BACKGROUND__SWEEP_CONN_IDS", "")
        triggerer_listener.on_starting(SimpleNamespace(job_type=None))
        assert forked == []

    def test_the_connections(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert triggerer_listener.sweep_conn_ids() == ["postgres_default"]
        monkeypatch.setenv("AIRFLOW__PG_BACKGROUND__SWEEP_CONN_IDS", "warehouse, lake ,")
        assert triggerer_listener.sweep_conn_ids() == ["warehouse", "lake"]

    def test_the_plugin_brings_it_to_triggerers_only(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A listener anywhere else has Airflow refuse each DAG with `end_from_trigger=True`."""
        assert plugin.PgBackgroundPlugin.listeners == []
        for component in ("scheduler", "dag-processor", "api-server", "standalone", "triggerer"):
            monkeypatch.setattr("sys.argv", ["airflow", component])
            assert triggerer_listener.in_triggerer() is (component == "triggerer")
        found = runpy.run_path(plugin.__file__)["PgBackgroundPlugin"]
        assert found.listeners == [triggerer_listener]

    @pytest.mark.usefixtures("no_worker_left")
    async def test_it_looks(self, database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(PgBackgroundHook, "conninfo", lambda _self: database.conninfo)
        monkeypatch.setattr(triggerer_listener, "states_of", _states({LOAD: "failed"}))
        job_id = await _orphan(database)

        looking = asyncio.create_task(triggerer_listener.look(["warehouse"]))
        await _until(lambda: _state_of(database, job_id) == "cancelled")
        looking.cancel()
        await asyncio.gather(looking, return_exceptions=True)

    async def test_the_default_need_not_be_there(
        self, database: Database, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        def missing(self: PgBackgroundHook, *_: object) -> Any:
            raise AirflowNotFoundException(f"The conn_id `{self.postgres_conn_id}` isn't defined")

        monkeypatch.setattr(PgBackgroundHook, "get_connection", missing)
        looking = asyncio.create_task(triggerer_listener.look(["postgres_default", "warehouse"]))
        await _until(lambda: "isn't defined" in caplog.text)
        looking.cancel()
        await asyncio.gather(looking, return_exceptions=True)

        assert "warehouse" in caplog.text
        assert "postgres_default" not in caplog.text
