"""Fairness between the jobs of one process over worker slots: first come, first served."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import TypeVar

from pgbg_orchestration import pace

from .launch_message import SlotsUsedUp

T = TypeVar("T")


class SlotQueue:
    """Launches in turn; whoever is at the head retries until a slot comes free."""

    def __init__(self) -> None:
        self._turn = asyncio.Lock()  # wakes its waiters in order
        self._freed = asyncio.Event()
        self.waiting = 0

    def on_slot_freed(self) -> None:
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
                        # The postmaster frees a slot a little after its worker has ended: wait in any case.
                        async with asyncio.timeout(pace.backoff(tries)):
                            await self._freed.wait()
                        await asyncio.sleep(pace.SOONEST)
                    except TimeoutError:
                        tries += 1
        finally:
            self.waiting -= 1


class SlotTurns:
    """Turns for jobs that need several slots at once, so that none holds its first ones while others hold the rest.

    Parameters
    ----------
    slots:
        How many the server has. A job that needs more than all of them has its turn when it is alone.
    """

    def __init__(self, slots: int) -> None:
        self._slots = self._free = max(slots, 1)
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    def take_at_once(self, number: int) -> int:
        """Take that many slots and return how many they are; 0 when it is not this job's turn."""
        number = min(number, self._slots)
        if self._waiting or self._free < number:
            return 0
        self._free -= number
        return number

    async def take(self, number: int) -> int:
        """Take that many slots in turn and return how many they are; they have to be given back."""
        if taken := self.take_at_once(number):
            return taken
        number = min(number, self._slots)
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append((number, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._free += number  # it was this job's turn in the same moment
            self._next()  # whoever comes after it may need fewer
            raise
        return number

    def give_back(self, number: int) -> None:
        """Give back what was taken."""
        self._free += number
        self._next()

    def _next(self) -> None:
        while self._waiting and (self._waiting[0][1].cancelled() or self._waiting[0][0] <= self._free):
            number, turn = self._waiting.popleft()
            if not turn.cancelled():
                self._free -= number
                turn.set_result(None)
