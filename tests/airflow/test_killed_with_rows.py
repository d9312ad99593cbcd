"""``kill -9`` of a task's processes that asked for rows: who comes next has the same ones, of one run of the SQL."""

from __future__ import annotations

import json
import os
import signal
from typing import Any

import pytest
from airflow.sdk.serde import deserialize

from tests.core.kit import only_long

from .conftest import Lab

pytestmark = [pytest.mark.airflow, pytest.mark.processes, pytest.mark.slow, only_long]
pytestmark += [pytest.mark.timeout(900)]

ROWS = 1000


def _work(run_id: str, seconds: int) -> str:
    """Rows that no second run would give again."""
    return (
        f"insert into effect (run, pid) values ('{run_id}', pg_backend_pid()); select pg_sleep({seconds});"
        f" select g, gen_random_uuid()::text, pg_backend_pid() from generate_series(1, {ROWS}) g"
    )


def _kept(lab: Lab, run: str) -> tuple[int, int, int]:
    """How many receipts, sets of rows and rows there are of a run, in one look."""
    query = (
        "select count(distinct r.job_digest), count(distinct s.job_digest), coalesce(sum(c.row_count), 0)::int"
        " from pgbg.job j join pgbg.receipt r using (owner, job_digest)"
        " left join pgbg.row_set s on s.job_digest = r.job_digest"
        " left join pgbg.row_chunk c on c.job_digest = s.job_digest"
        " where j.label = %s"
    )
    ((receipts, sets, rows),) = lab.rows(query, run)
    return receipts, sets, rows


def _result(lab: Lab, dag_id: str, run: str) -> Any:
    """The task's result as another task gets it: asked for by value, the API makes one text of each tuple."""
    path = f"/dags/{dag_id}/dagRuns/{run}/taskInstances/job/xcomEntries/return_value?deserialize=false"
    value = lab.processes.call("GET", path)["value"]
    return deserialize(json.loads(value) if isinstance(value, str) else value)


def _ends_with_the_rows(lab: Lab, dag_id: str, run: str, worker: int) -> None:
    """The run ends well; until then the rows were there exactly when the receipt was. They are the task's result."""
    seen = set()

    def has_ended() -> bool:
        seen.add(_kept(lab, run))
        return lab.processes.run_state(dag_id, run) in ("success", "failed")

    lab.wait(has_ended, f"the end of {run}", 240)
    assert lab.processes.run_state(dag_id, run) == "success", lab.processes.task_log(dag_id, run, "job", 1)
    assert seen <= {(0, 0, 0), (1, 1, ROWS)}
    assert lab.rows("select pid from effect where run = %s", run) == [(worker,)]
    assert lab.states(run) == ["committed"]
    assert _kept(lab, run) == (1, 1, ROWS)
    told = _result(lab, dag_id, run)
    assert [(number, pid) for number, _, pid in told] == [(number, worker) for number in range(1, ROWS + 1)]
    ((values,),) = lab.rows(
        "select c.cells from pgbg.job j join pgbg.row_chunk c using (owner, job_digest) where j.label = %s", run
    )
    assert [uuid for _, uuid, _ in told] == values[ROWS : 2 * ROWS]


def test_a_triggerer_while_the_job_is_at_work(lab: Lab) -> None:
    run = lab.start("deferred_rows", "rows-triggerer", _work("rows-triggerer", 30))
    worker = lab.wait_for_worker(run)
    busy = lab.triggerer_of(run)

    lab.processes.kill(busy)
    try:
        assert _kept(lab, run) == (0, 0, 0)
        _ends_with_the_rows(lab, "deferred_rows", run, worker)
    finally:
        lab.processes.start_component(busy)


def test_both_triggerers_and_the_job_commits_while_there_is_none(lab: Lab) -> None:
    run = lab.start("deferred_rows", "rows-no-triggerer", _work("rows-no-triggerer", 8))
    worker = lab.wait_for_worker(run)
    triggerers = [name for name in lab.processes.components if name.startswith("triggerer")]

    for name in triggerers:
        lab.processes.kill(name)
    try:
        lab.wait_for_states(run, ["committed"])
        assert _kept(lab, run) == (1, 1, ROWS)
    finally:
        for name in triggerers:
            lab.processes.start_component(name)
    _ends_with_the_rows(lab, "deferred_rows", run, worker)


def test_the_tasks_own_process_while_the_job_is_at_work(lab: Lab) -> None:
    run = lab.start("here_rows", "rows-task", _work("rows-task", 20))
    worker = lab.wait_for_worker(run)

    os.kill(lab.processes.task("here_rows", run, "job")["pid"], signal.SIGKILL)

    assert _kept(lab, run) == (0, 0, 0)
    _ends_with_the_rows(lab, "here_rows", run, worker)
    assert lab.processes.task("here_rows", run, "job")["try_number"] == 2


@pytest.mark.parametrize("dag_id", ["here_rows_handled", "deferred_rows_handled"])
def test_the_tasks_process_in_its_handler(lab: Lab, dag_id: str) -> None:
    """The job is committed, and its rows are read."""
    run = lab.start(dag_id, f"rows-handler-{dag_id}", _work(f"rows-handler-{dag_id}", 1))

    def handles() -> bool:
        rows = lab.rows(
            "select c.cells[%s] from pgbg.job j join pgbg.row_chunk c using (owner, job_digest) where j.label = %s",
            ROWS + 1, run,
        )  # fmt: skip
        return bool(rows) and (lab.processes.home / f"handled-{rows[0][0]}").exists()

    lab.wait(handles, f"the handler of {run}", 120)
    task = lab.processes.task(dag_id, run, "job")
    (worker,) = (pid for (pid,) in lab.rows("select pid from effect where run = %s", run))
    assert (task["state"], task["try_number"]) == ("running", 1)
    os.kill(task["pid"], signal.SIGKILL)

    _ends_with_the_rows(lab, dag_id, run, worker)
    assert lab.processes.task(dag_id, run, "job")["try_number"] == 2
