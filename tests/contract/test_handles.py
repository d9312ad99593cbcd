"""A handle belongs to the session that launched it; the worker belongs to nobody."""

from __future__ import annotations

from collections.abc import Callable

import psycopg
import pytest
from psycopg import errors, sql

from tests.contract.background import Background, Handle, eventually

pytestmark = pytest.mark.majors

SLEEP = "select pg_sleep(60)"
OpenSession = Callable[..., Background]
ASKING = ["result_info", "error_info", "cancel", "detach", "result"]


def ask(session: Background, function: str, handle: Handle) -> None:
    if function == "result":
        session.result(handle)
    else:
        session.call(function, *handle)


@pytest.mark.parametrize("function", ASKING)
def test_another_session_is_told_42704_for_a_handle(
    session: Background, open_session: OpenSession, function: str
) -> None:
    handle = session.launch(SLEEP)
    with pytest.raises(errors.UndefinedObject, match=f"PID {handle.pid} is not attached to this session"):
        ask(open_session(), function, handle)
    session.cancel(handle)


@pytest.mark.parametrize("function", ASKING)
def test_a_wrong_cookie_is_told_55000_and_by_result_42704_before_2_0(session: Background, function: str) -> None:
    handle = session.launch(SLEEP)
    wrong = Handle(handle.pid, handle.cookie + 1)
    if function == "result" and not session.v2_0:
        with pytest.raises(errors.UndefinedObject, match="cookie mismatch"):
            ask(session, function, wrong)
    else:
        with pytest.raises(errors.ObjectNotInPrerequisiteState, match="cookie mismatch") as caught:
            ask(session, function, wrong)
        assert caught.value.diag.message_hint == "The worker may have been restarted or the handle is stale."
    session.cancel(handle)


@pytest.mark.since(extension="2.0")
def test_outcome_never_raises(session: Background, open_session: OpenSession) -> None:
    handle = session.launch(SLEEP)
    assert session.call("outcome", *handle)[0]["state"] == "running"
    unknown = {"pid": handle.pid, "cookie": handle.cookie} | dict.fromkeys(
        (
            "state",
            "consumed",
            "completed",
            "has_error",
            "row_count",
            "command_tag",
            "sqlstate",
            "error_message",
            "label",
        )
    )
    told = open_session().call("outcome", *handle)[0]
    assert told.pop("launched_at") is None
    assert told == unknown
    assert session.call("outcome", handle.pid, handle.cookie + 1)[0]["state"] is None
    session.cancel(handle)


def test_get_progress_of_an_unknown_handle_is_null_and_no_error(session: Background) -> None:
    assert session.call("get_progress", 1, 1) == [{"progress_pct": None, "progress_msg": None}]


def test_one_bad_handle_fails_a_set_based_query(session: Background) -> None:
    good = session.launch("select 1")
    with pytest.raises(errors.UndefinedObject):
        session.connection.execute(
            sql.SQL("select r.* from unnest(%s::int[], %s::bigint[]) as h(p, c), lateral {}(h.p, h.c) as r").format(
                session.extension.name("result_info")
            ),
            ([good.pid, 1], [good.cookie, 1]),
        ).fetchall()


def test_a_worker_goes_on_and_commits_when_its_launching_session_closes(
    session: Background, open_session: OpenSession
) -> None:
    session.execute("create table done (i int)")
    launching = open_session()
    handle = launching.launch("do $$begin perform pg_sleep(2); end$$; insert into done values (1)")
    launching.connection.close()
    eventually(lambda: session.activity(handle), "the worker at work without its launcher")
    eventually(lambda: session.value("select count(*) from done"), "the orphan's commit")


def test_a_worker_goes_on_and_commits_when_its_launching_session_is_terminated(
    session: Background, open_session: OpenSession
) -> None:
    session.execute("create table done (i int)")
    launching = open_session()
    launching.launch("do $$begin perform pg_sleep(0.5); end$$; insert into done values (1)")
    assert session.value("select pg_terminate_backend(%s)", (launching.connection.info.backend_pid,))
    eventually(lambda: session.value("select count(*) from done"), "the orphan's commit")


def test_an_orphan_with_much_output_goes_on_and_commits(
    session: Background, open_session: OpenSession, unlike: Callable[[str], None]
) -> None:
    unlike("orphan_output")
    session.execute("create table done (i int)")
    launching = open_session()
    handle = launching.launch("insert into done values (1); select repeat('x', 100) from generate_series(1, 100000)")
    launching.blocked(handle)
    launching.connection.close()
    eventually(lambda: session.value("select count(*) from done"), "the orphan's commit")


