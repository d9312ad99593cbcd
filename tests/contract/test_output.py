"""Rows and NOTICEs go through a queue, and can block a worker for ever; result() reads it to the end."""

from __future__ import annotations

from collections.abc import Callable

import psycopg
import pytest
from psycopg import errors

from tests.contract.background import Background, eventually

MANY_ROWS = "insert into done values (1); select repeat('x', 100) from generate_series(1, 100000)"
# 12 MB: the buffers of a TCP connection, which a stand-in's worker fills before it waits, take several.
MANY_NOTICES = (
    "insert into done values (1);"
    " do $$begin for i in 1 .. 20000 loop raise notice 'notice number % of many: %',"
    " i, repeat('x', 600); end loop; end$$"
)


@pytest.fixture(autouse=True)
def done(session: Background) -> None:
    session.execute("create table done (i int)")


@pytest.mark.parametrize("submit", [False, True], ids=["launch", "submit"])
@pytest.mark.parametrize("text", [MANY_ROWS, MANY_NOTICES], ids=["rows", "notices"])
def test_output_that_nobody_reads_blocks_the_worker(session: Background, text: str, submit: bool) -> None:
    handle = session.launch(text, submit=submit)
    session.blocked(handle)
    info = session.info(handle)
    # What is told of the work is the statement before: nothing tells this worker from a busy one.
    assert (info["completed"], info["has_error"], info["row_count"], info["command_tag"]) == (False, False, 1, "INSERT")
    assert session.list()[0]["state"] == "running"
    assert session.wait(handle, 100) is False
    assert session.value("select count(*) from done") == 0
    session.detach(handle)
    eventually(lambda: session.value("select count(*) from done"), "the commit, after detach dropped the output")


def test_a_blocked_worker_waits_in_message_queue_put_message(
    session: Background, unlike: Callable[[str], None]
) -> None:
    unlike("wait_event")
    handle = session.launch(MANY_ROWS)
    session.blocked(handle)
    seen = session.activity(handle)
    assert seen is not None
    assert (seen["wait_event_type"], seen["wait_event"], seen["state"]) == ("IPC", "MessageQueuePutMessage", "active")
    session.detach(handle)


def test_output_larger_than_a_small_queue_keeps_completed_false(session: Background) -> None:
    handle = session.launch("select repeat('x', 100) from generate_series(1, 100)", queue_size=4096)
    assert session.wait(handle, 300) is False
    assert not session.info(handle)["completed"]
    assert len(session.result(handle, "x text")) == 100


def test_a_statement_that_is_not_the_last_sends_no_rows(session: Background) -> None:
    ended = session.run("select repeat('x', 100) from generate_series(1, 100000); insert into done values (1)")
    assert (ended["command_tag"], ended["row_count"]) == ("INSERT", 1)


def test_reading_the_result_frees_a_blocked_worker(session: Background) -> None:
    handle = session.launch(MANY_ROWS)
    session.blocked(handle)
    rows = session.result(handle, "x text")
    assert len(rows) == 100_000
    assert set(rows) == {("x" * 100,)}
    assert session.value("select count(*) from done") == 1


def test_notices_arrive_in_the_readers_session(session: Background, unlike: Callable[[str], None]) -> None:
    unlike("notices")
    arrived: list[str | None] = []
    session.connection.add_notice_handler(lambda notice: arrived.append(notice.message_primary))
    assert session.fetch(MANY_NOTICES) == [("INSERT 0 1",), ("DO",)]
    assert len(arrived) == 20_000
    assert (arrived[0] or "").startswith("notice number 1 of many: xxx")


def test_no_notice_is_sent_with_client_min_messages_at_launch(session: Background) -> None:
    session.execute("set client_min_messages = warning")
    handle = session.launch(MANY_NOTICES)
    session.ended(handle)
    assert session.value("select count(*) from done") == 1


def test_a_blocked_worker_can_be_cancelled_by_the_extension(session: Background) -> None:
    handle = session.launch(MANY_ROWS)
    session.blocked(handle)
    session.cancel(handle)
    assert session.ended(handle)["has_error"]
    assert session.error(handle)["sqlstate"] == "57014"
    assert session.value("select count(*) from done") == 0


