"""Waiting for jobs from a step, so that a termination of the run can never hit the wrong piece of code.

Dagster ends a step by raising ``DagsterExecutionInterruptedError`` wherever the main thread happens to be; the core's
driver keeps that from its event loop. The waiting thread writes the step's log, and looks at the run's status from time
to time (Celery sends no signal at all, and the child of a run process that was killed gets none).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from dagster import DagsterExecutionInterruptedError

from pgbg_orchestration.driver import Driver, Talk
from pgbg_orchestration.outcome import Event, EventKind, level_of

T = TypeVar("T")

WORTH_A_WARNING = (
    EventKind.WAITING_FOR_SLOT, EventKind.WAITING_FOR_SERIES, EventKind.OUTPUT_BLOCKED, EventKind.BLOCKED,
    EventKind.SESSION_LOST,
)  # fmt: skip


def tell(talk: Talk, event: Event) -> None:
    """Put an event of the core's into the step's log."""
    if event.kind is EventKind.LET_GO:
        return  # how an interrupted job ended is told by whoever interrupted it
    level = logging.WARNING if event.kind in WORTH_A_WARNING else logging.INFO
    if event.kind is EventKind.NOTICE:
        level = level_of(event.data["severity"])
    pid = event.data.get("pid")
    talk.note(level, f"{event.label}: {event.message}{f' (pid {pid})' if pid else ''}")


def drive(
    work: Callable[[Talk], Coroutine[Any, Any, T]],
    *,
    log: Callable[[int, str], None],
    is_terminated: Callable[[], bool],
    should_cancel: Callable[[], bool],
    interval: float,
) -> T:
    """Run ``work`` in an event loop of its own and wait for it; the calling thread writes the log.

    Parameters
    ----------
    work:
        Makes the coroutine. When it is cancelled it looks at ``Talk.cancel_workers``.
    log:
        Writes one line, with a level of :mod:`logging`.
    is_terminated:
        Tells whether the run is being terminated; asked every ``interval`` seconds.
    should_cancel:
        Tells, once the step is interrupted, whether its workers are to end.
    interval:
        Seconds between two looks at the run's status.

    Raises
    ------
    DagsterExecutionInterruptedError, KeyboardInterrupt
        The step was interrupted; by then it is decided how its jobs ended, or they were left at work.
    BaseException
        Whatever ``work`` raises.
    """
    driver = Driver(work)

    def on_interrupt(interruption: BaseException) -> float:
        return pass_on(interruption, driver.talk, should_cancel)

    return driver.run(
        log=log, look=lambda: raise_if_terminated(is_terminated), interval=interval, on_interrupt=on_interrupt
    )


def raise_if_terminated(is_terminated: Callable[[], bool]) -> None:
    """Interrupt the step whose run is being terminated, as if Dagster had sent it.

    Raises
    ------
    DagsterExecutionInterruptedError
        The run is being terminated.
    """
    if is_terminated():
        raise DagsterExecutionInterruptedError


def pass_on(interruption: BaseException, talk: Talk, should_cancel: Callable[[], bool]) -> float:
    """Tell the work whether its workers are to end; returns for how many seconds it may go on, which is none.

    They go on where the interruption is none of Dagster's: an error of the step's own.
    """
    by_dagster = isinstance(interruption, (DagsterExecutionInterruptedError, KeyboardInterrupt))
    talk.cancel_workers = by_dagster and should_cancel()
    return 0.0


def see_through(work: Callable[[Talk], Coroutine[Any, Any, Any]], *, log: Callable[[int, str], None]) -> None:
    """Run ``work`` to its end, however often the step is interrupted meanwhile; every wait of it must be bounded.

    Raises
    ------
    BaseException
        Whatever ``work`` raises.
    """
    Driver(work).see_through(log=log)
