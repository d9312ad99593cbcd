"""``kill -9`` at many points of a task's life, of each process that it meets: one commit, and the run ends well."""

from __future__ import annotations

import os
import random
import signal
import time
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest

from tests.core.kit import seeded
from tests.matrix import IN_THE_LONG_FORM, LONG

from .conftest import Lab

pytestmark = [
    pytest.mark.airflow,
    pytest.mark.processes,
    pytest.mark.slow,
    pytest.mark.timeout(600),  # longer than what it waits for, so that a run that does not end is told by its state
    pytest.mark.skipif(not LONG, reason=f"{IN_THE_LONG_FORM}: takes half an hour"),
]

TIMES = 12
WITHIN = 12.0
"""Seconds from a run's start in which something is killed: before its launch, at work, at its end, and after it."""


@pytest.fixture(scope="module")
def chance() -> random.Random:
    """A random generator whose seed can be given."""
    return seeded("kills")


def _work(run_id: str) -> str:
    return f"insert into effect (run, pid) values ('{run_id}', pg_backend_pid()); select pg_sleep(3)"


def _ends_well(lab: Lab, dag_id: str, run: str) -> None:
    assert lab.processes.wait_for_run(dag_id, run, 300) == "success"
    assert lab.effects(run) == 1
    assert lab.states(run) == ["committed"]
    assert lab.workers(run) == []


@pytest.mark.parametrize("dag_id", ["deferred_retried", "deferred_resumed"])
@pytest.mark.parametrize("number", range(TIMES))
def test_a_triggerer_with_a_standby(lab: Lab, chance: random.Random, dag_id: str, number: int) -> None:
    run = lab.start(dag_id, f"triggerer-{dag_id}-{number}", _work(f"triggerer-{dag_id}-{number}"))
    time.sleep(chance.uniform(0, WITHIN))
    jobs = lab.rows("select 1 from pgbg.jobs where label = %s", run)
    victim = lab.triggerer_of(run) if jobs else chance.choice(["triggerer", "triggerer-2"])

    lab.processes.kill(victim)
    try:
        _ends_well(lab, dag_id, run)
    finally:
        lab.processes.start_component(victim)


@pytest.mark.parametrize("dag_id", ["deferred_retried", "deferred_resumed", "here_retried"])
@pytest.mark.parametrize("number", range(TIMES // 2))
def test_the_scheduler(lab: Lab, chance: random.Random, dag_id: str, number: int) -> None:
    run = lab.start(dag_id, f"scheduler-{dag_id}-{number}", _work(f"scheduler-{dag_id}-{number}"))
    time.sleep(chance.uniform(0, WITHIN))

    lab.processes.kill("scheduler")
    lab.processes.start_component("scheduler")

    _ends_well(lab, dag_id, run)


@pytest.mark.parametrize("dag_id", ["deferred_resumed", "here_retried"])
@pytest.mark.parametrize("number", range(TIMES))
def test_the_tasks_process(lab: Lab, chance: random.Random, dag_id: str, number: int) -> None:
    run = lab.start(dag_id, f"task-{dag_id}-{number}", _work(f"task-{dag_id}-{number}"))
    killed = 0
    while lab.processes.run_state(dag_id, run) not in ("success", "failed") and killed < 3:
        time.sleep(chance.uniform(0, 4))
        killed += _kill_process_of(lab, dag_id, run)

    _ends_well(lab, dag_id, run)


def _kill_process_of(lab: Lab, dag_id: str, run: str) -> bool:
    """Kill the process that a task has now, and none that has its number by chance."""
    seen: dict[str, Any] = lab.processes.task(dag_id, run, "job")
    pid = seen["pid"]
    if seen["state"] != "running" or pid is None or pid not in lab.processes.pids("scheduler"):
        return False
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("number", range(2))
def test_the_executors_own_process(lab: Lab, number: int) -> None:
    """Its task's process lives on for a while, beside the next try's: both are at the same job."""
    run = lab.start("here_retried", f"executor-{number}", _work(f"executor-{number}"))
    lab.wait_for_worker(run)
    task = psutil.Process(lab.processes.task("here_retried", run, "job")["pid"])

    task.parent().kill()
    _ends_well(lab, "here_retried", run)


def test_a_fault_in_every_try(lab: Lab) -> None:
    run = lab.start("deferred_resumed", "every-try", _work("every-try"))
    # Each try but the last loses its process when it is resumed: the SQL has committed long before that.
    lab.wait_for_worker(run)
    lab.wait_for_states(run, ["committed"])
    for number in range(1, 4):

        def killed(number: int = number) -> bool:
            return _is_at(lab, run, number) and _kill_process_of(lab, "deferred_resumed", run)

        lab.wait(killed, f"a process of try {number}")

    _ends_well(lab, "deferred_resumed", run)
    assert _is_at(lab, run, 4)


def _is_at(lab: Lab, run: str, number: int) -> bool:
    return bool(lab.processes.task("deferred_resumed", run, "job")["try_number"] == number)
