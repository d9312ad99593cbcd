"""Jobs with a supervisor, and without a receipt: begun in few messages, and their ends not polled for."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from psycopg import sql

from pgbg_orchestration import Job, Kind, Launcher, arun, errors, pace
from pgbg_orchestration.ledger.ledger import Ledger
from pgbg_orchestration.ledger.sighting import Key, Sighting
from pgbg_orchestration.postgres.pg_background import Extension
from pgbg_orchestration.postgres.session import LaunchingSession
from tests.core.kit import APP, Watched, effect, eventually, within


def deaf(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nobody poll, or look again, for minutes."""
    monkeypatch.setattr(pace, "poll_handle", lambda *_: 600)
    monkeypatch.setattr(pace, "LOOK_SOONEST", 600)


def listens(db: Watched) -> bool:
    """Whether a process hears of commits."""
    return bool(
        db.sql("select 1 from pg_stat_activity where application_name = 'pgbg: listening' and query ~ '^listen'")
    )


async def test_the_server_waits_for_the_end_of_a_session_job(db: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    deaf(monkeypatch)
    monkeypatch.setattr(pace, "WAIT_IN_SERVER", pace.CALL / 2)
    outcome = await within(arun(db.conninfo, Job(effect("j"), id="j", kind="session")))
    assert (outcome.proof, outcome.row_count, outcome.command_tag) == ("result", 1, "INSERT")
    if db.server.surface == "2.0":
        assert outcome.started_at is not None
        assert outcome.finished_at is not None
        assert outcome.started_at <= outcome.finished_at


async def test_that_wait_keeps_no_index_build_waiting(db: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """A build waits for all older snapshots, that of the wait for it too: it is short, and polls come after it."""
    db.sql("create table built (n int)")
    db.sql(f"alter table built owner to {APP}")
    db.sql(f"grant create on schema public to {APP}")
    outcome = await within(arun(db.conninfo, Job("create index concurrently on built (n)", kind="session")))
    assert outcome.command_tag == "CREATE INDEX"


async def test_a_supervised_commit_is_heard(db: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    deaf(monkeypatch)
    outcome = await within(arun(db.conninfo, Job(effect("j"), id="j", kind="supervised")))
    assert (outcome.proof, outcome.row_count, outcome.command_tag) == ("receipt", 1, "INSERT")


async def test_a_supervised_commit_is_read_by_itself(db: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    async def never(*_: object) -> Any:
        raise AssertionError("it is looked at")

    async with Launcher(db.conninfo) as launcher:
        await within(launcher.run(Job("select 1")))
        await eventually(lambda: listens(db), "it listens")
        deaf(monkeypatch)
        monkeypatch.setattr(Ledger, "look", never)
        outcome = await within(launcher.run(Job(effect("j"), id="j", kind="supervised")))
    assert (outcome.proof, outcome.row_count, outcome.command_tag) == ("receipt", 1, "INSERT")
    told = db.sql("select attempt, worker_pid, started_at, ended_at from pgbg.jobs where job_id = 'j'")
    assert told == [(outcome.attempt, outcome.worker_pid, outcome.started_at, outcome.finished_at)]


async def test_a_hint_of_a_supervised_job_is_no_proof(db: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that comes while it is at work has its receipt read, which is none yet."""
    deaf(monkeypatch)
    read: list[object] = []
    supervised_end = Ledger.supervised_end

    async def seen(self: Ledger, key: Key, attempt: int) -> Sighting | None:
        read.append(end := await supervised_end(self, key, attempt))
        return end

    monkeypatch.setattr(Ledger, "supervised_end", seen)
    db.sql("select pg_advisory_lock(77)")
    sql = "insert into effects (job) select 'j' from pg_advisory_xact_lock(77)"
    async with Launcher(db.conninfo) as launcher:
        running = asyncio.create_task(launcher.run(Job(sql, id="j", kind="supervised")))
        await eventually(lambda: db.sql("select 1 from pg_locks where objid = 77 and not granted"), "it is at work")
        await eventually(lambda: listens(db), "it listens")
        db.sql("select pg_notify('pgbg', pgbg.marker(%s, 'j'))", APP)
        await eventually(lambda: read or running.done(), "its receipt is read")
        assert set(read) == {None}
        assert not running.done()
        db.sql("select pg_advisory_unlock(77)")
        outcome = await within(running)
    assert outcome.proof == "receipt"


async def test_a_supervised_job_is_begun_in_one_message(db: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    async def never(*_: object, **__: object) -> Any:
        raise AssertionError("it goes the long way")

    monkeypatch.setattr(Ledger, "register", never)
    monkeypatch.setattr(LaunchingSession, "launch", never)
    outcome = await within(arun(db.conninfo, Job(effect("j"), id="j", kind="supervised")))
    assert (outcome.attempt, outcome.launched) == (1, True)
    told = db.sql("select state, attempt, row_count, command_tag, started_at is not null from pgbg.jobs")
    assert told == [("committed", 1, 1, "INSERT", True)]


async def test_one_that_committed_is_told_though_its_table_is_gone(db: Watched) -> None:
    """What the server says of the statement now is nothing to a job that is done."""
    db.sql("create table gone (n int)")
    db.sql(f"alter table gone owner to {APP}")
    job = Job("insert into gone values (1)", id="j", kind=Kind.SUPERVISED)
    assert (await within(arun(db.conninfo, job))).launched
    db.sql("drop table gone")
    assert not (await within(arun(db.conninfo, job))).launched
    with pytest.raises(errors.InvalidJob, match="gone"):
        await within(arun(db.conninfo, Job("insert into gone values (1)", id="other", kind=Kind.SUPERVISED)))


async def test_a_client_of_the_version_before(db: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """It knows no wait, and goes on while the new schema is there: its supervisors sleep between their looks."""
    supervision = Extension.supervision

    def before(self: Extension, columns: sql.Composable | None, **options: Any) -> Sequence[str]:
        return supervision(self, columns, **options)[:4]

    monkeypatch.setattr(Extension, "supervision", before)
    outcome = await within(arun(db.conninfo, Job(effect("j"), id="j", kind="supervised")))
    assert (outcome.row_count, outcome.command_tag) == (1, "INSERT")
