"""A task that waits in its own process: whatever ends it, how its job ends is decided, and no chance's business."""

from __future__ import annotations

import asyncio
import json
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
from airflow.sdk.exceptions import TaskDeferred

from airflow_provider import PgBackgroundOperator
from airflow_provider.compat import AirflowTaskTimeout
from airflow_provider.hook import PgBackgroundHook
from airflow_provider.task_driver import TaskDriver, TaskKilled
from pgbg_orchestration import Cause, Fetch, Job, Launcher, Outcome, errors
from tests.conftest import Database

pytestmark = [pytest.mark.airflow, pytest.mark.servers("real", "embedded")]

SQL = "select pg_sleep(60)"
CONTEXT: Any = {
    "ti": SimpleNamespace(dag_id="books", run_id="q1", task_id="t", map_index=-1, max_tries=1, try_number=1)
}


@pytest.fixture(autouse=True)
def _connection(monkeypatch: pytest.MonkeyPatch, database: Database) -> None:
    """Every Airflow connection leads to the test's database."""
    monkeypatch.setenv("AIRFLOW_CONN_POSTGRES_DEFAULT", '{"conn_type": "postgres", "host": "patched"}')
    monkeypatch.setattr(PgBackgroundHook, "conninfo", lambda _self: database.conninfo)
    monkeypatch.setattr("airflow_provider.triggers.login._conninfos", {})
    monkeypatch.setattr("airflow_provider.triggers.task.RESUME_SECONDS", 0.0)


def rows(database: Database, query: str) -> list[tuple[Any, ...]]:
    with database.connect() as admin:
        return admin.execute(query.encode()).fetchall()


@contextmanager
def airflows_timeout(seconds: float) -> Iterator[None]:
    """As Airflow's task runner does it: an alarm that raises in the main thread."""

    def handler(_number: int, _frame: object) -> None:
        raise AirflowTaskTimeout("Timeout")

    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("lead", [0.3, 0.0, -0.3], ids=["the deadline first", "at once", "the alarm first"])
def test_an_execution_timeout_is_a_deadline_whichever_comes_first(database: Database, lead: float) -> None:
    until = datetime.now(UTC) + timedelta(seconds=1.5 - lead)

    async def work(launcher: Launcher) -> Outcome:
        return await launcher.run(Job(SQL, id="a"), deadline=until)

    with airflows_timeout(1.5), pytest.raises(errors.DeadlinePassed):
        TaskDriver[Outcome](database.conninfo).run(work)

    assert rows(database, "select state, cause from pgbg.jobs") == [("cancelled", Cause.DEADLINE)]
    assert not database.workers()


@pytest.mark.parametrize("cancel_on_kill", [True, False])
def test_a_killed_task_ends_its_worker_only_when_it_is_to(database: Database, cancel_on_kill: bool) -> None:
    waiting = TaskDriver[Outcome](database.conninfo, cancel_on_kill=cancel_on_kill)

    async def work(launcher: Launcher) -> Outcome:
        on_cancel = "cancel" if cancel_on_kill else "leave"
        return await launcher.run(Job(SQL, id="a"), on_cancel=on_cancel)  # type: ignore[arg-type]

    def kill() -> None:
        while not rows(database, "select from pgbg.jobs where state = 'running'"):
            time.sleep(0.05)
        waiting.kill(wait=60)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(TaskKilled, match="so were its jobs" if cancel_on_kill else "left at work"):
        waiting.run(work)
    killer.join()

    if cancel_on_kill:
        assert rows(database, "select state, cause from pgbg.jobs") == [("cancelled", Cause.INTERRUPTED)]
    else:
        assert rows(database, "select state from pgbg.jobs") == [("running",)]
        rows(database, "select pg_cancel_backend(running_pid) from pgbg.jobs")


def test_killed_before_it_began_it_launches_nothing(database: Database) -> None:
    waiting = TaskDriver[Outcome](database.conninfo)
    waiting.kill()
    with pytest.raises(TaskKilled):
        waiting.run(lambda launcher: launcher.run(Job(SQL, id="a")))
    assert rows(database, "select from pgbg.jobs") == []


KEPT = "select c.cells::text from pgbg.row_chunk as c join pgbg.receipt using (owner, job_digest)"


@pytest.mark.parametrize("fetch", [True, Fetch(max_rows=5), {"max_rows": 5}], ids=str)
def test_rows_are_kept_by_a_task_in_its_own_process(database: Database, fetch: Any) -> None:
    operator = PgBackgroundOperator(task_id="t", sql="select 42", fetch=fetch, deferrable=False)
    outcome = operator.execute(CONTEXT)

    assert (outcome["row_count"], outcome["command_tag"]) == (1, "SELECT")
    assert "results" not in outcome
    assert rows(database, KEPT) == [("{42}",)]


def test_rows_are_kept_by_a_trigger(database: Database) -> None:
    operator = PgBackgroundOperator(task_id="t", sql="select 42", fetch=Fetch(max_rows=5), deferrable=True)
    with pytest.raises(TaskDeferred) as deferred:
        operator.execute(CONTEXT)
    path, arguments = deferred.value.trigger.serialize()
    module, _, name = path.rpartition(".")
    again = getattr(import_module(module), name)(**json.loads(json.dumps(arguments, default=str)))

    async def fire() -> list[Any]:
        return [event.payload async for event in again.run()]

    (payload,) = asyncio.run(fire())
    assert payload["status"] == "committed"
    assert rows(database, KEPT) == [("{42}",)]
