"""Handlers: what SQLExecuteQueryOperator's and users' own make of the rows of a job, in every mode."""

from __future__ import annotations

import datetime as dt
import itertools
import json
from collections.abc import Callable
from decimal import Decimal
from typing import Any
from unittest.mock import MagicMock

import pytest
from airflow.providers.common.sql.hooks.handlers import fetch_all_handler, fetch_one_handler
from airflow.providers.common.sql.operators.sql import SQLExecuteQueryOperator
from airflow.sdk import DAG, task
from airflow.sdk.exceptions import AirflowFailException, TaskDeferred
from psycopg.conninfo import conninfo_to_dict

from airflow_provider.operators import PgBackgroundBatchOperator, PgBackgroundOperator, handlers
from airflow_provider.triggers import PgBackgroundBatchTrigger, PgBackgroundTrigger
from pgbg_orchestration import errors
from tests.conftest import Database

pytestmark = [
    pytest.mark.airflow,
    pytest.mark.servers("real", "embedded"),
    pytest.mark.filterwarnings("ignore:Task .* was never mapped"),
]

_runs = itertools.count()


def context(run: str | None = None) -> Any:
    told = {"dag_id": "books", "run_id": run or f"q{next(_runs)}", "task_id": "t", "map_index": -1}
    began = dt.datetime.now(dt.UTC)
    store = {"pgbg_first_run": 1}
    return {"ti": MagicMock(try_number=1, max_tries=0, start_date=began, task=None, **told), "task_state_store": store}


