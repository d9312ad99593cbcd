"""The page's table "Moving over from SQLExecuteQueryOperator": each of its lines, by running both."""

from __future__ import annotations

import datetime as dt
import itertools
import json
from pathlib import Path
from typing import Any, ClassVar, NamedTuple
from unittest.mock import MagicMock

import pytest
from airflow.providers.common.sql.hooks.handlers import fetch_all_handler, fetch_one_handler
from airflow.providers.common.sql.operators.sql import SQLExecuteQueryOperator
from airflow.sdk import DAG, task
from psycopg.conninfo import conninfo_to_dict

from airflow_provider.operators import PgBackgroundOperator
from pgbg_orchestration import errors
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


def run(operator: Any, **known: Any) -> Any:
    """Run a task as a worker does: its templates rendered, by what a run of its DAG knows."""
    operator.prepare_template()
    told = {**context(), "ds": "2013-04-01", "params": {}, **known}
    operator.render_template_fields(told)
    return operator.execute(told)


class TestTheDecorator:
    """``@task.sql`` and ``@task.pg_background``, which run what a function returns."""

    @staticmethod
    def both(returned: Any, **given: Any) -> list[Any]:
        def query(who: str = "nobody") -> Any:  # it is in the context of what is rendered
            return returned

        results = []
        for decorator, ours in (
            (task.sql, {"conn_id": "books"}),
            (task.pg_background, {"postgres_conn_id": "books", "handler": fetch_all_handler}),
        ):
            with DAG("books", schedule=None):
                operator = decorator(**ours, **given)(query)(who="ann").operator
            results.append(run(operator))
        return results

    def test_the_documented_example(self, shop: Database) -> None:
        with shop.connect() as admin:
            admin.execute("insert into effect values ('a')")
        theirs, ours = self.both("SELECT 1; SELECT * FROM effect LIMIT 1;", split_statements=True, return_last=False)

        assert theirs == ours == [[(1,)], [("a",)]]

    @pytest.mark.parametrize("returned", ["select '{{ ds }} {{ who }}'", ["select '{{ ds }} {{ who }}'"]], ids=type)
    def test_what_its_function_returns_is_rendered(self, shop: Database, returned: Any) -> None:
        theirs, ours = self.both(returned)

        assert theirs == ours
        assert "2013-04-01 ann" in str(ours)

    def test_braces_of_the_sqls_own(self, shop: Database) -> None:
        theirs, ours = self.both("select '{% raw %}{{1,2},{3,4}}{% endraw %}'::int[]")

        assert theirs == ours == [([[1, 2], [3, 4]],)]

    @pytest.mark.parametrize("deferrable", [False, True])
    def test_parameters_that_it_returns_are_data(self, shop: Database, deferrable: bool) -> None:
        """``@task.sql`` cannot return any. A value from elsewhere must not become a template."""

        @task.pg_background(postgres_conn_id="books", handler=fetch_all_handler)
        def query() -> Any:
            return "select %(a)s || '{{ ds }}'", {"a": "{{ conn.books.password }} "}

        with DAG("books", schedule=None):
            operator = query().operator  # type: ignore[attr-defined]
        assert run(operator) == [("{{ conn.books.password }} 2013-04-01",)]

    def test_a_file_that_it_names(self, shop: Database, tmp_path: Path) -> None:
        (tmp_path / "day.sql").write_text("select '{{ ds }}'")

        @task.pg_background(postgres_conn_id="books", handler=fetch_all_handler)
        def query() -> str:
            return "day.sql"

        with DAG("books", schedule=None, template_searchpath=str(tmp_path)):
            operator = query().operator  # type: ignore[attr-defined]
        assert run(operator) == [("2013-04-01",)]


