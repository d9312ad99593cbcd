"""Tasks that begin in the triggerer: what holds in a real Airflow, and what is refused when a DAG file is parsed."""

from __future__ import annotations

from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
from airflow.sdk import DAG

from airflow_provider.identity import identify_try
from airflow_provider.operators import PgBackgroundBatchOperator, PgBackgroundOperator
from airflow_provider.triggers import PgBackgroundStartTrigger
from tests.core.kit import only_long

from .conftest import Lab

pytestmark = pytest.mark.airflow


class Try:
    """A task instance, as a triggerer has it."""

    dag_id, task_id, run_id, map_index = "books", "close", "q1", -1

    def __init__(self, seconds: float, try_number: int = 1) -> None:
        self.id = UUID(int=(int(seconds * 1000) << 80) | (7 << 76) | (0x8 << 60) | try_number)
        self.try_number = try_number


class TestParsing:
    def test_the_scheduler_is_told_all_that_the_operator_was(self) -> None:
        operator = PgBackgroundOperator(
            task_id="close",
            sql="insert into closed values ('{{ ds }}')",
            label="close {{ ds }}",
            timeout=timedelta(hours=1),
            poll_interval=2,
            slot_timeout=60,
            start_from_trigger=True,
        )
        told = operator.start_trigger_args

        assert operator.deferrable, "dag.test() and a worker defer it"
        assert told is not None
        trigger = PgBackgroundStartTrigger(**(told.trigger_kwargs or {}))
        assert trigger.serialize() == (told.trigger_cls, {**(told.trigger_kwargs or {}), "deadline": None})
        assert (trigger.worker_label, trigger.poll_interval, trigger.slot_timeout) == ("close {{ ds }}", 2, 60)
        assert told.timeout == timedelta(hours=1, seconds=5)

    def test_each_option_reaches_the_trigger(self) -> None:
        """One that is forgotten on the way would be silently ignored."""
        operator = PgBackgroundOperator(task_id="t", sql="select 1", start_from_trigger=True)
        assert operator.start_trigger_args is not None
        told = set(operator.start_trigger_args.trigger_kwargs or {})

        # The deadline is made of Airflow's own, which `timeout` sets.
        assert told == set(PgBackgroundStartTrigger.arguments) - {"deadline"}

    @pytest.mark.parametrize(
        ("options", "why"),
        [
            ({"retries": 1}, "retries=1"),
            ({"sql": ["select %s", b"x"]}, "bytes"),
            ({"parameters": [object()]}, "parameter 1"),
            ({"parameters": {"day": {1}}}, "parameter 'day'"),
            ({"parameters": {"both": ["{{ ds }}", object()]}}, "parameter 'both'"),
            ({"parameters": {"text": "\0"}}, "a text that cannot be stored"),
            ({"settings": {"a": object()}}, "the setting 'a'"),
            ({"slot_timeout": timedelta(1)}, "slot_timeout is or holds a timedelta"),
        ],
    )
    def test_what_is_not_sound_is_refused(self, options: dict[str, Any], why: str) -> None:
        with pytest.raises(ValueError, match=why) as caught:
            PgBackgroundOperator(**{"task_id": "t", "sql": "select 1", "start_from_trigger": True, **options})

        assert "Leave start_from_trigger out" in str(caught.value)

    def test_retries_of_the_dags_defaults_count(self) -> None:
        with DAG("d", schedule=None, default_args={"retries": 2}), pytest.raises(ValueError, match="durable=False"):
            PgBackgroundOperator(task_id="t", sql="select 1", start_from_trigger=True)

    def test_a_batch_is_refused(self) -> None:
        with pytest.raises(ValueError, match="put together on a worker"):
            PgBackgroundBatchOperator(task_id="t", jobs={"a": "select 1"}, start_from_trigger=True)

    def test_a_decorated_function_is_refused(self) -> None:
        from airflow.sdk import task

        @task.pg_background(start_from_trigger=True)
        def compose() -> str:
            return "select 1"

        with DAG("d", schedule=None), pytest.raises(ValueError, match="put together on a worker"):
            compose()

    @pytest.mark.filterwarnings("ignore:Task .* was never mapped")
    @pytest.mark.parametrize("where", ["partial", "default_args"])
    def test_mapped_tasks_are_refused(self, where: str) -> None:
        given = {"start_from_trigger": True}
        with (
            DAG("d", schedule=None, default_args=given if where == "default_args" else {}),
            pytest.raises(ValueError, match="starts no mapped task"),
        ):
            PgBackgroundOperator.partial(task_id="t", **(given if where == "partial" else {})).expand(sql=["select 1"])


