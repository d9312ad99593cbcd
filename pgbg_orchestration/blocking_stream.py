"""The rows of a job as they are read, for blocking code: what :class:`Stream` is for code with an event loop."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Iterator
from types import TracebackType
from typing import Any, Self

from .driver import Driver, Talk, cancel_at_once
from .launcher import Launcher
from .outcome import Outcome
from .rows import Column
from .stream import Stream

BATCH = 1000
"""Rows that one thread hands to the other at once."""


class BlockingStream:
    """The rows of a job's last statement, each once: iterate, or use it as a context manager where not to their end.

    It holds 3,000 rows at most. An interruption before the first row is a cancel of the job; one after it, or leaving
    the loop, ends the reading, and the job stays committed.

    Parameters
    ----------
    launcher:
        Makes the launcher, which is the stream's own.
    stream:
        Makes the stream of it, as :meth:`Launcher.stream` does.
    log, look, interval, on_interrupt:
        As :meth:`pgbg_orchestration.driver.Driver.run` takes them.

    Attributes
    ----------
    outcome:
        From the first row on the proof that the job is committed; its ``row_count`` once the rows have ended.
    columns:
        The columns, from then on too.
    """

    def __init__(
        self,
        launcher: Callable[[], Launcher],
        stream: Callable[[Launcher, Talk], Awaitable[Stream]],
        *,
        log: Callable[[int, str], None] | None = None,
        look: Callable[[], None] | None = None,
        interval: float = math.inf,
        on_interrupt: Callable[[BaseException], float] = cancel_at_once,
    ) -> None:
        self.outcome: Outcome | None = None
        self.columns: tuple[Column, ...] = ()
        self._launcher, self._stream = launcher, stream
        driver = Driver(self._read)
        self._given = driver.iterate(log=log, look=look, interval=interval, on_interrupt=on_interrupt)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        """Give the rows, once.

        Raises
        ------
        PgbgError
            Nothing of the job is committed, or that is not known.
        RowsGone
            It is committed, and its rows, or the rest of them, are lost.
        """
        try:
            for batch in self._given:
                yield from batch
        finally:
            self.close()

    def close(self) -> None:
        """Read no further, and wait until that is done; before the first row, cancel the job."""
        self._given.close()

    async def _read(self, talk: Talk) -> None:
        async with self._launcher() as launcher, await self._stream(launcher, talk) as stream:
            self.outcome, self.columns = stream.outcome, stream.columns
            batch: list[tuple[Any, ...]] = []
            async for row in stream:
                batch.append(row)
                if len(batch) == BATCH:
                    await talk.give(batch)
                    batch = []
            self.outcome = stream.outcome
            await talk.give(batch)
