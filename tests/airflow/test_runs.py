"""What a task is worth that runs in a real Airflow: one commit, its outcome, its errors, its limits."""

from __future__ import annotations

import pytest

from .conftest import EXAMPLES, Lab

pytestmark = [pytest.mark.airflow, pytest.mark.processes, pytest.mark.slow, pytest.mark.xdist_group("airflow")]


def _insert(run_id: str) -> str:
    return f"insert into effect (run, pid) values ('{run_id}', pg_backend_pid())"


@pytest.mark.parametrize("dag_id", ["deferred_retried", "here_retried"])
def test_the_outcome_is_xcom(lab: Lab, dag_id: str) -> None:
    run = lab.start(dag_id, f"outcome-{dag_id}", _insert(f"outcome-{dag_id}"))

    assert lab.processes.wait_for_run(dag_id, run) == "success"
    outcome = lab.processes.xcom(dag_id, run, "job")
    (pid,) = lab.rows("select pid from effect where run = %s", run)[0]
    assert outcome["row_count"] == 1
    assert outcome["command_tag"] == "INSERT"
    assert outcome["label"] == run
    assert outcome["worker_pid"] == pid
    assert outcome["job_id"].startswith(f"airflow:{dag_id}/{run}/job/-1#")
    assert set(outcome) == {
        "job_id", "label", "row_count", "command_tag", "started_at", "finished_at", "worker_pid", "attempt",
        "launched", "proof",
    }  # fmt: skip


def test_a_serialization_failure_is_retried_and_commits_once(lab: Lab) -> None:
    # A sequence is not rolled back, so it counts the tries.
    sql = (
        f"{_insert('retried')}; do $$ begin if nextval('tries') < 3 then"
        " raise exception 'could not serialize' using errcode = '40001'; end if; end $$"
    )
    run = lab.start("deferred_retried", "retried", sql)

    assert lab.processes.wait_for_run("deferred_retried", run) == "success"
    assert lab.processes.task("deferred_retried", run, "job")["try_number"] == 3
    assert lab.effects(run) == 1
    assert lab.states(run) == ["committed"], "automatic retries share one job"


def test_a_division_by_zero_fails_at_once(lab: Lab) -> None:
    run = lab.start("deferred_retried", "divided", "select 1/0")

    assert lab.processes.wait_for_run("deferred_retried", run) == "failed"
    tries = lab.processes.task("deferred_retried", run, "job")["try_number"]
    assert tries < 4, "retries were left"
    log = lab.processes.task_log("deferred_retried", run, "job", tries)
    assert "it would fail in the same way again" in log
    assert "SQLSTATE 22012: division by zero" in log
    assert "Nothing of this job is committed." in log


def test_a_database_without_the_extension_is_named_and_not_retried(lab: Lab) -> None:
    run = lab.start("no_extension", "no-extension", "select 1")

    assert lab.processes.wait_for_run("no_extension", run) == "failed"
    # Not tried again for this error; a busy Airflow may lose a try by itself (docs/airflow.md, Retries).
    tries = lab.processes.task("no_extension", run, "job")["try_number"]
    assert tries < 4, "retries were left"
    log = lab.processes.task_log("no_extension", run, "job", tries)
    assert "ExtensionMissing: pg_background is not installed" in log
    assert "CREATE EXTENSION pg_background" in log
    assert "SQLExecuteQueryOperator" in log


@pytest.mark.parametrize("dag_id", ["deferred_times_out", "here_times_out"])
def test_execution_timeout_ends_the_sql(lab: Lab, dag_id: str) -> None:
    run = lab.start(dag_id, f"timed-out-{dag_id}", f"{_insert(f'timed-out-{dag_id}')}; select pg_sleep(300)")
    lab.wait_for_worker(run)

    assert lab.processes.wait_for_run(dag_id, run) == "failed"
    lab.wait_for_no_worker(run)
    assert lab.effects(run) == 0


def test_a_run_that_was_deleted_and_made_again_runs_its_sql_again(lab: Lab) -> None:
    run = lab.start("deferred_retried", "made-again", _insert("made-again"))
    assert lab.processes.wait_for_run("deferred_retried", run) == "success"
    lab.processes.call("DELETE", f"/dags/deferred_retried/dagRuns/{run}")

    assert lab.start("deferred_retried", "made-again", _insert("made-again")) == run

    assert lab.processes.wait_for_run("deferred_retried", run) == "success"
    assert lab.effects(run) == 2


def test_mapped_tasks_are_jobs_of_their_own(lab: Lab) -> None:
    lab.processes.wait_for_dag("many")
    run = lab.processes.trigger_dag("many", run_id="many")

    assert lab.processes.wait_for_run("many", run, 240) == "success"
    # Nobody reads their outcomes, so the trigger ended the tasks: their log has no line of a worker that resumed them.
    assert "Trigger fired event" in (log := lab.processes.task_log("many", run, "job", 1, 5))
    assert "worker pid" not in log
    found = lab.rows("select run, count(*) from effect where run like 'many-%%' group by run")
    assert sorted(found) == sorted((f"many-{number}", 1) for number in range(24))


@pytest.mark.parametrize("dag_id", sorted(path.stem for path in EXAMPLES.glob("airflow_*.py")))
def test_every_example_runs(lab: Lab, dag_id: str) -> None:
    lab.processes.wait_for_dag(dag_id)
    run = lab.processes.trigger_dag(dag_id)

    assert lab.processes.wait_for_run(dag_id, run, 200) == "success", lab.processes.task_states(dag_id, run)
