"""The sensor: waits for a job that somebody else runs, or for a worker that somebody launched by hand."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, ClassVar

from airflow.sdk import BaseSensorOperator, conf

from . import events
from .hook import PgBackgroundHook
from .retry_policy import SqlStateRetryPolicy
from .trigger_base import ServerTrigger

if TYPE_CHECKING:
    from airflow.sdk import Context, PokeReturnValue

    from pgbg_orchestration import Launcher
    from pgbg_orchestration.ledger import JobEntry

COMMITTED = ("committed",)
ENDED_BADLY = ("cancelled", "failed", "lost", "unknown")
TIMED_OUT = "timed_out"
POLL_INTERVAL = 5.0
"""Seconds between two looks of a deferred sensor where none is given."""


class PgBackgroundSensorTrigger(ServerTrigger):
    """Looks at jobs or at a worker until they are as wanted, and fires one event.

    Parameters
    ----------
    job_id, label, worker_pid, states, fail_on:
        As :class:`PgBackgroundSensor` takes them.
    poll_interval:
        Seconds between two looks; None for ``POLL_INTERVAL``.
    deadline:
        The moment until which to wait, with time zone.
    kwargs:
        As :class:`~airflow_provider.trigger_base.ServerTrigger` takes them.
    """

    arguments = (
        "job_id", "label", "worker_pid", "states", "fail_on", "poll_interval", "deadline", *ServerTrigger.arguments,
    )  # fmt: skip

    def __init__(
        self,
        *,
        job_id: str | None = None,
        label: str | None = None,
        worker_pid: int | None = None,
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
        self.states = list(states)
        self.fail_on = list(fail_on)
        self.poll_interval = poll_interval
        self.deadline = deadline

    async def work(self, launcher: Launcher) -> dict[str, Any]:
        """Look until it is as wanted, or the deadline has passed."""
        while (event := await self.look(launcher)) is None:
            if self.deadline is not None and datetime.now(UTC) >= self.deadline:
                return {"status": TIMED_OUT}
            await asyncio.sleep(self.poll_interval or POLL_INTERVAL)
        return event

    async def look(self, launcher: Launcher) -> dict[str, Any] | None:
        """Look once; returns the event, or None while it is not as wanted.

        Raises
        ------
        PgbgError
            A job ended in a state of ``fail_on``: with its own SQLSTATE and message.
        """
        if self.worker_pid is not None:
            return await self._look_at_worker(launcher, self.worker_pid)
        found = await launcher.ledger.jobs(job_id=self.job_id, label=self.label)
        if bad := next((entry for entry in found if entry.state in self.fail_on), None):
            raise error_of(bad)
        if found and all(entry.state in self.states for entry in found):
            return {"status": events.COMMITTED, "jobs": [_told(entry) for entry in found]}
        return None

    async def _look_at_worker(self, launcher: Launcher, pid: int) -> dict[str, Any] | None:
        query = (
            "select 1 from pg_catalog.pg_stat_activity where pid = %s"
            " and (backend_type = 'pg_background' or application_name like 'pg\\_background:%%')"
        )

        async def ask(conn: Any) -> bool:
            return await (await conn.execute(query, (pid,))).fetchone() is None

        # Its launching session alone can tell how it ended.
        return {"status": events.COMMITTED, "worker_pid": pid} if await launcher.ledger.run(ask) else None


class PgBackgroundSensor(BaseSensorOperator):
    """Waits for a job, by its id or label, or for a worker, by its pid.

    Parameters
    ----------
    job_id:
        Id of the job, as it stands in ``pgbg.jobs`` and in the XCom of the task that runs it.
    label:
        Label of the jobs; ``*`` and ``?`` stand for any characters, and for one. All jobs that fit are waited for, and
        at least one has to be there.
    worker_pid:
        Process id of a worker that somebody launched by hand: waits until it is gone. How it ended only its launching
        session can tell.
    states:
        States of ``pgbg.jobs`` that are waited for.
    fail_on:
        States in which the sensor fails with the job's own error; an empty list to go on waiting.
    postgres_conn_id, database, endpoint, schema:
        As :class:`~airflow_provider.operators.PgBackgroundOperator` takes them.
    poll_interval:
        Seconds between two looks, deferred or not. Default: 5 of a deferred sensor, ``poke_interval`` of another.
    deferrable:
        Wait in the triggerer. Default: ``[operators] default_deferrable``.

    Returns
    -------
    list
        As XCom: ``job_id``, ``label``, ``state``, ``row_count``, ``command_tag``, ``launched_at`` and ``ended_at`` of
        each job.

    Raises
    ------
    PgbgError
        A job ended in a state of ``fail_on``.
    AirflowSensorTimeout
        ``timeout`` passed.
    """

    template_fields: Sequence[str] = ("job_id", "job_label", "worker_pid", "postgres_conn_id", "database", "endpoint")
    template_fields_renderers: ClassVar[dict[str, str]] = {}
    ui_color = "#d8e2ee"

    def __init__(
        self,
        *,
        job_id: str | None = None,
        label: str | None = None,
        worker_pid: int | str | None = None,
        states: Collection[str] = COMMITTED,
        fail_on: Collection[str] = ENDED_BADLY,
        postgres_conn_id: str = "postgres_default",
        database: str | None = None,
        endpoint: str | None = None,
        schema: str = "pgbg",
        poll_interval: float | None = None,
        deferrable: bool = conf.getboolean("operators", "default_deferrable", fallback=False),
        **kwargs: Any,
    ) -> None:
        if poll_interval is not None:
            if "poke_interval" in kwargs:
                raise ValueError("poll_interval and poke_interval are one thing here: give one of them")
            if not poll_interval > 0:
                raise ValueError(f"poll_interval must be a number of seconds above 0, not {poll_interval!r}")
            kwargs["poke_interval"] = poll_interval
        super().__init__(**kwargs)
        if sum(value is not None for value in (job_id, label, worker_pid)) != 1:
            raise ValueError("a sensor waits for one thing: give job_id, label or worker_pid")
        self.job_id = job_id
        self.job_label = label  # `label` is Airflow's own: the name of the node in the graph
        self.worker_pid = worker_pid
        self.states = states
        self.fail_on = fail_on
        self.postgres_conn_id = postgres_conn_id
        self.database = database
        self.endpoint = endpoint
        self.schema = schema
        self.poll_interval = poll_interval
        self.deferrable = deferrable
        if self.retry_policy is None:
            self.retry_policy = SqlStateRetryPolicy()

    def execute(self, context: Context) -> Any:
        """Wait: defer to a trigger, or look here."""
        if self.deferrable:
            deadline = context["ti"].start_date + timedelta(seconds=self.timeout)
            self.defer(trigger=self._trigger(deadline), method_name="execute_complete")
        return super().execute(context)

    def poke(self, context: Context) -> bool | PokeReturnValue:
        """Look once."""
        from airflow.sdk import PokeReturnValue

        hook = PgBackgroundHook(self.postgres_conn_id, database=self.database, endpoint=self.endpoint)
        event = asyncio.run(self._look_once(hook.conninfo()))
        return PokeReturnValue(event is not None, event and event.get("jobs"))

    async def _look_once(self, conninfo: str) -> dict[str, Any] | None:
        from pgbg_orchestration import Launcher

        async with Launcher(conninfo, schema=self.schema) as launcher:
            return await self._trigger(None).look(launcher)

    def execute_complete(self, context: Context, event: dict[str, Any] | None = None) -> Any:
        """Return what was waited for, or raise the error that the trigger met."""
        from airflow.sdk.exceptions import AirflowSensorTimeout, AirflowSkipException

        if event is not None and event.get("status") == TIMED_OUT:
            message = f"waited for {self.timeout:.0f} s for {self.job_id or self.job_label or self.worker_pid}"
            raise AirflowSkipException(message) if self.soft_fail else AirflowSensorTimeout(message)
        return events.result_of(event).get("jobs")

    def _trigger(self, deadline: datetime | None) -> PgBackgroundSensorTrigger:
        return PgBackgroundSensorTrigger(
            job_id=self.job_id,
            label=self.job_label,
            worker_pid=None if self.worker_pid is None else int(self.worker_pid),
            states=list(self.states),
            fail_on=list(self.fail_on),
            poll_interval=self.poll_interval,
            deadline=deadline,
            postgres_conn_id=self.postgres_conn_id,
            database=self.database,
            endpoint=self.endpoint,
            schema=self.schema,
        )


def error_of(entry: JobEntry) -> Exception:
    """Return the error that a job of ``pgbg.jobs`` ended with."""
    from pgbg_orchestration import ErrorFields, errors

    named: dict[str, Any] = {"job_id": entry.job_id, "label": entry.label}
    match entry.state:
        case "failed":
            told = ErrorFields(sqlstate=entry.sqlstate, message=entry.message, detail=entry.detail, hint=entry.hint)
            return errors.WorkerError(
                "the SQL of the job that is waited for failed in its worker", fields=told, **named
            )
        case "cancelled":
            why = f" by {entry.cancelled_by} ({entry.reason})" if entry.cancelled_by else ""
            return errors.JobCancelled(f"the job that is waited for was cancelled{why}", sqlstate="57014", **named)
        case "lost":
            return errors.WorkerLost("the worker of the job that is waited for is gone", **named)
        case _:
            return errors.OutcomeUnknown(f"the job that is waited for is {entry.state}", **named)


def _told(entry: JobEntry) -> dict[str, Any]:
    names = ("job_id", "label", "state", "row_count", "command_tag", "launched_at", "ended_at")
    values = {name: getattr(entry, name) for name in names}
    return {name: value.isoformat() if isinstance(value, datetime) else value for name, value in values.items()}
