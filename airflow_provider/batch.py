"""Several jobs side by side in one task, with an outcome for each."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from . import events
from .identity import job_arguments, label_of
from .operators import PgBackgroundOperator
from .trigger_base import JobTrigger

if TYPE_CHECKING:
    from airflow.sdk import Context

    from pgbg_orchestration import Launcher
    from pgbg_orchestration.errors import PgbgError

    from .identity import Identity

STOPPED = "another job of the batch failed"
"""Why a job of a batch was cancelled; a later try of the task takes that back."""


class PgBackgroundBatchTrigger(JobTrigger):
    """Runs the jobs of a batch and fires one event with the end of each.

    Parameters
    ----------
    jobs:
        The arguments of :class:`pgbg_orchestration.Job` by the job's name in the batch.
    at_once:
        How many run at once; None for all.
    fail_fast:
        Whether the rest is cancelled when one fails.
    try_number:
        The try that this trigger works for: what an earlier one stopped is run.
    kwargs:
        As :class:`~airflow_provider.trigger_base.JobTrigger` takes them.
    """

    arguments = ("jobs", "at_once", "fail_fast", "try_number", *JobTrigger.arguments)

    def __init__(
        self,
        *,
        jobs: dict[str, dict[str, Any]],
        at_once: int | None = None,
        fail_fast: bool = False,
        try_number: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.jobs = jobs
        self.at_once = at_once
        self.fail_fast = fail_fast
        self.try_number = try_number

    def identities(self) -> list[Mapping[str, Any]]:
        """Return ``id``, ``series`` and ``owner`` of each job."""
        return list(self.jobs.values())

    def failed(self, error: PgbgError) -> dict[str, Any]:
        """Return the event of an error that is all jobs': the jobs' own are in their ends."""
        return {"jobs": dict.fromkeys(self.jobs, events.of_error(error))}

    async def work(self, launcher: Launcher) -> dict[str, Any]:
        """Launch the jobs or attach to them, and wait for all outcomes."""
        turns = asyncio.Semaphore(self.at_once or len(self.jobs))
        failed = asyncio.Event()

        async def run_one(arguments: dict[str, Any]) -> dict[str, Any]:
            from pgbg_orchestration.errors import JobCancelled, PgbgError

            async with turns:
                try:
                    if self.fail_fast and failed.is_set():
                        raise JobCancelled(STOPPED, job_id=arguments["id"], label=arguments["label"])
                    stopped = await self._was_stopped(launcher, arguments)
                    return events.of_outcome(await self.run_job(launcher, arguments, retry_cancelled=stopped))
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

    async def _was_stopped(self, launcher: Launcher, arguments: dict[str, Any]) -> bool:
        """Say whether an earlier try stopped this job because of another one."""
        seen = await launcher.look(arguments["id"], owner=arguments.get("owner"), series=arguments["series"])
        return bool(seen.reason and seen.reason.startswith(STOPPED) and seen.reason != self._reason_of(self.try_number))

    async def _stop_rest(
        self, launcher: Launcher, failed: asyncio.Event, tasks: Mapping[str, asyncio.Task[dict[str, Any]]]
    ) -> None:
        if not self.fail_fast:
            return
        await failed.wait()
        rest = [name for name, task in tasks.items() if not task.done()]
        self.log.info("A job failed: cancelling %s.", ", ".join(rest) or "none, all others have ended")
        await self.cancel(launcher, [self.jobs[name] for name in rest], self._reason_of(self.try_number))

    @staticmethod
    def _reason_of(try_number: int) -> str:
        return f"{STOPPED} (try {try_number})"


class PgBackgroundBatchOperator(PgBackgroundOperator):
    """Runs several jobs side by side in one task: each commits at most once, however often the task is tried.

    A retry runs those that did not commit. Jobs are told apart by their names, so these must stay the same from try to
    try; their order does not matter. For a task instance per job: ``PgBackgroundOperator.partial(…).expand(sql=…)``.

    Parameters
    ----------
    jobs:
        The jobs by name: SQL (one text or a list of statements), or a dict of ``sql`` and any of ``parameters``,
        ``label``, ``settings``, ``role``, ``isolation``, ``kind``, ``queue_size``, ``verify_sql``,
        ``drop_invalid_index`` and ``redact_details``.
    at_once:
        How many run at once. Default: all.
    fail_fast:
        Cancel the rest when one fails. Otherwise all are let end before the task fails.
    kwargs:
        As :class:`PgBackgroundOperator` takes them, without ``sql``; they are the defaults of all jobs.

    Returns
    -------
    dict
        As XCom: the outcome of each job, by its name.

    Raises
    ------
    PgbgError
        The error of the first job that failed, with a note for each other one.
    """

    template_fields: Sequence[str] = (
        "jobs", *(name for name in PgBackgroundOperator.template_fields if name != "sql"),
    )  # fmt: skip
    can_start_from_trigger = False
    template_fields_renderers: ClassVar[dict[str, str]] = {"jobs": "json", "parameters": "json", "settings": "json"}

    def __init__(
        self,
        *,
        jobs: Mapping[str, str | Sequence[str] | Mapping[str, Any]],
        at_once: int | None = None,
        fail_fast: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(sql="", **kwargs)
        if at_once is not None and at_once < 1:
            raise ValueError(f"at_once is at least 1, not {at_once!r}")
        self.jobs = jobs
        self.at_once = at_once
        self.fail_fast = fail_fast

    def execute(self, context: Context) -> dict[str, Any]:
        """Run the jobs: defer to a trigger, or wait here."""
        from .identity import identify

        if not self.jobs:
            self.log.info("The batch is empty: nothing to do.")
            return {}
        identity = identify(context, durable=self.durable)
        jobs = {name: self._arguments_of(name, given, identity) for name, given in self.jobs.items()}
        checked = {name: self._check(job) for name, job in jobs.items()}
        self.log.info("%d jobs: %s.", len(jobs), ", ".join(sorted(jobs)))
        deadline = self._deadline(context)
        if self.deferrable:
            trigger = PgBackgroundBatchTrigger(
                jobs=jobs,
                at_once=self.at_once,
                fail_fast=self.fail_fast,
                try_number=context["ti"].try_number,
                deadline=deadline,
                **self.trigger_arguments(),
            )
            self._defer_to(trigger, deadline)
        ends = self._run_here(list(checked.values()), deadline, at_once=self.at_once, fail_fast=self.fail_fast)
        named = dict(zip(checked, ends, strict=True))
        return self.execute_complete({}, {"jobs": {name: _event(end, checked[name]) for name, end in named.items()}})

    def execute_complete(self, context: Any, event: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return the outcome of each job, or raise the error of the first one that failed."""
        if event is None:
            return events.result_of(None)
        ends: dict[str, dict[str, Any]] = event["jobs"]
        failures = {name: events.to_error(end) for name, end in ends.items() if end["status"] != events.COMMITTED}
        self.log.info("%d of %d jobs committed.", len(ends) - len(failures), len(ends))
        if not failures:
            return {name: events.result_of(end) for name, end in ends.items()}
        # One that was stopped because of another is not the reason.
        first = next((name for name, error in failures.items() if not events.was_stopped(error, STOPPED)), None)
        first = first or next(iter(failures))
        error = failures.pop(first)
        error.add_note(f"Job {first!r} of the batch; {len(failures)} more did not commit.")
        for name, other in failures.items():
            error.add_note(f"Job {name!r}: {other.message}")
        raise error

    def _statements(self) -> list[str]:
        given = (job["sql"] if isinstance(job, Mapping) else job for job in self.jobs.values())
        return [text for sql in given for text in ([sql] if isinstance(sql, str) else sql)]

    def _arguments_of(self, name: str, given: Any, identity: Identity) -> dict[str, Any]:
        own: dict[str, Any] = dict(given) if isinstance(given, Mapping) else {"sql": given}
        arguments = job_arguments(self, identity, self)
        known = set(arguments) - {"id", "series", "generation"}
        if strange := set(own) - known:
            raise ValueError(f"the job {name!r} of the batch has {sorted(strange)}; a job takes {sorted(known)}")
        if not isinstance(own["sql"], str):
            own["sql"] = list(own["sql"])
        # Without a label of its own a job shows the task's, with its name.
        label = own.get("label") or label_of(self.dag_id, self.task_id, f".{name}")
        return {
            **arguments,
            **own,
            "label": label,
            "id": f"{identity.job_id}/{name}",
            "series": f"{identity.series}/{name}",
        }


def _event(end: Any, job: Any) -> dict[str, Any]:
    from pgbg_orchestration.errors import JobCancelled, PgbgError

    if isinstance(end, asyncio.CancelledError):
        end = JobCancelled(STOPPED, job_id=job.id, label=job.label)
    if isinstance(end, PgbgError):
        return events.of_error(end)
    if isinstance(end, BaseException):
        raise end
    return events.of_outcome(end)
