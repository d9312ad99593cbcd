"""What changes under a job's feet: rows edited by hand, privileges and schemas gone, the extension moved, clocks set.

Each call ends, by an outcome that is true or an error that says what state the data is in.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Self

import pytest

from pgbg_orchestration import Job, Launcher, Outcome, arun, errors
from pgbg_orchestration.errors import GOES_ON
from pgbg_orchestration.ledger import install
from pgbg_orchestration.walk import case
from tests.core.kit import APP, Watched, effect, ended, eventually, slow, within

pytestmark = pytest.mark.servers("real", "embedded")

# Rows ---------------------------------------------------------------------------------------------------------------

EDITS = [
    ("attempt = 2147483647", errors.LedgerError),
    ("generation = 9223372036854775807", errors.Superseded),
    ("sql_digest = '\\x00'", errors.JobIdReused),
    ("outcome = 'committed', command_tag = 'INSERT', row_count = 7", Outcome),
    ("outcome = null, ended_at = 'epoch', launched_at = '9999-12-31', registered_at = 'epoch'", Outcome),
    ("ended_at = 'infinity'", errors.LedgerError),
    ("kind = 'other', label = null, launched_by = '', launcher_pid = 0, worker_pid = -1", Outcome),
    ("job_id = 'k', series = 'k'", Outcome),
]
"""Of the history of a job that failed, and how its next call ends."""


@pytest.mark.parametrize(("edit", "expected"), EDITS, ids=[edit for edit, _ in EDITS])
async def test_history_edited_by_hand(db: Watched, edit: str, expected: type) -> None:
    """It is history, and never the proof of anything: no success, no second effect."""
    sql = f"{effect('j')}; select 1 / case when (select count(*) from gate) > 0 then 1 else 0 end"
    db.sql("create table gate (); grant select on gate to public")
    job = Job(sql, id="j", series="s", generation=7)
    assert isinstance(await ended(arun(db.conninfo, job)), errors.WorkerError)
    db.sql("insert into gate default values")
    db.sql(f"update pgbg.job set {edit}")
    db.sql("update pgbg.series set newest = (select generation from pgbg.job)")
    end = await ended(arun(db.conninfo, job))
    assert isinstance(end, expected), end
    assert db.effects("j") == isinstance(end, Outcome)
    if isinstance(end, Outcome):
        assert end.launched
    assert db.receipts() == ({"j" if job.id is None else job.id} if isinstance(end, Outcome) else set())


async def test_history_deleted_by_hand(db: Watched) -> None:
    task = asyncio.create_task(arun(db.conninfo, Job(slow("j", 0.5), id="j")))
    await db.at_work("j")
    db.sql("delete from pgbg.job; delete from pgbg.series")
    assert isinstance(await ended(task), Outcome)
    assert isinstance(await ended(arun(db.conninfo, Job(slow("j", 0.5), id="j"))), Outcome)
    assert db.effects("j") == 1


RECEIPTS = [
    ("status = 'cancelled', cause = null, reason = null", {}, errors.JobCancelled),
    ("status = 'cancelled', cause = null, reason = null", {"retry_cancelled": True}, Outcome),
    ("status = 'cancelled', cause = 'superseded'", {"retry_cancelled": True}, errors.Superseded),
    ("status = 'launching', attempt = null", {}, errors.OutcomeUnknown),
    ("label = null, attempt = null, worker_pid = null, xid = null, started_at = null", {}, Outcome),
    ("sql_digest = '\\x00'", {}, errors.JobIdReused),
]
"""Of a receipt, with options of the next call, and how that ends."""


@pytest.mark.parametrize(("edit", "options", "expected"), RECEIPTS, ids=[f"{e} {o or ''}" for e, o, _ in RECEIPTS])
async def test_receipt_edited_by_hand(db: Watched, edit: str, options: dict[str, bool], expected: type) -> None:
    """Whoever edits receipts decides; nobody waits for ever for what is no longer there."""
    await within(arun(db.conninfo, Job(effect("j"), id="j")))
    db.sql("truncate effects")
    db.sql(f"update pgbg.receipt set {edit}")
    end = await ended(arun(db.conninfo, Job(effect("j"), id="j"), **options))  # type: ignore[arg-type]
    assert isinstance(end, expected), end
    assert db.effects() == (isinstance(end, Outcome) and end.launched)


@pytest.mark.parametrize("done", [True, False])
async def test_claim_without_an_attempt_is_settled(db: Watched, done: bool) -> None:
    await within(arun(db.conninfo, Job("select 1", id="j", kind="supervised")))
    db.sql("update pgbg.receipt set status = 'launching', attempt = null")
    job = Job("select 1", id="j", kind="supervised", verify_sql=f"select {done}")
    end = await ended(arun(db.conninfo, job))
    assert isinstance(end, Outcome), end
    assert end.proof == ("verify_sql" if done else "receipt")


async def test_generations_used_up(db: Watched) -> None:
    await within(arun(db.conninfo, Job("select 1", id="j", series="s")))
    db.sql("update pgbg.series set newest = 9223372036854775807")
    end = await ended(arun(db.conninfo, Job(effect("k"), id="k", series="s")))
    assert isinstance(end, errors.LedgerError), end
    assert (end.sqlstate, end.data_state) == ("22003", GOES_ON)
    assert db.effects() == 0


# Schema and privileges ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [0, 99])
async def test_schema_of_another_version(db: Watched, version: int) -> None:
    """Older or newer than the code: refused, by a launcher that has run jobs before too, once it looks again."""
    db.sql("delete from pgbg.meta where version > 1")
    db.sql("update pgbg.meta set version = %s", version)
    with pytest.raises(errors.SchemaVersionMismatch, match=str(version)) as caught:
        await within(arun(db.conninfo, Job(effect("j"), id="j")))
    assert ("pgbg install" in (caught.value.todo or "")) is (version == 0)
    async with Launcher(db.conninfo) as launcher:
        with pytest.raises(errors.SchemaVersionMismatch):
            await within(launcher.cancel("j"))
        db.sql("update pgbg.meta set version = %s", install.VERSION)
        assert (await within(launcher.run(Job(effect("j"), id="j")))).launched
    assert db.effects() == 1


@pytest.mark.parametrize(
    ("change", "expected", "undo"),
    [
        (
            "revoke execute on all functions in schema pgbg from pgbackground_role",
            errors.NoPrivilege,
            "grant execute on all functions in schema pgbg to pgbackground_role",
        ),
        (
            "revoke usage on schema pgbg from pgbackground_role",
            errors.NoPrivilege,
            "grant usage on schema pgbg to pgbackground_role",
        ),
        ("alter schema pgbg rename to away", errors.LedgerError, "alter schema away rename to pgbg"),
        (
            "alter table pgbg.job rename column hint to away",
            errors.LedgerError,
            "alter table pgbg.job rename column away to hint",
        ),
    ],
    ids=["functions", "schema", "dropped", "column"],
)
async def test_taken_away_while_a_job_is_at_work(
    db: Watched, change: str, expected: type[errors.PgbgError], undo: str
) -> None:
    """Told in our own words, with the truth of the data; once it is given back, the job's receipt is there."""
    async with Launcher(db.conninfo) as launcher:
        task = asyncio.create_task(launcher.run(Job(slow("j", 1), id="j")))
        await db.at_work("j")
        db.sql(change)
        end = await ended(task)
        assert type(end) is expected, end
        assert end.data_state == GOES_ON
        with pytest.raises(errors.PgbgError):
            await within(launcher.cancel("j"))
        await eventually(lambda: not db.workers(), "the worker has ended")
        assert db.effects("j") == 1
        db.sql(undo)
        assert (await within(launcher.run(Job(slow("j", 1), id="j")))).launched is False
    assert db.effects("j") == 1


