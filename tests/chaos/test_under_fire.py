"""Thousands of jobs by real processes on a real server, while everything that can break is broken at random.

``make chaos`` runs it; a short form is part of the suite. What is asserted is the promise alone: each job that is
wanted has one effect and one receipt in the end, each that was cancelled in time has neither, and nobody was told
anything else. The environment says how much of what (all of it has a default):

| variable | what |
|---|---|
| ``PGBG_CHAOS_SEED`` | the jobs, the faults and their order; random, and printed |
| ``PGBG_CHAOS_JOBS`` | how many jobs; without it the time is what ends the run |
| ``PGBG_CHAOS_SECONDS`` | for how long jobs are begun: 600 |
| ``PGBG_CHAOS_RATE`` | faults for each job: 0.5 |
| ``PGBG_CHAOS_MIX`` | how much more often groups of faults come: ``"server=5 network=0"`` (``breaker.GROUPS``) |
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Self

import pytest

from pgbg_orchestration.testing.faults import POINTS
from tests.chaos.breaker import GROUPS, Breaker, chosen
from tests.chaos.crew import BOUND, Crew, Hand, fate
from tests.chaos.plans import Plan
from tests.chaos.report import Report
from tests.chaos.stage import Stage
from tests.chaos.unproven import CUSTOMERS
from tests.conftest import Database
from tests.core.kit import Watched
from tests.kit.proxy import Proxy
from tests.servers.kinds import Server

SLOTS = 32
PROCESSES = 6
"""Every other one of them is behind a proxy of its own."""
SIDE_BY_SIDE = 32
"""Jobs in flight at any moment."""
MANY = 2_000
"""Jobs of which it is asserted that every point of the algorithm has killed a process."""

ENOUGH = 300
"""Jobs of which some meet each thing that is broken on purpose."""


@dataclass(frozen=True)
class Fire:
    """How much is broken of what."""

    seed: int
    seconds: float = 600
    jobs: int | None = None
    rate: float = 0.5
    mix: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def from_environment(cls) -> Self:
        """Read it from PGBG_CHAOS_*."""
        given = {name.removeprefix("PGBG_CHAOS_"): value for name, value in os.environ.items() if value}
        parts = [part.partition("=") for part in given.get("MIX", "").split()]
        if unknown := {group for group, *_ in parts} - {*GROUPS}:
            raise ValueError(f"PGBG_CHAOS_MIX: {unknown}; there are {', '.join(GROUPS)}")
        return cls(
            seed=int(given.get("SEED", "0")) or random.SystemRandom().randrange(1, 2**31),
            seconds=float(given.get("SECONDS", "600")),
            jobs=int(given["JOBS"]) if "JOBS" in given else None,
            rate=float(given.get("RATE", "0.5")),
            mix={group: float(factor) for group, _, factor in parts},
        )

    def lasts(self, began: float, jobs: int) -> bool:
        """Whether another job is begun."""
        return jobs < self.jobs if self.jobs is not None else time.monotonic() - began < self.seconds


@pytest.fixture
def stage(own_server: Callable[..., Server], fresh_database: Callable[..., Database]) -> Iterator[Stage]:
    """A server of the test's own, with few slots."""
    db = Watched(fresh_database(own_server(SLOTS)))
    yield Stage(db)
    db.close()


async def under_fire(stage: Stage, fire: Fire, hand: type[Hand] = Hand) -> Report:
    """Run jobs, and break things meanwhile."""
    report = Report(fire.seed, f"{stage.db.server.name} ({stage.db.server.extension})")
    over = asyncio.Event()
    numbers = itertools.count()
    fatal = int(stage.db.value("show server_version_num")) >= 170000  # transaction_timeout is there
    straight = stage.db.conninfo
    with contextlib.ExitStack() as stack:
        proxies = [stack.enter_context(Proxy.before(stage.db.server.conninfo())) for _ in range(PROCESSES // 2)]
        ways = [straight, *(proxy.through(straight) for proxy in proxies)]
        ways += [straight] * (PROCESSES - len(ways))
        async with Crew(ways, fire.seed, report, hand) as crew:
            began = time.monotonic()

            async def customers() -> None:
                while fire.lasts(began, report.jobs.total()):
                    plan = Plan.make(fire.seed, next(numbers), fatal=fatal)
                    chance = random.Random(f"{fire.seed}/{plan.name}/hands")
                    await CUSTOMERS[plan.kind](plan, crew, stage, report, chance).follow()
                # No fault for the last ones: few jobs would get them all, and never come to an end.
                over.set()

            breaker = Breaker(stage, crew, proxies, report, seed=fire.seed, rate=fire.rate, mix=fire.mix)
            async with asyncio.TaskGroup() as group:
                group.create_task(breaker.break_until(over))
                for _ in range(SIDE_BY_SIDE):
                    group.create_task(customers())
    await stage.count(report)
    report.seconds = time.monotonic() - began
    return report


def judged(report: Report, fire: Fire) -> None:
    print(f"\n{report}")
    assert not report.broken(), str(report)
    # A run that broke nothing proves nothing.
    assert report.jobs.total() >= (fire.jobs or 1)
    assert report.broken_things
    if report.jobs.total() >= MANY and fire.mix.get("processes", 1):
        assert all(report.deaths[point] for point in POINTS), "no process died there"


@pytest.mark.slow
@pytest.mark.servers("real", "embedded")
async def test_a_short_fire(stage: Stage) -> None:
    fire = replace(Fire.from_environment(), seconds=15, jobs=None)
    judged(await under_fire(stage, fire), fire)


@pytest.mark.chaos
@pytest.mark.servers("real", "embedded")
@pytest.mark.timeout(0)
async def test_a_long_fire(stage: Stage) -> None:
    fire = Fire.from_environment()
    bound = 2 * fire.jobs if fire.jobs else fire.seconds
    async with asyncio.timeout(bound + 4 * BOUND):
        report = await under_fire(stage, fire)
    judged(report, fire)


def test_the_seed_brings_jobs_and_faults_back() -> None:
    """All but the moments at which they meet."""

    def all_of(seed: int) -> tuple[list[object], ...]:
        numbers = range(1, 300)
        return (
            [Plan.make(seed, number) for number in numbers],
            [chosen(seed, number, {})[0] for number in numbers],
            [fate(seed, number) for number in numbers],
        )

    assert all_of(1) == all_of(1)
    assert all(one != other for one, other in zip(all_of(1), all_of(2), strict=True))


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
    report = await under_fire(stage, replace(Fire.from_environment(), jobs=ENOUGH))
    print(f"\n{report}")
    assert report.doubled


@pytest.mark.chaos
@pytest.mark.servers("real")
async def test_a_broken_verdict_is_noticed(stage: Stage) -> None:
    report = await under_fire(stage, replace(Fire.from_environment(), jobs=ENOUGH), TooHopeful)
    print(f"\n{report}")
    assert report.false_successes
