"""A fair queue for worker slots: the jobs of one process launch one after the other, first come first served."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from pgbg_orchestration import pace

from .opening import SlotsUsedUp

T = TypeVar("T")


class SlotQueue:
    """Launches in turn; whoever is at the head retries until a slot comes free."""

    def __init__(self) -> None:
        self._turn = asyncio.Lock()  # wakes its waiters in order
        self._freed = asyncio.Event()
        self.waiting = 0

    def freed(self) -> None:
        """Say that a worker of this process has ended: the head of the queue tries again at once."""
        self._freed.set()

    async def launch(self, attempt: Callable[[], Awaitable[T]], on_wait: Callable[[SlotsUsedUp], None]) -> T:
        """Call ``attempt`` in turn until it does not find the slots used up.

        Parameters
        ----------
        attempt:
            Launches, or raises ``SlotsUsedUp``; any other exception ends the wait.
        on_wait:
            Called each time that there was no slot.
        """
        self.waiting += 1
        try:
            async with self._turn:
                tries = 0
                while True:
                    self._freed.clear()
                    try:
                        return await attempt()
                    except SlotsUsedUp as error:
                        on_wait(error)
                    try:
                        # The postmaster frees a slot a little after its worker is gone: wait in any case.
                        async with asyncio.timeout(pace.backoff(tries)):
                            await self._freed.wait()
                        await asyncio.sleep(pace.SOONEST)
                    except TimeoutError:
                        tries += 1
        finally:
            self.waiting -= 1
