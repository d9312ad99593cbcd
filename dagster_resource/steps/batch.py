"""The jobs of one call, in Dagster's words: which job a member is, and what the step's log says of their ends."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pgbg_orchestration import Job, batch
from pgbg_orchestration.batch import Call, CancelEnd, End, Target, can_be_found, was_stopped
from pgbg_orchestration.call_options import RunOptions
from pgbg_orchestration.driver import Talk
from pgbg_orchestration.errors import PgbgError
from pgbg_orchestration.outcome import OF_A_TRY, Cause, Outcome

from .sql import Sql
from .step_driver import tell

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

    async def call(
        self, launcher: Launcher, talk: Talk, *, keep_on_interrupt: bool, options: Mapping[str, Any]
    ) -> Call:
        """Return the job to run, and how it is run for a step.

        Parameters
        ----------
        launcher:
            Over which.
        talk:
            Takes its events to the step's log.
        keep_on_interrupt:
            Leave a worker at work that leaves no receipt, too.
        options:
            Further ones, as :func:`pgbg_orchestration.arun` takes them.
        """
        job, lift = await self.choose(launcher)
        wanted: RunOptions = {
            # A worker is left here and cancelled afterwards, when it is known what the interruption was.
            "on_cancel": "leave" if can_be_found(job) or keep_on_interrupt else "cancel",
            "retry_cancelled": lift,
            "observer": lambda event: tell(talk, event),
            **options,  # type: ignore[typeddict-item]
        }
        return Call(job, wanted)


class _StepLog(batch.BatchObserver):
    def __init__(self, talk: Talk) -> None:
        self._talk = talk

    def stopped(self, job: Job, end: CancelEnd) -> None:
        note_cancel(self._talk, job, end)


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
    ends: dict[str, End] = field(default_factory=dict)

    @property
    def outcomes(self) -> dict[str, Outcome]:
        """The outcomes of those that committed, by name."""
        return {name: end for name, end in self.ends.items() if isinstance(end, Outcome)}

    @property
    def errors(self) -> list[PgbgError]:
        """The errors of the others, the first one first; one that another's failure ended is no reason beside that."""
        errors = [end for end in self.ends.values() if isinstance(end, PgbgError)]
        return [error for error in errors if not was_stopped(error)] or errors

    async def run(self, talk: Talk) -> None:
        """Run all jobs; returns when each one is decided, or left at work."""
        from pgbg_orchestration import Launcher

        # The launcher of a step is its own: whoever is waiting for its turn holds no connection.
        async with Launcher(self.conninfo, schema=self.schema) as launcher:

            def preparation(member: Member) -> Any:
                return lambda: member.call(
                    launcher, talk, keep_on_interrupt=self.keep_on_interrupt, options=self.options
                )

            jobs = batch.Batch(
                launcher,
                {member.name: preparation(member) for member in self.members},
                at_once=self.max_running,
                fail_fast=self.fail_fast,
                reason=FAILED_BESIDE,
                observer=_StepLog(talk),
            )
            try:
                self.ends = await jobs.run()
            except asyncio.CancelledError:  # whatever it was that the step was interrupted in
                if talk.cancel_workers:
                    found = [job for job in jobs.interrupted if can_be_found(job)]
                    await cancel_jobs(launcher, found, talk, Cause.INTERRUPTED, TERMINATED)
                raise


async def cancel_jobs(launcher: Launcher, jobs: Sequence[Job], talk: Talk, cause: Cause, reason: str) -> None:
    """Cancel jobs for good, and say in the step's log how each of them ended."""
    ends = await batch.cancel_all(launcher, [Target.of(job) for job in jobs], cause=cause, reason=reason)
    for job, end in zip(jobs, ends, strict=True):
        note_cancel(talk, job, end)


def note_cancel(talk: Talk, job: Job, end: CancelEnd) -> None:
    """Say in the step's log what came of a cancel."""
    if end == "cancelled":
        talk.note(logging.INFO, f"{job.label}: cancelled; nothing of it is committed")
    elif end == "committed":
        talk.note(logging.WARNING, f"{job.label}: the cancel came too late, it is committed")
    else:
        talk.note(logging.ERROR, f"{job.label}: could not be cancelled: {end}")
