"""A task that is marked in the seconds after its triggerer was killed, in a real Airflow: nobody is told of it."""

from __future__ import annotations

import pytest

from tests.core.kit import count, only_long

from .conftest import Lab

pytestmark = [pytest.mark.airflow, pytest.mark.processes, pytest.mark.slow, pytest.mark.timeout(900)]


def _long(run_id: str, seconds: int = 300) -> str:
    return f"insert into effect (run, pid) values ('{run_id}', pg_backend_pid()); select pg_sleep({seconds})"


@pytest.mark.parametrize(
    "beside",
    [pytest.param(True, id="another waits"), pytest.param(False, id="nobody waits", marks=only_long)],
)
def test_marked_right_after_its_triggerer_was_killed(lab: Lab, beside: bool) -> None:
    """The triggerer that is left drops its trigger, and finds its worker, whether another task waits in it or not."""
    name = f"orphan-{beside}"
    run = lab.start("deferred", name, _long(name))
    lab.wait_for_worker(run)
    busy = lab.triggerer_of(run)
    healthy = None
    if beside:
        healthy = lab.start("deferred_retried", "orphan-not", _long("orphan-not", count(30, 60)))
        lab.wait_for_worker(healthy)

    lab.processes.kill(busy)
    try:
        lab.processes.mark("deferred", run, "job", "failed")
        lab.wait_for_no_worker(run)
    finally:
        lab.processes.start_component(busy)

    lab.wait_for_states(run, ["cancelled"])
    ((cause, reason),) = lab.rows("select cause, reason from pgbg.jobs where label = %s", run)
    assert cause == "run gone", reason
    assert "the Airflow task is failed, and the launcher " in reason
    assert lab.effects(run) == 0
    if healthy is not None:
        assert lab.processes.wait_for_run("deferred_retried", healthy) == "success"
        assert lab.effects(healthy) == 1
        assert lab.states(healthy) == ["committed"]
