"""What the extension refuses, and with which SQLSTATE."""

from __future__ import annotations

from collections.abc import Callable

import psycopg
import pytest
from psycopg import errors

from tests.contract.background import Background, eventually
from tests.servers.kinds import Server

NAP = "select pg_sleep(0.5)"  # not at an end before its launcher wakes, so that each has a pid of its own


def test_more_workers_than_max_workers_in_one_session_fail_with_53400(session: Background) -> None:
    session.execute("set pg_background.max_workers = 3")
    handles = [session.launch(NAP) for _ in range(3)]
    with pytest.raises(errors.ConfigurationLimitExceeded, match="too many background workers"):
        session.launch(NAP)
    for handle in handles:
        session.ended(handle)
    with pytest.raises(errors.ConfigurationLimitExceeded):  # finished ones count until they are detached
        session.launch(NAP)
    session.detach(handles[0])
    session.detach(session.launch(NAP))


def test_sixteen_workers_of_one_session_are_allowed_unless_set(session: Background) -> None:
    for _ in range(16):
        session.launch("select pg_sleep(5)")
    with pytest.raises(errors.ConfigurationLimitExceeded):
        session.launch(NAP)


def test_max_workers_can_be_raised_for_the_session(session: Background) -> None:
    session.execute("set pg_background.max_workers = 30")
    for _ in range(20):
        session.launch(NAP)
    assert len(session.list()) == 20


def test_used_up_worker_slots_fail_with_53000(own_server: Callable[..., Server], unlike: Callable[[str], None]) -> None:
    unlike("worker_slots")
    server = own_server(4)
    server.create_extension("postgres")
    with server.connect() as connection:
        name = "pg_background_launch" if server.surface == "2.0" else "pg_background_launch_v2"
        launch = f"select {name}('select pg_sleep(20)', 65536, 'slot')".encode()
        # The server's own launcher of logical replication takes one of the four.
        for _ in range(3):
            connection.execute(launch)
        with pytest.raises(errors.InsufficientResources, match="could not register background process"):
            connection.execute(launch)


@pytest.mark.parametrize("label", ["x" * 65, "é" * 33])
def test_a_label_over_64_bytes_fails_with_22001(session: Background, label: str) -> None:
    with pytest.raises(errors.StringDataRightTruncation, match="label too long"):
        session.launch("select 1", label=label)


@pytest.mark.parametrize("label", ["x" * 64, "é" * 32, "", None, "a 'quoted' label"])
def test_a_label_of_64_bytes_is_kept(session: Background, label: str | None) -> None:
    session.launch(NAP, label=label)
    assert session.list()[0]["label"] in (label, None if label == "" else label)


@pytest.mark.parametrize("size", [1, 63, 268_435_457])
def test_a_queue_size_out_of_range_fails_with_22023(session: Background, size: int) -> None:
    with pytest.raises(errors.InvalidParameterValue, match="queue size must"):
        session.launch("select 1", queue_size=size)


@pytest.mark.parametrize("size", [4096, 1_048_576])
def test_a_queue_size_in_range_is_taken(session: Background, size: int) -> None:
    handle = session.launch(NAP, queue_size=size)
    assert session.list()[0]["queue_size"] == size
    session.ended(handle)


def test_a_null_text_fails_with_22004(session: Background) -> None:
    with pytest.raises(errors.NullValueNotAllowed):
        session.call("launch", None, 65536, "nothing")


@pytest.mark.slow
def test_20_mb_of_text_work_in_one_launch(session: Background) -> None:
    text = f"select length('{'x' * 20_000_000}')"
    assert session.fetch(text, "n int") == [(20_000_000,)]


def test_many_statements_work_in_one_launch(session: Background) -> None:
    session.execute("create table many (i int)")
    text = "\n;set local pgbg.step to default\n;".join(f"insert into many values ({n})" for n in range(500))
    assert session.run(text)["command_tag"] == "INSERT"
    assert session.value("select count(*) from many") == 500


def test_a_launch_call_on_a_server_that_is_read_only_by_default_works(session: Background) -> None:
    session.execute("set default_transaction_read_only = on")
    ended = session.run("select 1")
    assert (ended["has_error"], ended["command_tag"]) == (False, "SELECT")
    assert session.run("create table refused (i int)")["sqlstate"] == "25006"


def test_a_pids_entry_is_free_again_after_detach(session: Background, observer: psycopg.Connection) -> None:
    for _ in range(40):
        handle = session.launch("select 1")
        session.ended(handle)
        session.detach(handle)
    assert session.list() == []
    eventually(
        lambda: (
            observer.execute(
                "select count(*) from pg_stat_activity where application_name like 'pg_background:%'"
            ).fetchone()
            == (0,)
        ),
        "the end of all workers",
    )
