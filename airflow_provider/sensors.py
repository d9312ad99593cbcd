"""The sensor: waits for jobs that somebody else runs, or for workers that somebody launched by hand."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, ClassVar

from airflow.sdk import BaseSensorOperator

from . import parse_checks
from .compat import conf, fails_for_good, take_retry_policy
from .operators.end import ends_in_trigger
from .retry_policy import SqlStateRetryPolicy, tells_decision
from .watch import COMMITTED, ENDED_BADLY, Watch, moment_of

if TYPE_CHECKING:
    from airflow.sdk import Context, PokeReturnValue

    from .triggers import PgBackgroundSensorTrigger


class PgBackgroundSensor(BaseSensorOperator):
    """Waits for jobs, by id or label, or for workers that somebody launched by hand, by pid or label.

    Parameters
    ----------
    job_id:
        Id of the job, as it stands in ``pgbg.jobs`` and in the XCom of the task that runs it.
    label:
        Label of the jobs; ``*`` and ``?`` stand for any characters, and for one. Of each series the newest job decides,
        all series that fit are waited for, and at least one has to be there.
    since:
        The moment from which on a job with the label counts, by its registration: a datetime, or text as ISO 8601 has
        it, with time zone, such as ``{{ run_after }}``. Default: when the DAG run began (again, where it was cleared).
    worker_pid:
        Process id of a worker that somebody launched by hand: waits until it is gone. How it ended only its launching
        session can tell.
    worker_label:
        Label of workers that somebody launched by hand, with ``*`` and ``?``: waits until none of them is at work. One
        that has not started yet is not waited for. From pg_background 1.10 on, and where the launching session has not
        set an ``application_name`` of its own.
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
    end_from_trigger:
        Let the trigger of a deferred sensor end it, as :class:`~airflow_provider.operators.PgBackgroundOperator` takes
        it.

    Returns
    -------
    list
        As XCom: ``job_id``, ``label``, ``state``, ``row_count``, ``command_tag``, ``launched_at`` and ``ended_at`` of
        each job. Nothing of a worker.

    Raises
    ------
    PgbgError
        A job ended in a state of ``fail_on``.
    AirflowSensorTimeout
        ``timeout`` passed.
    """

    template_fields: Sequence[str] = (
        "job_id", "job_label", "worker_pid", "worker_label", "since", "postgres_conn_id", "database", "endpoint",
    )  # fmt: skip
    template_fields_renderers: ClassVar[dict[str, str]] = {}
    ui_color = "#d8e2ee"

    def __init__(
        self,
        *,
        job_id: str | None = None,
        label: str | None = None,
        worker_pid: int | str | None = None,
        worker_label: str | None = None,
        since: datetime | str | None = None,
        states: Collection[str] = COMMITTED,
        fail_on: Collection[str] = ENDED_BADLY,
        postgres_conn_id: str = "postgres_default",
        database: str | None = None,
        endpoint: str | None = None,
        schema: str = "pgbg",
        poll_interval: float | None = None,
        deferrable: bool = conf.getboolean("operators", "default_deferrable", fallback=False),
        end_from_trigger: bool | None = None,
        **kwargs: Any,
    ) -> None:
        if poll_interval is not None:
            if "poke_interval" in kwargs:
                raise ValueError("poll_interval and poke_interval are one thing here: give one of them")
            if not poll_interval > 0:
                raise ValueError(f"poll_interval must be a number of seconds above 0, not {poll_interval!r}")
            kwargs["poke_interval"] = poll_interval
        retry_policy = take_retry_policy(kwargs)
        parse_checks.check(type(self), {**kwargs, "worker_pid": worker_pid})
        super().__init__(**kwargs)
        if sum(value is not None for value in (job_id, label, worker_pid, worker_label)) != 1:
            raise ValueError("a sensor waits for one thing: give job_id, label, worker_pid or worker_label")
        if since is not None and label is None:
            raise ValueError("since goes with a label: a job's id names one job, and a worker is at work or not")
        if unknown := set(fail_on) - set(ENDED_BADLY):
            raise ValueError(f"fail_on takes {', '.join(ENDED_BADLY)}, not {', '.join(sorted(unknown))}")
        self.job_id = job_id
        self.job_label = label  # `label` is Airflow's own: the name of the node in the graph
        self.worker_pid = worker_pid
        self.worker_label = worker_label
        self.since = since
        self.states = states
        self.fail_on = fail_on
        self.postgres_conn_id = postgres_conn_id
        self.database = database
        self.endpoint = endpoint
        self.schema = schema
        self.poll_interval = poll_interval
        self.deferrable = deferrable
        self.end_from_trigger = end_from_trigger
        self._watch: Watch | None = None
        if getattr(self, "retry_policy", None) is None:
            self.retry_policy = retry_policy or SqlStateRetryPolicy()

    @fails_for_good
    def execute(self, context: Context) -> Any:
        """Wait: defer to a trigger, or look here."""
        if self.deferrable:
            from .hook import PgBackgroundHook

            deadline = context["ti"].start_date + timedelta(seconds=self.timeout)
            trigger = self._trigger(context, deadline)
            PgBackgroundHook(self.postgres_conn_id, database=self.database, endpoint=self.endpoint).check()
            trigger.check_storable()
            self.defer(trigger=trigger, method_name="execute_complete")
        return super().execute(context)

    def _trigger(self, context: Context, deadline: datetime) -> PgBackgroundSensorTrigger:
        from .triggers import PgBackgroundSensorTrigger

        since = self._counts_from(context)
        return PgBackgroundSensorTrigger(
            **self._watched(),
            since=None if since is None else since.isoformat(),
            poll_interval=self.poll_interval,
            deadline=deadline,
            postgres_conn_id=self.postgres_conn_id,
            database=self.database,
            endpoint=self.endpoint,
            schema=self.schema,
            end_task=ends_in_trigger(self, self.end_from_trigger),
            do_xcom_push=bool(self.do_xcom_push),
        )

    def poke(self, context: Context) -> bool | PokeReturnValue:
        """Look once."""
        from airflow.sdk import PokeReturnValue

        from .hook import PgBackgroundHook

        hook = PgBackgroundHook(self.postgres_conn_id, database=self.database, endpoint=self.endpoint)
        if self._watch is None:
            self._watch = Watch(**self._watched(), since=self._counts_from(context), log=self.log.info)
        with tells_decision(self, context):
            event = asyncio.run(self._look_once(self._watch, hook.conninfo()))
        return PokeReturnValue(event is not None, event and event["jobs"])

    async def _look_once(self, watch: Watch, conninfo: str) -> dict[str, Any] | None:
        from pgbg_orchestration import Launcher

        async with Launcher(conninfo, schema=self.schema) as launcher:
            return await watch.look(launcher.ledger)

    def _counts_from(self, context: Context) -> datetime | None:
        """Return the moment from which on a job with the label counts.

        Raises
        ------
        ValueError
            ``since`` is no moment, or has no time zone.
        """
        if self.job_label is None:
            return None
        since = context["dag_run"].start_date if self.since is None else self.since
        return None if since is None else moment_of(since)

    @fails_for_good
    def execute_complete(self, context: Context, event: dict[str, Any] | None = None) -> Any:
        """Return what was waited for, or raise the error that the trigger met."""
        from . import events
        from .compat import AirflowSensorTimeout, AirflowSkipException

        if event is not None and event.get("status") == events.TIMED_OUT:
            since = self._counts_from(context)
            message = f"waited {self.timeout:.0f} s for {Watch(**self._watched(), since=since).what}"
            if event.get("seen"):
                message += f"; last seen: {event['seen']}"
            raise AirflowSkipException(message) if self.soft_fail else AirflowSensorTimeout(message)
        with tells_decision(self, context):
            return events.result_of(event).get("jobs")

    def _watched(self) -> dict[str, Any]:
        return {
            "job_id": self.job_id,
            "label": self.job_label,
            "worker_pid": None if self.worker_pid is None else int(self.worker_pid),
            "worker_label": self.worker_label,
            "states": list(self.states),
            "fail_on": list(self.fail_on),
        }