def test_a_blocked_worker_can_be_cancelled_by_pg_cancel_backend(
    session: Background, unlike: Callable[[str], None]
) -> None:
    unlike("cancel_blocked")
    handle = session.launch(MANY_ROWS)
    session.blocked(handle)
    assert session.value("select pg_cancel_backend(%s)", (handle.pid,))
    assert session.ended(handle)["has_error"]


def test_an_error_in_a_full_queue_makes_a_worker_that_only_detach_frees(
    session: Background, observer: psycopg.Connection, unlike: Callable[[str], None]
) -> None:
    unlike("error_in_full_queue")
    locks = "select pid from pg_locks where locktype = 'advisory' and objid = 4712"
    for size in range(3600, 4100, 8):
        # One NOTICE that nearly fills the queue; the report of the error then finds no room.
        handle = session.launch(
            f"select pg_advisory_xact_lock(4712); do $$begin raise notice '%', repeat('x', {size}); "
            "raise exception 'no room for this report' using errcode = 'PB778'; end$$",
            queue_size=4096,
        )
        session.ended_or_blocked(handle)
        held = observer.execute(locks).fetchall() == [(handle.pid,)]
        if held and not session.info(handle)["completed"] and session.error(handle)["sqlstate"] == "PB778":
            break
        session.detach(handle)
        session.gone(handle)
    else:
        pytest.fail("no size of NOTICE left too little room for the report")
    assert session.value("select pg_cancel_backend(%s)", (handle.pid,))
    assert session.value("select pg_terminate_backend(%s, 500)", (handle.pid,)) is False
    assert observer.execute(locks).fetchall() == [(handle.pid,)]
    session.detach(handle)
    eventually(lambda: not observer.execute(locks).fetchall(), "the lock's release")


def test_result_gives_the_rows_and_forgets_the_handle(session: Background) -> None:
    handle = session.launch("select 1, 'one'::text union all select 2, null order by 1")
    assert session.result(handle, "n int, t text") == [(1, "one"), (2, None)]
    with pytest.raises(errors.UndefinedObject):
        session.info(handle)
    with pytest.raises(errors.UndefinedObject):
        session.result(handle, "n int, t text")


def test_result_comes_after_the_commit(session: Background, observer: psycopg.Connection) -> None:
    for number in range(20):
        assert session.fetch(f"insert into done values ({number})") == [("INSERT 0 1",)]
        assert observer.execute("select count(*) from done where i = %s", (number,)).fetchone() == (1,)


@pytest.mark.parametrize(
    ("expression", "column", "value"),
    [
        ("1::bigint", "v bigint", 1),
        ("1.50::numeric(10, 2)", "v numeric", None),
        ("'2026-01-02 03:04:05+00'::timestamptz", "v timestamptz", None),
        ("array['a', null, 'c,\"d']", "v text[]", ["a", None, 'c,"d']),
        ("'{\"a\": [1, null]}'::jsonb", "v jsonb", {"a": [1, None]}),
        ("'\\x00ff'::bytea", "v bytea", b"\x00\xff"),
        ("true", "v bool", True),
        ("null::date", "v date", None),
    ],
)
def test_result_keeps_types_and_values(session: Background, expression: str, column: str, value: object) -> None:
    ((found,),) = session.fetch(f"select {expression}", column)
    assert found == session.value(f"select {expression}")
    if value is not None:
        assert found == value


def test_result_reraises_the_workers_error_with_its_fields(session: Background) -> None:
    text = "do $$begin raise exception 'a message' using errcode = 'PB777', detail = 'a detail', hint = 'a hint'; end$$"
    handle = session.launch(text)
    with pytest.raises(psycopg.Error, match="a message") as caught:
        session.result(handle)
    diag = caught.value.diag
    assert (diag.sqlstate, diag.message_detail, diag.message_hint) == ("PB777", "a detail", "a hint")
    with pytest.raises(errors.UndefinedObject):
        session.info(handle)


