"""When a trigger's on_kill runs, and what it may do: each row of the table in docs/airflow.md, in a real Airflow."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest

from demo.airflow_processes import SETTINGS
from pgbg_orchestration import Launcher
from tests.core.kit import count, only_long

from .conftest import Lab

pytestmark = [pytest.mark.airflow, pytest.mark.processes, pytest.mark.slow, pytest.mark.timeout(900)]


def _long(run_id: str, seconds: int = 300) -> str:
    return f"insert into effect (run, pid) values ('{run_id}', pg_backend_pid()); select pg_sleep({seconds})"


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("mark-failed", lambda lab, run: lab.processes.mark("deferred", run, "job", "failed")),
        pytest.param(
            "mark-success", lambda lab, run: lab.processes.mark("deferred", run, "job", "success"), marks=only_long
        ),
        pytest.param(
            "mark-run-failed", lambda lab, run: lab.processes.mark_run("deferred", run, "failed"), marks=only_long
        ),
    ],
)
def test_what_a_user_ends_is_cancelled(lab: Lab, name: str, end: Callable[[Lab, str], None]) -> None:
    run = lab.start("deferred", name, _long(name))
    lab.wait_for_worker(run)

    end(lab, run)

    lab.wait_for_no_worker(run)
    lab.wait_for_states(run, ["cancelled"])
    assert lab.effects(run) == 0


def test_cancel_on_kill_can_be_refused(lab: Lab) -> None:
    run = lab.start("deferred_leaves", "left-alone", _long("left-alone", 8))
    lab.wait_for_worker(run)

    lab.processes.mark("deferred_leaves", run, "job", "failed")

    lab.wait_for_states(run, ["committed"])
    assert lab.effects(run) == 1


@only_long
def test_a_deleted_dag_takes_its_workers_along(lab: Lab) -> None:
    run = lab.start("to_delete", "deleted", _long("deleted"))
    lab.wait_for_worker(run)

    lab.processes.call("DELETE", "/dags/to_delete")

    lab.wait_for_no_worker(run)
    assert lab.effects(run) == 0


@pytest.mark.parametrize("dag_id", ["deferred", pytest.param("deferred_waits", marks=only_long)])
def test_a_clear_while_running_never_has_two_workers(lab: Lab, dag_id: str) -> None:
    run = lab.start(dag_id, f"cleared-{dag_id}", _long(f"cleared-{dag_id}", 12))
    first = lab.wait_for_worker(run)
    seen: set[int] = {first}

    lab.processes.clear(dag_id, run, ["job"])

    def finished() -> bool:
        workers = lab.workers(run)
        assert len(workers) <= 1, f"two workers of one task at once: {workers}"
        seen.update(workers)
        return lab.processes.run_state(dag_id, run) in ("success", "failed")

    lab.wait(finished, "the end of the cleared run", 120)
    assert lab.processes.run_state(dag_id, run) == "success"
    assert len(seen) == 2
    assert lab.effects(run) == (1 if dag_id == "deferred" else 2)
    assert lab.states(run)[-1] == "committed"


@only_long
def test_a_triggerer_that_was_stalled_cancels_nothing(lab: Lab) -> None:
    run = lab.start("deferred", "stalled", _long("stalled", 60))
    worker = lab.wait_for_worker(run)
    busy = lab.triggerer_of(run)

    lab.processes.signal(busy, signal.SIGSTOP)
    time.sleep(40)  # longer than the health check's threshold, so that the other triggerer takes over
    lab.processes.signal(busy, signal.SIGCONT)

    assert lab.processes.wait_for_run("deferred", run) == "success"
    assert lab.effects(run) == 1
    assert [pid for (pid,) in lab.rows("select pid from effect where run = %s", run)] == [worker]


def test_a_killed_triggerer_is_replaced(lab: Lab) -> None:
    run = lab.start("deferred", "triggerer-killed", _long("triggerer-killed", 30))
    worker = lab.wait_for_worker(run)
    busy = lab.triggerer_of(run)

    lab.processes.kill(busy)
    try:
        assert lab.processes.wait_for_run("deferred", run) == "success"
    finally:
        lab.processes.start_component(busy)
    assert [pid for (pid,) in lab.rows("select pid from effect where run = %s", run)] == [worker]


@only_long
def test_marked_while_no_triggerer_is_there(lab: Lab) -> None:
    run = lab.start("deferred", "nobody-there", _long("nobody-there"))
    lab.wait_for_worker(run)
    triggerers = [name for name in lab.processes.components if name.startswith("triggerer")]

    for name in triggerers:
        lab.processes.kill(name)
    try:
        lab.processes.mark("deferred", run, "job", "failed")
        # One that starts before they count as dead drops their triggers unseen (docs/airflow.md).
        time.sleep(float(SETTINGS["AIRFLOW__TRIGGERER__TRIGGERER_HEALTH_CHECK_THRESHOLD"]) + 1)
    finally:
        for name in triggerers:
            lab.processes.start_component(name)

    lab.wait_for_no_worker(run)
    lab.wait_for_states(run, ["cancelled"])
    assert lab.effects(run) == 0


def test_marked_while_it_waits_in_its_own_process(lab: Lab) -> None:
    run = lab.start("here", "here-marked", _long("here-marked"))
    lab.wait_for_worker(run)

    lab.processes.mark("here", run, "job", "failed")

    lab.wait_for_no_worker(run)
    lab.wait_for_states(run, ["cancelled"])
    assert lab.effects(run) == 0


@only_long
def test_a_run_that_times_out_takes_its_worker_along(lab: Lab) -> None:
    run = lab.start("run_times_out", "run-late", _long("run-late"))
    lab.wait_for_worker(run)

    assert lab.processes.wait_for_run("run_times_out", run) == "failed"
    lab.wait_for_no_worker(run)
    lab.wait_for_states(run, ["cancelled"])


@pytest.mark.parametrize("how", ["by the package", pytest.param("by somebody", marks=only_long)])
def test_a_job_that_somebody_cancels_is_not_tried_again(lab: Lab, how: str) -> None:
    run = lab.start("deferred_retried", f"cancelled-{how}".replace(" ", "-"), _long("cancelled"))
    worker = lab.wait_for_worker(run)

    if how == "by somebody":
        lab.rows("select pg_cancel_backend(%s)", worker)
    else:
        asyncio.run(_cancel(lab, run))

    assert lab.processes.wait_for_run("deferred_retried", run) == "failed"
    assert lab.processes.task("deferred_retried", run, "job")["try_number"] < 4, "retries were left"
    log = lab.processes.task_log("deferred_retried", run, "job", 1)
    assert ("57014" if how == "by somebody" else "JobCancelled") in log
    assert lab.workers(run) == []


async def _cancel(lab: Lab, run: str) -> None:
    ((job_id, series),) = lab.rows("select job_id, series from pgbg.jobs where label = %s", run)
    async with Launcher(lab.conninfo) as launcher:
        assert await launcher.cancel(job_id, series=series) == "cancelled"


def test_a_task_process_killed_in_its_first_tries(lab: Lab) -> None:
    run = lab.start("here_retried", "unlucky", _long("unlucky", count(20, 60)))
    worker = lab.wait_for_worker(run)
    for number in range(1, count(1, 3) + 1):  # in the long form in every try but the last
        seen: dict[str, Any] = {}

        def at_work(number: int = number, seen: dict[str, Any] = seen) -> bool:
            seen.update(lab.processes.task("here_retried", run, "job"))
            return seen["try_number"] == number and seen["state"] == "running" and seen["pid"] is not None

        lab.wait(at_work, f"try {number}", 120)
        os.kill(seen["pid"], signal.SIGKILL)

    assert lab.processes.wait_for_run("here_retried", run, 240) == "success"
    # Each further try attached to the worker of the first, or found its receipt.
    assert lab.rows("select pid from effect where run = %s", run) == [(worker,)]
    assert lab.states(run) == ["committed"]


def test_a_killed_scheduler_loses_nothing(lab: Lab) -> None:
    run = lab.start("deferred", "scheduler-killed", _long("scheduler-killed", 10))
    worker = lab.wait_for_worker(run)

    lab.processes.kill("scheduler")
    try:
        lab.wait_for_states(run, ["committed"])  # while there is none
    finally:
        lab.processes.start_component("scheduler")

    assert lab.processes.wait_for_run("deferred", run) == "success"
    assert lab.rows("select pid from effect where run = %s", run) == [(worker,)]