def test_a_launch_is_not_undone_by_rollback(session: Background) -> None:
    session.execute("create table done (i int)")
    with session.connection.transaction(force_rollback=True):
        handle = session.launch("insert into done values (1)")
    assert session.ended(handle)["command_tag"] == "INSERT"
    assert session.value("select count(*) from done") == 1


def test_a_launch_is_not_undone_when_its_transaction_fails(session: Background) -> None:
    session.execute("create table done (i int)")
    session.execute("begin")
    handle = session.launch("insert into done values (1)")
    with pytest.raises(errors.DivisionByZero):
        session.execute("select 1/0")
    session.execute("rollback")
    session.ended(handle)
    assert session.value("select count(*) from done") == 1


def test_expanding_the_launch_call_launches_one_worker_for_each_column(session: Background) -> None:
    session.execute("create table done (i int)")
    session.connection.execute(
        # Not at an end before the launcher wakes: both handles would then have the pid 0, and share one entry.
        sql.SQL("select ({}('insert into done select 1 from pg_sleep(0.5)', 65536, 'twice')).*").format(
            session.extension.name("launch")
        )
    )
    assert len(session.list()) == 2
    eventually(lambda: session.value("select count(*) from done") == 2, "two rows")


def test_the_list_shows_each_worker_with_its_label(session: Background) -> None:
    handle = session.launch(SLEEP, label="a label", queue_size=8192)
    (row,) = session.list()
    columns = "pid cookie launched_at user_id queue_size state sql_preview last_error consumed label"
    assert list(row) == columns.split()
    session.seen_at_work(handle)
    (row,) = session.list()
    assert Handle(row["pid"], row["cookie"]) == handle
    assert (row["queue_size"], row["state"], row["sql_preview"], row["consumed"]) == (8192, "running", SLEEP, False)
    assert (row["last_error"], row["label"]) == (None, "a label")
    assert row["user_id"] == session.value("select current_user::regrole::oid")
    session.cancel(handle)
    session.ended(handle)
    assert [row["state"] for row in session.list()] == ["stopped"]


def test_the_list_of_another_session_is_empty(session: Background, open_session: OpenSession) -> None:
    handle = session.launch(SLEEP)
    assert open_session().list() == []
    session.cancel(handle)


def test_a_handle_is_forgotten_by_detach_and_its_worker_goes_on(session: Background) -> None:
    session.execute("create table done (i int)")
    handle = session.launch("do $$begin perform pg_sleep(0.3); end$$; insert into done values (1)")
    session.detach(handle)
    assert session.list() == []
    with pytest.raises(errors.UndefinedObject):
        session.detach(handle)
    eventually(lambda: session.value("select count(*) from done"), "the detached worker's commit")


def test_detach_all_forgets_all_and_tells_how_many(session: Background) -> None:
    session.execute("create table done (i int)")
    for _ in range(3):
        session.launch("insert into done select 1 from pg_sleep(0.5)")
    assert list(session.call("detach_all")[0].values()) == [3]
    assert session.list() == []
    eventually(lambda: session.value("select count(*) from done") == 3, "three commits")


def test_wait_tells_whether_the_worker_ended(session: Background) -> None:
    handle = session.launch(SLEEP)
    assert session.wait(handle, 50) is False
    session.cancel(handle)
    assert session.wait(handle, 20000) is True
    assert session.info(handle)["completed"]


def test_completed_comes_after_the_commit_and_the_release_of_locks(
    session: Background, observer: psycopg.Connection
) -> None:
    session.execute("create table done (i int)")
    session.execute(
        "create function slow() returns trigger language plpgsql as $$begin perform pg_sleep(0.02); return null; end$$"
    )
    session.execute(
        "create constraint trigger slow after insert on done deferrable initially deferred"
        " for each row execute function slow()"
    )
    for number in range(20):
        text = f"select pg_advisory_xact_lock({number}); insert into done values ({number})"
        session.ended(session.launch(text))
        held = observer.execute("select count(*) from pg_locks where locktype = 'advisory' and objid = %s", (number,))
        assert held.fetchone() == (0,)
        assert observer.execute("select count(*) from done where i = %s", (number,)).fetchone() == (1,)
        session.call("detach_all")


def test_a_worker_is_seen_by_its_pid_as_a_background_worker(session: Background, unlike: Callable[[str], None]) -> None:
    unlike("backend_type")
    handle = session.launch(SLEEP)
    session.seen_at_work(handle)
    row = session.activity(handle)
    assert row is not None
    assert (row["backend_type"], row["query"]) == ("pg_background", SLEEP)
    session.cancel(handle)