class TestThePostgresGuide:
    """The how-to guide of the postgres provider: its DAG, its files and what it says of ``hook_params``."""

    CREATE = """-- create pet table
        CREATE TABLE IF NOT EXISTS pet (
            pet_id SERIAL PRIMARY KEY,
            name VARCHAR NOT NULL,
            pet_type VARCHAR NOT NULL,
            birth_date DATE NOT NULL,
            OWNER VARCHAR NOT NULL);
    """
    POPULATE = "".join(
        f"\n    INSERT INTO pet (name, pet_type, birth_date, OWNER)\n    VALUES ( {values});"
        for values in (
            "'Max', 'Dog', '2018-07-05', 'Jane'", "'Susie', 'Cat', '2019-05-01', 'Phil'",
            "'Lester', 'Hamster', '2020-06-23', 'Lily'", "'Quincy', 'Parrot', '2013-08-11', 'Anne'",
        )
    )  # fmt: skip
    BETWEEN = "SELECT * FROM pet WHERE birth_date BETWEEN SYMMETRIC"
    DAYS: ClassVar[dict[str, Any]] = {"begin_date": "2020-01-01", "end_date": "2020-12-31"}

    @staticmethod
    def theirs(sql: str, **given: Any) -> Any:
        return SQLExecuteQueryOperator(task_id=f"t{next(_runs)}", conn_id="books", sql=sql, **given)

    @staticmethod
    def ours(sql: str, **given: Any) -> Any:
        return PgBackgroundOperator(
            task_id=f"t{next(_runs)}", postgres_conn_id="books", sql=sql, handler=fetch_all_handler, **given
        )

    @pytest.mark.parametrize("name", ["theirs", "ours"])
    @pytest.mark.parametrize("in_files", [False, True])
    def test_its_dag(self, shop: Database, tmp_path: Path, name: str, in_files: bool) -> None:
        make = getattr(self, name)
        create, populate, between = self.CREATE, self.POPULATE, f"{self.BETWEEN} %(begin_date)s AND %(end_date)s"
        if in_files:
            (tmp_path / "sql").mkdir()
            for file, text in (("create", create), ("populate", populate), ("between", between)):
                (tmp_path / "sql" / f"{file}.sql").write_text(text)
            create, populate, between = "sql/create.sql", "sql/populate.sql", "sql/between.sql"
        limit: dict[str, Any] = {
            "theirs": {"hook_params": {"options": "-c statement_timeout=3000ms"}},
            "ours": {"settings": {"statement_timeout": "3000ms"}},
        }
        with DAG("postgres_operator_dag", schedule=None, template_searchpath=str(tmp_path)):
            tasks = [make(create), make(populate), make("SELECT * FROM pet;")]
            tasks += [make(between, parameters=self.DAYS, **limit[name])]
        *_, pets, born = [run(operator) for operator in tasks]

        assert [pet[1:3] for pet in pets] == [
            ("Max", "Dog"),
            ("Susie", "Cat"),
            ("Lester", "Hamster"),
            ("Quincy", "Parrot"),
        ]
        assert born == [(3, "Lester", "Hamster", dt.date(2020, 6, 23), "Lily")]

    @pytest.mark.parametrize("name", ["theirs", "ours"])
    @pytest.mark.parametrize("quote", ["", "'"], ids=["as written", "quoted"])
    def test_its_file_with_params(self, shop: Database, tmp_path: Path, name: str, quote: str) -> None:
        """As the guide writes it, the file is a comparison of a date with 2020 - 1 - 1: an error, there as here."""
        with shop.connect() as admin:
            admin.execute((self.CREATE + self.POPULATE).encode())
        days = [f"{quote}{{{{ params.{day} }}}}{quote}" for day in self.DAYS]
        (tmp_path / "birth_date.sql").write_text(f"{self.BETWEEN} {days[0]} AND {days[1]};")
        with DAG("postgres_operator_dag", schedule=None, template_searchpath=str(tmp_path)):
            operator = getattr(self, name)("birth_date.sql", params=self.DAYS)
        if quote:
            assert [pet[1] for pet in run(operator, params=self.DAYS)] == ["Lester"]
            return
        with pytest.raises(Exception, match="operator does not exist: date >= integer") as caught:
            run(operator, params=self.DAYS)
        assert getattr(caught.value, "sqlstate", getattr(caught.value, "pgcode", None)) == "42883"

    @pytest.mark.parametrize("name", ["theirs", "ours"])
    def test_a_procedures_output(self, shop: Database, name: str) -> None:
        with shop.connect() as admin:
            admin.execute("create procedure twice(inout n int) language plpgsql as $$ begin n := 2 * n; end $$")

        assert [*map(tuple, run(getattr(self, name)("call twice(4);")))] == [(8,)]

    def test_a_procedure_that_is_heard(
        self, shop: Database, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level("INFO")
        with shop.connect() as admin:
            admin.execute("create procedure proc() language plpgsql as $$ begin raise notice 'a step'; end $$")
        theirs = run(self.theirs("call proc();", hook_params={"enable_log_db_messages": True}))
        there = capsys.readouterr().out
        ours = PgBackgroundOperator(
            task_id="t", postgres_conn_id="books", sql="call proc();", enable_log_db_messages=True
        )
        here = run(ours)

        assert "a step" in there
        assert "NOTICE: a step" in caplog.text
        assert (theirs, here["command_tag"], here["proof"]) == (None, "CALL", "receipt")


def test_default_arguments_of_the_documented_dag(shop: Database) -> None:
    """They hold the whole connection there; here ``schema`` is where the receipts are, and says so."""
    given = {"conn_id": "books", "postgres_conn_id": "books", "conn_type": "Postgres", "schema": "postgres", "port": 1}
    with DAG("example_sql_execute_query", schedule=None, default_args=given):
        theirs = SQLExecuteQueryOperator(task_id="theirs", sql="SELECT 1")
        ours: Any = PgBackgroundOperator(task_id="ours", sql="SELECT 1")

    assert run(theirs) == [(1,)]
    with pytest.raises(errors.SchemaMissing, match="'postgres'"):
        run(ours)
