"""The server under fire: the database, what is expected of it in the end, and the final count."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TypeVar

import psycopg

from tests.chaos.report import Report
from tests.core.kit import APP, Watched

T = TypeVar("T")
AWAY = 60.0
"""Seconds that the server may be away before the harness itself gives up."""
LEFT = 20.0
"""Seconds that workers get to end once everybody has an answer."""
OWN_CRASHES = ("was terminated by signal 11", "was terminated by signal 6", "was terminated by signal 7")


class Stage:
    """A database whose effects are counted, on a server that is broken again and again."""

    def __init__(self, db: Watched) -> None:
        self.db = db
        self._expected: dict[str, int] = {}
        self._either: dict[str, str] = {}
        db.sql("create index on effects (job)")
        db.sql("create table spans (series text, job text primary key, began timestamptz, ended timestamptz)")
        db.sql(f"grant select, insert, update on spans to {APP}")

    async def steadily(self, ask: Callable[[], T]) -> T:
        """Ask the server again until it is there."""
        until = time.monotonic() + AWAY
        while True:
            try:
                return ask()
            except psycopg.OperationalError:
                if time.monotonic() > until:
                    raise
            await asyncio.sleep(0.1)

    async def effects(self, name: str) -> int:
        return await self.steadily(lambda: self.db.effects(name))

    def expect(self, name: str, effects: int) -> None:
        """In the end a job of this id has so many effects."""
        self._expected[name] = effects

    def expect_either(self, name: str, job_id: str) -> None:
        """In the end this job, whose effects bear ``name``, has one and a receipt, or neither."""
        self._either[name] = job_id

    async def count(self, report: Report) -> None:
        """Compare everything that is there with everything that was told."""
        until = time.monotonic() + LEFT
        while (workers := await self.steadily(self.db.workers)) and time.monotonic() < until:
            await asyncio.sleep(0.1)
        report.orphans += [str(worker) for worker in workers]
        effects = await self.steadily(self.db.effects_by_job)
        receipts = await self.steadily(self.db.receipts)
        report.doubled += [f"{name}: {number} effects" for name, number in effects.items() if number > 1]
        for name, expected in self._expected.items():
            found = effects.pop(name, 0)
            if found < expected:
                report.lost.append(f"{name}: no effect in the end")
            if found > expected == 0:
                report.cancels_undone.append(f"{name}: {found} effects in the end")
            if (found > 0) != (name in receipts):
                report.without_receipt.append(f"{name}: {found} effects, receipt: {name in receipts}")
        for name, job_id in self._either.items():
            found = effects.pop(name, 0)
            if (found > 0) != (job_id in receipts):
                report.without_receipt.append(f"{job_id}: {found} effects, receipt: {job_id in receipts}")
        overlaps = (
            "select a.job, b.job from spans a join spans b"
            " on a.series = b.series and a.job < b.job and a.began < b.ended and b.began < a.ended"
        )
        report.overlaps += [str(row) for row in await self.steadily(lambda: self.db.sql(overlaps))]
        report.crashes += [line for line in self.db.server.log().splitlines() if any(o in line for o in OWN_CRASHES)]
