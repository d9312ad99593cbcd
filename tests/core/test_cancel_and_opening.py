"""A cancel around the message that registers and launches a new job, for a call that takes earlier cancels back.

What was there before the call is taken back, and what comes once the job is registered is final for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from pgbg_orchestration import Cause, Event, Job, Launcher, Outcome, errors
from pgbg_orchestration.postgres import session
from pgbg_orchestration.testing import faults
from pgbg_orchestration.walk.host import Host
from tests.core.kit import APP, Watched, effect, ended, slow, within


def mark(db: Watched, cause: str = "asked") -> None:
    """Mark the job as another process does."""
    db.sql(
        "insert into pgbg.receipt (owner, job_digest, status, job_id, cause) values (%s, pgbg.digest('j'),"
        " 'cancelled', 'j', %s)", APP, cause,
    )  # fmt: skip


@contextmanager
def at(point: str, do: object) -> Iterator[None]:
    """Do something the first time that a point is passed."""
    done: list[str] = []

    def look(passed: str) -> None:
        if passed == point and not done:
            done.append(passed)
            assert callable(do)
            do()

    faults.install(look)
    try:
        yield
    finally:
        faults.install(None)


@pytest.mark.parametrize("point", ["before_register", "before_launch"])
@pytest.mark.parametrize("wanted", [False, True], ids=["refused", "taken back"])
async def test_before_the_message_is_sent(db: Watched, point: str, wanted: bool) -> None:
    async with Launcher(db.conninfo) as launcher:
        with at(point, lambda: mark(db)):
            end = await ended(launcher.run(Job(effect("j"), id="j"), retry_cancelled=wanted))
    assert isinstance(end, Outcome if wanted else errors.JobCancelled), end
    assert db.effects("j") == int(wanted)
    assert db.receipts("cancelled") == (set() if wanted else {"j"})


async def test_a_provisional_mark_is_taken_back_by_whoever_comes(db: Watched) -> None:
    async with Launcher(db.conninfo) as launcher:
        with at("before_launch", lambda: mark(db, "deadline")):
            assert isinstance(await ended(launcher.run(Job(effect("j"), id="j"))), Outcome)
    assert db.effects("j") == 1


async def test_just_after_it_was_launched(db: Watched) -> None:
    """Before this call has looked at its job for the first time."""
    launched = asyncio.Event()
    async with Launcher(db.conninfo) as launcher, Launcher(db.conninfo) as other:
        with at("after_launch", launched.set):
            task = asyncio.create_task(launcher.run(Job(slow("j", 60), id="j"), retry_cancelled=True))
            await within(launched.wait())
            assert await within(other.cancel("j", reason="no longer wanted")) == "cancelled"
            end = await ended(task)
        assert isinstance(end, errors.JobCancelled), end
        assert "no longer wanted" in str(end)
    assert db.effects("j") == 0
    assert db.states() == {"j": "cancelled"}


async def test_registered_and_without_a_slot(db: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message registered the job, and launched nothing: the cancel that comes then is none from before."""
    monkeypatch.setattr(session, "MAX_TRACKED", 1)
    monkeypatch.setattr(Host, "_most_sessions", lambda _: 1)
    marked: list[Event] = []

    def on_event(event: Event) -> None:
        if event.kind == "waiting_for_slot" and not marked:
            marked.append(event)
            mark(db)

    async with Launcher(db.conninfo) as launcher:
        first = asyncio.create_task(launcher.run(Job(slow("i", 60), id="i")))
        await db.at_work("i")
        end = await ended(launcher.run(Job(effect("j"), id="j"), retry_cancelled=True, observer=on_event))
        assert marked, "there was a slot"
        assert isinstance(end, errors.JobCancelled), end
        first.cancel()
        await asyncio.wait({first})
    assert db.effects("j") == 0
    assert db.receipts("cancelled") == {"i", "j"}


async def test_the_next_try_takes_back_what_ended_the_one_before(db: Watched) -> None:
    """Of a batch, say: its first try was cancelled on the way of its message; the next one runs the job, once."""
    launched = asyncio.Event()
    async with Launcher(db.conninfo) as launcher:
        with at("after_launch", launched.set):
            task = asyncio.create_task(launcher.run(Job(slow("j", 60), id="j", label="j"), of_try="1"))
            await within(launched.wait())
            task.cancel()
            assert isinstance(await ended(task), asyncio.CancelledError)
        assert db.receipts("cancelled") == {"j"}
        again = launcher.run(
            Job(effect("j"), id="j"), of_try="2", retry_cancelled={Cause.INTERRUPTED}, accept_changed_sql=True
        )
        outcome = await within(again)
    assert outcome.launched
    assert db.effects("j") == 1
