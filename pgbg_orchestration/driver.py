"""From blocking code to the core: an event loop in a thread of its own, where no signal handler raises.

A signal's handler runs in the main thread, and raises wherever that happens to be: ``KeyboardInterrupt``, Dagster's
interruption, Airflow's timeout. Raised among the callbacks of asyncio and psycopg, it would leave a connection half
way, or end a task that it has nothing to do with. So the calling thread only waits and writes the log. What interrupts
it becomes a cancel of the work, whose end is waited for: nothing is left half done, and how the work ended is known.
"""

from __future__ import annotations

import asyncio
import contextvars
import math
import queue
import threading
import time
from collections.abc import Callable, Coroutine, Generator
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

T = TypeVar("T")

TICK = 0.5
"""Seconds that the waiting thread waits at a time. Signals wake it at once."""


@dataclass(slots=True)
class Parcel:
    """A value that the work hands to the waiting thread, and what that thread calls when it has taken it."""

    value: Any
    taken: Callable[[], object]


@dataclass(slots=True)
class Talk:
    """What the event loop's thread and the waiting thread exchange."""

    notes: queue.SimpleQueue[tuple[int, str] | Parcel | None] = field(default_factory=queue.SimpleQueue)
    """Lines for the log, each with a level of :mod:`logging`; parcels; and None, which wakes the waiting thread."""
    cancel_workers: bool = True
    """Set before the work is cancelled: whether its workers are to end too, or to go on."""

    def note(self, level: int, message: str) -> None:
        """Have the waiting thread write a line."""
        self.notes.put((level, message))

    async def give(self, value: Any) -> None:
        """Hand a value to the thread that iterates (:meth:`Driver.iterate`), and wait until it has taken it."""
        loop, taken = asyncio.get_running_loop(), asyncio.Event()
        self.notes.put(Parcel(value, lambda: loop.call_soon_threadsafe(taken.set)))
        await taken.wait()


def cancel_at_once(_interruption: BaseException) -> float:
    """Stop the work at the first interruption: the default of :meth:`Driver.run`."""
    return 0.0


