"""The triggers of one job: of a task that was on a worker first, and of one that begins in the triggerer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar

from airflow_provider import events
from airflow_provider.arguments import JOB_FIELDS, LEAD, job_arguments, unpacked
from airflow_provider.identity import identify_try
from airflow_provider.templates import filled
from pgbg_orchestration.job import SQL_OPTIONS

from .base import JobTrigger

if TYPE_CHECKING:
    from pgbg_orchestration import Launcher


class PgBackgroundTrigger(JobTrigger):
    """Runs one job and fires one event: its outcome, or the fields of its error.

    Airflow stores what it carries, the SQL and its parameters included: encrypted where it has a Fernet key.

    Parameters
    ----------
    job:
        What :func:`~airflow_provider.arguments.job_arguments` returns, or its text.
    kwargs:
        As :class:`~airflow_provider.triggers.base.JobTrigger` takes them.
    """

    packs: ClassVar[tuple[str, ...]] = ("job",)
    arguments = ("job", *JobTrigger.arguments)

    def __init__(self, *, job: dict[str, Any] | str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.job: dict[str, Any] = unpacked(job)

    def identities(self) -> list[Mapping[str, Any]]:
        """Return the job's ``id``, ``series`` and ``owner``."""
        return [self.job]

    async def work(self, launcher: Launcher) -> dict[str, Any]:
        """Launch the job or attach to it, and wait for its outcome."""
        return events.of_outcome(await self.run_job(launcher, self.job), self.job)


class PgBackgroundStartTrigger(PgBackgroundTrigger):
    """Runs the job of a task that never was on a worker (``start_from_trigger``).

    Airflow renders those attributes that bear the name of a template field of the operator. The job is made here, from
    the id of the try, which stays when the trigger moves to another triggerer.

    Parameters
    ----------
    sql, parameters, worker_label, settings:
        The attributes of :class:`~airflow_provider.operators.PgBackgroundOperator` of these names.
    fixed:
        What belongs to ``parameters`` and ``settings`` and is not to be rendered, as
        :func:`~airflow_provider.templates.take_apart` returns it: the two then hold texts to be rendered only. None in
        a row of a release before it, which has them whole.
    kwargs:
        The operator's further attributes of which :data:`pgbg_orchestration.job.SQL_OPTIONS` has the names (``fetch``
        as one text), and what :class:`PgBackgroundTrigger` takes, without ``job``.
    """

    packs: ClassVar[tuple[str, ...]] = ()
    fetch: str | None
    # No process of the task's was before it, so there is no span to be below.
    arguments = (
        *JOB_FIELDS,
        "fixed",
        *(name for name in PgBackgroundTrigger.arguments if name not in ("job", "trace_parent")),
    )
    follows_process = False

    def __init__(
        self,
        *,
        sql: str | list[str],
        parameters: Sequence[Any] | Mapping[str, Any] | None = None,
        worker_label: str | None = None,
        settings: Sequence[str] | Mapping[str, str] | None = None,
        fixed: str | None = None,
        **kwargs: Any,
    ) -> None:
        options = {name: kwargs.pop(name, default) for name, default in SQL_OPTIONS.items() if name != "settings"}
        super().__init__(job={}, **kwargs)
        for name, value in options.items():
            setattr(self, name, value)
        self.sql = sql
        self.parameters = parameters
        self.worker_label = worker_label
        self.settings = settings
        self.fixed = fixed
        self.timeout_after: datetime | None = None  # the triggerer sets it

    def identities(self) -> list[Mapping[str, Any]]:
        """Return the ``id`` and ``series`` of the job of this try."""
        identity = identify_try(self.task_instance)
        return [{"id": identity.job_id, "series": identity.series}]

    async def work(self, launcher: Launcher) -> dict[str, Any]:
        """Make the job, launch it or attach to it, and wait for its outcome."""
        given = {field: getattr(self, field) for field in JOB_FIELDS}
        given["fetch"] = unpacked(self.fetch)
        if self.fixed is not None:
            given["parameters"], given["settings"] = filled(self.fixed, self.parameters, self.settings)
        self.job = job_arguments(SimpleNamespace(**given), identify_try(self.task_instance), self.task_instance)
        if self.timeout_after is not None:
            self.deadline = self.timeout_after - LEAD
        self.log.info("Job %s, label %r.", self.job["id"], self.job["label"])
        return await super().work(launcher)
