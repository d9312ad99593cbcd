"""All statements of one launch run in one transaction; one alone runs at top level."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from psycopg import errors

from tests.contract.background import Background

SEPARATOR = "\n;set local pgbg.step to default\n;"


@pytest.fixture(autouse=True)
def table(session: Background) -> None:
    session.execute("create table t (i int)")


def test_an_error_in_the_last_statement_undoes_the_first(session: Background) -> None:
    assert session.run("insert into t values (1); select 1/0")["sqlstate"] == "22012"
    assert session.value("select count(*) from t") == 0


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("insert into t values (1); select count(*) from t", 0),
        ("truncate t; insert into t values (1); select count(*) from t", 0),
        ("insert into t values (1); with u as (update t set i = 2 returning 1) select count(*) from u", 0),
    ],
)
def test_statements_of_one_launch_do_not_see_each_others_rows(
    session: Background, unlike: Callable[[str], None], text: str, seen: int
) -> None:
    unlike("statements_see_rows")
    assert session.fetch(text, "n bigint") == [(seen,)]


@pytest.mark.parametrize(
    "separator", [SEPARATOR, ";do $$begin null; end$$;", ";set local x = 'y';".replace("x", "x.y")]
)
@pytest.mark.parametrize(
    "statements",
    [
        ("insert into t values (1)", "select count(*) from t"),
        ("truncate t", "insert into t values (1)", "select count(*) from t"),
        ("insert into t values (1)", "with u as (update t set i = 2 returning 1) select count(*) from u"),
    ],
)
def test_a_utility_statement_between_them_makes_rows_visible(
    session: Background, separator: str, statements: tuple[str, ...]
) -> None:
    assert session.fetch(separator.join(statements), "n bigint") == [(1,)]


@pytest.mark.parametrize(
    "text", ["vacuum t", "create index concurrently t_i on t (i)", "call commits()", "create database contract_made"]
)
def test_a_single_statement_runs_at_top_level(session: Background, text: str) -> None:
    session.execute("create procedure commits() language plpgsql as $$begin insert into t values (1); commit; end$$")
    ended = session.run(text)
    assert not ended["has_error"], ended
    session.execute("drop database if exists contract_made")


@pytest.mark.parametrize("text", ["vacuum t", "create index concurrently t_i on t (i)"])
def test_with_a_second_statement_beside_it_it_fails_with_25001(session: Background, text: str) -> None:
    assert session.run(f"insert into t values (1); {text}")["sqlstate"] == "25001"


def test_what_it_says_then(session: Background, unlike: Callable[[str], None]) -> None:
    unlike("not_alone")
    assert "cannot be executed from a function" in session.run("insert into t values (1); vacuum t")["message"]
    assert session.value("select count(*) from t") == 0


def test_it_says_then_that_it_is_not_at_top_level(session: Background, unlike: Callable[[str], None]) -> None:
    unlike("alone_words")
    assert "VACUUM cannot be executed from a function" in session.run("select 1; vacuum t")["message"]


def test_a_procedure_that_commits_fails_with_a_second_statement_beside_it(session: Background) -> None:
    session.execute("create procedure commits() language plpgsql as $$begin insert into t values (1); commit; end$$")
    assert session.run("select 1; call commits()")["sqlstate"] == "2D000"


@pytest.mark.parametrize(
    "text",
    [
        "begin",
        "select 1; commit",
        "rollback",
        "abort",
        "end",
        "savepoint a",
        "start transaction",
        "prepare transaction 'x'",
    ],
)
def test_transaction_control_fails_with_0a000(session: Background, text: str) -> None:
    assert session.run(text)["sqlstate"] == "0A000"


def test_listen_fails_with_0a000(session: Background) -> None:
    assert session.run("listen channel")["sqlstate"] == "0A000"


def test_copy_from_stdin_ends_in_08003(session: Background) -> None:
    assert session.run("copy t from stdin")["sqlstate"] == "08003"


def test_copy_to_stdout_completes_and_only_its_result_fails(session: Background, unlike: Callable[[str], None]) -> None:
    unlike("copy_to_stdout")
    session.execute("insert into t values (1)")
    handle = session.launch("copy t to stdout")
    assert session.ended(handle)["command_tag"] == "COPY"
    with pytest.raises(errors.FeatureNotSupported):
        session.result(handle)


def test_a_type_without_binary_output_fails_with_42883(session: Background, unlike: Callable[[str], None]) -> None:
    unlike("binary_output")
    assert session.run("select makeaclitem(10, 10, 'SELECT', false)")["sqlstate"] == "42883"


def test_now_and_statement_timestamp_stay_fixed_for_the_whole_launch(session: Background) -> None:
    stamps = "select now() = (select now_ from s), statement_timestamp() = (select statement_ from s)"
    text = SEPARATOR.join(
        ["create temp table s as select now() now_, statement_timestamp() statement_", "select pg_sleep(0.05)", stamps]
    )
    assert session.fetch(text, "a bool, b bool") == [(True, True)]


def test_the_isolation_level_can_only_be_inherited(session: Background) -> None:
    level = "select 1; set transaction isolation level serializable; select 1"
    assert session.run(level)["sqlstate"] == "25001"
    session.execute("set default_transaction_isolation = 'repeatable read'")
    assert session.fetch("select current_setting('transaction_isolation')", "level text") == [("repeatable read",)]


def test_a_statement_timeout_set_in_the_text_does_nothing(session: Background, unlike: Callable[[str], None]) -> None:
    unlike("statement_timeout_scope")
    assert not session.run("set statement_timeout = '50ms'; select pg_sleep(0.3)")["has_error"]


def test_a_temporary_table_of_the_launching_session_is_not_there(session: Background) -> None:
    session.execute("create temp table mine (i int)")
    assert session.run("select * from mine")["sqlstate"] == "42P01"


def test_a_notification_is_delivered_at_the_commit(session: Background) -> None:
    session.execute("listen contract")
    session.run("notify contract, 'from the worker'")
    (notification,) = session.connection.notifies(timeout=20, stop_after=1)
    assert notification.payload == "from the worker"
