"""The rows of a job as they are read, for results that are too big to keep or to hold in memory."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

import psycopg

from .errors import PgbgError, RowsGone
from .job import Job
from .outcome import Outcome
from .postgres import connection
from .rows import Column
from .walk.streamed_rows import Feed


class Stream:
    """The rows of a job's last statement, each once, as psycopg gives them: made by :meth:`Launcher.stream`.

    The job is launched with the first row that is asked for. Its rows begin to come when it is committed; until then a
    cancel of whoever waits is a cancel of the job, as with :meth:`Launcher.run`. They are not kept: who needs them
    twice, or after a fault of the connection, has the job keep them (``fetch``), or writes them to a table.

    Use it as an async context manager where the rows may not be read to their end.

    Attributes
    ----------
    outcome:
        Once its rows begin to come, the proof that the job is committed; its ``row_count`` once they have ended.
    columns:
        The columns, from then on too.
    """

    def __init__(
        self,
        job: Job,
        start: Callable[[Feed], Awaitable[Outcome]],
        finish: Callable[[Stream, Outcome | None], Awaitable[None]],
        *,
        as_text: bool = False,
    ) -> None:
        self.outcome: Outcome | None = None
        self.columns: tuple[Column, ...] = ()
        self._job, self._start, self._finish = job, start, finish
        self._feed = Feed(as_text=as_text)
        self._read = 0
        self._closed = False

    async def __aenter__(self) -> Self:
        """Run the job, until it is committed.

        Raises
        ------
        PgbgError
            As :func:`pgbg_orchestration.arun`: it did not commit.
        RowsGone
            It is committed, by an earlier or another launch.
        """
        await self._begin()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def __aiter__(self) -> AsyncGenerator[tuple[Any, ...], None]:
        """Give the rows. Raises as :meth:`__aenter__`, and :class:`RowsGone` where the rest of them is lost."""
        try:
            await self._begin()
            if self._feed.rows is None:
                raise self._gone("its rows were read before, or the stream was closed")
            try:
                async for row in self._feed.rows:
                    self._read += 1
                    yield row
            except (psycopg.Error, OSError) as error:
                why = "" if self._job.redact_details else f": {connection.words(error)}"
                raise self._gone(f"the rest of its rows is lost, after {self._read} of them{why}") from error
            await self._end()
        finally:
            await self.close()

    async def close(self) -> None:
        """Read no further; the job stays committed."""
        self._closed = True
        await self._feed.close()
        await self._finish(self, None)

    async def _begin(self) -> None:
        if self.outcome is not None or self._closed:
            return
        try:
            outcome = await self._start(self._feed)
        except BaseException:
            await self.close()
            raise
        if self._feed.rows is None:
            await self.close()
            raise self._gone(
                "the connection that was to read its rows was lost"
                if outcome.launched
                else "an earlier or another launch of it committed, which had its rows"
            )
        self.outcome, self.columns = outcome, self._feed.columns

    async def _end(self) -> None:
        assert self.outcome is not None
        self.outcome = replace(self.outcome, row_count=self._read)
        await self._feed.close()
        await self._finish(self, self.outcome)

    def _gone(self, why: str) -> PgbgError:
        return RowsGone(
            f"the job is committed, and {why}",
            job_id=self._job.id,
            label=self._job.label,
            todo="Rows that have to be read again are kept by fetch, or written to a table by the SQL.",
        )
