"""What a task is worth that runs in a real Airflow: one commit, its outcome, its errors, its limits."""

from __future__ import annotations

import pytest

from airflow_provider import compat
from tests.core.kit import count, only_long
from tests.matrix import LONG

from .conftest import EXAMPLE_DAGS, Lab

pytestmark = [pytest.mark.airflow, pytest.mark.processes, pytest.mark.slow, pytest.mark.timeout(900)]

LIKE_OTHERS = ("airflow_audit_log", "airflow_flights_etl")
"""Examples whose operators the others and the demo use in the same way: in the long form only."""
EXAMPLES_NOW = [dag_id for dag_id in EXAMPLE_DAGS if LONG or dag_id not in LIKE_OTHERS]


def _insert(run_id: str) -> str:
    return f"insert into effect (run, pid) values ('{run_id}', pg_backend_pid())"


@pytest.mark.parametrize(
    "dag_id",
    [
        "deferred_retried",
        pytest.param("deferred_resumed", marks=only_long),
        pytest.param("here_retried", marks=only_long),
    ],
)
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


@pytest.mark.parametrize("sqlstate", ["40001", pytest.param("40P01", marks=only_long)])
def test_a_conflict_is_retried_and_commits_once(lab: Lab, sqlstate: str) -> None:
    name = f"retried-{sqlstate}"
    run = lab.start("deferred_retried", name, lab.conflicting(name, sqlstate))
    lab.wait_for_try("deferred_retried", run, 2)
    lab.end_conflict(name)

    assert lab.processes.wait_for_run("deferred_retried", run) == "success"
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


@only_long
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


@pytest.mark.parametrize(
    "dag_id",
    [
        "deferred_times_out",
        "here_times_out",
        pytest.param("deferred_timeout", marks=only_long),
        pytest.param("here_timeout", marks=only_long),
    ],
)
def test_a_time_limit_ends_the_sql(lab: Lab, dag_id: str) -> None:
    run = lab.start(dag_id, f"timed-out-{dag_id}", f"{_insert(f'timed-out-{dag_id}')}; select pg_sleep(300)")
    lab.wait_for_worker(run)

    assert lab.processes.wait_for_run(dag_id, run) == "failed"
    lab.wait_for_no_worker(run)
    assert lab.effects(run) == 0


@pytest.mark.skipif(not compat.HERE.keeps_task_state, reason="this Airflow tells it from the first by nothing")
def test_a_run_that_was_deleted_and_made_again_runs_its_sql_again(lab: Lab) -> None:
    run = lab.start("deferred_retried", "made-again", _insert("made-again"))
    assert lab.processes.wait_for_run("deferred_retried", run) == "success"
    lab.processes.call("DELETE", f"/dags/deferred_retried/dagRuns/{run}")

    assert lab.start("deferred_retried", "made-again", _insert("made-again")) == run

    assert lab.processes.wait_for_run("deferred_retried", run) == "success"
    assert lab.effects(run) == 2


def test_an_xcom_is_the_same_wherever_its_task_ends(lab: Lab) -> None:
    """Airflow encodes twice what a ``TaskSuccessEvent`` takes along; ours is stored as a worker stores it."""
    told = {}
    dag_ids = ("here", "deferred", "deferred_resumed", *["started_ends"] * compat.HERE.starts_from_triggers)
    runs = {dag_id: lab.start(dag_id, f"xcom-{dag_id}", _insert(f"xcom-{dag_id}")) for dag_id in dag_ids}
    for dag_id, run in runs.items():
        assert lab.processes.wait_for_run(dag_id, run) == "success"
        told[dag_id] = lab.processes.xcom(dag_id, run, "job")

    own = {"job_id", "label", "started_at", "finished_at", "worker_pid"}
    for dag_id, value in told.items():
        assert {name: of for name, of in value.items() if name not in own} == {
            "row_count": 1, "command_tag": "INSERT", "attempt": 1, "launched": True, "proof": "receipt",
        }, dag_id  # fmt: skip
        assert {name: type(of) for name, of in value.items()} == {name: type(of) for name, of in told["here"].items()}


def test_mapped_tasks_are_jobs_of_their_own(lab: Lab) -> None:
    lab.processes.wait_for_dag("many")
    run = lab.processes.trigger_dag("many", run_id="many")

    assert lab.processes.wait_for_run("many", run, 240) == "success"
    found = lab.rows("select run, count(*) from effect where run like 'many-%%' group by run")
    assert sorted(found) == sorted((f"many-{number}", 1) for number in range(count(6, 24)))


