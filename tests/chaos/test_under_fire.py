"""Thousands of jobs by real processes on a real server, while everything that can break is broken at random.

``make chaos`` runs it for PGBG_CHAOS_SECONDS (600) with PGBG_CHAOS_SEED (random, and printed); a short form is part of
the suite. What is asserted is the promise alone: each job that is wanted has one effect and one receipt in the end,
each that was cancelled in time has neither, and nobody was told anything else.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Callable, Iterator

import pytest

from tests.chaos.breaker import Breaker
from tests.chaos.crew import BOUND, Crew, Hand
from tests.chaos.customers import Customer, Plan
from tests.chaos.report import Report
from tests.chaos.stage import Stage
from tests.conftest import Database
from tests.core.kit import Watched
from tests.kit.proxy import Proxy
from tests.servers.kinds import Server

SLOTS = 24
PROCESSES = 4
SIDE_BY_SIDE = 24
"""Jobs in flight at any moment."""
PAUSE = 0.12
"""Seconds between faults: about one for every second job."""


def chosen_seed() -> int:
    return int(os.environ.get("PGBG_CHAOS_SEED", "0")) or random.SystemRandom().randrange(1, 2**31)


@pytest.fixture
def stage(own_server: Callable[..., Server], fresh_database: Callable[..., Database]) -> Iterator[Stage]:
    """A server of the test's own, with few slots."""
    db = Watched(fresh_database(own_server(SLOTS)))
    yield Stage(db)
    db.close()


async def under_fire(stage: Stage, seconds: float, seed: int, hand: type[Hand] = Hand) -> Report:
    """Run jobs for so many seconds, and break things meanwhile."""
    report = Report(seed, f"{stage.db.server.name} ({stage.db.server.extension})")
    began = time.monotonic()
    over = asyncio.Event()
    numbers = iter(range(10**9))
    fatal = int(stage.db.value("show server_version_num")) >= 170000  # transaction_timeout is there
    with Proxy.before(stage.db.server.conninfo()) as proxy:
        straight = stage.db.conninfo
        ways = [straight if number % 2 else proxy.through(straight) for number in range(PROCESSES)]
        async with Crew(ways, random.Random(f"{seed}/crew"), hand) as crew:

            async def customers() -> None:
                while time.monotonic() - began < seconds:
                    plan = Plan.make(seed, next(numbers), fatal=fatal)
                    await Customer(plan, crew, stage, report).follow()

            breaker = Breaker(stage, crew, proxy, report, random.Random(f"{seed}/breaker"), PAUSE)
            breaking = asyncio.create_task(breaker.break_until(over))
            wanted = asyncio.gather(*(customers() for _ in range(SIDE_BY_SIDE)))
            await asyncio.wait({wanted}, timeout=seconds)
            # No fault for the last ones: few jobs would get them all, and never come to an end.
            over.set()
            await breaking
            await wanted
            for fate, deaths in crew.deaths.items():
                report.faults[f"launching process killed at {fate}"] += deaths
    await stage.count(report)
    report.seconds = time.monotonic() - began
    return report


def judged(report: Report) -> None:
    print(f"\n{report}")
    assert not report.broken(), str(report)
    # A run that broke nothing proves nothing.
    assert report.jobs > 0
    assert report.faults.total() > 0


@pytest.mark.slow
@pytest.mark.servers("real", "embedded")
async def test_a_short_fire(stage: Stage) -> None:
    judged(await under_fire(stage, 15, chosen_seed()))


@pytest.mark.chaos
@pytest.mark.servers("real", "embedded")
@pytest.mark.timeout(0)
async def test_a_long_fire(stage: Stage) -> None:
    seconds = float(os.environ.get("PGBG_CHAOS_SECONDS", "600"))
    async with asyncio.timeout(seconds + 4 * BOUND):
        report = await under_fire(stage, seconds, chosen_seed())
    judged(report)


# Broken on purpose --------------------------------------------------------------------------------------------------


def without_receipt_check(db: Watched) -> None:
    """A worker goes on though its job has a receipt."""
    check = "exception when unique_violation then"
    definition = db.value("select pg_get_functiondef('pgbg.begin_work'::regproc)")
    assert check in definition
    db.sql(definition.replace(check, f"{check} return;"))


class TooHopeful(Hand):
    """A launching process that takes "completed and no error" for success."""

    module = "tests.chaos.hopeful_child"


@pytest.mark.chaos
@pytest.mark.servers("real")
async def test_a_broken_ledger_is_noticed(stage: Stage) -> None:
    without_receipt_check(stage.db)
    report = await under_fire(stage, 20, chosen_seed())
    print(f"\n{report}")
    assert report.doubled


@pytest.mark.chaos
@pytest.mark.servers("real")
async def test_a_broken_verdict_is_noticed(stage: Stage) -> None:
    report = await under_fire(stage, 20, chosen_seed(), TooHopeful)
    print(f"\n{report}")
    assert report.false_successes
