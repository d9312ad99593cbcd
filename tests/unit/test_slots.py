"""Turns for jobs that need several worker slots at once."""

from __future__ import annotations

import asyncio
import random
from contextlib import suppress

import pytest

from pgbg_orchestration import Job
from pgbg_orchestration.postgres.slots import SlotTurns
from pgbg_orchestration.statements import split, takes_slot
from pgbg_orchestration.walk.worker_sql import bind


@pytest.mark.parametrize(
    ("sql", "takes"),
    [
        ("repack (concurrently) t", True),
        ('/* a */ Repack (Verbose, "concurrently" on) t using index i', True),
        ("repack (concurrently off) t", False),
        ("repack t", False),
        ("create index concurrently on t (i)", False),
        ("reindex (concurrently) table t", False),
    ],
)
def test_what_takes_a_slot_beside_its_worker(sql: str, takes: bool) -> None:
    assert takes_slot(split(sql)[0]) is takes


@pytest.mark.parametrize(
    ("sql", "kind", "slots"),
    [
        ("select 1", "receipt", 1),
        ("vacuum t", "session", 1),
        ("vacuum t", "supervised", 2),
        ("repack (concurrently) t", "session", 2),
        ("repack (concurrently) t", "supervised", 3),
    ],
)
async def test_how_many_slots_a_job_takes_at_once(sql: str, kind: str, slots: int) -> None:
    assert (await bind(Job(sql, id="j", kind=kind), None, "login")).slots == slots


async def test_first_come_first_served() -> None:
    turns = SlotTurns(4)
    first = await turns.take(2)
    order: list[str] = []

    async def job(name: str, number: int) -> None:
        taken = await turns.take(number)
        order.append(name)
        turns.give_back(taken)

    large = asyncio.create_task(job("large", 3))
    await asyncio.sleep(0)
    small = asyncio.create_task(job("small", 2))
    await asyncio.sleep(0)
    assert turns.take_at_once(2) == 0, "others came before"
    turns.give_back(first)
    await asyncio.gather(large, small)
    assert order == ["large", "small"]


async def test_one_that_needs_more_than_there_are_is_alone() -> None:
    turns = SlotTurns(2)
    assert await turns.take(3) == 2
    assert turns.take_at_once(1) == 0
    turns.give_back(2)
    assert turns.take_at_once(1) == 1


async def test_whoever_leaves_the_queue_lets_the_next_one_in() -> None:
    turns = SlotTurns(4)
    held = await turns.take(2)
    large = asyncio.create_task(turns.take(3))
    await asyncio.sleep(0)
    small = asyncio.create_task(turns.take(2))
    await asyncio.sleep(0)
    large.cancel()
    assert await small == 2
    turns.give_back(held + 2)
    assert turns.take_at_once(4) == 4


@pytest.mark.parametrize("seed", range(20))
async def test_cancelled_at_any_moment_nothing_is_lost(seed: int) -> None:
    dice = random.Random(seed)
    turns = SlotTurns(5)
    taken_now = 0

    async def job(number: int) -> None:
        nonlocal taken_now
        taken = await turns.take(number)
        taken_now += taken
        assert taken_now <= 5
        try:
            await asyncio.sleep(0)
        finally:
            taken_now -= taken
            turns.give_back(taken)

    tasks = [asyncio.create_task(job(dice.choice((2, 2, 3)))) for _ in range(30)]
    for task in tasks:
        if dice.random() < 0.5:
            task.cancel()
        if dice.random() < 0.5:
            await asyncio.sleep(0)
    for task in tasks:
        with suppress(asyncio.CancelledError):
            await asyncio.wait_for(task, 60)
    assert turns.take_at_once(5) == 5
