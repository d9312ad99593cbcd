"""poll_interval: where the pauses between two looks stop growing."""

from __future__ import annotations

import asyncio

import pytest

from pgbg_orchestration import Job, Launcher, pace
from tests.core.kit import Watched, slow, within

pytestmark = pytest.mark.any_surface


@pytest.fixture(autouse=True)
def _endless_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an interval of the caller's, the second look at a job would come after an hour."""
    monkeypatch.setattr(pace, "SHARE", 1e6)
    monkeypatch.setattr(pace, "LATEST", 3600.0)
    monkeypatch.setattr(pace, "LOOK_LATEST", 3600.0)


async def test_it_bounds_the_pauses_of_whoever_launched_the_job_and_of_whoever_attached(db: Watched) -> None:
    async with Launcher(db.conninfo) as launcher, Launcher(db.conninfo) as other:
        launched = asyncio.create_task(launcher.run(Job(slow("j", 3), id="j"), poll_interval=0.2))
        await db.at_work("j")
        attached = await within(other.run(Job(slow("j", 3), id="j"), poll_interval=0.2))

        assert (await within(launched)).launched
        assert not attached.launched
    assert db.effects() == 1


async def test_the_shortest_interval_of_a_session_serves_all_its_jobs(db: Watched) -> None:
    async with Launcher(db.conninfo) as launcher:
        first = asyncio.create_task(launcher.run(Job(slow("first", 2), id="first")))
        await db.at_work("first")
        second = asyncio.create_task(launcher.run(Job(slow("second", 4), id="second"), poll_interval=0.2))

        await within(asyncio.gather(first, second))
    assert db.effects() == 2