# The extension ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["moved", "made anew", "another name"])
async def test_extension_changed_while_jobs_run(db: Watched, how: str) -> None:
    """The job at work is followed by lock and receipt; the next one of the same launcher finds the new functions."""
    async with Launcher(db.conninfo) as launcher:
        if how == "another name":
            # As of before an update from 1.10, whose names 2.0 still has.
            launcher._host._facts = replace(await launcher.facts(), extension_version="1.10")
        tasks = [
            asyncio.create_task(launcher.run(Job(slow(kind, 1), id=kind, kind=kind)))
            for kind in ("receipt", "supervised")
        ]
        await db.at_work("receipt")
        await db.at_work("supervised")
        match how:
            case "moved":
                db.sql("create schema elsewhere; grant usage on schema elsewhere to public")
                db.sql("alter extension pg_background set schema elsewhere")
            case "made anew":
                db.sql("drop extension pg_background; create extension pg_background")
            case _:
                launcher._host.forget_facts()
        assert isinstance(await ended(tasks[0]), Outcome)
        # A supervisor calls the functions by the names that it was given.
        end = await ended(tasks[1])
        # In the middle of its work; before it had launched, with or without a word of it; or after its end.
        gone = (errors.OutcomeUnknown, errors.WorkerError, errors.WorkerLost)
        assert isinstance(end, Outcome if how == "another name" else (Outcome, *gone)), end
        if not isinstance(end, errors.OutcomeUnknown):
            assert db.effects("supervised") == int(isinstance(end, Outcome))
        for kind in ("receipt", "supervised", "session"):
            assert (await within(launcher.run(Job(effect(f"new {kind}"), id=f"new {kind}", kind=kind)))).launched
    await eventually(lambda: not db.workers(), "the workers have ended")
    assert set(db.effects_by_job().values()) == {1}
    assert len(db.effects_by_job().keys() - {"supervised"}) == 4


