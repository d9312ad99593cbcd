"""Waiting for jobs in a task's own process, in an event loop of its own, with a way to end them from a signal."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from airflow.sdk.exceptions import AirflowException

from . import events

if TYPE_CHECKING:
    from pgbg_orchestration import Job, Outcome

KILL_SECONDS = 4.0
"""How long ``on_kill`` waits for the cancel to be decided: Airflow sends SIGKILL 5 s after SIGTERM."""

BLOW_SECONDS = 0.5
"""How long the extension's own ``cancel_all`` is waited for before the jobs are cancelled one by one."""


class TaskKilled(AirflowException):
    """The task's process was asked to end, and its jobs were cancelled. Another try runs them."""


class Waiting:
    """Runs jobs over launching sessions of the task's own.

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
        self._work: asyncio.Task[Any] | None = None
        self._ended = threading.Event()
        self.killed = False

    def run(
        self, jobs: Sequence[Job], *, at_once: int | None = None, fail_fast: bool = False, **options: Any
    ) -> list[Outcome | BaseException]:
        """Run the jobs side by side and return the outcome or error of each.

        Parameters
        ----------
        jobs:
            The jobs.
        at_once:
            How many of them run at once; None for all.
        fail_fast:
            Cancel the rest when one fails; those that were cancelled or not begun have a ``CancelledError``.
        options:
            As :func:`pgbg_orchestration.arun` takes them.

        Raises
        ------
        TaskKilled
            :meth:`kill` was called meanwhile.
        """
        result: Future[list[Outcome | BaseException]] = Future()
        context = contextvars.copy_context()

        def drive() -> None:
            try:
                result.set_result(asyncio.run(self._run(jobs, at_once, fail_fast, options)))
            except BaseException as error:  # noqa: BLE001 - the waiting thread raises it
                result.set_exception(error)
            finally:
                self._ended.set()

        thread = threading.Thread(target=context.run, args=(drive,), name="pgbg jobs")
        thread.start()
        try:
            outcomes = result.result()
        except BaseException:
            # A signal's exception, or the loop's own: either way no worker stays behind.
            self.kill(wait=None)
            thread.join()
            if self.killed and result.done() and isinstance(result.exception(), asyncio.CancelledError):
                raise TaskKilled("the task was asked to end; its jobs are cancelled") from None
            raise
        thread.join()
        return outcomes

    def kill(self, wait: float | None = KILL_SECONDS) -> None:
        """Cancel the jobs and wait until that is decided; safe in a signal handler, and more than once.

        Parameters
        ----------
        wait:
            Seconds to wait at most; None for as long as it takes (at most a minute).
        """
        self.killed = True
        loop, work = self._loop, self._work
        if loop is None or work is None or self._ended.is_set():
            return
        try:
            loop.call_soon_threadsafe(work.cancel)
        except RuntimeError:
            return  # the loop has ended in between
        self._ended.wait(wait)

    async def _run(
        self, jobs: Sequence[Job], at_once: int | None, fail_fast: bool, options: dict[str, Any]
    ) -> list[Outcome | BaseException]:
        from pgbg_orchestration import Launcher

        self._loop, self._work = asyncio.get_running_loop(), asyncio.current_task()
        if self.killed:
            raise asyncio.CancelledError
        async with Launcher(self._conninfo, schema=self._schema) as launcher:
            slots = asyncio.Semaphore(at_once or len(jobs))

            async def run_one(job: Job) -> Outcome:
                async with slots:
                    return await launcher.run(job, on_cancel="cancel", observer=events.watch, **options)

            tasks = [asyncio.create_task(run_one(job)) for job in jobs]
            try:
                when = asyncio.FIRST_EXCEPTION if fail_fast else asyncio.ALL_COMPLETED
                await asyncio.wait(tasks, return_when=when)
            finally:
                # One blow for all; what it does not reach is cancelled job by job, and every cancel made final.
                blow = asyncio.create_task(launcher.cancel_all()) if self.killed else None
                if blow is not None:
                    await asyncio.wait({blow}, timeout=BLOW_SECONDS)
                for task in tasks:
                    task.cancel()
                outcomes = await asyncio.gather(*tasks, return_exceptions=True)
                if blow is not None:
                    await blow
        return outcomes
