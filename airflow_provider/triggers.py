"""The triggers: they launch a job or attach to it, so any copy of one, in any triggerer, resumes rightly."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from . import events
from .arguments import JOB_FIELDS, job_arguments
from .identity import identify_try
from .starting import LEAD
from .trigger_base import JobTrigger, ServerTrigger
from .watching import COMMITTED, ENDED_BADLY, Watch

if TYPE_CHECKING:
    from pgbg_orchestration import Launcher
    from pgbg_orchestration.errors import PgbgError

POLL_INTERVAL = 5.0
"""Seconds between two looks of a deferred sensor where none is given."""


class PgBackgroundTrigger(JobTrigger):
    """Runs one job and fires one event: its outcome, or the fields of its error.

    What it carries is stored by Airflow in clear text, the SQL and its parameters included.

    Parameters
    ----------
    job:
        The arguments of :class:`pgbg_orchestration.Job`.
    kwargs:
        As :class:`~airflow_provider.trigger_base.JobTrigger` takes them.
    """

    arguments = ("job", *JobTrigger.arguments)

    def __init__(self, *, job: dict[str, Any], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.job = job

    def identities(self) -> list[Mapping[str, Any]]:
        """Return the job's ``id``, ``series`` and ``owner``."""
        return [self.job]

    async def work(self, launcher: Launcher) -> dict[str, Any]:
        """Launch the job or attach to it, and wait for its outcome."""
        return events.of_outcome(await self.run_job(launcher, self.job))


class PgBackgroundStartTrigger(PgBackgroundTrigger):
    """Runs the job of a task that never was on a worker (``start_from_trigger``).

    Airflow renders those attributes that bear the name of a template field of the operator. The job is made here, from
    the id of the try, which stays when the trigger moves to another triggerer.

    Parameters
    ----------
    sql, parameters, worker_label, settings, role, isolation, kind, queue_size, verify_sql, drop_invalid_index, \
redact_details:
        The attributes of :class:`~airflow_provider.operators.PgBackgroundOperator` of these names.
    kwargs:
        As :class:`PgBackgroundTrigger` takes them, without ``job``.
    """

    arguments = (*JOB_FIELDS, *(name for name in PgBackgroundTrigger.arguments if name != "job"))
    follows_process = False

    def __init__(
        self,
        *,
        sql: str | list[str],
        parameters: Sequence[Any] | Mapping[str, Any] | None = None,
        worker_label: str | None = None,
        settings: Mapping[str, str] | None = None,
        role: str | None = None,
        isolation: str | None = None,
        kind: str | None = None,
        queue_size: int | None = None,
        verify_sql: str | None = None,
        drop_invalid_index: bool = False,
        redact_details: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(job={}, **kwargs)
        self.sql = sql
        self.parameters = parameters
        self.worker_label = worker_label
        self.settings = settings
        self.role = role
        self.isolation = isolation
        self.kind = kind
        self.queue_size = queue_size
        self.verify_sql = verify_sql
        self.drop_invalid_index = drop_invalid_index
        self.redact_details = redact_details
        self.timeout_after: datetime | None = None  # the triggerer sets it

    def identities(self) -> list[Mapping[str, Any]]:
        """Return the ``id`` and ``series`` of the job of this try."""
        identity = identify_try(self.task_instance)
        return [{"id": identity.job_id, "series": identity.series}]

    async def work(self, launcher: Launcher) -> dict[str, Any]:
        """Make the job, launch it or attach to it, and wait for its outcome."""
        self.job = job_arguments(self, identify_try(self.task_instance), self.task_instance)
        if self.timeout_after is not None:
            self.deadline = self.timeout_after - LEAD
        self.log.info("Job %s, label %r.", self.job["id"], self.job["label"])
        return await super().work(launcher)


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

            async with turns:
                try:
                    if self.fail_fast and failed.is_set():
                        raise JobCancelled(events.STOPPED, job_id=arguments["id"], label=arguments["label"])
                    stopped = self.fail_fast and self.try_number > 1 and await self._was_stopped(launcher, arguments)
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
        return bool(seen.reason and seen.reason.startswith(events.STOPPED) and seen.reason != self._reason)

    async def _stop_rest(
        self, launcher: Launcher, failed: asyncio.Event, tasks: Mapping[str, asyncio.Task[dict[str, Any]]]
    ) -> None:
        if not self.fail_fast:
            return
        await failed.wait()
        rest = [name for name, task in tasks.items() if not task.done()]
        self.log.info("A job failed: cancelling %s.", ", ".join(rest) or "none, all others have ended")
        await self.cancel(launcher, [self.jobs[name] for name in rest], self._reason)

    @property
    def _reason(self) -> str:
        return f"{events.STOPPED} (try {self.try_number})"


class PgBackgroundSensorTrigger(ServerTrigger):
    """Looks at jobs or at workers until they are as wanted, and fires one event.

    Parameters
    ----------
    job_id, label, worker_pid, worker_label, states, fail_on:
        As :class:`~airflow_provider.sensors.PgBackgroundSensor` takes them.
    poll_interval:
        Seconds between two looks; None for ``POLL_INTERVAL``.
    deadline:
        The moment until which to wait, with time zone.
    kwargs:
        As :class:`~airflow_provider.trigger_base.ServerTrigger` takes them.
    """

    arguments = (
        "job_id", "label", "worker_pid", "worker_label", "states", "fail_on", "poll_interval", "deadline",
        *ServerTrigger.arguments,
    )  # fmt: skip

    def __init__(
        self,
        *,
        job_id: str | None = None,
        label: str | None = None,
        worker_pid: int | None = None,
        worker_label: str | None = None,
        states: Collection[str] = COMMITTED,
        fail_on: Collection[str] = ENDED_BADLY,
        poll_interval: float | None = None,
        deadline: datetime | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.job_id = job_id
        self.label = label
        self.worker_pid = worker_pid
        self.worker_label = worker_label
        self.states = list(states)
        self.fail_on = list(fail_on)
        self.poll_interval = poll_interval
        self.deadline = deadline

    async def work(self, launcher: Launcher) -> dict[str, Any]:
        """Look until it is as wanted, or the deadline has passed."""
        watch = Watch(self.job_id, self.label, self.worker_pid, self.worker_label, self.states, self.fail_on)
        while (told := await watch.look(launcher.ledger)) is None:
            if self.deadline is not None and datetime.now(UTC) >= self.deadline:
                return {"status": events.TIMED_OUT}
            await asyncio.sleep(self.poll_interval or POLL_INTERVAL)
        return {"status": events.COMMITTED, **told}

    def result_of(self, payload: dict[str, Any]) -> Any:
        """Return what there is to tell of each job; None for a worker."""
        return payload["jobs"]