async def test_extension_dropped_while_jobs_run(db: Watched) -> None:
    async with Launcher(db.conninfo) as launcher:
        task = asyncio.create_task(launcher.run(Job(slow("j", 1), id="j")))
        await db.at_work("j")
        db.sql("drop extension pg_background")
        assert isinstance(await ended(task), Outcome)
        with pytest.raises(errors.ExtensionMissing):
            await within(launcher.run(Job(effect("k"), id="k")))
    assert db.effects_by_job() == {"j": 1}


# Clocks -------------------------------------------------------------------------------------------------------------


class Jumping(datetime):
    """A wall clock that was set a day forward or back since the process began."""

    offset = timedelta()

    @classmethod
    def now(cls, tz: object = None) -> Self:
        return cls.fromtimestamp((datetime.now(UTC) + cls.offset).timestamp(), UTC)


@pytest.mark.parametrize("days", [-1, 1])
async def test_wall_clock_of_the_process_jumps(db: Watched, monkeypatch: pytest.MonkeyPatch, days: int) -> None:
    """A deadline is turned into seconds once; what happens to the clock afterwards moves it no more."""
    monkeypatch.setattr(case, "datetime", Jumping)
    deadline = datetime.now(UTC) + timedelta(seconds=30)
    task = asyncio.create_task(arun(db.conninfo, Job(slow("j", 1), id="j"), deadline=deadline))
    await db.at_work("j")
    monkeypatch.setattr(Jumping, "offset", timedelta(days=days))
    assert isinstance(await ended(task), Outcome)
    short = datetime.now(UTC) + timedelta(days=days, seconds=0.5)
    end = await ended(arun(db.conninfo, Job(slow("k", 20), id="k"), deadline=short))
    assert isinstance(end, errors.DeadlinePassed), end
    assert db.effects_by_job() == {"j": 1}


@pytest.mark.parametrize("hours", [-1, 1])
async def test_clock_of_the_server_jumps(db: Watched, hours: int) -> None:
    """A cancel is told from an older one though its time says otherwise; other times are for people only."""
    jump = f"interval '{hours} hours'"
    db.sql(
        "create table clock (ahead interval); grant select on clock to public; insert into clock values ('0');"
        "create function jump() returns trigger language plpgsql as $$ begin"
        " new.decided_at := new.decided_at + (select ahead from public.clock); return new; end $$;"
        " create trigger jump before insert or update on pgbg.receipt for each row execute function jump()"
    )
    async with Launcher(db.conninfo) as launcher:
        assert await within(launcher.cancel("old")) == "cancelled"
        task = asyncio.create_task(launcher.run(Job(slow("j", 30), id="j"), retry_cancelled=True))
        await db.at_work("j")
        db.sql(f"update clock set ahead = {jump}")
        db.sql(f"update pgbg.job set launched_at = launched_at + {jump}, registered_at = registered_at + {jump}")
        assert await within(launcher.cancel("j")) == "cancelled"
        end = await ended(task)
        assert isinstance(end, errors.JobCancelled), end
        db.sql(f"update pgbg.receipt set decided_at = decided_at + {jump} where job_id = 'old'")
        assert (await within(launcher.run(Job(effect("old"), id="old"), retry_cancelled=True))).launched
    assert db.effects_by_job() == {"old": 1}
    assert db.value("select owner from pgbg.receipt where job_id = 'old'") == APP
