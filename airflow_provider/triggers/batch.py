"""The trigger of a batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from airflow_provider import events
from airflow_provider.arguments import unpacked

from .base import JobTrigger, note_cancel

if TYPE_CHECKING:
    from pgbg_orchestration import Job, Launcher
    from pgbg_orchestration.batch import BatchObserver, CancelEnd
    from pgbg_orchestration.errors import PgbgError


class PgBackgroundBatchTrigger(JobTrigger):
    """Runs the jobs of a batch and fires one event with the end of each.

    Parameters
    ----------
    jobs:
        By the job's name in the batch, what :func:`~airflow_provider.arguments.job_arguments` returns, or its text.
    at_once:
        How many run at once; None for all.
    fail_fast:
        Whether the rest is cancelled when one fails.
    try_number:
        The try that this trigger works for: what an earlier one stopped is run.
    kwargs:
        As :class:`~airflow_provider.triggers.base.JobTrigger` takes them.
    """

    packs = ("jobs",)
    arguments = ("jobs", "at_once", "fail_fast", "try_number", *JobTrigger.arguments)

    def __init__(
        self,
        *,
        jobs: dict[str, dict[str, Any]] | str,
        at_once: int | None = None,
        fail_fast: bool = False,
        try_number: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.jobs: dict[str, dict[str, Any]] = unpacked(jobs)
        self.at_once = at_once
        self.fail_fast = fail_fast
        self.try_number = try_number

    def identities(self) -> list[Mapping[str, Any]]:
        """Return ``id``, ``series`` and ``owner`` of each job."""
        return list(self.jobs.values())

    def failed(self, error: PgbgError) -> dict[str, Any]:
        """Return the event of an error that is all jobs': the jobs' own are in their ends."""
        return {"jobs": dict.fromkeys(self.jobs, events.of_error(error))}

    def is_success(self, payload: dict[str, Any]) -> bool:
        """Tell whether all jobs committed."""
        return all(end["status"] == events.COMMITTED for end in payload["jobs"].values())

    def result_of(self, payload: dict[str, Any]) -> dict[str, Any]:
        """Return the outcome of each job, by its name."""
        return {name: events.result_of(end) for name, end in payload["jobs"].items()}

    async def work(self, launcher: Launcher) -> dict[str, Any]:
        """Launch the jobs or attach to them, and wait for the end of each."""
        from pgbg_orchestration.batch import STOPPED, Batch, Call, Preparation
        from pgbg_orchestration.outcome import Cause

        def preparation(arguments: dict[str, Any]) -> Preparation:
            async def prepare() -> Call:
                # What an earlier try stopped is run; what this very one stopped, elsewhere, stays so.
                return await self.call(arguments, retry_cancelled={Cause.FAILED_BESIDE})

            return prepare

        batch = Batch(
            launcher,
            {name: preparation(job) for name, job in self.jobs.items()},
            at_once=self.at_once,
            fail_fast=self.fail_fast,
            reason=f"{STOPPED} (try {self.try_number})",
            of_try=None if self.in_task else str(self.try_number),
            observer=self._observer(),
        )
        ends = await batch.run()
        return {"jobs": {name: events.of_end(ends[name], job) for name, job in self.jobs.items()}}

    def _observer(self) -> BatchObserver:
        """Return what writes to the task's log how the batch gets on."""
        from pgbg_orchestration.batch import BatchObserver

        log = self.log

        class TaskLog(BatchObserver):
            def failed(self, name: str, error: PgbgError) -> None:
                log.error("%s", error)

            def stopping(self, names: list[str]) -> None:
                log.info("A job failed: cancelling %s.", ", ".join(names) or "none, all others have ended")

            def stopped(self, job: Job, end: CancelEnd) -> None:
                note_cancel(log, job.id, end)

        return TaskLog()
