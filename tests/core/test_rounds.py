"""Jobs that wait are looked at together, and left to wait while nothing is new: what changes is told all the same."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

import pytest

from pgbg_orchestration import Job, Launcher, errors, pace
from pgbg_orchestration.errors import ServerUnreachable
from pgbg_orchestration.ledger.ledger import Ledger
from tests.core.kit import APP, Watched, eventually, slow, within

pytestmark = pytest.mark.any_surface


@pytest.fixture
def rounds(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many jobs each round looked at; one that is due takes the others along."""
    made: list[int] = []
    changed = Ledger.changed

    async def noting(self: Ledger, jobs: Any) -> list[int]:
        made.append(len(jobs))
        return await changed(self, jobs)

    monkeypatch.setattr(Ledger, "changed", noting)
    monkeypatch.setattr(pace, "TOGETHER", 1.0)
    monkeypatch.setattr(pace, "look_behind", lambda *_: 1.0)
    return made


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Of which jobs somebody looked at all that there is to be seen."""
    made: list[str] = []
    look = Ledger.look

    async def noting(self: Ledger, key: Any) -> Any:
        made.append(key.job_id)
        return await look(self, key)

    monkeypatch.setattr(Ledger, "look", noting)
    return made


def deaf_and_blind(db: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let commits not be heard of, and handles not be polled: what is left are the rounds."""
    db.sql(f"alter role {APP} in database {db.database.name} set pgbg.notify to off")
    monkeypatch.setattr(pace, "poll_handle", lambda *_: 600)


async def all_together(rounds: Iterable[int], number: int) -> None:
    await eventually(lambda: number in rounds, f"a round looks at {number} jobs")


async def test_jobs_at_work_are_looked_at_by_one_query_and_not_woken(
    db: Watched, rounds: list[int], looks: list[str]
) -> None:
    names = [f"j{number}" for number in range(4)]
    async with Launcher(db.conninfo) as launcher:
        running = [asyncio.create_task(launcher.run(Job(slow(name, 60), id=name))) for name in names]
        await all_together(rounds, 4)
        looks.clear()
        rounds.clear()
        await all_together(rounds, 4)
        rounds.clear()
        await all_together(rounds, 4)
        assert looks == []
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
    assert db.effects() == 0


@pytest.mark.parametrize("how", ["its own call", "one that attached"])
async def test_a_commit_that_nobody_heard_of_is_told(
    db: Watched, rounds: list[int], how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    deaf_and_blind(db, monkeypatch)
    monkeypatch.setattr(pace, "poll", lambda *_: 1.0)
    async with Launcher(db.conninfo) as launcher, Launcher(db.conninfo) as other:
        first = asyncio.create_task(launcher.run(Job(slow("j", 6), id="j")))
        await db.at_work("j")
        if how == "its own call":
            await all_together(rounds, 1)
            assert (await within(first)).proof == "receipt"
        else:
            assert not (await within(other.run(Job(slow("j", 6), id="j")))).launched
            await within(first)
    assert 1 in rounds


async def test_a_worker_that_is_gone_is_seen_by_whoever_attached(
    db: Watched, rounds: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    deaf_and_blind(db, monkeypatch)
    monkeypatch.setattr(pace, "poll", lambda *_: 1.0)
    monkeypatch.setattr(pace, "GRACE", 0.1)
    async with Launcher(db.conninfo) as launcher, Launcher(db.conninfo) as other:
        first = asyncio.create_task(launcher.run(Job(slow("j", 60), id="j"), on_cancel="leave"))
        pid = await db.at_work("j")
        attached = asyncio.create_task(other.run(Job(slow("j", 0), id="j"), accept_changed_sql=True))
        await all_together(rounds, 1)
        first.cancel()
        await asyncio.wait({first})
        db.sql("select pg_terminate_backend(%s)", pid)
        outcome = await within(attached)
    assert outcome.launched
    assert db.effects() == 1


async def test_where_a_round_cannot_tell_each_job_looks_by_itself(
    db: Watched, looks: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def out_of_reach(*_: object) -> list[int]:
        raise ServerUnreachable("nobody answers")

    monkeypatch.setattr(Ledger, "changed", out_of_reach)
    monkeypatch.setattr(pace, "look_behind", lambda *_: 1.0)
    async with Launcher(db.conninfo) as launcher:
        running = asyncio.create_task(launcher.run(Job(slow("j", 60), id="j")))
        await db.at_work("j")
        looks.clear()
        await eventually(lambda: looks.count("j") > 2, "it looks by itself, again and again")
        running.cancel()
        with pytest.raises((asyncio.CancelledError, errors.JobCancelled)):
            await running
