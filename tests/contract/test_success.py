""" "completed and not has_error" is not success, and an error is not always a failure."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from psycopg import errors

from tests.conftest import OLDER
from tests.contract.background import Background, Handle

NO_ERROR = dict.fromkeys(("sqlstate", "message", "detail", "hint", "context"))


@pytest.fixture
def silent(session: Background, extension_database: object) -> Handle:
    """A worker that ended silently: cancelled while it was starting."""
    stand_in = session.value(
        "select obj_description(oid) like 'Stand-in%%' from pg_extension where extname = %s", ("pg_background",)
    )
    if stand_in:
        session.execute("set pgbg_standin.silent_cancel = '1h'")
        handle = session.launch("insert into done select 1 from pg_sleep(30)")
        session.call("cancel", *handle)
        session.ended(handle)
        return handle
    if not session.v2_0:
        pytest.skip(f"{OLDER}before pg_background 2.0.2 such a cancel often takes it down")
    for _ in range(400):
        # Cancelled within the launching statement: the real worker meets the signal at any moment of its start.
        launch, cancel = (session.extension.name(name).as_string(None) for name in ("launch", "cancel"))
        (row,) = session.execute(
            f"select h.pid, h.cookie, {cancel}(h.pid, h.cookie)"
            f" from {launch}('insert into done select 1 from pg_sleep(30)', 65536, 'silent') as h"
        )
        handle = Handle(row["pid"], row["cookie"])
        if not session.ended(handle)["has_error"]:
            return handle
        session.detach(handle)
    pytest.fail("none of 400 workers that were cancelled while they started ended silently")


@pytest.fixture(autouse=True)
def done(session: Background) -> None:
    session.execute("create table done (i int primary key)")


def test_a_worker_cancelled_just_after_launch_can_end_silently(session: Background, silent: Handle) -> None:
    info = session.info(silent)
    assert (info["completed"], info["has_error"], info["command_tag"], info["row_count"]) == (True, False, "", 0)
    assert all(value is None for value in session.error(silent).values())
    assert session.value("select count(*) from done") == 0


def test_result_of_a_worker_that_ended_silently_raises_08006_and_the_session_is_fine(
    session: Background, silent: Handle
) -> None:
    with pytest.raises(errors.ConnectionFailure, match="lost connection to worker process"):
        session.result(silent)
    assert session.value("select 1") == 1


@pytest.mark.parametrize("text", ["", "  ; ;", "-- only a comment", "/* nor /* here */ */"])
def test_an_empty_statement_looks_like_a_silent_end(session: Background, text: str) -> None:
    ended = session.run(text)
    assert (ended["completed"], ended["has_error"], ended["command_tag"], ended["row_count"]) == (True, False, "", 0)
    assert session.fetch(text) == []


@pytest.mark.since(postgres=17)
def test_transaction_timeout_looks_like_success_and_nothing_is_committed(session: Background) -> None:
    session.execute("set transaction_timeout = '2s'")  # long enough for the first statement on a busy machine
    handle = session.launch("insert into done values (1); select pg_sleep(60)")
    session.execute("reset transaction_timeout")
    info = session.ended(handle)
    assert (info["has_error"], info["command_tag"], info["row_count"]) == (False, "INSERT", 1)
    assert all(value is None for value in session.error(handle).values())
    assert session.value("select count(*) from done") == 0
    if session.v2_0:
        assert info["started_at"]
        assert info["finished_at"] is None


@pytest.mark.since(postgres=17)
def test_result_of_a_worker_that_died_of_a_fatal_error_raises_that_error(session: Background) -> None:
    session.execute("set transaction_timeout = '300ms'")
    handle = session.launch("do $$begin perform pg_sleep(60); end$$")
    session.execute("reset transaction_timeout")
    with pytest.raises(errors.TransactionTimeout):
        session.result(handle)


def test_exit_on_error_looks_like_success_and_nothing_is_committed(session: Background) -> None:
    session.execute("set exit_on_error = on")
    handle = session.launch("insert into done values (1); do $$begin perform 1/0; end$$")
    session.execute("reset exit_on_error")
    info = session.ended(handle)
    assert (info["has_error"], info["command_tag"], info["row_count"]) == (False, "INSERT", 1)
    assert session.value("select count(*) from done") == 0
    with pytest.raises(errors.DivisionByZero):
        session.result(handle)


def test_a_committed_job_reports_an_error_when_it_is_cancelled_with_its_output_exactly_filling_the_queue(
    session: Background, unlike: Callable[[str], None]
) -> None:
    unlike("exact_queue")
    for size in range(3900, 4096):
        session.execute("truncate done")
        text = f"insert into done values (1); select repeat('x', {size})"
        handle = session.launch(text, queue_size=4096)
        session.ended_or_blocked(handle)
        if not session.info(handle)["completed"] and session.value("select count(*) from done") == 1:
            session.call("cancel", *handle)
            assert session.ended(handle)["has_error"]
            assert session.error(handle)["sqlstate"] == "57014"
            assert session.value("select count(*) from done") == 1
            return
        session.detach(handle)
    pytest.fail("no size of output held a worker up after its commit")


def test_a_tag_is_set_before_the_commit(session: Background) -> None:
    session.execute(
        "create function slow() returns trigger language plpgsql as $$begin perform pg_sleep(60); return null; end$$"
    )
    session.execute(
        "create constraint trigger slow after insert on done deferrable initially deferred"
        " for each row execute function slow()"
    )
    handle = session.launch("insert into done values (1)")
    session.cancel(handle)
    info = session.ended(handle)
    assert info["has_error"]
    assert session.value("select count(*) from done") == 0


def test_an_error_is_reported_with_sqlstate_message_detail_and_hint(session: Background) -> None:
    ended = session.run(
        "do $$begin raise exception 'a message' using errcode = 'PB777', detail = 'a detail', hint = 'a hint'; end$$"
    )
    assert ended["completed"]
    assert ended["has_error"]
    told = (ended["sqlstate"], ended["message"], ended["detail"], ended["hint"])
    assert told == ("PB777", "a message", "a detail", "a hint")
    assert ended["context"].startswith("PL/pgSQL function inline_code_block line 1 at RAISE\nbackground worker, pid ")


def test_an_error_without_detail_and_hint_has_nulls_there(session: Background) -> None:
    ended = session.run("select 1/0")
    assert (ended["sqlstate"], ended["message"]) == ("22012", "division by zero")
    assert (ended["detail"], ended["hint"]) == (None, None)
    assert (ended["command_tag"], ended["row_count"]) == ("", 0)


def test_the_texts_of_an_error_are_cut_at_255_bytes(session: Background) -> None:
    ended = session.run(
        "do $$begin raise exception '%', repeat('m', 400)"
        " using detail = repeat('d', 400), hint = repeat('h', 400); end$$"
    )
    assert (ended["message"], ended["detail"], ended["hint"]) == ("m" * 255, "d" * 255, "h" * 255)


def test_error_info_without_an_error_is_one_row_of_nulls(session: Background) -> None:
    handle = session.launch("select 1")
    session.ended(handle)
    assert all(value is None for value in session.error(handle).values())
    assert session.error(handle).keys() >= NO_ERROR.keys()


@pytest.mark.since(extension="2.0")
def test_an_error_names_the_table_and_the_constraint(session: Background, unlike: Callable[[str], None]) -> None:
    unlike("error_object_names")
    ended = session.run("insert into done values (1), (1)")
    names = (ended["schema_name"], ended["table_name"], ended["column_name"], ended["constraint_name"])
    assert names == ("public", "done", None, "done_pkey")


def test_an_error_at_commit_is_reported_like_any_other(session: Background) -> None:
    session.execute("create table child (i int references done deferrable initially deferred)")
    ended = session.run("insert into child values (1)")
    assert (ended["has_error"], ended["sqlstate"]) == (True, "23503")
    assert session.value("select count(*) from child") == 0


def test_a_failed_worker_shows_as_stopped_and_the_list_tells_no_error(session: Background) -> None:
    session.ended(session.launch("select 1/0"))
    (row,) = session.list()
    assert (row["state"], row["last_error"]) == ("stopped", None)


@pytest.mark.parametrize(
    ("text", "tag", "count"),
    [
        ("select generate_series(1, 3)", "SELECT", 3),
        ("values (1), (2)", "SELECT", 2),
        ("with a as (select 1) select * from a", "SELECT", 1),
        ("insert into done values (1), (2)", "INSERT", 2),
        ("insert into done values (1), (2) returning i", "INSERT", 2),
        ("with a as (select 7) insert into done select * from a", "INSERT", 1),
        ("update done set i = i", "UPDATE", 0),
        ("create table other (i int)", "CREATE TABLE", 0),
        ("create table other as select generate_series(1, 4)", "CREATE TABLE AS", 4),
        ("do $$begin null; end$$", "DO", 0),
        ("select 1; select 2 union all select 3", "SELECT", 2),
        ("insert into done values (5); create temp table t as select 1; select * from t", "SELECT", 1),
        ("vacuum done", "VACUUM", 0),
        ("explain select 1", "EXPLAIN", 1),
        ("show work_mem", "SHOW", 1),
        ("select ';', $q$;$q$, 'a''b' /* ; /* ; */ */ -- ;", "SELECT", 1),
    ],
)
def test_the_last_statements_tag_and_count_are_reported(session: Background, text: str, tag: str, count: int) -> None:
    ended = session.run(text)
    assert (ended["has_error"], ended["command_tag"], ended["row_count"]) == (False, tag, count), ended


@pytest.mark.parametrize("utility", ["set local x.y to default", "do $$begin null; end$$", "set local x.y = 'z'"])
def test_a_utility_statement_between_does_not_change_the_last_tag_and_count(session: Background, utility: str) -> None:
    ended = session.run(f"insert into done values (1)\n;{utility}\n;insert into done values (2), (3)")
    assert (ended["command_tag"], ended["row_count"]) == ("INSERT", 2)
    assert session.value("select count(*) from done") == 3
