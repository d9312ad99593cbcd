"""The trigger of a batch."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from airflow_provider import events
from airflow_provider.arguments import unpacked

from .base import JobTrigger

if TYPE_CHECKING:
    from pgbg_orchestration import Launcher
    from pgbg_orchestration.errors import PgbgError


STOPPED = "another job of the batch failed"
"""Why the rest of a batch is cancelled, for people; what decides is the cause."""


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
        turns = asyncio.Semaphore(self.at_once or len(self.jobs))
        failed = asyncio.Event()

        async def run_one(arguments: dict[str, Any]) -> dict[str, Any]:
            from pgbg_orchestration.errors import JobCancelled, PgbgError
            from pgbg_orchestration.outcome import Cause

            async with turns:
                try:
                    if self.fail_fast and failed.is_set():
                        raise JobCancelled(
                            STOPPED, cause=Cause.FAILED_BESIDE, job_id=arguments["id"], label=arguments["label"]
                        )
                    # What an earlier try stopped is run; what this very one stopped, elsewhere, stays so.
                    outcome = await self.run_job(
                        launcher, arguments, retry_cancelled={Cause.FAILED_BESIDE}, of_try=str(self.try_number)
                    )
                    return events.of_outcome(outcome, arguments)
                except PgbgError as error:
                    self.log.error("%s", error)  # noqa: TRY400 - the error says all
                    failed.set()
                    return events.of_error(error)

        tasks = {name: asyncio.create_task(run_one(job)) for name, job in self.jobs.items()}
        stopping = asyncio.create_task(self._stop_rest(launcher, failed, tasks))
        try:
            await asyncio.gather(*tasks.values())
        finally:
            for task in (stopping, *tasks.values()):
                task.cancel()
            await asyncio.gather(stopping, *tasks.values(), return_exceptions=True)
        return {"jobs": {name: task.result() for name, task in tasks.items()}}

    async def _stop_rest(
        self, launcher: Launcher, failed: asyncio.Event, tasks: Mapping[str, asyncio.Task[dict[str, Any]]]
    ) -> None:
        from pgbg_orchestration.outcome import Cause

        if not self.fail_fast:
            return
        await failed.wait()
        rest = [name for name, task in tasks.items() if not task.done()]
        self.log.info("A job failed: cancelling %s.", ", ".join(rest) or "none, all others have ended")
        await self.cancel(
            launcher,
            [self.jobs[name] for name in rest],
            f"{STOPPED} (try {self.try_number})",
            cause=Cause.FAILED_BESIDE,
            of_try=str(self.try_number),
        )
