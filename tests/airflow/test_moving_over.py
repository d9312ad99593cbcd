"""The page's table "Moving over from SQLExecuteQueryOperator": each of its lines, by running both."""

from __future__ import annotations

import datetime as dt
import itertools
import json
from typing import Any, NamedTuple
from unittest.mock import MagicMock

import pytest
from airflow.providers.common.sql.hooks.handlers import fetch_all_handler, fetch_one_handler
from airflow.providers.common.sql.operators.sql import SQLExecuteQueryOperator
from psycopg.conninfo import conninfo_to_dict

from airflow_provider.operators import PgBackgroundOperator
from tests.conftest import Database

pytestmark = [pytest.mark.airflow, pytest.mark.servers("real", "embedded")]

_runs = itertools.count()


class End(NamedTuple):
    """How a task ended: what it left in the table, and its result or the name of its error and its SQLSTATE."""

    effect: list[str]
    result: Any = None
    error: str | None = None
    sqlstate: str | None = None


def context() -> Any:
    told = {"dag_id": "books", "run_id": f"q{next(_runs)}", "task_id": "t", "map_index": -1}
    began = dt.datetime.now(dt.UTC)
    store = {"pgbg_first_run": 1}
    return {"ti": MagicMock(try_number=1, max_tries=0, start_date=began, task=None, **told), "task_state_store": store}


@pytest.fixture
def shop(database: Database, monkeypatch: pytest.MonkeyPatch) -> Database:
    there = conninfo_to_dict(database.conninfo)
    extra = {**there, "options": "-c work_mem=7MB -c timezone=Asia/Tokyo"}
    monkeypatch.setenv("AIRFLOW_CONN_BOOKS", json.dumps({"conn_type": "postgres", "extra": extra}))
    with database.connect() as admin:
        admin.execute("create table effect (what text)")
    return database


def end_of(shop: Database, operator: Any) -> End:
    with shop.connect() as admin:
        admin.execute("truncate effect")
        result, error = None, None
        try:
            operator.prepare_template()
            result = operator.execute(context())
        except Exception as raised:  # noqa: BLE001 - which one it is, is what is asked
            error = raised
        left = [what for (what,) in admin.execute("select what from effect order by what").fetchall()]
    if isinstance(result, dict):
        result = (result["row_count"], result["command_tag"])
    return End(left, result, type(error).__name__ if error else None, getattr(error, "sqlstate", None))