class Driver(Generic[T]):
    """Runs a coroutine in an event loop of its own, for a thread that waits for it.

    Parameters
    ----------
    work:
        Makes the coroutine, in the loop's thread and with the caller's context variables. Cancelled, the coroutine
        heeds ``Talk.cancel_workers``, and each of its waits has to have a bound.
    """

    def __init__(self, work: Callable[[Talk], Coroutine[Any, Any, T]]) -> None:
        self.talk = Talk()
        self.ended = threading.Event()
        self._work = work
        self._lock = threading.RLock()  # re-entrant: a signal's handler may call stop() within stop()
        self._stopping = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[T] | None = None
        self._result: T | None = None
        self._error: BaseException | None = None
        # A daemon: a thread that hangs must not keep the process from ending.
        run = contextvars.copy_context().run
        self._thread = threading.Thread(target=run, args=(self._run,), name="pgbg jobs", daemon=True)

    def run(
        self,
        *,
        log: Callable[[int, str], None] | None = None,
        look: Callable[[], None] | None = None,
        interval: float = math.inf,
        on_interrupt: Callable[[BaseException], float] = cancel_at_once,
    ) -> T:
        """Do the work and return what it returns.

        Parameters
        ----------
        log:
            Writes one line, with a level of :mod:`logging`, in the calling thread.
        look:
            Called every ``interval`` seconds in the calling thread; what it raises interrupts.
        interval:
            Seconds.
        on_interrupt:
            Called with what interrupted; returns how many seconds the work has to end by itself before it is stopped.
            May set ``talk.cancel_workers``.

        Raises
        ------
        BaseException
            Whatever the work raises; or what interrupted it, once the work has ended after it was stopped.
        """
        try:
            self._thread.start()
            look_at = time.monotonic() + interval
            while not self.ended.is_set():
                self._write(log, patience=TICK)
                if look is not None and time.monotonic() >= look_at:
                    look()
                    look_at = time.monotonic() + interval
        except BaseException as interruption:
            if self._finish(interruption, on_interrupt):
                self._write(log)
                raise
        self._write(log)
        return self.result()

    def iterate(
        self,
        *,
        log: Callable[[int, str], None] | None = None,
        look: Callable[[], None] | None = None,
        interval: float = math.inf,
        on_interrupt: Callable[[BaseException], float] = cancel_at_once,
    ) -> Generator[Any, None, None]:
        """Do the work, and yield what it hands over (:meth:`Talk.give`); parameters as of :meth:`run`.

        Closing the iterator stops the work, as an interruption does.

        Raises
        ------
        BaseException
            As :meth:`run`.
        """
        try:
            self._thread.start()
            look_at = time.monotonic() + interval
            while not (self.ended.is_set() and self.talk.notes.empty()):
                try:
                    note = self.talk.notes.get(timeout=TICK)
                except queue.Empty:
                    note = None
                if isinstance(note, Parcel):
                    with self._lock:
                        if self._loop is not None:
                            note.taken()
                    yield note.value
                elif note is not None and log is not None:
                    log(*note)
                if look is not None and time.monotonic() >= look_at:
                    look()
                    look_at = time.monotonic() + interval
        except BaseException as interruption:
            if self._finish(interruption, on_interrupt):
                self._write(log)
                raise
        self.result()

    def see_through(self, *, log: Callable[[int, str], None] | None = None) -> T:
        """Do the work to its end, however often the calling thread is interrupted meanwhile.

        Raises
        ------
        BaseException
            Whatever the work raises.
        """
        started = False
        while not self.ended.is_set():
            try:
                if not started:
                    started = True
                    self._thread.start()
                self.ended.wait(TICK)
            except BaseException:  # noqa: BLE001, S112 - an interruption: the work is bounded, and is waited for
                continue
        self._write(log)
        return self.result()

    def stop(self) -> None:
        """Cancel the work, once; also when it has not begun, and when it has ended. Safe in a signal's handler."""
        with self._lock:
            if self._stopping:
                return
            self._stopping = True
            if self._thread.ident is None:
                self.ended.set()
            elif self._loop is not None and self._task is not None:
                self._loop.call_soon_threadsafe(self._task.cancel)

    @property
    def was_stopped(self) -> bool:
        """Whether :meth:`stop` was called."""
        return self._stopping

    def result(self) -> T:
        """Return what the work returned, once it has ended.

        Raises
        ------
        BaseException
            Whatever the work raised.
        """
        if self._thread.ident is not None:
            self._thread.join()
        if self._error is not None:
            raise self._error
        return self._result  # type: ignore[return-value]  # there is one when there is no error

    def _finish(self, interruption: BaseException, on_interrupt: Callable[[BaseException], float]) -> bool:
        """Wait for the end of the interrupted work, through further interruptions; returns whether it was stopped."""
        until: float | None = None
        while not self.ended.is_set():
            try:
                if until is None:
                    until = time.monotonic() + on_interrupt(interruption)
                if time.monotonic() >= until:
                    self.stop()
                self.ended.wait(TICK)
            except BaseException:  # noqa: BLE001, S112 - interrupted again: every wait of the work's is bounded
                continue
        return self._stopping

    def _write(self, log: Callable[[int, str], None] | None, *, patience: float = 0.0) -> None:
        """Write the lines that have come, after a wait of at most ``patience`` seconds for the first."""
        try:
            note = self.talk.notes.get(timeout=patience) if patience else self.talk.notes.get_nowait()
            while note is not None:
                if log is not None and not isinstance(note, Parcel):
                    log(*note)
                note = self.talk.notes.get_nowait()
        except queue.Empty:
            return

    def _run(self) -> None:
        try:
            self._result = asyncio.run(self._main())
        except BaseException as error:  # noqa: BLE001 - raised in the thread that waits
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
        try:
            return await task
        finally:
            with self._lock:  # the loop closes now, and a closed one takes no cancel
                self._loop = None


async def to_its_end(work: Coroutine[Any, Any, None]) -> bool:
    """Await ``work``, however often the caller is cancelled meanwhile; returns whether it was."""
    task = asyncio.create_task(work)
    cancelled = False
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:
            cancelled = True
    task.result()
    return cancelled
