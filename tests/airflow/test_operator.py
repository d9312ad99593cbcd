"""The operator without a server: what it hands to its trigger, what it refuses, what it makes of an event."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from typing import Any
from unittest.mock import MagicMock

import pytest
from airflow.listeners import hookimpl
from airflow.sdk import DAG, Asset
from airflow.sdk.exceptions import TaskDeferred
from airflow.sdk.listener import ListenerManager
from pytest_mock import MockerFixture

from airflow_provider import PgBackgroundBatchOperator, PgBackgroundOperator, PgBackgroundTrigger, SqlStateRetryPolicy
from airflow_provider import events as event_of
from airflow_provider.get_provider_info import get_provider_info
from airflow_provider.identity import FIRST_RUN, identify
from airflow_provider.triggers import PgBackgroundBatchTrigger
from pgbg_orchestration import ErrorFields, Outcome, errors
from pgbg_orchestration.labels import VISIBLE, worker_name
from pgbg_orchestration.outcome import Cause

pytestmark = pytest.mark.airflow


@pytest.fixture(autouse=True)
def _connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """A task that defers looks whether there is its connection."""
    for name in ("POSTGRES_DEFAULT", "BOOKS"):
        monkeypatch.setenv(f"AIRFLOW_CONN_{name}", "postgres://airflow@db/books")


BEGAN = datetime(2013, 4, 1, 3, 0, tzinfo=UTC)


class Store(dict[str, Any]):
    """Airflow's task state store, which lives as long as the task instance's row."""

    def set(self, key: str, value: Any, *, retention: timedelta | None = None) -> None:
        self[key] = value


def context(*, try_number: int = 1, max_tries: int = 0, store: Store | None = None, **ti: Any) -> Any:
    told = {"dag_id": "books", "run_id": "q1", "task_id": "close", "map_index": -1, "start_date": BEGAN, **ti}
    return {
        "ti": MagicMock(try_number=try_number, max_tries=max_tries, **told),
        "task_state_store": Store() if store is None else store,
    }


def deferred(operator: PgBackgroundOperator, given: Any = None) -> TaskDeferred:
    with pytest.raises(TaskDeferred) as caught:
        operator.execute(given or context())
    return caught.value


class TestImports:
    @pytest.mark.parametrize(
        ("module", "name"), [("operators", "Operator"), ("operators", "BatchOperator"), ("sensors", "Sensor")]
    )
    def test_a_dag_file_pays_for_nothing_but_what_it_names(self, module: str, name: str) -> None:
        """Neither a driver, nor a hook, nor triggers, nor the core: each of them costs more than all of this."""
        code = (
            f"import sys, airflow.sdk; known = set(sys.modules); import airflow_provider.{module}\n"
            f"airflow_provider.{module}.PgBackground{name}\n"
            "print(*sorted(set(sys.modules) - known))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        imported = set(done.stdout.split()) - {
            "airflow.sdk.bases.operatorlink", "airflow.sdk.bases.sensor", "airflow.sdk.definitions.retry_policy",
        }  # fmt: skip

        assert imported <= {
            f"airflow_provider{name}"
            for name in (
                "", ".arguments", ".compat", ".events", ".identity", ".link", ".operators", ".operators.batch",
                ".operators.end", ".operators.job", ".operators.start", ".parse_checks", ".retry_policy", ".sensors",
                ".templates", ".watch",
            )
        }  # fmt: skip

    def test_the_provider_info_is_valid(self) -> None:
        from importlib import resources

        import jsonschema  # type: ignore[import-untyped]

        schema = json.loads(resources.files("airflow").joinpath("provider_info.schema.json").read_text())

        jsonschema.validate(get_provider_info(), schema)

    def test_the_decorator_is_found_under_its_name(self) -> None:
        from airflow.sdk import task

        assert callable(task.pg_background)


class TestIdentity:
    def test_automatic_retries_share_a_job(self) -> None:
        store = Store()
        first = identify(context(try_number=1, max_tries=3, store=store))

        assert identify(context(try_number=2, max_tries=3, store=store)) == first

    def test_a_clear_starts_a_later_generation_of_the_same_series(self) -> None:
        store = Store()
        first = identify(context(try_number=1, max_tries=3, store=store))
        cleared = identify(context(try_number=2, max_tries=4, store=store))

        assert cleared.series == first.series == "airflow:books/q1/close/-1"
        assert cleared.generation > first.generation
        assert cleared.job_id != first.job_id

    def test_a_run_made_again_under_the_same_id_is_later_than_any_clear_of_the_old_one(self) -> None:
        old, new = Store({FIRST_RUN: 1_000}), Store({FIRST_RUN: 1_001})

        assert (
            identify(context(max_tries=0, store=new)).generation > identify(context(max_tries=99, store=old)).generation
        )

    def test_without_durability_each_try_is_a_job(self) -> None:
        store = Store()
        first = identify(context(try_number=1, max_tries=3, store=store), durable=False)
        second = identify(context(try_number=2, max_tries=3, store=store), durable=False)

        assert second.generation > first.generation
        assert second.job_id != first.job_id

    def test_a_store_that_fails_fails_the_try(self) -> None:
        store = MagicMock()
        store.get.side_effect = RuntimeError("the API server is away")

        with pytest.raises(RuntimeError, match="away"):
            identify(context(store=store))


@pytest.fixture
def listeners(mocker: MockerFixture) -> Any:
    """The listeners of an Airflow that has none but those of its examples."""
    from airflow.example_dags.plugins import event_listener
    from airflow.sdk._shared.listeners.spec import taskinstance

    manager: Any = ListenerManager()  # type: ignore[no-untyped-call]
    manager.add_hookspecs(taskinstance)
    manager.add_listener(event_listener)
    mocker.patch("airflow.sdk.listener.get_listener_manager", return_value=manager)
    return manager


@pytest.mark.usefixtures("listeners")
class TestDeferring:
    def test_the_job_travels_in_the_triggers_arguments(self) -> None:
        operator = PgBackgroundOperator(
            task_id="close",
            sql=["select 1", "select 2"],
            parameters=None,
            label="close the quarter",
            settings={"work_mem": "64MB"},
            role="bookkeeper",
            isolation="serializable",
            postgres_conn_id="books",
            deferrable=True,
        )
        trigger = deferred(operator).trigger

        assert isinstance(trigger, PgBackgroundTrigger)
        assert trigger.postgres_conn_id == "books"
        assert {name: trigger.job[name] for name in ("sql", "label", "settings", "role", "isolation")} == {
            "sql": ["select 1", "select 2"],
            "label": "close the quarter",
            "settings": {"work_mem": "64MB"},
            "role": "bookkeeper",
            "isolation": "serializable",
        }
        assert trigger.job["series"] == "airflow:books/q1/close/-1"

    @pytest.mark.parametrize(
        ("options", "ends"),
        [
            ({}, True),
            ({"do_xcom_push": False}, True),
            ({"end_from_trigger": False}, False),
            ({"outlets": [Asset("books")]}, False),
            ({"on_success_callback": print}, False),
            ({"multiple_outputs": True}, False),
            ({"multiple_outputs": True, "do_xcom_push": False}, True),
            ({"post_execute": print}, False),
            ({"end_from_trigger": True, "post_execute": print}, True),
            ({"end_from_trigger": True, "outlets": [Asset("books")]}, False),
            ({"end_from_trigger": True, "on_success_callback": print}, False),
        ],
    )
    def test_the_trigger_ends_a_task_that_has_nothing_left_to_do(
        self, listeners: Any, options: dict[str, Any], ends: bool
    ) -> None:
        trigger = deferred(PgBackgroundOperator(task_id="t", sql="select 1", deferrable=True, **options)).trigger

        assert isinstance(trigger, PgBackgroundTrigger)
        assert trigger.end_task is ends

    def test_with_a_listener_a_worker_ends_the_task(self, listeners: Any) -> None:
        class Listener:
            @hookimpl
            def on_task_instance_success(self, task_instance: Any) -> None: ...

        listeners.add_listener(Listener())
        operator = PgBackgroundOperator(task_id="t", sql="select 1", deferrable=True)

        assert deferred(operator).trigger.end_task is False

    def test_a_subclass_that_goes_on_is_resumed(self, listeners: Any) -> None:

        class AndThen(PgBackgroundOperator):  # type: ignore[misc]  # the package imports it when it is first used
            def execute_complete(self, context: Any, event: dict[str, Any] | None = None) -> dict[str, Any]:
                return {"and": "then"}

        assert deferred(AndThen(task_id="t", sql="select 1", deferrable=True)).trigger.end_task is False

    def test_a_task_whose_xcom_is_mapped_over_is_resumed(self, listeners: Any) -> None:
        with DAG("d", schedule=None):
            operator = PgBackgroundOperator(task_id="t", sql="select 1", deferrable=True)
            PgBackgroundOperator.partial(task_id="each").expand(sql=operator.output)

        assert deferred(operator).trigger.end_task is False

    def test_another_copy_of_the_trigger_does_the_same(self) -> None:
        trigger = deferred(PgBackgroundOperator(task_id="t", sql="select 1", timeout=60, deferrable=True)).trigger
        path, arguments = trigger.serialize()
        from airflow.sdk.serde import deserialize, serialize

        stored: Any = deserialize(serialize(arguments))
        copy = PgBackgroundTrigger(**stored)

        assert path == "airflow_provider.triggers.PgBackgroundTrigger"
        assert copy.serialize() == trigger.serialize()

    def test_arguments_of_a_newer_release_are_ignored(self) -> None:
        trigger = PgBackgroundTrigger(job={"id": "a", "sql": "select 1"}, something_new=1)

        assert "something_new" not in trigger.serialize()[1]

    def test_neither_trigger_shows_its_sql(self) -> None:
        job = {"id": "a", "sql": "select 'secret'", "label": "a", "series": "a"}

        assert "secret" not in repr(PgBackgroundTrigger(job=job))
        assert "secret" not in repr(PgBackgroundBatchTrigger(jobs={"one": job}))

    def test_the_deadline_is_the_nearer_of_timeout_and_execution_timeout(self) -> None:
        now = datetime.now(UTC)
        operator = PgBackgroundOperator(
            task_id="t", sql="select 1", timeout=3600, execution_timeout=timedelta(seconds=60), deferrable=True
        )
        raised = deferred(operator, context(start_date=now))

        assert raised.trigger.deadline == now + timedelta(seconds=60)
        assert raised.timeout is not None
        assert raised.timeout > timedelta(minutes=5), "Airflow's own timeout loses the error, so it comes later"

    def test_without_limits_nothing_ends_the_waiting(self) -> None:
        raised = deferred(PgBackgroundOperator(task_id="t", sql="select 1", deferrable=True))

        assert raised.trigger.deadline is None
        assert raised.timeout is None

    def test_a_long_label_keeps_its_end(self) -> None:
        operator = PgBackgroundOperator(task_id="ß" * 60 + "_end", sql="select 1", deferrable=True)
        label = deferred(operator).trigger.job["label"]

        assert len(label.encode()) <= 64
        assert label.endswith("ß_end")

    def test_long_names_of_one_dag_are_told_apart_where_the_server_shows_them(self) -> None:
        names = [f"load_the_table_of_{table}_of_the_düsseldorf_office" for table in ("orders", "customers")]
        labels = [
            deferred(PgBackgroundOperator(task_id=name, sql="select 1", deferrable=True)).trigger.job["label"]
            for name in names
        ]

        assert len({worker_name(label, 4711) for label in labels}) == 2

    def test_a_mapped_tasks_label_tells_its_map_index(self) -> None:
        operator = PgBackgroundOperator(task_id="a_task_of_a_name_that_is_far_too_long_to_be_seen", sql="select 1")
        operator.deferrable = True
        labels = [deferred(operator, context(map_index=index)).trigger.job["label"] for index in (-1, 0, 12)]

        assert not labels[0].endswith("]")
        assert [label[-4:] for label in labels[1:]] == ["n[0]", "[12]"]
        assert all(len(label) <= VISIBLE for label in labels)

    def test_a_label_that_is_given_stays_and_a_batch_puts_the_name_of_each_job_behind_it(self) -> None:
        given: Any = {"task_id": "t", "deferrable": True, "label": "nightly"}
        job = deferred(PgBackgroundOperator(sql="select 1", **given), context(map_index=3)).trigger.job
        jobs = deferred(
            PgBackgroundBatchOperator(jobs={"a": "select 1", "b" * 70: "select 2"}, **given), context(map_index=3)
        ).trigger.jobs

        assert job["label"] == "nightly"
        assert jobs["a"]["label"] == "nightly.a"
        assert jobs["b" * 70]["label"].startswith("nightly.b")
        assert len(jobs["b" * 70]["label"]) <= VISIBLE

    def test_each_job_of_a_batch_has_its_name_in_its_id(self) -> None:
        operator = PgBackgroundBatchOperator(
            task_id="sums", jobs={"a": "select 1", "b": {"sql": ["select 2"], "label": "two"}}, deferrable=True
        )
        jobs = deferred(operator).trigger.jobs

        assert [job["series"].rsplit("/", 1)[1] for job in jobs.values()] == ["a", "b"]
        assert jobs["a"]["label"].endswith(".sums.a")
        assert jobs["b"]["label"] == "two"
        assert jobs["b"]["sql"] == ["select 2"]


class TestRefusals:
    def test_sql_that_no_worker_can_run(self) -> None:
        with pytest.raises(errors.InvalidJob):
            PgBackgroundOperator(task_id="t", sql="begin; select 1; commit", deferrable=True).execute(context())

    def test_an_unknown_field_of_a_batchs_job(self) -> None:
        operator = PgBackgroundBatchOperator(task_id="t", jobs={"a": {"sql": "select 1", "priority": 3}})

        with pytest.raises(ValueError, match="priority"):
            operator.execute(context())


class TestEvents:
    def test_an_outcome_is_the_xcom_value(self) -> None:
        outcome = Outcome(job_id="a#1", label="a", row_count=3, command_tag="INSERT", started_at=BEGAN, worker_pid=7)
        result = PgBackgroundOperator(task_id="t", sql="select 1").execute_complete({}, event_of.of_outcome(outcome))

        assert result["row_count"] == 3
        assert result["started_at"] == "2013-04-01T03:00:00+00:00"
        assert "status" not in result
        json.dumps(result)

    @pytest.mark.parametrize("name", sorted(set(errors.__all__) - {"NO_FIELDS", "ErrorFields", "shorten"}))
    def test_each_error_comes_back_in_its_own_type(self, name: str) -> None:
        kind = getattr(errors, name)
        fields = ErrorFields("23514", "new row violates", detail="Failing row", hint="look", constraint_name="c")
        own: dict[str, Any] = {"fields": fields} if issubclass(kind, errors.WorkerError) else {}
        error = kind("it failed", job_id="a#1", label="a", todo="do this", **own)
        event = json.loads(json.dumps(event_of.of_error(error)))

        with pytest.raises(kind) as caught:
            PgBackgroundOperator(task_id="t", sql="select 1").execute_complete({}, event)

        assert type(caught.value) is kind
        assert str(error) in str(caught.value) or name.startswith("Extension")
        assert caught.value.job_id == "a#1"

    def test_the_servers_context_stays_where_it_is(self) -> None:
        fields = ErrorFields("22012", "division by zero", context='SQL statement "select secret/0"')
        event = event_of.of_error(errors.WorkerError("it failed", fields=fields))

        assert "secret" not in json.dumps(event)

    def test_an_error_of_a_newer_release_is_an_error_all_the_same(self) -> None:
        with pytest.raises(errors.PgbgError, match="something new"):
            event_of.result_of({"status": "failed", "error": "SomethingNew", "message": "something new", "fields": {}})

    def test_a_missing_extension_says_what_else_runs_the_sql(self) -> None:
        event = event_of.of_error(errors.ExtensionMissing("not installed", todo="CREATE EXTENSION pg_background;"))

        with pytest.raises(errors.ExtensionMissing, match=r"(?s)CREATE EXTENSION.*SQLExecuteQueryOperator"):
            event_of.result_of(event)

    def test_a_batch_fails_with_what_failed_first_and_notes_the_rest(self) -> None:
        stopped = errors.JobCancelled("cancelled by x", cause=Cause.FAILED_BESIDE)
        failed = errors.WorkerError("it failed", fields=ErrorFields("22012", "division by zero"))
        ends = {
            "one": event_of.of_error(stopped),
            "two": event_of.of_error(failed),
            "three": event_of.of_outcome(Outcome(job_id="3", label="3")),
        }
        with pytest.raises(errors.WorkerError) as caught:
            PgBackgroundBatchOperator(task_id="t", jobs={}).execute_complete({}, {"jobs": ends})

        assert any("'one'" in note for note in caught.value.__notes__)


class TestRetryPolicyOfTheOperator:
    def test_the_default_is_by_sqlstate(self) -> None:
        assert isinstance(PgBackgroundOperator(task_id="t", sql="select 1").retry_policy, SqlStateRetryPolicy)

    def test_the_users_own_stays(self) -> None:
        own = SqlStateRetryPolicy()

        assert PgBackgroundOperator(task_id="t", sql="select 1", retry_policy=own).retry_policy is own

    def test_the_default_arguments_of_the_dag_stay(self) -> None:
        own = SqlStateRetryPolicy()
        with DAG("d", schedule=None, default_args={"retry_policy": own}):
            operator = PgBackgroundOperator(task_id="t", sql="select 1")

        assert operator.retry_policy is own


class TestLineage:
    def test_without_openlineage_there_is_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def missing(name: str) -> Any:
            raise ImportError(name)

        monkeypatch.setattr("airflow_provider.lineage.import_module", missing)

        assert PgBackgroundOperator(task_id="t", sql="select 1").get_openlineage_facets_on_start() is None

    @pytest.mark.parametrize(
        ("operator", "statements"),
        [
            (PgBackgroundOperator(task_id="a", sql="select 1"), ["select 1"]),
            (PgBackgroundOperator(task_id="b", sql=["select 1", "select 2"]), ["select 1", "select 2"]),
            (
                PgBackgroundBatchOperator(task_id="c", jobs={"x": "select 1", "y": {"sql": ["select 2", "select 3"]}}),
                ["select 1", "select 2", "select 3"],
            ),
        ],
    )
    def test_every_statement_is_told(
        self, monkeypatch: pytest.MonkeyPatch, operator: PgBackgroundOperator, statements: list[str]
    ) -> None:
        told = MagicMock()
        monkeypatch.setattr("airflow_provider.lineage.facets_of", told)

        assert operator.get_openlineage_facets_on_complete(None) is told.return_value
        told.assert_called_once_with(statements, "postgres_default", None, has_parameters=False)
