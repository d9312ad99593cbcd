"""Somebody holds a lock on a row of the package's: the job that needs it waits, and no other job does."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
from psycopg import AsyncConnection

from pgbg_orchestration import Job, Launcher, Outcome
from pgbg_orchestration.postgres.pg_background import Extension
from tests.core.kit import Watched, effect, eventually, slow, within

pytestmark = pytest.mark.any_surface

SOON = 20.0
"""Seconds that a job may take that waits for nothing: a call to the server is given up after 30."""


@contextmanager
def held(db: Watched, query: str) -> Iterator[None]:
    """Hold what a query locks, in a transaction of its own."""
    with psycopg.connect(db.admin_conninfo) as holder:
        assert holder.execute(query.encode()).fetchall()
        yield


async def test_the_row_of_a_series(db: Watched) -> None:
    async with Launcher(db.conninfo) as launcher:
        names = [f"s{number}" for number in range(6)]  # more than there are launching sessions
        for name in names:
            await within(launcher.run(Job("select 1", series=name, generation=1)))
        with held(db, "select series from pgbg.series where series like 's_' for update"):
            jobs = [Job(effect(name), id=f"{name}-2", series=name, generation=2) for name in names]
            waiting = [asyncio.create_task(launcher.run(job)) for job in jobs]
            await asyncio.sleep(1)  # they are under way
            outcome = await within(launcher.run(Job(effect("free"), id="free")), SOON)
            assert isinstance(outcome, Outcome)
            assert not any(task.done() for task in waiting)
        for outcome in await within(asyncio.gather(*waiting)):
            assert outcome.attempt == 1
    assert db.effects_by_job() == dict.fromkeys([*names, "free"], 1)


@pytest.mark.parametrize("last", ["select generate_series(1, 3)", "insert into effects values ('j'), ('j'), ('j')"])
async def test_the_line_of_a_job_in_the_history(db: Watched, last: str) -> None:
    async with Launcher(db.conninfo) as launcher:
        running = asyncio.create_task(launcher.run(Job(f"{slow('j', 1)}; {last}", id="j")))
        await db.at_work("j")
        with held(db, "select job_id from pgbg.job where job_id = 'j' for update"):
            await eventually(lambda: db.receipts() == {"j"}, "it has committed")
            await within(launcher.run(Job(effect("free"), id="free")), SOON)
        assert (await within(running)).row_count == 3
    assert db.states() == {"j": "committed", "free": "committed"}


@pytest.mark.parametrize("left", [False, True], ids=["ended", "left"])
async def test_a_detach_that_is_broken_off_is_made_again(
    db: Watched, monkeypatch: pytest.MonkeyPatch, left: bool
) -> None:
    """By somebody's pg_cancel_backend on the launching session: a handle that stays would count for ever."""
    broken: list[object] = []

    def broken_once(detach: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
        async def cancelled(self: Extension, conn: AsyncConnection[Any], what: object) -> None:
            if not broken:
                broken.append(what)
                raise psycopg.errors.QueryCanceled("canceling statement due to user request")
            await detach(self, conn, what)

        return cancelled

    monkeypatch.setattr(Extension, "detach", broken_once(Extension.detach))
    monkeypatch.setattr(Extension, "detach_many", broken_once(Extension.detach_many))
    async with Launcher(db.conninfo) as launcher:
        job = Job(f"{slow('j', 1)}; {effect('j')}", id="j")
        running = asyncio.create_task(launcher.run(job, on_cancel="leave"))
        await db.at_work("j")
        if left:
            running.cancel()
        await asyncio.wait({running})
        await eventually(lambda: broken, "the detach was broken off")
        (session,) = launcher._host._sessions

        async def forgotten() -> None:
            while True:
                async with session._turn:
                    if not session.lost and not await session.extension.list(session._conn):
                        return
                await asyncio.sleep(0.05)

        await within(forgotten())
        await eventually(lambda: db.receipts() == {"j"}, "it has committed")
