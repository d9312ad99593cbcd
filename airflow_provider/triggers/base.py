"""What the triggers share: their connection, their one event, and how they run and cancel jobs."""

from __future__ import annotations

import asyncio
import logging
from abc import abstractmethod
from collections.abc import AsyncIterator, Collection, Iterable, Mapping
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext
from datetime import datetime
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from airflow.triggers.base import BaseTaskEndEvent, BaseTrigger, TaskSuccessEvent, TriggerEvent

from airflow_provider import events
from airflow_provider.arguments import job_of, moment, not_plain, pack
from airflow_provider.compat import HERE
from airflow_provider.hook import PgBackgroundHook
from airflow_provider.sweep import sweeping

from .login import Login
from .task import GOES_ON, load_core, push_xcom, state_of, states_of, to_its_end, wait_to_resume

if TYPE_CHECKING:
    from pgbg_orchestration import Cause, Launcher, Outcome
    from pgbg_orchestration.batch import Call, CancelEnd
    from pgbg_orchestration.call_options import RunOptions
    from pgbg_orchestration.errors import PgbgError


class ServerTrigger(BaseTrigger):
    """Does its work over the connections that all triggers of its process share, and fires one event.

    Parameters
    ----------
    postgres_conn_id, database, endpoint:
        As :class:`~airflow_provider.hook.PgBackgroundHook` takes them.
    schema:
        Name of the package's schema.
    end_task:
        Whether the task is ended here when all went well, and no worker resumes it.
    do_xcom_push:
        Whether a task that is ended here gets its result as XCom.
    unknown:
        Arguments of a newer release, which a row in Airflow's database may hold: ignored.
    """

    arguments: ClassVar[tuple[str, ...]] = (
        "postgres_conn_id", "database", "endpoint", "schema", "end_task", "do_xcom_push",
    )  # fmt: skip
    """What Airflow stores of the trigger; a subclass adds its own."""

    packs: ClassVar[tuple[str, ...]] = ()
    """Those of them that hold what a user gave: Airflow gets one text of each, and has nothing to understand."""

    trace_parent: str | None = None
    """The span of the task's process, where OpenTelemetry traces it: those of what is done here are below it."""

    follows_process: ClassVar[bool] = True
    """Whether the task was in a process of its own before: that has just ended, which Airflow may notice late."""

    def __init__(
        self,
        *,
        postgres_conn_id: str = PgBackgroundHook.default_conn_name,
        database: str | None = None,
        endpoint: str | None = None,
        schema: str = "pgbg",
        end_task: bool = False,
        do_xcom_push: bool = True,
        **unknown: Any,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.postgres_conn_id = postgres_conn_id
        self.database = database
        self.endpoint = endpoint
        self.schema = schema
        self.end_task = end_task
        self.do_xcom_push = do_xcom_push
        self._unknown = unknown
        self._fired = False

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """Return the trigger's class path and arguments."""
        own = type(self).__module__.startswith(f"{__package__}.")
        room = __package__ if own else type(self).__module__  # a subclass of a user's stays where it is
        return f"{room}.{type(self).__name__}", {name: self._stored(name) for name in self.arguments}

    def _stored(self, name: str) -> Any:
        value = getattr(self, name)
        if name in self.packs:
            return pack(name, value)
        return value.isoformat() if isinstance(value, datetime) else value

    def check_storable(self) -> None:
        """Refuse, before a task defers, what would not come back from Airflow's database as it is.

        Raises
        ------
        InvalidJob
            It names the argument.
        """
        from pgbg_orchestration.errors import InvalidJob

        for name, value in self.serialize()[1].items():
            if strange := not_plain(value):
                raise InvalidJob(f"{name} is or holds {strange}, which Airflow cannot store for a trigger")

    async def run(self) -> AsyncIterator[TriggerEvent]:
        """Do the work, and fire one event."""
        began = asyncio.get_running_loop().time()
        await load_core()
        from pgbg_orchestration import telemetry
        from pgbg_orchestration.errors import PgbgError

        try:
            async with self.launcher() as launcher:
                with await self._sweeping(), telemetry.below(self.trace_parent):
                    payload = await self.work(launcher)
        except PgbgError as error:
            self.log.error("%s", error)  # noqa: TRY400 - the error says all; a traceback would only hide it
            payload = self.failed(error)
        event = await self._event_of(payload)
        if self.follows_process and not isinstance(event, BaseTaskEndEvent):
            await wait_to_resume(began)
        self._fired = True
        yield event

    @abstractmethod
    async def work(self, launcher: Launcher) -> dict[str, Any]:
        """Do what this trigger is for, and return what its event tells.

        Raises
        ------
        PgbgError
            It failed.
        """

    def failed(self, error: PgbgError) -> dict[str, Any]:
        """Return what the event tells of an error."""
        return events.of_error(error)

    def is_success(self, payload: dict[str, Any]) -> bool:
        """Tell whether an event tells of success, so that no worker has anything to raise."""
        return bool(payload["status"] == events.COMMITTED)

    def result_of(self, payload: dict[str, Any]) -> Any:
        """Return the task's result of a success, as its operator would."""
        return events.result_of(payload)

    async def _event_of(self, payload: dict[str, Any]) -> TriggerEvent:
        """Return the event that resumes the task with ``payload``, or the one that ends it."""
        payload = events.plain(payload)
        # Without a task instance (`dag.test()`) nobody understands the latter.
        if self.end_task and self.task_instance is not None and self.is_success(payload):
            result = self.result_of(payload)
            try:
                if self.do_xcom_push and result is not None:
                    await push_xcom(self.task_instance, result)
            except Exception as error:  # noqa: BLE001 - a backend of the user's raises what it likes
                self.log.warning("The XCom cannot be stored here (%r): a worker tries it again.", error)
            else:
                return TaskSuccessEvent()
        return TriggerEvent(payload)  # type: ignore[no-untyped-call]

    async def _sweeping(self) -> AbstractContextManager[None]:
        """Return what looks for orphans meanwhile; outside of a triggerer (``dag.test()``) nobody does."""
        if self.task_instance is None:
            return nullcontext()
        return sweeping(await Login.of(self.postgres_conn_id, self.database, self.endpoint), self.schema, states_of)

    @asynccontextmanager
    async def launcher(self) -> AsyncIterator[Launcher]:
        """Lend the launcher that the triggers of this process share for one connection."""
        from pgbg_orchestration.launcher import shared_launcher

        login = await Login.of(self.postgres_conn_id, self.database, self.endpoint)
        async with shared_launcher(login, schema=self.schema) as launcher:
            yield launcher


class JobTrigger(ServerTrigger):
    """Runs jobs, and cancels them when a user ends their task.

    Parameters
    ----------
    deadline:
        The moment until which the jobs have time, with time zone (its ISO 8601 text in Airflow's database); None for
        none.
    on_superseded:
        What to do with a worker of an older generation: ``cancel`` it or ``wait`` for it.
    slot_timeout:
        Seconds to wait for a worker slot at most.
    poll_interval:
        Seconds between two looks at a job at most.
    cancel_on_kill:
        Whether the workers are cancelled when a user marks the task or deletes its run.
    enable_log_db_messages:
        Whether what the SQL raises comes into the task's log.
    trace_parent:
        What :func:`pgbg_orchestration.telemetry.parent` returned in the task's process; None in a row of a release
        before it.
    kwargs:
        As :class:`ServerTrigger` takes them.
    """

    arguments = (
        *ServerTrigger.arguments, "deadline", "on_superseded", "slot_timeout", "poll_interval", "cancel_on_kill",
        "enable_log_db_messages", "trace_parent",
    )  # fmt: skip

    def __init__(
        self,
        *,
        deadline: datetime | str | None = None,
        on_superseded: Literal["cancel", "wait"] = "cancel",
        slot_timeout: float | None = None,
        poll_interval: float | None = None,
        cancel_on_kill: bool = True,
        enable_log_db_messages: bool = False,
        trace_parent: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.trace_parent = trace_parent
        self.enable_log_db_messages = enable_log_db_messages
        self.deadline = moment(deadline)
        self.on_superseded = on_superseded
        self.slot_timeout = slot_timeout
        self.poll_interval = poll_interval
        self.cancel_on_kill = cancel_on_kill

    @abstractmethod
    def identities(self) -> Iterable[Mapping[str, Any]]:
        """Return ``id``, ``series`` and ``owner`` of each of the trigger's jobs."""

    def __repr__(self) -> str:
        # The base class shows all arguments, the SQL among them.
        return f"<{type(self).__name__} {self.trigger_id}>"

    in_task: bool = False
    """Whether the jobs are run in the task's own process, whose end is the end of its try."""

    async def call(self, arguments: dict[str, Any], *, retry_cancelled: Collection[Cause] = ()) -> Call:
        """Return a job, and how it is run for this trigger's task.

        Parameters
        ----------
        arguments:
            As :func:`~airflow_provider.arguments.job_of` takes them.
        retry_cancelled:
            Causes of a cancel that this call takes back.

        Raises
        ------
        InvalidJob
            It cannot be run.
        """
        from pgbg_orchestration.batch import Call
        from pgbg_orchestration.errors import InvalidJob
        from pgbg_orchestration.outcome import OF_A_TRY

        try:
            job = await asyncio.to_thread(job_of, arguments)  # a long text takes seconds
        except TypeError as error:
            # Leaving out what is not known could run something else than what was meant.
            raise InvalidJob(
                f"the trigger was stored by another version of this package: {error}",
                job_id=arguments.get("id"),
                todo="Install the same version on workers and triggerers, and clear the task.",
            ) from error
        options: RunOptions = {
            # A triggerer that ends hands its triggers to another, which attaches to the worker.
            "on_cancel": "cancel" if self.in_task and self.cancel_on_kill else "leave",
            # A try that was asked to end (an evicted pod) cancelled the job; this try was started to run it. What a
            # person cancelled stays so.
            "retry_cancelled": OF_A_TRY if self.in_task else retry_cancelled,
            "on_superseded": self.on_superseded,
            "accept_changed_sql": True,
            "slot_timeout": self.slot_timeout,
            "poll_interval": self.poll_interval,
            "deadline": self.deadline,
            "observer": events.follow,
            "notices": self.enable_log_db_messages,
            "when_orphaned": "cancel" if self.cancel_on_kill else "leave",
        }
        return Call(job, options)

    async def run_job(self, launcher: Launcher, arguments: dict[str, Any]) -> Outcome:
        """Launch a job or attach to it, and wait for its outcome.

        Parameters
        ----------
        launcher:
            Over which.
        arguments:
            As :meth:`call` takes them.

        Raises
        ------
        PgbgError
            As :func:`pgbg_orchestration.arun`.
        """
        job, options = await self.call(arguments)
        return await launcher.run(job, **options)

    async def on_kill(self) -> None:
        """Cancel the workers of a task that a user ended; leave them at work when the task still waits for them.

        Airflow calls this after a clear too, when the next try has been deferred already, and on a triggerer that was
        stalled and lost its triggers (airflow PR #73454): in both the task is deferred. The next try deals with the
        worker of an older generation itself.
        """
        if self.cancel_on_kill:
            await to_its_end(self._cancel_if_ended())

    async def cleanup(self) -> None:
        """Do what ``on_kill`` does where Airflow does not call it: this is called at every end of a trigger."""
        await super().cleanup()
        if not (HERE.calls_on_kill or self._fired):
            await self.on_kill()

    async def _cancel_if_ended(self) -> None:
        state = await state_of(self.task_instance)
        if state in GOES_ON:
            # What the next try's log says of it then: "cancelling", "waiting for it" or "attached".
            then = "cancels" if self.on_superseded == "cancel" else "waits for"
            self.log.info(
                "The task goes on (%s), so nothing is cancelled here. Its next try, if it was cleared, %s the worker of"
                " %s; another triggerer, if it was given to one, attaches to it.",
                state,
                then,
                ", ".join(str(job["id"]) for job in self.identities()),
            )
            return
        self.log.info("The task is %s: cancelling its jobs.", state or "gone")
        from pgbg_orchestration.batch import Target, cancel_all
        from pgbg_orchestration.outcome import Cause

        targets = [Target(job["id"], job.get("owner"), job.get("series")) for job in self.identities()]
        async with self.launcher() as launcher:
            reason = f"the Airflow task is {state or 'gone'}"
            ends = await cancel_all(launcher, targets, cause=Cause.ASKED, reason=reason)
        for target, end in zip(targets, ends, strict=True):
            note_cancel(self.log, target.job_id, end)


def note_cancel(log: Any, job_id: str | None, end: CancelEnd) -> None:
    """Write to a task's log what came of a cancel."""
    log.log(logging.WARNING if isinstance(end, BaseException) else logging.INFO, "Job %s: %s", job_id, end)
