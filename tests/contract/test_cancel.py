"""The ways to cancel a worker."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import psycopg
import pytest

from tests.contract.background import Background, eventually

pytestmark = pytest.mark.majors

SLEEP = "insert into done select 1 from pg_sleep(60)"
STUBBORN = """do $$begin
    for i in 1 .. 100 loop
        begin perform pg_sleep(0.05); exception when query_canceled then null; end;
    end loop;
    insert into done values (1);
end$$"""


@pytest.fixture(autouse=True)
def done(session: Background) -> None:
    session.execute("create table done (i int)")


def cancelled(session: Background, info: dict[str, object], error: dict[str, object]) -> None:
    assert (info["completed"], info["has_error"], info["command_tag"]) == (True, True, "")
    assert (error["sqlstate"], error["message"]) == ("57014", "canceling statement due to user request")
    assert session.value("select count(*) from done") == 0


def test_the_extensions_cancel_ends_a_worker_at_work_with_57014(session: Background) -> None:
    handle = session.launch(SLEEP)
    session.cancel(handle)
    cancelled(session, session.ended(handle), session.error(handle))


def test_pg_cancel_backend_from_another_session_ends_a_worker_with_57014(
    session: Background, observer: psycopg.Connection
) -> None:
    handle = session.launch(SLEEP)
    session.seen_at_work(handle)
    assert observer.execute("select pg_cancel_backend(%s)", (handle.pid,)).fetchone() == (True,)
    cancelled(session, session.ended(handle), session.error(handle))


def test_each_pg_cancel_backend_that_is_accepted_gives_57014_and_never_a_silent_end(
    session: Background, observer: psycopg.Connection
) -> None:
    def accepted(pid: int) -> bool:
        return observer.execute("select pg_cancel_backend(%s)", (pid,)).fetchone() == (True,)

    for _ in range(20):
        handle = session.launch(SLEEP)
        eventually(partial(accepted, handle.pid), "an accepted signal")
        cancelled(session, session.ended(handle), session.error(handle))
        session.detach(handle)


def test_pg_terminate_backend_reports_a_cancel(session: Background, observer: psycopg.Connection) -> None:
    handle = session.launch(SLEEP)
    session.seen_at_work(handle)
    assert observer.execute("select pg_terminate_backend(%s)", (handle.pid,)).fetchone() == (True,)
    cancelled(session, session.ended(handle), session.error(handle))


def test_cancel_all_hits_every_worker_of_the_session_and_of_no_other(
    session: Background, open_session: Callable[..., Background]
) -> None:
    other = open_session()
    survivor = other.launch("select pg_sleep(1)")
    handles = [session.launch(SLEEP) for _ in range(3)]
    for handle in handles:
        session.seen_at_work(handle)
    assert list(session.call("cancel_all")[0].values()) == [3]
    for handle in handles:
        cancelled(session, session.ended(handle), session.error(handle))
    assert list(session.call("cancel_all")[0].values()) == [0]
    assert not other.ended(survivor)["has_error"]


def test_cancel_of_a_worker_that_ended_does_nothing(session: Background) -> None:
    handle = session.launch("select 1")
    session.ended(handle)
    session.call("cancel", *handle)
    assert session.info(handle)["has_error"] is False


def test_result_of_a_cancelled_worker_raises_57014(session: Background) -> None:
    handle = session.launch(SLEEP)
    session.cancel(handle)
    with pytest.raises(psycopg.errors.QueryCanceled):
        session.result(handle)


def test_a_worker_that_catches_query_canceled_survives_the_extensions_cancel(session: Background) -> None:
    handle = session.launch(STUBBORN)
    # Before its first nap nothing in it catches the cancel.
    eventually(lambda: (found := session.activity(handle)) and found["wait_event"] == "PgSleep", "a nap")
    session.call("cancel", *handle)
    info = session.ended(handle)
    assert (info["has_error"], info["command_tag"]) == (False, "DO")
    assert session.value("select count(*) from done") == 1


@pytest.mark.since(extension="2.0")
def test_cancel_with_a_grace_period_waits_for_the_end(session: Background) -> None:
    handle = session.launch(SLEEP)
    session.seen_at_work(handle)
    session.call("cancel", *handle, 20000)
    assert session.info(handle)["completed"]


@pytest.mark.since(extension="2.0")
def test_workers_can_be_cancelled_by_label(session: Background) -> None:
    handles = {label: session.launch(SLEEP, label=label) for label in ("night one", "night two", "day")}
    for handle in handles.values():
        session.seen_at_work(handle)
    assert session.call("cancel_by_label", "night%")[0]["pg_background_cancel_by_label"] == 2
    assert session.ended(handles["night one"])["has_error"]
    assert session.ended(handles["night two"])["has_error"]
    assert not session.info(handles["day"])["completed"]
    session.cancel(handles["day"])


def test_a_cancelled_worker_shows_as_stopped(session: Background) -> None:
    handle = session.launch(SLEEP)
    session.cancel(handle)
    session.ended(handle)
    (row,) = session.list()
    assert (row["state"], row["last_error"]) == ("stopped", None)