@pytest.fixture(autouse=True)
def _shop(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    extra = conninfo_to_dict(database.conninfo)
    monkeypatch.setenv("AIRFLOW_CONN_BOOKS", json.dumps({"conn_type": "postgres", "extra": extra}))
    monkeypatch.setattr("airflow_provider.triggers.login._conninfos", {})
    monkeypatch.setattr("airflow_provider.triggers.task.RESUME_SECONDS", 0.0)
    with database.connect() as admin:
        admin.execute("create table effect (what text)")


def resumed(operator: Any, deferral: TaskDeferred) -> Any:
    """What a task returns that was deferred: its trigger runs from what Airflow stores, in another process's stead."""
    import asyncio

    path, arguments = deferral.trigger.serialize()
    kind: Any = PgBackgroundBatchTrigger if "Batch" in path else PgBackgroundTrigger

    async def fire() -> Any:
        return [event async for event in kind(**json.loads(json.dumps(arguments))).run()]

    (event,) = asyncio.run(fire())
    assert not arguments["end_task"], "a handler needs a worker"
    return operator.execute_complete(context(), json.loads(json.dumps(event.payload)))


def here(**given: Any) -> Any:
    return PgBackgroundOperator(task_id="t", postgres_conn_id="books", **given).execute(context())


def deferred(**given: Any) -> Any:
    operator = PgBackgroundOperator(task_id="t", postgres_conn_id="books", deferrable=True, **given)
    with pytest.raises(TaskDeferred) as caught:
        operator.execute(context())
    return resumed(operator, caught.value)


def mapped(sql: Any, **given: Any) -> Any:
    with DAG("d", schedule=None):
        made = PgBackgroundOperator.partial(task_id="t", postgres_conn_id="books", **given).expand(sql=[sql])
    return made.unmap({"sql": sql}).execute(context())


def in_a_batch(sql: Any, **given: Any) -> Any:
    operator = PgBackgroundBatchOperator(
        task_id="t", postgres_conn_id="books", jobs={"one": sql}, deferrable=True, **given
    )
    with pytest.raises(TaskDeferred) as caught:
        operator.execute(context())
    return resumed(operator, caught.value)["one"]


def decorated(sql: Any, parameters: Any = None, **given: Any) -> Any:
    @task.pg_background(postgres_conn_id="books", deferrable=True, **given)
    def compose() -> Any:
        return sql, parameters

    with DAG("d", schedule=None):
        operator = compose().operator  # type: ignore[attr-defined]
    with pytest.raises(TaskDeferred) as caught:
        operator.execute(context())
    # The function is not called again when the task is resumed: a new object, as in a new process.
    with DAG("e", schedule=None):
        again = compose().operator  # type: ignore[attr-defined]
    return resumed(again, caught.value)


MODES: dict[str, Callable[..., Any]] = {
    "own process": here,
    "deferred": deferred,
    "mapped": mapped,
    "batch": in_a_batch,
    "@task": decorated,
}


def names(cursor: Any) -> list[dict[str, Any]]:
    """A handler of a user's own."""
    columns = [column[0] for column in cursor.description]
    return [dict(zip(columns, row, strict=True)) for row in cursor]


CASES: dict[str, dict[str, Any]] = {
    "select": {"sql": "select 1 as a, 'x' as b union all select 2, 'y'", "handler": fetch_all_handler},
    "one": {"sql": "select generate_series(1, 5)", "handler": fetch_one_handler},
    "own": {"sql": "select 1 as a, null as b", "handler": names},
    "no rows": {"sql": "select 1 where false", "handler": fetch_all_handler},
    "returning": {"sql": "insert into effect values ('1'), ('2') returning what", "handler": fetch_all_handler},
    "none to give": {"sql": "insert into effect values ('1')", "handler": fetch_all_handler},
    "types": {
        "sql": "select 1.10::numeric, date '2020-01-01', array[1,2], '{\"a\": 1}'::jsonb, true, 'a'::char(3), null",
        "handler": fetch_all_handler,
    },
    "list": {"sql": ["select 1", "insert into effect values ('1')", "select 2"], "handler": fetch_all_handler},
    "list of one": {"sql": ["select 1"], "handler": fetch_all_handler},
    "processor": {
        "sql": "select 1 as a",
        "handler": fetch_all_handler,
        "output_processor": lambda results, descriptions: [(results[0], descriptions[0][0][0])],
    },
    "parameters": {"sql": "select %(a)s", "parameters": {"a": "x"}, "handler": fetch_all_handler},
}


@pytest.mark.parametrize("name", CASES)
def test_the_result_is_that_of_the_operator_before(name: str) -> None:
    """One mode for each case: that all modes are one is the next test."""
    operator: Any = SQLExecuteQueryOperator(task_id="t", conn_id="books", **CASES[name])
    expected = operator.execute(context())

    assert here(**CASES[name]) == expected


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["select", "own", "list", "parameters", "none to give"])
def test_every_mode_gives_the_same(mode: str, name: str) -> None:
    given = dict(CASES[name])
    if mode == "batch" and "parameters" in given:
        given["sql"] = {"sql": given["sql"], "parameters": given.pop("parameters")}
    expected = {
        "select": [(1, "x"), (2, "y")],
        "own": [{"a": 1, "b": None}],
        "list": [[(1,)], None, [(2,)]],
        "parameters": [("x",)],
        "none to give": None,
    }

    assert MODES[mode](**given) == expected[name]


def test_each_statement_of_a_text() -> None:
    text = "select 1; insert into effect values ('1'); select 2, 3"

    assert here(sql=text, handler=fetch_all_handler) == [(2, 3)]
    assert here(sql=text, handler=fetch_all_handler, return_last=False) == [[(1,)], None, [(2, 3)]]


def test_a_cursor_is_a_cursor() -> None:
    seen: list[Any] = []

    def look(cursor: Any) -> Any:
        seen.extend([cursor.rowcount, cursor.statusmessage, [column[0] for column in cursor.description]])
        return [cursor.fetchone(), cursor.fetchmany(2), cursor.fetchmany(), cursor.fetchall(), cursor.fetchone()]

    assert here(sql="select g as n from generate_series(1, 5) g", handler=look) == [
        (1,), [(2,), (3,)], [(4,)], [(5,)], None,
    ]  # fmt: skip
    assert seen == [5, "SELECT", ["n"]]