class TestIdentity:
    def test_a_later_try_is_a_later_generation_of_the_same_series(self) -> None:
        first, second = identify_try(Try(1_700_000_000)), identify_try(Try(1_700_000_000, try_number=2))

        assert first.series == second.series == "airflow:books/q1/close/-1"
        assert first.job_id != second.job_id
        assert first.generation < second.generation < identify_try(Try(1_700_000_000.1)).generation

    def test_it_is_later_than_what_ran_on_a_worker_before(self) -> None:
        from airflow_provider.identity import FIRST_RUN, identify

        on_a_worker = identify(
            {"ti": Mapped(Try(0), max_tries=3), "task_state_store": {FIRST_RUN: 1_700_000_000}}, durable=True
        )

        assert identify_try(Try(1_700_000_001)).generation > on_a_worker.generation


class Mapped:
    """A task instance as a worker has it."""

    def __init__(self, ti: Try, max_tries: int) -> None:
        self.dag_id, self.run_id, self.task_id, self.map_index = ti.dag_id, ti.run_id, ti.task_id, ti.map_index
        self.max_tries, self.try_number = max_tries, 1


def _insert(run_id: str) -> str:
    return f"insert into effect (run, pid) values ('{run_id}', pg_backend_pid())"


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.timeout(900)
class TestInARealAirflow:
    def test_it_succeeds_and_the_worker_is_told_the_outcome(self, lab: Lab) -> None:
        run = lab.start("started", "started", _insert("started"))

        assert lab.processes.wait_for_run("started", run) == "success"
        outcome = lab.processes.xcom("started", run, "job")
        assert outcome["row_count"] == 1
        assert outcome["job_id"].startswith("airflow:started/started/job/-1#")
        assert lab.effects(run) == 1
        (by,) = lab.rows("select launched_by from pgbg.jobs where label = %s", run)[0]
        pids = [pid for name in lab.processes.components if "triggerer" in name for pid in lab.processes.pids(name)]
        assert int(by.rpartition("/")[2]) in pids

    def test_without_any_worker_from_a_template_file(self, lab: Lab) -> None:
        """The file begins with a byte-order mark, which is dropped."""
        lab.processes.wait_for_dag("started_from_file")
        run = lab.processes.trigger_dag("started_from_file", run_id="from-file")

        assert lab.processes.wait_for_run("started_from_file", run) == "success"
        assert lab.effects(run) == 1
        assert lab.processes.xcom("started_from_file", run, "job")["label"] == run
        assert lab.processes.task("started_from_file", run, "job")["pid"] is None, "no worker had it"

    @only_long
    def test_an_automatic_retry_commits_once_more_only_if_the_try_before_did_not(self, lab: Lab) -> None:
        run = lab.start("started_retried", "started-retried", lab.conflicting("started-retried"))
        lab.wait_for_try("started_retried", run, 2)
        lab.end_conflict("started-retried")

        assert lab.processes.wait_for_run("started_retried", run) == "success"
        assert lab.states(run)[-1] == "committed"
        assert lab.effects(run) == 1

    @only_long
    def test_an_error_is_the_tasks(self, lab: Lab) -> None:
        run = lab.start("started_ends", "started-divided", "select 1/0")

        assert lab.processes.wait_for_run("started_ends", run) == "failed"
        assert "SQLSTATE 22012: division by zero" in lab.processes.task_log("started_ends", run, "job", 1)

    def test_a_mark_cancels_its_worker(self, lab: Lab) -> None:
        run = lab.start("started", "started-marked", f"{_insert('started-marked')}; select pg_sleep(300)")
        lab.wait_for_worker(run)

        lab.processes.mark("started", run, "job", "failed")

        lab.wait_for_no_worker(run)
        lab.wait_for_states(run, ["cancelled"])

    @only_long
    def test_a_clear_runs_it_again_after_the_old_worker(self, lab: Lab) -> None:
        run = lab.start("started", "started-cleared", f"{_insert('started-cleared')}; select pg_sleep(12)")
        lab.wait_for_worker(run)

        lab.processes.clear("started", run, ["job"])

        assert lab.processes.wait_for_run("started", run) == "success"
        assert lab.effects(run) == 1
        assert lab.states(run)[-1] == "committed"

        lab.processes.clear("started", run, ["job"])
        lab.wait(lambda: lab.effects(run) == 2, "the second wanted run of it", 120)

    @only_long
    def test_another_triggerer_goes_on_with_it(self, lab: Lab) -> None:
        run = lab.start("started", "started-killed", f"{_insert('started-killed')}; select pg_sleep(30)")
        worker = lab.wait_for_worker(run)
        busy = lab.triggerer_of(run)

        lab.processes.kill(busy)
        try:
            assert lab.processes.wait_for_run("started", run) == "success"
        finally:
            lab.processes.start_component(busy)
        assert lab.rows("select pid from effect where run = %s", run) == [(worker,)]

    @only_long
    def test_execution_timeout_ends_the_sql(self, lab: Lab) -> None:
        run = lab.start("started_times_out", "started-late", f"{_insert('started-late')}; select pg_sleep(300)")
        lab.wait_for_worker(run)

        assert lab.processes.wait_for_run("started_times_out", run) == "failed"
        lab.wait_for_no_worker(run)
        assert lab.states(run) == ["cancelled"]
        assert "DeadlinePassed" in lab.processes.task_log("started_times_out", run, "job", 1)
