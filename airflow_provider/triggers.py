"""The trigger that runs a job: it launches or attaches, so any copy of it, in any triggerer, resumes rightly."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import datetime
from typing import TYPE_CHECKING, Any

from airflow.triggers.base import BaseTrigger, TaskSuccessEvent, TriggerEvent

from . import events
from .hook import PgBackgroundHook
from .triggering import GOES_ON, load_core, settle, shared_conninfo, state_of, to_its_end

if TYPE_CHECKING:
    from pgbg_orchestration import Job


class PgBackgroundTrigger(BaseTrigger):
    """Runs one job and fires one event: its outcome, or the fields of its error.

    What it carries is stored by Airflow in clear text, the SQL and its parameters included.

    Parameters
    ----------
    job:
        The arguments of :class:`pgbg_orchestration.Job`.
    postgres_conn_id, database, endpoint:
        As :class:`~airflow_provider.hook.PgBackgroundHook` takes them.
    deadline:
        The moment until which the job has time, with time zone; None for none.
    on_superseded:
        What to do with a worker of an older generation: ``cancel`` it or ``wait`` for it.
    slot_timeout:
        Seconds to wait for a worker slot at most.
    cancel_on_kill:
        Whether the worker is cancelled when a user marks the task or deletes its run.
    schema:
        Name of the package's schema.
    end_task:
        Whether a commit ends the task here, and no worker resumes it.
    do_xcom_push:
        Whether a task that is ended here gets its outcome as XCom.
    unknown:
        Arguments of a newer release, which a row in Airflow's database may hold: ignored.
    """

    def __init__(
        self,
        *,
        job: dict[str, Any],
        postgres_conn_id: str = PgBackgroundHook.default_conn_name,
        database: str | None = None,
        endpoint: str | None = None,
        deadline: datetime | None = None,
        on_superseded: str = "cancel",
        slot_timeout: float | None = None,
        cancel_on_kill: bool = True,
        schema: str = "pgbg",
        end_task: bool = False,
        do_xcom_push: bool = True,
        **unknown: Any,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.job = job
        self.postgres_conn_id = postgres_conn_id
        self.database = database
        self.endpoint = endpoint
        self.deadline = deadline
        self.on_superseded = on_superseded
        self.slot_timeout = slot_timeout
        self.cancel_on_kill = cancel_on_kill
        self.schema = schema
        self.end_task = end_task
        self.do_xcom_push = do_xcom_push
        self._unknown = unknown

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """Return the trigger's class path and arguments."""
        names = (
            "job", "postgres_conn_id", "database", "endpoint", "deadline", "on_superseded", "slot_timeout",
            "cancel_on_kill", "schema", "end_task", "do_xcom_push",
        )  # fmt: skip
        return f"{__name__}.{type(self).__name__}", {name: getattr(self, name) for name in names}

    def __repr__(self) -> str:
        # The base class shows all arguments, the SQL among them.
        return f"<{type(self).__name__} job_id={self.job.get('id')!r}>"

    async def run(self) -> AsyncIterator[TriggerEvent]:
        """Launch the job or attach to it, wait for its outcome, and fire one event."""
        began = asyncio.get_running_loop().time()
        await load_core()
        from pgbg_orchestration.errors import PgbgError

        try:
            event = events.of_outcome(await self._run_job())
        except PgbgError as error:
            self.log.error("%s", error)  # noqa: TRY400 - the error says all; a traceback would only hide it
            event = events.of_error(error)
        if self.end_task and event["status"] == events.COMMITTED:
            yield TaskSuccessEvent(xcoms={"return_value": events.result_of(event)} if self.do_xcom_push else None)
            return
        await settle(began)
        yield TriggerEvent(event)  # type: ignore[no-untyped-call]

    async def _run_job(self) -> Any:
        from pgbg_orchestration.running import shared_launcher

        conninfo = await shared_conninfo(self.postgres_conn_id, self.database, self.endpoint)
        async with shared_launcher(conninfo, schema=self.schema) as launcher:
            return await launcher.run(
                self._job(),
                # A triggerer that ends hands its triggers to another, which attaches to the worker.
                on_cancel="leave",
                on_superseded=self.on_superseded,
                accept_changed_sql=True,
                slot_timeout=self.slot_timeout,
                deadline=self.deadline,
                observer=events.watch,
            )

    def _job(self) -> Job:
        from pgbg_orchestration import Job

        return Job(**self.job)

    async def on_kill(self) -> None:
        """Cancel the worker of a task that a user ended; leave it at work when the task still waits for it.

        Airflow calls this after a clear too, when the next try has been deferred already, and on a triggerer that was
        stalled and lost its triggers (airflow PR #73454): in both the task is deferred. The next try deals with the
        worker of an older generation itself.
        """
        if self.cancel_on_kill:
            await to_its_end(self._cancel_if_ended())

    async def _cancel_if_ended(self) -> None:
        state = await state_of(self.task_instance)
        if state in GOES_ON:
            self.log.info("The task goes on (%s): job %s is left alone.", state, self.job["id"])
            return
        from pgbg_orchestration.running import shared_launcher

        self.log.info("The task is %s: cancelling job %s.", state or "gone", self.job["id"])
        async with shared_launcher(
            await shared_conninfo(self.postgres_conn_id, self.database, self.endpoint), schema=self.schema
        ) as launcher:
            ended = await launcher.cancel(
                self.job["id"],
                owner=self.job.get("owner"),
                series=self.job.get("series"),
                reason=f"the Airflow task is {state or 'gone'}",
            )
        self.log.info("Job %s is %s.", self.job["id"], ended)
