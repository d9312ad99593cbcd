"""Commits are heard of, and nothing depends on it: lost listeners, poolers, other processes, restarts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import psycopg
import pytest

from pgbg_orchestration import Job, Launcher, Outcome, arun, pace
from pgbg_orchestration.ledger.ledger import Ledger
from pgbg_orchestration.postgres import connection, launch_message
from pgbg_orchestration.postgres.handles import HandleSession
from pgbg_orchestration.walk import host
from tests.core.kit import APP, Watched, cancelled, effect, eventually, slow, within
from tests.kit import pgbouncer

pytestmark = pytest.mark.servers("real", "embedded")
LISTENING = "pgbg: listening"


def deaf(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nobody poll for minutes, so that only what is heard ends a wait."""
    monkeypatch.setattr(pace, "poll_handle", lambda *_: 600)
    monkeypatch.setattr(pace, "look", lambda *_: 600)


def listener(db: Watched) -> int | None:
    """The process that listens, once it does."""
    rows = db.sql("select pid from pg_stat_activity where application_name = %s and query ~ '^listen'", LISTENING)
    return int(rows[0][0]) if rows else None


async def test_a_commit_is_heard(db: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    deaf(monkeypatch)
    async with Launcher(db.conninfo) as launcher:
        outcome = await within(launcher.run(Job(f"{slow('j', 2)}; insert into effects values ('j'), ('j')", id="j")))
        assert (outcome.proof, outcome.row_count, outcome.command_tag) == ("receipt", 2, "INSERT")
        assert outcome.worker_pid == db.value("select worker_pid from pgbg.receipt")
        told = db.sql("select state, row_count, command_tag, ended_at is not null from pgbg.jobs")
        assert told == [("committed", 2, "INSERT", True)]


async def test_many_that_end_together(db: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their ends are written down together, and each is told its own."""
    deaf(monkeypatch)
    async with Launcher(db.conninfo) as launcher:
        await within(launcher.run(Job("select 1")))
        await eventually(lambda: listener(db), "it listens")
        sql = "insert into effects select 'j' from generate_series(1, {})"
        jobs = [Job(sql.format(number), id=f"j{number}") for number in range(1, 31)]
        outcomes = await within(asyncio.gather(*(launcher.run(job) for job in jobs)))
    assert [outcome.row_count for outcome in outcomes] == list(range(1, 31))
    assert set(db.states().values()) == {"committed"}


async def test_the_history_counts_the_jobs_own_rows_where_they_are_kept(
    db: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the handle tells then is of the statement that keeps them."""
    deaf(monkeypatch)
    async with Launcher(db.conninfo) as launcher:
        await within(launcher.run(Job("select 1")))
        await eventually(lambda: listener(db), "it listens")
        job = Job("select pg_sleep(2); insert into effects values ('j'), ('j') returning n", id="j", fetch=True)
        outcome = await within(launcher.run(job))
    assert (outcome.row_count, outcome.command_tag) == (2, "INSERT")
    assert db.sql("select row_count, command_tag from pgbg.jobs where job_id = 'j'") == [(2, "INSERT")]


async def test_rows_that_nobody_reads_are_counted_however_rarely_it_is_polled(
    db: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The report of their number comes after the commit that was heard of."""
    deaf(monkeypatch)
    async with Launcher(db.conninfo) as launcher:
        await within(launcher.run(Job("select 1")))
        await eventually(lambda: listener(db), "it listens")
        job = Job("select pg_sleep(2); select generate_series(1, 5)", id="j")
        outcome = await within(launcher.run(job))
    assert (outcome.row_count, outcome.command_tag) == (5, "SELECT")
    assert db.sql("select row_count, command_tag from pgbg.jobs where job_id = 'j'") == [(5, "SELECT")]


async def test_rows_that_nobody_reads_are_not_polled_for(db: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their number is read with the receipt, for all that end together, each its own."""

    async def poll(_: object) -> None:
        raise AssertionError("polled")

    deaf(monkeypatch)
    async with Launcher(db.conninfo) as launcher:
        await within(launcher.run(Job("select 1")))
        await eventually(lambda: listener(db), "it listens")
        monkeypatch.setattr(pace, "LOOK_SOONEST", 600)
        monkeypatch.setattr(HandleSession, "poll", poll)
        sql = ("{}; select generate_series(1, {})", "{}; insert into effects select 'j' from generate_series(1, {})")
        jobs = [Job(sql[n % 2].format(slow(f"j{n}", 1), n), id=f"j{n}") for n in range(1, 21)]
        outcomes = await within(asyncio.gather(*(launcher.run(job) for job in jobs)))
        assert launcher._host.worker_count == 0
    told = [(outcome.row_count, outcome.command_tag) for outcome in outcomes]
    assert told == [(n, ("SELECT", "INSERT")[n % 2]) for n in range(1, 21)]
    kept = db.sql("select row_count, command_tag from pgbg.job where job_id ~ '^j' order by substr(job_id, 2)::int")
    assert kept == told


async def test_ends_that_nobody_heard_of_are_written_down_together(
    db: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The poll that finds them does what a notification has done; no job asks for its own."""

    async def drain(*_: object) -> None:
        raise AssertionError("read by itself")

    db.sql(f"alter role {APP} in database {db.database.name} set pgbg.notify to off")
    monkeypatch.setattr(HandleSession, "drain", drain)
    monkeypatch.setattr(Ledger, "record", drain)
    monkeypatch.setattr(pace, "LOOK_SOONEST", 600)
    async with Launcher(db.conninfo) as launcher:
        jobs = [Job(f"{slow(f'j{n}', 1)}; select generate_series(1, {n})", id=f"j{n}") for n in range(1, 11)]
        outcomes = await within(asyncio.gather(*(launcher.run(job) for job in jobs)))
    assert [outcome.row_count for outcome in outcomes] == [*range(1, 11)]
    assert set(db.states().values()) == {"committed"}


async def test_a_hint_before_the_commit_of_rows_that_nobody_reads(db: Watched) -> None:
    """A result is read of no worker that is at work: the session would wait for it, and all its other jobs."""
    async with Launcher(db.conninfo) as launcher:
        await within(launcher.run(Job("select 1")))
        await eventually(lambda: listener(db), "it listens")
        task = asyncio.create_task(launcher.run(Job("select pg_sleep(4)", id="j")))
        await db.at_work("j")
        db.sql("select pg_notify('pgbg', pgbg.marker(%s, 'j'))", APP)
        others = [await within(launcher.run(Job("select 2"))) for _ in range(4)]
        assert not task.done()
        assert [outcome.row_count for outcome in [*others, await within(task)]] == [1] * 5


async def test_a_listener_that_was_terminated(db: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was said meanwhile is looked for when another one listens."""
    deaf(monkeypatch)
    async with Launcher(db.conninfo) as launcher:
        task = asyncio.create_task(launcher.run(Job(slow("j", 2), id="j")))
        await db.at_work("j")
        first = await eventually(lambda: listener(db), "it listens")
        assert first is not None
        db.terminate([first])
        assert (await within(task)).launched
        second = await eventually(lambda: listener(db), "it listens again")
        assert second != first


async def test_hints_about_jobs_of_others(db: Watched) -> None:
    """Of another process, and of nobody: whoever hears them reads the receipt, or lets them pass."""
    async with Launcher(db.conninfo) as mine, Launcher(db.conninfo) as other:
        task = asyncio.create_task(mine.run(Job(slow("mine", 1.5), id="mine")))
        await db.at_work("mine")
        await within(asyncio.gather(*(other.run(Job(effect(f"o{n}"), id=f"o{n}")) for n in range(5))))
        for payload in ("", "pgbg:", "x" * 7000, "é"):
            db.sql("select pg_notify('pgbg', %s)", payload)
        db.sql("select pg_notify('pgbg', pgbg.marker(%s, 'mine'))", APP)  # before its commit
        assert not task.done()
        assert (await within(task)).launched
    assert db.effects() == 6


async def test_who_is_attached_hears_it_too(db: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    async with Launcher(db.conninfo) as one, Launcher(db.conninfo) as other:
        first = asyncio.create_task(one.run(Job(slow("j", 3), id="j")))
        await db.at_work("j")
        second = asyncio.create_task(other.run(Job(slow("j", 3), id="j")))
        await eventually(lambda: len(db.sessions(LISTENING)) == 2, "both listen")
        monkeypatch.setattr(pace, "poll", lambda *_: 600)
        monkeypatch.setattr(pace, "GRACE", 60)  # for the launching side to write down how many rows it were
        outcomes = [await within(task) for task in (first, second)]
    assert [outcome.launched for outcome in outcomes] == [True, False]
    assert [outcome.row_count for outcome in outcomes] == [1, 1]
    assert db.effects() == 1


@pytest.mark.parametrize("where", ["login", "job"])
async def test_notifications_can_be_turned_off(db: Watched, where: str) -> None:
    off = {"pgbg.notify": "off"}
    if where == "login":
        db.sql(f"alter role {APP} in database {db.database.name} set pgbg.notify to off")
    heard: list[str] = []
    with psycopg.connect(db.admin_conninfo, autocommit=True) as eavesdropping:
        eavesdropping.execute("listen pgbg")
        eavesdropping.add_notify_handler(lambda told: heard.append(told.payload))
        async with Launcher(db.conninfo) as launcher:
            job = Job(slow("j", 1.5), id="j", settings=off if where == "job" else None)
            task = asyncio.create_task(launcher.run(job))
            await db.at_work("j")
            assert len(db.sessions(LISTENING)) == (1 if where == "job" else 0)
            assert (await within(task)).launched
        eavesdropping.execute("select 1")
    assert heard == []


async def test_a_hint_names_nobodys_job(db: Watched) -> None:
    heard: list[str] = []
    with psycopg.connect(db.admin_conninfo, autocommit=True) as eavesdropping:
        eavesdropping.execute("listen pgbg")
        eavesdropping.add_notify_handler(lambda told: heard.append(told.payload))
        for kind in ("receipt", "supervised"):
            await within(arun(db.conninfo, Job(effect(kind), id=f"secret {kind}", kind=kind)))
        eavesdropping.execute("select 1")
    assert heard == [db.value("select pgbg.marker(%s, %s)", APP, f"secret {k}") for k in ("receipt", "supervised")]


async def test_a_restart_between(own_db: Callable[..., Watched]) -> None:
    """The listener and the launching session go with the server; the job is run again, once."""
    db = own_db()
    async with Launcher(db.conninfo) as launcher:
        task = asyncio.create_task(launcher.run(Job(slow("j", 2), id="j")))
        await db.at_work("j")
        await eventually(lambda: listener(db), "it listens")
        db.close()
        db.server.stop()
        db.server.start()
        outcome = await within(task, 120)
        assert isinstance(outcome, Outcome)
    assert db.effects("j") == 1


async def test_a_pooler_in_session_mode(db: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    if pgbouncer.program() is None:
        pytest.skip("pgbouncer is not installed")
    deaf(monkeypatch)
    with pgbouncer.pooler(db.conninfo, "session") as conninfo:
        async with Launcher(conninfo) as launcher:
            assert (await within(launcher.run(Job(slow("j", 2), id="j")))).launched
    assert db.effects("j") == 1


async def test_the_end_of_a_job_that_was_heard_of_is_forgotten(db: Watched) -> None:
    """Its handle counts against pg_background.max_workers until then."""
    async with Launcher(db.conninfo) as launcher:
        for _ in range(5):
            await within(launcher.run(Job("select 1")))
        session = await launcher._host.session()
        await eventually(lambda: not session._turn.locked() and not session.workers, "all are forgotten")
        assert await within(session.extension.stats(session._conn))
        assert await within(session.extension.list(session._conn)) == []


async def test_an_end_does_not_wait_behind_the_launches_of_others(db: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many jobs launched at once the first have ended when the last wait for the session still."""
    deaf(monkeypatch)
    monkeypatch.setattr(pace, "LOOK_SOONEST", 600)
    monkeypatch.setattr(host, "SESSIONS", 1)
    run = launch_message.run
    launched = 0

    async def slowly(*args: Any) -> Any:
        nonlocal launched
        await asyncio.sleep(0.2)
        launched += 1
        return await run(*args)

    async with Launcher(db.conninfo) as launcher:
        await within(launcher.run(Job("select 1")))
        await eventually(lambda: listener(db), "it listens")
        monkeypatch.setattr(launch_message, "run", slowly)
        first = asyncio.create_task(launcher.run(Job(effect("first"), id="first")))
        others = [asyncio.create_task(launcher.run(Job("select 1"))) for _ in range(60)]
        assert (await within(first)).proof == "receipt"
        assert launched < len(others)
        monkeypatch.setattr(launch_message, "run", run)
        await within(asyncio.gather(*others))


async def test_nobody_waits_for_the_socket_of_a_connection_that_is_closed(
    db: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next connection can be given the socket's number, and fails with psycopg 3.3.4 where somebody still waits."""
    loop, close = asyncio.get_running_loop(), connection.close
    awaited: list[bool] = []

    async def watched(conn: psycopg.AsyncConnection[Any]) -> None:
        awaited.append(loop.remove_reader(conn.fileno()))
        await close(conn)

    monkeypatch.setattr(connection, "close", watched)
    for number in range(5):
        async with Launcher(db.conninfo) as launcher:
            running = asyncio.create_task(launcher.run(Job(slow("j", 30), id=f"j{number}"), on_cancel="leave"))
            await db.at_work(f"j{number}")
            await cancelled(running)
        async with Launcher(db.conninfo) as launcher:
            await launcher.cancel(f"j{number}")
    assert len(awaited) >= 20
    assert not any(awaited)
