"""The looks at jobs that are at work, and show nothing new: one query a round for all jobs of a process.

Whoever waits for such a job has its look made here. It is taken along early where others are due, so that a thousand
jobs need a few queries and not a thousand; and who still shows what its last look showed is left to wait. Whatever has
changed is not told: who waits for it looks by itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psycopg

from pgbg_orchestration import pace
from pgbg_orchestration.errors import PgbgError
from pgbg_orchestration.ledger.ledger import Ledger
from pgbg_orchestration.ledger.sighting import AtWork


@dataclass(slots=True, eq=False)
class Wait:
    """A wait for a job: what its last look showed, how long to the next one, and what wakes it."""

    job: AtWork
    pause: Callable[[], float]
    wake: Callable[[], None]
    due: float = 0.0  # on the event loop's clock
    early: float = 0.0  # from when on it is taken along

    def put_off(self, now: float) -> None:
        """Have the next look made a pause from now, or somewhat earlier."""
        pause = self.pause()
        self.due = now + pause
        self.early = self.due - pause * pace.TOGETHER


class Rounds:
    """Looks at the jobs that are waited for, as long as there are any.

    Parameters
    ----------
    ledger:
        Over whose connection.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._waits: dict[int, Wait] = {}
        self._round: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    @contextmanager
    def waiting(self, job: AtWork, pause: Callable[[], float], wake: Callable[[], None]) -> Iterator[None]:
        """Look at a job meanwhile.

        Parameters
        ----------
        job:
            What its last look showed.
        pause:
            Returns the seconds to its next look.
        wake:
            Called once it shows anything else, or that cannot be told.
        """
        wait = Wait(job, pause, wake)
        wait.put_off(asyncio.get_running_loop().time())
        self._waits[id(wait)] = wait
        self._come_by(wait.due)
        try:
            yield
        finally:
            del self._waits[id(wait)]

    async def close(self) -> None:
        """Look no more."""
        self._waits.clear()
        if self._timer is not None:
            self._timer.cancel()
        if self._round is not None:
            self._round.cancel()
            await asyncio.wait({self._round})

    def _come_by(self, due: float) -> None:
        """Begin a round at that time; one that is on its way sees to the next itself."""
        if self._round is not None and not self._round.done():
            return
        if self._timer is not None and not self._timer.cancelled():
            if self._timer.when() <= due:
                return
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_at(due, self._begin)

    def _begin(self) -> None:
        self._timer = None
        if self._waits:
            self._round = asyncio.get_running_loop().create_task(self._go_round())
            self._round.add_done_callback(self._gone_round)

    def _gone_round(self, _: asyncio.Task[None]) -> None:
        if self._waits:
            self._come_by(min(wait.due for wait in self._waits.values()))

    async def _go_round(self) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        waits = [wait for wait in self._waits.values() if wait.early <= now]
        if not any(wait.due <= now for wait in waits):
            return  # who was due has gone
        try:
            async with asyncio.timeout(pace.STALLED):
                news = [waits[number] for number in await self._ledger.changed([wait.job for wait in waits])]
        except (psycopg.Error, PgbgError, TimeoutError):
            news = waits  # each looks by itself, and is told what is wrong
        for wait in news:
            if id(wait) in self._waits:
                wait.wake()
        now = loop.time()
        for wait in waits:
            wait.put_off(now)
