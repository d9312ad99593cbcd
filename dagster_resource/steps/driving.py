"""Waiting for jobs from a step, so that a termination of the run can never hit the wrong piece of code.

Dagster ends a step by raising ``DagsterExecutionInterruptedError`` wherever the main thread happens to be, and psycopg
and asyncio do not know that exception: raised among their callbacks it leaves a connection half way, or ends up in a
task that has nothing to do with it. So the event loop runs in a thread of its own, where no signal handler runs, and
the main thread does nothing but wait, write the step's log, and look at the run's status from time to time (Celery
sends no signal at all, and the child of a run process that was killed gets none).
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from dagster import DagsterExecutionInterruptedError

from pgbg_orchestration.outcome import Event, EventKind

T = TypeVar("T")

TICK = 0.5  # seconds; signals wake the waiting thread at once, this only bounds how late a status is looked at


@dataclass(frozen=True, slots=True)
class Note:
    """A line for the step's log."""

    level: int
    message: str


@dataclass(slots=True)
class Talk:
    """What the event loop's thread and the waiting thread say to one another."""

    notes: queue.SimpleQueue[Note | None] = field(default_factory=queue.SimpleQueue)
    """None wakes the waiting thread."""
    cancel_workers: bool = False
    """Set before the work is cancelled: whether its workers are to end too, or to go on."""

    def note(self, level: int, message: str) -> None:
        """Put a line into the step's log."""
        self.notes.put(Note(level, message))

    def event(self, event: Event) -> None:
        """Put an event of the core's into the step's log."""
        level = logging.WARNING if event.kind in WORTH_A_WARNING else logging.INFO
        pid = event.data.get("pid")
        self.note(level, f"{event.label}: {event.message}{f' (pid {pid})' if pid else ''}")


WORTH_A_WARNING = (
    EventKind.WAITING_FOR_SLOT, EventKind.WAITING_FOR_SERIES, EventKind.OUTPUT_BLOCKED, EventKind.SESSION_LOST,
)  # fmt: skip


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
    talk = Talk()
    background = _Background(work, talk)
    try:
        background.start()
        look_at = time.monotonic() + interval
        while not background.ended.is_set():
            _write(talk, log, patience=TICK)
            if time.monotonic() >= look_at:
                if is_terminated():
                    raise DagsterExecutionInterruptedError  # noqa: TRY301  (as if Dagster had sent it)
                look_at = time.monotonic() + interval
        _write(talk, log)
        return background.result()
    except BaseException as interruption:
        if not background.ended.is_set():
            by_dagster = isinstance(interruption, (DagsterExecutionInterruptedError, KeyboardInterrupt))
            _finish(background, lambda: by_dagster and should_cancel())
            _write(talk, log)
        raise


def see_through(work: Callable[[Talk], Coroutine[Any, Any, Any]], *, log: Callable[[int, str], None]) -> None:
    """Run ``work`` to its end, however often the step is interrupted meanwhile; every wait of it must be bounded.

    Raises
    ------
    BaseException
        Whatever ``work`` raises.
    """
    background = _Background(work, Talk())
    started = False
    while not background.ended.is_set():
        try:
            if not started:
                started = True
                background.start()
            background.ended.wait(TICK)
        except (DagsterExecutionInterruptedError, KeyboardInterrupt):
            continue
    _write(background.talk, log)
    background.result()


def _finish(background: _Background[Any], should_cancel: Callable[[], bool]) -> None:
    """Stop the work and wait for it, however often the step is interrupted: every wait of the work's is bounded."""
    asked = False
    while not background.ended.is_set():
        try:
            if not asked:
                background.talk.cancel_workers = should_cancel()
                asked = True
            background.stop()
            background.ended.wait(TICK)
        except (DagsterExecutionInterruptedError, KeyboardInterrupt):
            continue


def _write(talk: Talk, log: Callable[[int, str], None], *, patience: float = 0.0) -> None:
    """Write what is there, waiting for ``patience`` seconds for something to come."""
    try:
        note = talk.notes.get(timeout=patience) if patience else talk.notes.get_nowait()
        while note is not None:
            log(note.level, note.message)
            note = talk.notes.get_nowait()
    except queue.Empty:
        return


class _Background(Generic[T]):
    """A coroutine in a thread with an event loop."""

    def __init__(self, work: Callable[[Talk], Coroutine[Any, Any, T]], talk: Talk) -> None:
        self.talk = talk
        self.ended = threading.Event()
        self._work = work
        self._lock = threading.Lock()
        self._stopping = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[T] | None = None
        self._result: T | None = None
        self._error: BaseException | None = None
        # A daemon: a thread that hangs must not keep the process from ending.
        self._thread = threading.Thread(target=self._run, name="pg_background", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Cancel the work, once; also when it has not begun."""
        with self._lock:
            if self._stopping:
                return
            self._stopping = True
            if self._thread.ident is None:
                self.ended.set()
            elif self._loop is not None and self._task is not None:
                self._loop.call_soon_threadsafe(self._task.cancel)

    def result(self) -> T:
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._result  # type: ignore[return-value]  # there is one when there is no error

    def _run(self) -> None:
        try:
            self._result = asyncio.run(self._main())
        except BaseException as error:  # noqa: BLE001  (raised in the thread that waits)
            self._error = error
        finally:
            self.ended.set()
            self.talk.notes.put(None)

    async def _main(self) -> T:
        task = asyncio.ensure_future(self._work(self.talk))
        with self._lock:
            self._loop, self._task = asyncio.get_running_loop(), task
            if self._stopping:
                task.cancel()
        return await task
