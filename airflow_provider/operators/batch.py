"""Several jobs side by side in one task, with an outcome for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar

from airflow_provider import events, parse_checks
from airflow_provider.arguments import JOB_FIELDS, job_arguments, label_of
from airflow_provider.compat import fails_for_good
from airflow_provider.retry_policy import tells_decision

from .job import PgBackgroundOperator

if TYPE_CHECKING:
    from airflow.sdk import Context

    from airflow_provider.identity import Identity


_OWN = frozenset({"label", *JOB_FIELDS} - {"worker_label"})
"""What a job of a batch may say of itself."""

_AIRFLOWS_KEYS = frozenset({"__classname__", "__version__", "__data__", "__type", "__var", "__id__", "__cls"})
"""Keys by which Airflow's serialisers know their own objects: an XCom with one of them is not stored, or not read."""


class PgBackgroundBatchOperator(PgBackgroundOperator):
    """Runs several jobs side by side in one task: each commits at most once, however often the task is tried.

    A retry runs those that did not commit. Jobs are told apart by their names, so these must stay the same from try to
    try; their order does not matter. For a task instance per job: ``PgBackgroundOperator.partial(…).expand(sql=…)``.

    Parameters
    ----------
    jobs:
        The jobs by name: SQL (one text or a list of statements), or a dict of ``sql`` and any of ``parameters``,
        ``label``, ``settings``, ``role``, ``isolation``, ``kind``, ``queue_size``, ``verify_sql``,
        ``drop_invalid_index``, ``redact_details`` and ``fetch``.
    at_once:
        How many run at once. Default: all.
    fail_fast:
        Cancel the rest when one fails. Otherwise all are let end before the task fails.
    kwargs:
        As :class:`PgBackgroundOperator` takes them, without ``sql``; they are the defaults of all jobs.

    Returns
    -------
    dict
        As XCom: the outcome of each job, or what the handler returned for it, by its name.

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
        parse_checks.check(type(self), {"task_id": kwargs.get("task_id"), "jobs": jobs})
        super().__init__(sql="", **kwargs)
        if at_once is not None and at_once < 1:
            raise ValueError(f"at_once is at least 1, not {at_once!r}")
        self.jobs = jobs
        self.at_once = at_once
        self.fail_fast = fail_fast

    @fails_for_good
    def execute(self, context: Context) -> Any:
        """Run the jobs: defer to a trigger, or wait here."""
        from airflow_provider.identity import identify
        from airflow_provider.triggers import PgBackgroundBatchTrigger
        from pgbg_orchestration import telemetry

        if not self.jobs:
            self.log.info("The batch is empty: nothing to do.")
            return {}
        for name in self.jobs:
            if not isinstance(name, str) or name in _AIRFLOWS_KEYS:
                raise ValueError(f"a job of the batch cannot have the name {name!r}: give it another text")
        identity = identify(context, durable=self.durable)
        jobs = {name: self._arguments_of(name, given, identity) for name, given in self.jobs.items()}
        for job in jobs.values():
            self._check(job)
        self.log.info("%d jobs: %s.", len(jobs), ", ".join(sorted(jobs)))
        trigger = PgBackgroundBatchTrigger(
            jobs=jobs,
            at_once=self.at_once,
            fail_fast=self.fail_fast,
            try_number=context["ti"].try_number,
            deadline=self._deadline(context),
            trace_parent=telemetry.parent(),
            **self._trigger_arguments(),
        )
        return self._wait_for(context, trigger)

    @fails_for_good
    def execute_complete(self, context: Any, event: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return the outcome of each job, or raise the error of the first one that failed."""
        if event is None:
            return events.result_of(None)
        ends: dict[str, dict[str, Any]] = event["jobs"]
        failures = {name: events.to_error(end) for name, end in ends.items() if end["status"] != events.COMMITTED}
        self.log.info("%d of %d jobs committed.", len(ends) - len(failures), len(ends))
        if not failures:
            if self.handler is not None:
                return self._handled(ends)
            return {name: events.result_of(end) for name, end in ends.items()}
        from pgbg_orchestration.batch import was_stopped

        # One that was stopped because of another is not the reason.
        first = next((name for name, error in failures.items() if not was_stopped(error)), None)
        first = first or next(iter(failures))
        error = failures.pop(first)
        error.add_note(f"Job {first!r} of the batch; {len(failures)} more did not commit.")
        for name, other in failures.items():
            error.add_note(f"Job {name!r}: {other.message}")
        with tells_decision(self, context):
            raise error

    def _statements(self) -> list[str]:
        given = (job["sql"] if isinstance(job, Mapping) else job for job in self.jobs.values())
        return [text for sql in given for text in ([sql] if isinstance(sql, str) else sql)]

    def _has_parameters(self) -> bool:
        own = any(isinstance(job, Mapping) and job.get("parameters") for job in self.jobs.values())
        return own or super()._has_parameters()

    def _arguments_of(self, name: str, given: Any, identity: Identity) -> dict[str, Any]:
        own: dict[str, Any] = dict(given) if isinstance(given, Mapping) else {"sql": given}
        if strange := set(own) - _OWN:
            raise ValueError(f"the job {name!r} of the batch has {sorted(strange)}; a job takes {sorted(_OWN)}")
        if "sql" not in own:
            raise ValueError(f"the job {name!r} of the batch has no sql")
        # Without a label of its own a job shows the task's, with its name.
        own["worker_label"] = own.pop("label", None) or label_of(self, identity, self, name)
        fields = {field: getattr(self, field) for field in JOB_FIELDS}
        place = replace(identity, series=f"{identity.series}/{name}", job_id=f"{identity.job_id}/{name}")
        return job_arguments(SimpleNamespace(**{**fields, **own}), place, self)
