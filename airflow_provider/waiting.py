"""Waiting for jobs in a task's own process, in an event loop of its own, with a way to end them from a signal."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Generic, TypeVar

from airflow.sdk.exceptions import AirflowException

if TYPE_CHECKING:
    from pgbg_orchestration import Launcher

T = TypeVar("T")

KILL_SECONDS = 4.0
"""How long ``on_kill`` waits for the cancel to be decided: Airflow sends SIGKILL 5 s after SIGTERM."""

BLOW_SECONDS = 0.5
"""How long the extension's own ``cancel_all`` is waited for before the jobs are cancelled one by one."""


class TaskKilled(AirflowException):
    """The task's process was asked to end, and its jobs were cancelled. Another try runs them."""


class Waiting(Generic[T]):
    """Does a piece of work over launching sessions of the task's own.

    The event loop gets a thread, and the task's main thread waits for it: there Airflow's signals arrive, and raise
    what they raise (``AirflowTaskTimeout``) at a place where nothing is half done.

    Parameters
    ----------
    conninfo:
        A libpq connection string.
    schema:
        Name of the package's schema.
    """

    def __init__(self, conninfo: str, *, schema: str = "pgbg") -> None:
        self._conninfo = conninfo
        self._schema = schema
        self._loop: asyncio.AbstractEventLoop | None = None
        self._work: asyncio.Task[T] | None = None
        self._ended = threading.Event()
        self.killed = False

    def run(self, work: Callable[[Launcher], Awaitable[T]]) -> T:
        """Do the work and return what it returns, or raise what it raises.

        Parameters
        ----------
        work:
            Runs jobs over the launcher that it is given; when it is cancelled it cancels them.

        Raises
        ------
        TaskKilled
            :meth:`kill` was called meanwhile.
        """
        result: Future[T] = Future()
        context = contextvars.copy_context()

        def drive() -> None:
            try:
                result.set_result(asyncio.run(self._run(work)))
            except BaseException as error:  # noqa: BLE001 - the waiting thread raises it
                result.set_exception(error)
            finally:
                self._ended.set()

        thread = threading.Thread(target=context.run, args=(drive,), name="pgbg jobs")
        thread.start()
        try:
            return result.result()
        except BaseException:
            # A signal's exception, or the loop's own: either way no worker stays behind.
            self.kill(wait=None)
            if result.done() and isinstance(result.exception(), asyncio.CancelledError):
                raise TaskKilled("the task was asked to end; its jobs are cancelled") from None
            raise
        finally:
            thread.join()

    def kill(self, wait: float | None = KILL_SECONDS) -> None:
        """Cancel the jobs and wait until that is decided; safe in a signal handler, and more than once.

        Parameters
        ----------
        wait:
            Seconds to wait at most; None for as long as it takes (at most a minute).
        """
        first, self.killed = not self.killed, True
        loop, work = self._loop, self._work
        if loop is None or work is None or self._ended.is_set():
            return
        if first:  # a second cancel would end the first one in the middle
            try:
                loop.call_soon_threadsafe(work.cancel)
            except RuntimeError:
                return  # the loop has ended in between
        self._ended.wait(wait)

    async def _run(self, work: Callable[[Launcher], Awaitable[T]]) -> T:
        from pgbg_orchestration import Launcher

        self._loop, self._work = asyncio.get_running_loop(), asyncio.current_task()
        if self.killed:
            raise asyncio.CancelledError
        async with Launcher(self._conninfo, schema=self._schema) as launcher:
            working = asyncio.ensure_future(work(launcher))
            try:
                return await asyncio.shield(working)
            except asyncio.CancelledError:
                # One blow for all; what it does not reach is cancelled job by job, and every cancel made final.
                blow = asyncio.create_task(launcher.cancel_all())
                await asyncio.wait({blow}, timeout=BLOW_SECONDS)
                working.cancel()
                await asyncio.gather(blow, working, return_exceptions=True)
                raise