def test_a_batch_commits_each_job_and_retries_those_that_did_not(lab: Lab) -> None:
    lab.processes.wait_for_dag("batch")
    conf = {"one": _insert("batch-one"), "two": lab.conflicting("batch-two")}
    run = lab.processes.trigger_dag("batch", run_id="batch", conf=conf)
    lab.wait_for_try("batch", run, 2)
    lab.end_conflict("batch-two")

    assert lab.processes.wait_for_run("batch", run) == "success"
    ends = lab.processes.xcom("batch", run, "job")
    assert {name: end["row_count"] for name, end in ends.items()} == {"one": 1, "two": 0}
    assert ends["two"]["label"] == f"two {run}"
    assert ends["one"]["launched"] is False, "it had committed in the first try"
    assert (lab.effects("batch-one"), lab.effects("batch-two")) == (1, 1)


def test_a_sensor_waits_for_a_job_that_is_not_there_yet(lab: Lab) -> None:
    lab.processes.wait_for_dag("sensor")
    waiting = lab.processes.trigger_dag("sensor", run_id="sensing", conf={"label": "waited-for"})
    lab.processes.wait_for_task("sensor", waiting, "job", ["deferred"])

    lab.start("deferred", "waited-for", f"{_insert('waited-for')}; select pg_sleep(2)")

    assert lab.processes.wait_for_run("sensor", waiting) == "success"
    (job,) = lab.processes.xcom("sensor", waiting, "job")
    assert (job["label"], job["state"]) == ("waited-for", "committed")


@only_long
def test_a_sensor_fails_with_the_error_of_the_job(lab: Lab) -> None:
    lab.processes.wait_for_dag("sensor")
    waiting = lab.processes.trigger_dag("sensor", run_id="sensing-in-vain", conf={"label": "waited-for-in-vain"})
    lab.processes.wait_for_task("sensor", waiting, "job", ["deferred"])
    run = lab.start("deferred", "waited-for-in-vain", "select 1/0")
    assert lab.processes.wait_for_run("deferred", run) == "failed"

    assert lab.processes.wait_for_run("sensor", waiting) == "failed"
    assert lab.processes.task("sensor", waiting, "job")["try_number"] < 3, "retries were left"
    assert "SQLSTATE 22012: division by zero" in lab.processes.task_log("sensor", waiting, "job", 1)


@only_long
def test_used_up_worker_slots_are_waited_for_without_a_try(lab: Lab) -> None:
    lab.processes.wait_for_dag("deferred_retried")
    with lab.slots_used_up() as free:
        run = lab.start("deferred_retried", "no-slot", _insert("no-slot"))
        lab.processes.wait_for_task("deferred_retried", run, "job", ["deferred"])
        lab.wait(
            lambda: "waiting for a worker slot" in lab.processes.task_log("deferred_retried", run, "job", 1),
            "the log to say what is waited for",
        )
        assert lab.effects(run) == 0
        free()

    # Not "in the first try": a busy Airflow may lose one by itself (docs/airflow.md, Sizing).
    assert lab.processes.wait_for_run("deferred_retried", run) == "success"
    assert lab.processes.xcom("deferred_retried", run, "job")["attempt"] == 1
    assert lab.effects(run) == 1


@pytest.fixture(scope="module")
def examples(lab: Lab) -> dict[str, str]:
    """A run of each example, all side by side: they share no table."""
    for dag_id in EXAMPLES_NOW:
        lab.processes.wait_for_dag(dag_id)
    return {dag_id: lab.processes.trigger_dag(dag_id) for dag_id in EXAMPLES_NOW}


@pytest.mark.parametrize(
    "dag_id",
    [pytest.param(dag_id, marks=only_long) if dag_id in LIKE_OTHERS else dag_id for dag_id in EXAMPLE_DAGS],
)
def test_every_example_runs(lab: Lab, examples: dict[str, str], dag_id: str) -> None:
    run = examples[dag_id]

    assert lab.processes.wait_for_run(dag_id, run, 300) == "success", lab.processes.task_states(dag_id, run)


@only_long
@pytest.mark.timeout(1500)
def test_three_hundred_deferred_tasks_share_twenty_slots(lab: Lab) -> None:
    dag_id = "crowd"
    lab.processes.wait_for_dag(dag_id)
    lab.rows("delete from effect where run like 'crowd-%%' returning 1")
    held, deferred = [0], [0]

    def finished() -> bool:
        query = "select count(*) from pg_stat_activity where application_name like 'pgbg:%%'"
        held.append(int(lab.rows(query)[0][0]))
        deferred.append(list(lab.processes.task_states(dag_id, run).values()).count("deferred"))
        return lab.processes.run_state(dag_id, run) in ("success", "failed")

    with lab.slots_used_up(spare=20):
        run = lab.processes.trigger_dag(dag_id)
        lab.wait(finished, "the end of all tasks", 1400)

    print(f"at most {max(deferred)} deferred at once, over {max(held)} connections at most, of two triggerers")
    assert set(lab.processes.task_states(dag_id, run).values()) == {"success"}
    found = lab.rows("select run, count(*) from effect where run like 'crowd-%%' group by run")
    assert sorted(found) == sorted((f"crowd-{number}", 1) for number in range(300))
    assert 0 < max(held) <= 20
