"""The rows of a job as a step reads them, for results that are too big to keep or to hold in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, Self

from dagster import DagsterExecutionInterruptedError

from pgbg_orchestration.blocking_stream import BlockingStream
from pgbg_orchestration.driver import Talk
from pgbg_orchestration.errors import PgbgError
from pgbg_orchestration.launcher import Launcher
from pgbg_orchestration.outcome import Cause
from pgbg_orchestration.rows import Column
from pgbg_orchestration.stream import Stream

from .batch import Member
from .caller import Caller
from .identity import Identity
from .outcome import PgBackgroundOutcome
from .step_driver import pass_on, raise_if_terminated

if TYPE_CHECKING:
    from collections.abc import Callable


class StepStream:
    """The rows of a job's last statement, each once: iterate, or use it as a context manager where not to their end.

    Made by :meth:`PgBackgroundResource.stream`.
    """

    def __init__(
        self,
        member: Member,
        launcher: Callable[[], Launcher],
        caller: Caller,
        *,
        options: Mapping[str, Any],
        interval: float,
        step: Identity,
        web_url: str | None,
        fail: Callable[[PgbgError], NoReturn],
    ) -> None:
        self._member, self._caller, self._options, self._fail = member, caller, options, fail
        self._step, self._web_url = step, web_url
        self._talk: Talk | None = None
        self._rows = BlockingStream(
            launcher,
            self._stream,
            log=caller.log,
            look=lambda: raise_if_terminated(caller.is_terminated),
            interval=interval,
            on_interrupt=self._on_interrupt,
        )

    @property
    def columns(self) -> tuple[Column, ...]:
        """The columns, from the first row on."""
        return self._rows.columns

    @property
    def outcome(self) -> PgBackgroundOutcome | None:
        """From the first row on the proof that the job is committed; its ``row_count`` once the rows have ended."""
        if self._rows.outcome is None:
            return None
        return PgBackgroundOutcome.of(self._rows.outcome, self._member.sql.shown, self._step, web_url=self._web_url)

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
        PgBackgroundFailure
            The job did not commit, or it has, and its rows, or the rest of them, are lost.
        RetryRequested
            It did not commit, and the step is to be tried again.
        RunTerminated, DagsterExecutionInterruptedError
            The step was interrupted.
        """
        try:
            yield from self._rows
        except DagsterExecutionInterruptedError as interruption:
            self._caller.raise_terminated(interruption)
            raise
        except PgbgError as error:
            self._fail(error)

    def close(self) -> None:
        """Read no further; before the first row, deal with the job as with one that is interrupted."""
        self._rows.close()

    async def _stream(self, launcher: Launcher, talk: Talk) -> Stream:
        self._talk = talk
        call = await self._member.call(launcher, talk, keep_on_interrupt=False, options=self._options)
        # Before its first row an interruption decides on the job; whoever is told of it then knows how that ended.
        call.options["on_cancel"] = lambda: Cause.INTERRUPTED if talk.cancel_workers else None
        return launcher.stream(call.job, **call.options)

    def _on_interrupt(self, interruption: BaseException) -> float:
        return 0.0 if self._talk is None else pass_on(interruption, self._talk, self._caller.cancels)
