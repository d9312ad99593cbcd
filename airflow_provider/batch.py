"""Several jobs side by side in one task, with an outcome for each."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, ClassVar

from airflow.triggers.base import BaseTrigger, TriggerEvent

from . import events
from .hook import PgBackgroundHook
from .operators import PgBackgroundOperator
from .triggering import GOES_ON, load_core, settle, shared_conninfo, state_of, to_its_end

if TYPE_CHECKING:
    from airflow.sdk import Context

    from pgbg_orchestration import Launcher, Outcome

    from .identity import Identity

STOPPED = "another job of the batch failed"
"""Why a job of a batch was cancelled; a later try of the task takes that back."""


class PgBackgroundBatchTrigger(BaseTrigger):
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
    unknown:
        Arguments of a newer release, which a row in Airflow's database may hold: ignored.
    """

    def __init__(
        self,
        *,
        jobs: dict[str, dict[str, Any]],
        at_once: int | None = None,
        fail_fast: bool = False,
        try_number: int = 1,
        postgres_conn_id: str = PgBackgroundHook.default_conn_name,
        database: str | None = None,
        endpoint: str | None = None,
        deadline: datetime | None = None,
        on_superseded: str = "cancel",
        slot_timeout: float | None = None,
        cancel_on_kill: bool = True,
        schema: str = "pgbg",
        **unknown: Any,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.jobs = jobs
        self.at_once = at_once
        self.fail_fast = fail_fast
        self.try_number = try_number
        self.postgres_conn_id = postgres_conn_id
        self.database = database
        self.endpoint = endpoint
        self.deadline = deadline
        self.on_superseded = on_superseded
        self.slot_timeout = slot_timeout
        self.cancel_on_kill = cancel_on_kill
        self.schema = schema
        self._unknown = unknown

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """Return the trigger's class path and arguments."""
        names = (
            "jobs", "at_once", "fail_fast", "try_number", "postgres_conn_id", "database", "endpoint", "deadline",
            "on_superseded", "slot_timeout", "cancel_on_kill", "schema",
        )  # fmt: skip
        return f"{__name__}.{type(self).__name__}", {name: getattr(self, name) for name in names}

    def __repr__(self) -> str:
        # The base class shows all arguments, the SQL among them.
        return f"<{type(self).__name__} jobs={[job.get('id') for job in self.jobs.values()]!r}>"

    async def run(self) -> AsyncIterator[TriggerEvent]:
        """Launch the jobs or attach to them, wait for all outcomes, and fire one event."""
        began = asyncio.get_running_loop().time()
        await load_core()
        from pgbg_orchestration.errors import PgbgError
        from pgbg_orchestration.running import shared_launcher

        try:
            conninfo = await shared_conninfo(self.postgres_conn_id, self.database, self.endpoint)
            async with shared_launcher(conninfo, schema=self.schema) as launcher:
                ends = await self._run_jobs(launcher)
        except PgbgError as error:  # of the connection: the jobs' own are in their ends
            ends = dict.fromkeys(self.jobs, events.of_error(error))
        await settle(began)
        yield TriggerEvent({"jobs": ends})  # type: ignore[no-untyped-call]

    async def _run_jobs(self, launcher: Launcher) -> dict[str, dict[str, Any]]:
        turns = asyncio.Semaphore(self.at_once or len(self.jobs))
        failed = asyncio.Event()

        async def run_one(arguments: dict[str, Any]) -> dict[str, Any]:
            from pgbg_orchestration.errors import JobCancelled, PgbgError

            async with turns:
                try:
                    if self.fail_fast and failed.is_set():
                        raise JobCancelled(STOPPED, job_id=arguments["id"], label=arguments["label"])
                    return events.of_outcome(await self._run_one(launcher, arguments))
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
        return {name: task.result() for name, task in tasks.items()}

    async def _run_one(self, launcher: Launcher, arguments: dict[str, Any]) -> Outcome:
        from pgbg_orchestration import Job

        seen = await launcher.look(arguments["id"], owner=arguments.get("owner"), series=arguments["series"])
        stopped_before = bool(
            seen.reason and seen.reason.startswith(STOPPED) and seen.reason != self._reason_of(self.try_number)
        )
        return await launcher.run(
            Job(**arguments),
            # A triggerer that ends hands its triggers to another, which attaches to the workers.
            on_cancel="leave",
            on_superseded=self.on_superseded,
            retry_cancelled=stopped_before,
            accept_changed_sql=True,
            slot_timeout=self.slot_timeout,
            deadline=self.deadline,
            observer=events.watch,
        )

    async def _stop_rest(
        self, launcher: Launcher, failed: asyncio.Event, tasks: Mapping[str, asyncio.Task[dict[str, Any]]]
    ) -> None:
        if not self.fail_fast:
            return
        await failed.wait()
        rest = [name for name, task in tasks.items() if not task.done()]
        self.log.info("A job failed: cancelling %s.", ", ".join(rest) or "none, all others have ended")
        await self._cancel(launcher, rest, self._reason_of(self.try_number))

    async def _cancel(self, launcher: Launcher, names: Sequence[str], reason: str) -> None:
        ends = await asyncio.gather(
            *(
                launcher.cancel(
                    self.jobs[name]["id"],
                    owner=self.jobs[name].get("owner"),
                    series=self.jobs[name]["series"],
                    reason=reason,
                )
                for name in names
            ),
            return_exceptions=True,
        )
        for name, end in zip(names, ends, strict=True):
            self.log.log(30 if isinstance(end, BaseException) else 20, "Job %s: %s", name, end)

    @staticmethod
    def _reason_of(try_number: int) -> str:
        return f"{STOPPED} (try {try_number})"

    async def on_kill(self) -> None:
        """Cancel the workers of a task that a user ended, as :meth:`PgBackgroundTrigger.on_kill` does."""
        if self.cancel_on_kill:
            await to_its_end(self._cancel_if_ended())

    async def _cancel_if_ended(self) -> None:
        from pgbg_orchestration.running import shared_launcher

        state = await state_of(self.task_instance)
        if state in GOES_ON:
            self.log.info("The task goes on (%s): its jobs are left alone.", state)
            return
        conninfo = await shared_conninfo(self.postgres_conn_id, self.database, self.endpoint)
        async with shared_launcher(conninfo, schema=self.schema) as launcher:
            await self._cancel(launcher, list(self.jobs), f"the Airflow task is {state or 'gone'}")


class PgBackgroundBatchOperator(PgBackgroundOperator):
    """Runs several jobs side by side in one task: each commits at most once, however often the task is tried.

    A retry runs those that did not commit. Jobs are told apart by their names, so these must stay the same from try to
    try; their order does not matter. For a task instance per job: ``PgBackgroundOperator.partial(…).expand(sql=…)``.

    Parameters
    ----------
    jobs:
        The jobs by name: SQL (one text or a list of statements), or a dict of ``sql`` and any of ``parameters``,
        ``label``, ``settings``, ``role``, ``isolation``, ``kind``, ``queue_size``, ``verify_sql``
        and ``redact_details``.
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
                **self._trigger_arguments(deadline),
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
        arguments = self._job_arguments(identity)
        known = {*arguments, "redact_details"} - {"id", "series", "generation"}
        if strange := set(own) - known:
            raise ValueError(f"the job {name!r} of the batch has {sorted(strange)}; a job takes {sorted(known)}")
        if not isinstance(own["sql"], str):
            own["sql"] = list(own["sql"])
        # Without a label of its own a job shows the task's, with its name.
        label = own.get("label") or self._label(f".{name}")
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