INSERT = "insert into effect values"
LINES: dict[str, tuple[dict[str, Any], End, End]] = {
    "one statement": ({"sql": f"{INSERT} ('1')"}, End(["1"]), End(["1"], (1, "INSERT"))),
    "a text of two": (
        {"sql": f"{INSERT} ('1'); {INSERT} ('2'), ('3');"},
        End(["1", "2", "3"]), End(["1", "2", "3"], (2, "INSERT")),
    ),
    "a text of two with parameters": (
        {"sql": f"{INSERT} (%(a)s); {INSERT} (%(a)s)", "parameters": {"a": "x"}},
        End([], error="SyntaxError", sqlstate="42601"), End(["x", "x"], (1, "INSERT")),
    ),
    "a list": (
        {"sql": [f"{INSERT} ('1')", f"{INSERT} ('2')"]}, End(["1", "2"], [None, None]), End(["1", "2"], (1, "INSERT")),
    ),
    "a list of which one fails": (
        {"sql": [f"{INSERT} ('1')", "select 1/0"]},
        End([], error="DivisionByZero", sqlstate="22012"), End([], error="WorkerError", sqlstate="22012"),
    ),
    "an empty item in a list": (
        {"sql": [f"{INSERT} ('1')", ""]}, End(["1"], [None, None]), End(["1"], (1, "INSERT")),
    ),
    "nothing but a comment": ({"sql": "-- nothing"}, End([]), End([], error="InvalidJob")),
    "no SQL": ({"sql": ""}, End([], error="ValueError"), End([], error="InvalidJob")),
    "a temporary table": (
        {"sql": ["create temp table t as select 1 as a", "insert into effect select a from t"]},
        End(["1"], [None, None]), End(["1"], (1, "INSERT")),
    ),
    "set": (
        {"sql": f"set work_mem = '5MB'; {INSERT} (current_setting('work_mem'))"},
        End(["5MB"]), End(["5MB"], (1, "INSERT")),
    ),
    "the connection's options": (
        {"sql": f"{INSERT} (current_setting('work_mem') || current_setting('timezone'))"},
        End(["7MBAsia/Tokyo"]), End(["7MBAsia/Tokyo"], (1, "INSERT")),
    ),
    "begin and commit in the text": (
        {"sql": f"begin; {INSERT} ('1'); commit; select 1/0"},
        End(["1"], error="DivisionByZero", sqlstate="22012"), End([], error="InvalidJob"),
    ),
    "vacuum": (
        {"sql": "vacuum effect"},
        End([], error="ActiveSqlTransaction", sqlstate="25001"), End([], (0, "VACUUM")),
    ),
    "copy from standard input": (
        {"sql": "copy effect from stdin"}, End([], error="ProgrammingError"), End([], error="InvalidJob"),
    ),
    "empty parameters": (
        {"sql": f"{INSERT} ('5% %% %s')", "parameters": {}}, End(["5% %% %s"]), End(["5% %% %s"], (1, "INSERT")),
    ),
    "parameters": (
        {"sql": f"{INSERT} ('5%%' || %(a)s)", "parameters": {"a": "x"}}, End(["5%x"]), End(["5%x"], (1, "INSERT")),
    ),
    "a % beside parameters": (
        {"sql": f"{INSERT} ('5%' || %(a)s)", "parameters": {"a": "x"}},
        End([], error="ProgrammingError"), End([], error="InvalidJob"),
    ),
    "parameters as a text": (
        {"sql": f"{INSERT} (%(a)s)", "parameters": "{'a': 'x'}"}, End(["x"]), End(["x"], (1, "INSERT")),
    ),
    "a missing parameter": (
        {"sql": f"{INSERT} (%(b)s)", "parameters": {"a": "x"}},
        End([], error="ProgrammingError"), End([], error="InvalidJob"),
    ),
    "a parameter that nothing names": (
        {"sql": f"{INSERT} (%(a)s)", "parameters": {"a": "x", "b": object()}}, End(["x"]), End(["x"], (1, "INSERT")),
    ),
    "a dict as a parameter": (
        {"sql": f"{INSERT} (%s)", "parameters": [{"a": 1}]},
        End([], error="ProgrammingError"), End(['{"a": 1}'], (1, "INSERT")),
    ),
    "a set as a parameter": (
        {"sql": f"{INSERT} (%s)", "parameters": [{1}]}, End([], error="ProgrammingError"), End([], error="InvalidJob"),
    ),
    "a SELECT": (
        {"sql": "select 1, 'x' union all select 2, 'y'"}, End([], [(1, "x"), (2, "y")]), End([], (2, "SELECT")),
    ),
    "a statement timeout of the text's own": (
        {"sql": "set statement_timeout = '200ms'; select pg_sleep(5)"},
        End([], error="QueryCanceled", sqlstate="57014"), End([], error="WorkerError", sqlstate="57014"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LINES)
def test_both_do_what_the_page_says(shop: Database, name: str) -> None:
    given, theirs, ours = LINES[name]

    assert end_of(shop, SQLExecuteQueryOperator(task_id="t", conn_id="books", **given)) == theirs
    assert end_of(shop, PgBackgroundOperator(task_id="t", postgres_conn_id="books", **given)) == ours


# What the page of common.sql's operators shows, and each parameter that it tells of: each by its own default there.
DOCUMENTED: dict[str, dict[str, Any]] = {
    "each of two queries": {
        "sql": "select 1; select * from effect limit 1;", "split_statements": True, "return_last": False,
    },
    "the last of two queries": {"sql": "select 1; select * from effect limit 1;", "split_statements": True},
    "a list": {"sql": ["select 1", "select what, 2 from effect"]},
    "parameters": {"sql": "select %(a)s::int + 1, %(b)s", "parameters": {"a": 1, "b": "x"}},
    "a handler": {"sql": "select 1 union all select 2 order by 1", "handler": fetch_one_handler},
    "no handler": {"sql": "insert into effect values ('b')", "handler": None},
    "a change that tells rows": {"sql": "update effect set what = what || '!' returning what, length(what)"},
    "a processor": {
        "sql": "select 1 as a, 2 as b",
        "output_processor": lambda results, descriptions: [[column[0] for column in descriptions[-1]], *results],
    },
}  # fmt: skip


@pytest.mark.parametrize("name", DOCUMENTED)
def test_each_documented_example_gives_what_it_gave(shop: Database, name: str) -> None:
    """By its class and the name of its connection's parameter; and the handler, which is a default there."""
    given, results = DOCUMENTED[name], []
    handler = given.get("handler", fetch_all_handler)
    for make in (
        lambda: SQLExecuteQueryOperator(task_id="t", conn_id="books", autocommit=True, **given),
        lambda: PgBackgroundOperator(task_id="t", postgres_conn_id="books", **{**given, "handler": handler}),
    ):
        with shop.connect() as admin:
            admin.execute("truncate effect")
            admin.execute("insert into effect values ('a')")
        operator: Any = make()
        operator.prepare_template()
        results.append(operator.execute(context()))
    theirs, ours = results
    if handler is None:
        assert (theirs, ours["row_count"]) == (None, 1)
    else:
        assert ours == theirs
