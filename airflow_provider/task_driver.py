"""Waiting for jobs in a task's own process, with a way to end them from a signal."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Generic, TypeVar

from airflow.sdk.exceptions import AirflowException

from airflow_provider.compat import AirflowTaskTimeout
from pgbg_orchestration import pace
from pgbg_orchestration.driver import Driver, Talk

if TYPE_CHECKING:
    from pgbg_orchestration import Launcher

T = TypeVar("T")

KILL_SECONDS = 4.0
"""How long ``on_kill`` waits for the cancel to be decided: Airflow sends SIGKILL 5 s after SIGTERM."""

BLOW_SECONDS = 0.5
"""How long the extension's own ``cancel_all`` is waited for before the jobs are cancelled one by one."""

DEADLINE_SECONDS = pace.CANCEL + 10.0
"""How long a job whose ``execution_timeout`` has passed may take to end by its own deadline, of the same moment."""


class TaskKilled(AirflowException):
    """The task's process was asked to end, and its jobs were cancelled, or left at work. Another try runs them."""


class TaskDriver(Generic[T]):
    """Does a piece of work over launching sessions of the task's own, in the core's driver.

    The task's main thread only waits: there Airflow's signals arrive, and raise what they raise at a place where
    nothing is half done.

    Parameters
    ----------
    conninfo:
        A libpq connection string.
    schema:
        Name of the package's schema.
    cancel_on_kill:
        Whether an interruption ends the workers; otherwise they go on, and are attached to by the next try.
    """

    def __init__(self, conninfo: str, *, schema: str = "pgbg", cancel_on_kill: bool = True) -> None:
        self._conninfo = conninfo
        self._schema = schema
        self._cancel_on_kill = cancel_on_kill
        self._driver: Driver[T] | None = None
        self.killed = False

    def run(self, work: Callable[[Launcher], Awaitable[T]]) -> T:
        """Do the work and return what it returns, or raise what it raises.

        Airflow's own timeout has no word in how that ends: the jobs' deadline is of the same moment, cancels them and
        tells of it. Which of the two comes first is chance.

        Parameters
        ----------
        work:
            Runs jobs over the launcher that it is given; when it is cancelled it cancels or leaves them, as
            ``cancel_on_kill`` says.

        Raises
        ------
        TaskKilled
            :meth:`kill` was called meanwhile.
        """
        self._driver = driver = Driver(lambda talk: self._run(work, talk))
        driver.talk.cancel_workers = self._cancel_on_kill
        if self.killed:
            driver.stop()
        try:
            return driver.run(on_interrupt=_patience)
        except asyncio.CancelledError:
            fate = "and so were its jobs" if self._cancel_on_kill else "its jobs are left at work"
            raise TaskKilled(f"the task was asked to end, {fate}") from None

    def kill(self, wait: float = KILL_SECONDS) -> None:
        """End the work and wait until that is decided; safe in a signal handler, and more than once.

        Parameters
        ----------
        wait:
            Seconds to wait at most.
        """
        self.killed = True
        if self._driver is not None:
            self._driver.stop()
            self._driver.ended.wait(wait)

    async def _run(self, work: Callable[[Launcher], Awaitable[T]], talk: Talk) -> T:
        from pgbg_orchestration import Launcher

        async with Launcher(self._conninfo, schema=self._schema) as launcher:
            working = asyncio.ensure_future(work(launcher))
            try:
                return await asyncio.shield(working)
            except asyncio.CancelledError:
                blows = []
                if talk.cancel_workers:
                    # One blow for all; what it does not reach is cancelled job by job, and every cancel made final.
                    blows = [asyncio.create_task(launcher.cancel_all())]
                    await asyncio.wait(blows, timeout=BLOW_SECONDS)
                working.cancel()
                await asyncio.gather(working, return_exceptions=True)
                for blow in blows:
                    blow.cancel()  # that one would wait for a server that is away as long as for any other
                raise


def _patience(interruption: BaseException) -> float:
    return DEADLINE_SECONDS if isinstance(interruption, AirflowTaskTimeout) else 0.0