def test_result_reraises_the_workers_context(session: Background, unlike: Callable[[str], None]) -> None:
    unlike("result_context")
    with pytest.raises(errors.RaiseException) as caught:
        session.fetch("do $$begin raise exception 'a message'; end$$")
    assert (caught.value.diag.context or "").startswith(
        "PL/pgSQL function inline_code_block line 1 at RAISE\nbackground worker"
    )


def test_a_tag_is_read_by_one_column_of_text_only(session: Background, unlike: Callable[[str], None]) -> None:
    unlike("column_lists")
    with pytest.raises(errors.DatatypeMismatch, match="did not return a result set"):
        session.fetch("do $$begin end$$", "tag int")


def test_a_result_of_type_void_is_not_text(session: Background, unlike: Callable[[str], None]) -> None:
    unlike("void_results")
    with pytest.raises(errors.DatatypeMismatch):
        session.fetch("select pg_sleep(0)", "v text")


def test_results_of_a_submitted_worker_are_refused_by_its_launchers_name(session: Background) -> None:
    handle = session.launch("select 1", submit=True)
    name = "pg_background_submit" if session.v2_0 else "submit_v2"
    with pytest.raises(errors.FeatureNotSupported, match=f"submitted via {name}"):
        session.result(handle)


@pytest.mark.parametrize("columns", ["v text", "v int, w int", "v bigint"])
def test_result_with_other_columns_fails_with_42804_and_the_work_is_committed(
    session: Background, columns: str
) -> None:
    handle = session.launch("insert into done values (1); select 1::int")
    with pytest.raises(errors.DatatypeMismatch, match="remote query result rowtype does not match"):
        session.result(handle, columns)
    with pytest.raises(errors.UndefinedObject):
        session.info(handle)
    eventually(lambda: session.value("select count(*) from done") == 1, "the commit")


def test_result_without_rows_is_the_tags_as_one_text_column(session: Background) -> None:
    assert session.fetch("create table made (i int)") == [("CREATE TABLE",)]
    assert session.fetch("insert into done values (1), (2)") == [("INSERT 0 2",)]
    assert session.fetch("insert into done values (1); do $$begin null; end$$") == [("INSERT 0 1",), ("DO",)]
    assert session.fetch("select 1; select pg_sleep(0); set local a.b to default") == [
        ("SELECT 1",),
        ("SELECT 1",),
        ("SET",),
    ]


@pytest.mark.parametrize(
    ("text", "tag"),
    [
        ("insert into done values (1), (2) returning i", "INSERT 0 2"),
        ("explain (costs off) select 1", "EXPLAIN"),
        ("show work_mem", "SHOW"),
    ],
)
def test_a_statement_before_the_last_tells_its_tag_and_not_its_rows(session: Background, text: str, tag: str) -> None:
    assert session.fetch(f"{text}; set local a.b to default") == [(tag,), ("SET",)]


def test_result_needs_a_column_definition_list(session: Background) -> None:
    handle = session.launch("select 1")
    with pytest.raises(errors.SyntaxError):
        session.call("result", *handle)
    assert session.ended(handle)["completed"]


def test_result_of_a_submitted_worker_fails_with_0a000_and_keeps_the_handle(session: Background) -> None:
    handle = session.launch("select 1", submit=True)
    with pytest.raises(errors.FeatureNotSupported, match="results are disabled"):
        session.result(handle, "v int")
    assert session.ended(handle)["command_tag"] == "SELECT"


def test_result_waits_for_the_worker(session: Background) -> None:
    assert session.fetch("select 7 from pg_sleep(0.5)", "v int") == [(7,)]


def test_a_describe_of_a_prepared_statement_tells_the_columns_without_running_it(session: Background) -> None:
    session.connection.pgconn.prepare(b"shape", b"insert into done values (1) returning i as number, 'x'::text as word")
    described = session.connection.pgconn.describe_prepared(b"shape")
    columns = [(described.fname(n), described.ftype(n)) for n in range(described.nfields)]
    assert columns == [(b"number", 23), (b"word", 25)]
    assert session.value("select count(*) from done") == 0
