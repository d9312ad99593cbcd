"""The jobs of one call, run side by side over one launcher."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pgbg_orchestration import Job, Kind
from pgbg_orchestration.driver import Talk
from pgbg_orchestration.errors import PgbgError
from pgbg_orchestration.outcome import OF_A_TRY, Cause, Outcome

from .driving import tell
from .sql import Sql

if TYPE_CHECKING:
    from pgbg_orchestration import Launcher

FAILED_BESIDE = "dagster: another job of the step failed"
TERMINATED = "dagster: the run is being terminated"
RUN_IS_GONE = "dagster: its run is gone"
"""Reasons for people; what decides is the cause that goes with each."""


@dataclass(frozen=True, slots=True)
class Member:
    """One job of a batch.

    Attributes
    ----------
    name:
        Its name in the batch.
    sql, job:
        What it runs.
    anew:
        The same work as a new generation, where a person has asked for this run.
    """

    name: str
    sql: Sql
    job: Job
    anew: Job | None = None

    @property
    def job_id(self) -> str:
        """The job's id."""
        assert self.job.id is not None  # a Job gives itself one
        return self.job.id

    async def choose(self, launcher: Launcher) -> tuple[Job, bool | Collection[Cause]]:
        """Return the job to run, and for which causes it is run though it was cancelled before."""
        if not can_be_found(self.job):
            return self.job, False
        if self.anew is not None:
            seen = await launcher.look(self.job_id, owner=self.job.owner, series=self.job.series)
            if seen.newest is not None and seen.generation is not None and seen.newest > seen.generation:
                return self.anew, False  # it is too old to be taken up again, and a person wants it
            return self.job, True
        # Whoever is let to try it again takes back what ended a try. A cancel of a person's stays.
        return self.job, OF_A_TRY


@dataclass
class Batch:
    """Jobs that are run side by side; when one try of them ends, ``outcomes`` and ``errors`` tell how.

    Parameters
    ----------
    members:
        The jobs.
    conninfo, schema:
        The server, and the package's schema on it.
    max_running:
        How many run at the same time at most.
    fail_fast:
        Cancel the others when one fails.
    keep_on_interrupt:
        Leave workers at work that leave no receipt, too.
    options:
        As :func:`pgbg_orchestration.arun` takes them.
    """

    members: Sequence[Member]
    conninfo: str
    schema: str
    max_running: int | None
    fail_fast: bool
    keep_on_interrupt: bool
    options: Mapping[str, Any]
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    errors: list[PgbgError] = field(default_factory=list)
    _under_way: dict[str, Job] = field(default_factory=dict)

    async def run(self, talk: Talk) -> None:
        """Run all jobs; returns when each one is decided, or left at work."""
        from pgbg_orchestration import Launcher

        # Two lists: whoever is waiting for its turn holds no connection and launches nothing.
        turns = asyncio.Semaphore(self.max_running or max(len(self.members), 1))
        async with Launcher(self.conninfo, schema=self.schema) as launcher:
            tasks = [asyncio.ensure_future(self._run_one(launcher, member, turns, talk)) for member in self.members]
            try:
                try:
                    await self._wait_for(tasks)
                    if any(not task.done() for task in tasks):
                        await _stop(tasks)
                        await self._cancel_workers(launcher, talk, Cause.FAILED_BESIDE, FAILED_BESIDE)
                except Exception:
                    await _stop(tasks)  # before the connections are closed under them
                    raise
            except asyncio.CancelledError:  # whatever it was that the step was interrupted in
                await _stop(tasks)
                if talk.cancel_workers:
                    await self._cancel_workers(launcher, talk, Cause.INTERRUPTED, TERMINATED)
                raise

    async def _wait_for(self, tasks: Sequence[asyncio.Task[None]]) -> None:
        """Wait until all have ended or, if one failure is to end all, until the first one has failed."""
        waiting = set(tasks)
        while waiting and not (self.fail_fast and self.errors):
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()  # anything but an error of the core's is a fault of ours: let it be seen

    async def _run_one(self, launcher: Launcher, member: Member, turns: asyncio.Semaphore, talk: Talk) -> None:
        async with turns:
            try:
                job, lift = await member.choose(launcher)
                self._under_way[member.name] = job
                self.outcomes[member.name] = await launcher.run(
                    job,
                    # A worker is left here and cancelled afterwards, when it is known what the interruption was.
                    on_cancel="leave" if can_be_found(job) or self.keep_on_interrupt else "cancel",
                    retry_cancelled=lift,
                    observer=lambda event: tell(talk, event),
                    **self.options,
                )
            except PgbgError as error:
                self.errors.append(error)
            self._under_way.pop(member.name, None)

    async def _cancel_workers(self, launcher: Launcher, talk: Talk, cause: Cause, reason: str) -> None:
        """Cancel, for good, what was under way and can be found by its receipt."""
        await cancel_jobs(launcher, [job for job in self._under_way.values() if can_be_found(job)], talk, cause, reason)


async def cancel_jobs(launcher: Launcher, jobs: Sequence[Job], talk: Talk, cause: Cause, reason: str) -> None:
    """Cancel jobs for good, and say in the step's log how each of them ended."""
    ends = await asyncio.gather(
        *(
            launcher.cancel(job.id or "", owner=job.owner, series=job.series, cause=cause, reason=reason)
            for job in jobs
        ),
        return_exceptions=True,
    )
    for job, end in zip(jobs, ends, strict=True):
        if end == "cancelled":
            talk.note(logging.INFO, f"{job.label}: cancelled; nothing of it is committed")
        elif end == "committed":
            talk.note(logging.WARNING, f"{job.label}: the cancel came too late, it is committed")
        else:
            talk.note(logging.ERROR, f"{job.label}: could not be cancelled: {end}")


def can_be_found(job: Job) -> bool:
    """Tell whether a later call finds the job's worker: one of kind ``session`` leaves no receipt."""
    return job.kind is not Kind.SESSION


async def _stop(tasks: Sequence[asyncio.Task[None]]) -> None:
    """Cancel tasks and wait for them."""
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks)
