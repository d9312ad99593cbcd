"""Looks at all jobs of a process that wait while their workers are at work: one query for many of them.

When one is due, the round takes along all that are nearly due, so that a thousand jobs need a few queries and not a
thousand. A job that shows what its last look showed waits on. One that shows anything else is woken, and looks itself.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psycopg

from pgbg_orchestration import pace
from pgbg_orchestration.errors import PgbgError
from pgbg_orchestration.ledger.ledger import Ledger
from pgbg_orchestration.ledger.sighting import AtWork

logger = logging.getLogger("pgbg_orchestration")


@dataclass(slots=True, eq=False)
class Wait:
    """A job that waits: what its last look showed, how long to the next one, and what wakes it."""

    job: AtWork
    pause: Callable[[], float]
    wake: Callable[[], None]
    due: float = 0.0  # on the event loop's clock
    early: float = 0.0  # from then on another job's round takes it along

    def put_off(self, now: float) -> None:
        """Make the next look due a pause from now."""
        pause = self.pause()
        self.due = now + pause
        self.early = self.due - pause * pace.TOGETHER


class Rounds:
    """Looks at the jobs that wait, as long as there are any.

    Parameters
    ----------
    ledger:
        Looks over its connection.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._waits: dict[int, Wait] = {}
        self._round: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    @contextmanager
    def waiting(self, job: AtWork, pause: Callable[[], float], wake: Callable[[], None]) -> Iterator[None]:
        """Look at a job while the caller is in this context.

        Parameters
        ----------
        job:
            What its last look showed.
        pause:
            Returns the seconds to its next look.
        wake:
            Called when it shows anything else, or cannot be looked at.
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
        """Stop looking."""
        self._waits.clear()
        if self._timer is not None:
            self._timer.cancel()
        if self._round is not None:
            self._round.cancel()
            await asyncio.wait({self._round})

    def _come_by(self, due: float) -> None:
        """Begin a round at that time, unless one is under way: that one sees to the next."""
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
            return  # the one that was due has left
        try:
            async with asyncio.timeout(pace.STALLED):
                changed = [waits[number] for number in await self._ledger.changed([wait.job for wait in waits])]
        except (psycopg.Error, PgbgError, TimeoutError):
            changed = waits  # each looks by itself, and is told the error
        except Exception:
            logger.exception("the look at %d waiting jobs failed; each looks by itself", len(waits))
            changed = waits
        finally:
            now = loop.time()
            for wait in waits:
                wait.put_off(now)  # else the next round would begin at once, and go on so for ever
        for wait in changed:
            if id(wait) in self._waits:
                wait.wake()
