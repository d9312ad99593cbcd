"""Jobs with a supervisor, and without a receipt: begun in few messages, and their ends not polled for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from psycopg import sql

from pgbg_orchestration import Job, Kind, arun, errors, pace
from pgbg_orchestration.ledger.ledger import Ledger
from pgbg_orchestration.postgres.pg_background import Extension
from pgbg_orchestration.postgres.session import LaunchingSession
from tests.core.kit import APP, Watched, effect, within


def deaf(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nobody poll, or look again, for minutes."""
    monkeypatch.setattr(pace, "poll_handle", lambda *_: 600)
    monkeypatch.setattr(pace, "LOOK_SOONEST", 600)


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