def test_a_retry_reads_the_same_rows_and_runs_nothing() -> None:
    operator = PgBackgroundOperator(
        task_id="t", postgres_conn_id="books", sql="insert into effect values (now()::text) returning what",
        handler=fetch_all_handler,
    )  # fmt: skip
    first = operator.execute(context("again"))

    assert operator.execute(context("again")) == first


@pytest.mark.parametrize(
    "options",
    [
        {"sql": "select 1"},
        {"sql": "insert into effect values ('a') returning what"},
        {"sql": "select 1; insert into effect values ('a')", "return_last": False},
        {"sql": ["insert into effect values ('a') returning what", "insert into effect values ('b')"]},
    ],
    ids=["query", "returning", "each", "list"],
)
def test_rows_that_nobody_asked_for_are_no_empty_result(options: dict[str, Any]) -> None:
    """The job committed in a try whose DAG had no handler yet."""
    given = {"task_id": "t", "postgres_conn_id": "books", **options}
    PgBackgroundOperator(**given).execute(context("late"))

    with pytest.raises(AirflowFailException, match="no rows of it are kept"):
        PgBackgroundOperator(**given, handler=fetch_all_handler).execute(context("late"))


def test_a_job_that_gives_no_rows_has_none_to_miss() -> None:
    given: dict[str, Any] = {"task_id": "t", "postgres_conn_id": "books", "sql": "insert into effect values ('a')"}
    PgBackgroundOperator(**given).execute(context("late"))

    assert PgBackgroundOperator(**given, handler=fetch_all_handler).execute(context("late")) is None


def test_more_rows_than_the_bound_commit_nothing(database: Database) -> None:
    sql = "insert into effect select g::text from generate_series(1, 11) g returning what"
    with pytest.raises(errors.WorkerError) as caught:
        here(sql=sql, handler=fetch_all_handler, fetch={"max_rows": 10})

    assert caught.value.sqlstate == "PB005"
    with database.connect() as admin:
        assert admin.execute("select count(*) from effect").fetchone() == (0,)
    assert len(here(sql=sql, handler=fetch_all_handler, fetch={"max_rows": 11})) == 11


def test_an_xcom_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handlers, "XCOM_BYTES", 1000)
    sql = "select repeat('x', 1000)"

    with pytest.raises(AirflowFailException, match=r"the job is committed.*1,0\d\d bytes.*do_xcom_push=False"):
        here(sql=sql, handler=fetch_all_handler)
    assert here(sql=sql, handler=fetch_all_handler, do_xcom_push=False) == [("x" * 1000,)]


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"handler": fetch_all_handler, "show_return_value_in_logs": True}, "Operator output is: [[(4711,)]]"),
        ({}, "Its rows were not asked for: handler=fetch_all_handler returns them."),
    ],
)
def test_the_log_tells_of_rows(given: dict[str, Any], line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    log = MagicMock()
    monkeypatch.setattr(PgBackgroundOperator, "log", log)
    here(sql="select 4711", **given)

    assert line in [call.args[0] % call.args[1:] for call in log.info.call_args_list]


def test_a_task_that_begins_in_the_triggerer_takes_it_along() -> None:
    operator = PgBackgroundOperator(task_id="t", sql="select 1", handler=fetch_all_handler, start_from_trigger=True)
    told = operator.start_trigger_args
    assert told is not None
    arguments = told.trigger_kwargs or {}

    assert json.loads(arguments["fetch"])["return_last"] is True
    assert arguments["end_task"] is False


def test_a_handler_without_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="fetch=False"):
        PgBackgroundOperator(task_id="t", sql="select 1", handler=fetch_all_handler, fetch=False)


def test_exact_numbers() -> None:
    assert here(sql="select 12345678901234567.89", handler=fetch_all_handler) == [(Decimal("12345678901234567.89"),)]
