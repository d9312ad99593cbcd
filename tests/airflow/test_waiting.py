"""A task that waits in its own process: whatever ends it, how its job ends is decided, and no chance's business."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from airflow.sdk.exceptions import AirflowTaskTimeout

from airflow_provider.waiting import TaskKilled, Waiting
from pgbg_orchestration import Cause, Job, Launcher, Outcome, errors
from tests.conftest import Database

SQL = "select pg_sleep(60)"


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
        Waiting[Outcome](database.conninfo).run(work)

    assert rows(database, "select state, cause from pgbg.jobs") == [("cancelled", Cause.DEADLINE)]
    assert not database.workers()


@pytest.mark.parametrize("cancel_on_kill", [True, False])
def test_a_killed_task_ends_its_worker_only_when_it_is_to(database: Database, cancel_on_kill: bool) -> None:
    waiting = Waiting[Outcome](database.conninfo, cancel_on_kill=cancel_on_kill)

    async def work(launcher: Launcher) -> Outcome:
        on_cancel = "cancel" if cancel_on_kill else "leave"
        return await launcher.run(Job(SQL, id="a"), on_cancel=on_cancel)  # type: ignore[arg-type]

    def kill() -> None:
        while not rows(database, "select from pgbg.jobs where state = 'running'"):
            time.sleep(0.05)
        waiting.kill(wait=60)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(TaskKilled, match="cancelled" if cancel_on_kill else "left at work"):
        waiting.run(work)
    killer.join()

    if cancel_on_kill:
        assert rows(database, "select state, cause from pgbg.jobs") == [("cancelled", Cause.INTERRUPTED)]
    else:
        assert rows(database, "select state from pgbg.jobs") == [("running",)]
        rows(database, "select pg_cancel_backend(running_pid) from pgbg.jobs")


def test_killed_before_it_began_it_launches_nothing(database: Database) -> None:
    waiting = Waiting[Outcome](database.conninfo)
    waiting.kill()
    with pytest.raises(TaskKilled):
        waiting.run(lambda launcher: launcher.run(Job(SQL, id="a")))
    assert rows(database, "select from pgbg.jobs") == []