def test_a_worker_that_ended_is_gone_at_once(session: Background, unlike: Callable[[str], None]) -> None:
    unlike("lingers")
    handle = session.launch("select 1")
    eventually(lambda: session.activity(handle) is None, "the worker's end, with nobody asking")


def test_an_advisory_lock_in_the_worker_is_seen_by_all_with_its_pid(
    session: Background, observer: psycopg.Connection
) -> None:
    handle = session.launch("select pg_advisory_xact_lock(4711); select pg_sleep(60)")
    query = "select pid from pg_locks where locktype = 'advisory' and objid = 4711 and granted and objsubid = 1"
    assert eventually(lambda: observer.execute(query).fetchone(), "the lock") == (handle.pid,)
    session.cancel(handle)
    eventually(lambda: observer.execute(query).fetchone() is None, "the lock's release")


def test_a_role_without_pg_read_all_stats_does_not_see_another_roles_query(
    session: Background, open_session: OpenSession
) -> None:
    session.execute("drop role if exists contract_blind")
    session.execute("create role contract_blind login")
    handle = session.launch(SLEEP)
    session.seen_at_work(handle)
    blind = open_session("contract_blind")
    seen = blind.execute("select query, state, backend_type from pg_stat_activity where pid = %s", (handle.pid,))
    assert seen == [{"query": "<insufficient privilege>", "state": None, "backend_type": None}]
    session.cancel(handle)
    blind.connection.close()
    session.execute("drop role contract_blind")


def test_the_session_counts_its_workers(session: Background) -> None:
    session.run("select 1")
    session.run("select 1/0")
    (stats,) = session.call("stats")
    assert (stats["workers_launched"], stats["workers_completed"], stats["workers_failed"]) == (2, 1, 1)
    assert (stats["workers_canceled"], stats["workers_active"], stats["max_workers"]) == (0, 0, 16)
    assert ("workers_timed_out" in stats) == session.v2_0


def test_a_worker_can_launch_workers(session: Background) -> None:
    session.execute("create table done (i int)")
    launch = session.extension.name("launch").as_string(None)
    session.run(f"select pid from {launch}('insert into done values (1)', 65536, 'grandchild')")
    eventually(lambda: session.value("select count(*) from done"), "the grandchild's commit")


def test_progress_is_seen_while_the_worker_runs(session: Background) -> None:
    report = session.extension.name("report_progress").as_string(None)
    handle = session.launch(f"select {report}(40, 'nearly half'); select pg_sleep(60)")
    found = eventually(lambda: (row := session.call("get_progress", *handle)[0])["progress_pct"] and row, "a report")
    assert found == {"progress_pct": 40, "progress_msg": "nearly half"}
    session.cancel(handle)


def test_progress_is_clamped_and_its_message_cut_to_63_bytes(session: Background) -> None:
    report = session.extension.name("report_progress").as_string(None)
    handle = session.launch(f"select {report}(150, repeat('m', 300)); select pg_sleep(60)")
    found = eventually(lambda: (row := session.call("get_progress", *handle)[0])["progress_pct"] and row, "a report")
    assert found == {"progress_pct": 100, "progress_msg": "m" * 63}
    session.cancel(handle)


def test_progress_is_told_after_the_workers_end(session: Background) -> None:
    report = session.extension.name("report_progress").as_string(None)
    handle = session.launch(f"select {report}(-4, repeat('é', 60)); select 1/0")
    session.ended(handle)
    assert session.call("get_progress", *handle) == [{"progress_pct": 0, "progress_msg": "é" * 31}]


def test_progress_without_a_number_is_none_at_all_in_1_x_and_refused_since(session: Background) -> None:
    report = session.extension.name("report_progress").as_string(None)
    handle = session.launch(f"select {report}(null, 'x'); select 1")
    assert session.ended(handle)["has_error"] == session.v2_0
    told = session.call("get_progress", *handle)[0]["progress_pct"]
    assert told is None if session.v2_0 else told == 0


def test_progress_can_be_reported_by_a_worker_only(session: Background) -> None:
    name = "report_progress" if session.v2_0 else "progress"
    with pytest.raises(errors.FeatureNotSupported, match=f"^pg_background_{name} can only be called from a background"):
        session.call("report_progress", 1, "x")


def test_an_empty_label_is_none(session: Background) -> None:
    session.launch("select 1", label="")
    (listed,) = session.list()
    assert listed["label"] is None


def test_the_queue_is_as_large_as_the_session_says_unless_the_launch_does(session: Background) -> None:
    session.execute("set pg_background.default_queue_size = 131072")
    for arguments in (("select 1",), ("select 1", 0)):
        session.call("launch", *arguments)
    assert [listed["queue_size"] for listed in session.list()] == [131072, 131072]
