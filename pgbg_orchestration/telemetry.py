"""Traces and metrics by OpenTelemetry's API: nothing at all where it is not installed or no SDK is set up.

A job is a span, joined to whatever span is current where it is asked for (an Airflow task's, say), with a span of its
own for each phase: waiting for a slot, launching, running, and hearing of the end. The worker's SQL begins with a
comment that bears the trace, so that it is found in the server's log and in ``pg_stat_activity``.

Labels are cut to their first part (:func:`prefix_of`) in metrics: each distinct value is a series of numbers for ever.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any
from weakref import WeakSet

from .call_options import Options
from .errors import PgbgError
from .job import Job
from .outcome import Event, EventKind, Outcome

NAME = "pgbg_orchestration"
_OF_THE_API = ("opentelemetry.trace", "opentelemetry.metrics")


@dataclass(frozen=True)
class _Instruments:
    """What is measured; made once, from the API's own proxies, so that an SDK may be set up later."""

    tracer: Any
    jobs: Any
    failures: Any
    phases: Any


@cache
def _instruments() -> _Instruments | None:
    try:
        from opentelemetry import metrics, trace
    except ImportError:
        return None
    meter = metrics.get_meter(NAME, _version())
    for name, text, look in (
        ("pgbg.sessions", "Launching sessions of this process.", lambda host: host.session_count),
        ("pgbg.workers", "Workers that this process follows by their handles.", lambda host: host.worker_count),
        ("pgbg.slot_queue", "Jobs of this process that wait for a worker slot.", lambda host: host.slots.waiting),
    ):
        meter.create_observable_gauge(name, callbacks=[_summing(look)], description=text)
    return _Instruments(
        trace.get_tracer(NAME, _version()),
        meter.create_counter("pgbg.jobs", description="Jobs whose end was told, by how they ended."),
        meter.create_counter("pgbg.failures", description="Jobs that failed, by SQLSTATE."),
        meter.create_histogram("pgbg.phase.duration", unit="s", description="How long each phase of a job took."),
    )


_hosts: WeakSet[Any] = WeakSet()


def observe(host: Any) -> None:
    """Count the sessions, workers and waiting jobs of a host, as long as it is there."""
    _hosts.add(host)


def _summing(look: Callable[[Any], int]) -> Callable[[Any], list[Any]]:
    def observe(_: Any) -> list[Any]:
        from opentelemetry.metrics import Observation

        return [Observation(sum(look(host) for host in list(_hosts)))]

    return observe


def prefix_of(label: str) -> str:
    """Return a label's part before the first ``/``, ``:`` or ``[``: what is the same for all jobs of a kind."""
    ends = [at for sign in "/:[" if (at := label.find(sign)) > 0]
    return label[: min(ends, default=len(label))]


def comment() -> str:
    """Return the comment that a worker's SQL begins with: the current trace; empty without one."""
    current = parent()
    return "" if current is None else f"/* traceparent='{current}' */ "


def parent() -> str | None:
    """Return the current span as the header ``traceparent`` of the W3C's Trace Context has it; None without one.

    It is for another process, which makes its spans below it (:func:`below`).
    """
    if _instruments() is None:
        return None
    from opentelemetry import trace

    context = trace.get_current_span().get_span_context()
    if not context.is_valid:
        return None
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}"


@contextmanager
def below(parent: str | None) -> Iterator[None]:
    """Make the spans of what is run here those of another process's span.

    Parameters
    ----------
    parent:
        What :func:`parent` returned there. None, and what is no such text: nothing is changed. Nor where the current
        span is of the same trace already.
    """
    if parent is None or _instruments() is None:
        yield
        return
    from opentelemetry import context, trace
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    joined = TraceContextTextMapPropagator().extract({"traceparent": parent})
    wanted = trace.get_current_span(joined).get_span_context()
    if not wanted.is_valid or wanted.trace_id == trace.get_current_span().get_span_context().trace_id:
        yield
        return
    token = context.attach(joined)
    try:
        yield
    finally:
        context.detach(token)


class Observation:
    """One call for one job, as telemetry sees it.

    Parameters
    ----------
    instruments:
        Where it is told.
    span:
        The job's.
    job:
        The job.
    observer:
        The caller's own, which is told each event first.
    """

    def __init__(
        self, instruments: _Instruments, span: Any, job: Job, observer: Callable[[Event], None] | None
    ) -> None:
        self._instruments = instruments
        self._span = span
        self._job = job
        self._observer = observer
        self._began = time.time_ns()
        self._moments: dict[EventKind, int] = {}

    def event(self, event: Event) -> None:
        """Note an event of the job's way."""
        if self._observer is not None:
            self._observer(event)
        now = time.time_ns()
        self._moments.setdefault(event.kind, now)
        self._span.add_event(str(event.kind), {"message": event.message}, now)

    def ended(self, outcome: Outcome) -> None:
        """Tell of a job that committed."""
        known = {"worker_pid": outcome.worker_pid, "row_count": outcome.row_count, "attempt": outcome.attempt}
        self._span.set_attributes({f"pgbg.{name}": value for name, value in known.items() if value is not None})
        self._tell("committed")
        launched = self._moments.get(EventKind.LAUNCHED)
        if outcome.launched and outcome.started_at is not None and outcome.finished_at is not None:
            started, finished = (int(at.timestamp() * 1e9) for at in (outcome.started_at, outcome.finished_at))
            self._phase("run", started, finished)
            self._phase("hear", finished, max(time.time_ns(), finished))
            if launched is not None:
                self._before(launched)

    def failed(self, error: PgbgError) -> None:
        """Tell of a job that did not commit."""
        from opentelemetry.trace import StatusCode

        self._tell(type(error).__name__)
        self._span.set_attribute("error.type", error.sqlstate or type(error).__name__)
        # The message may quote data, and a span goes to another system: its class and code do not.
        self._span.set_status(StatusCode.ERROR, error.sqlstate or type(error).__name__)
        if error.sqlstate is not None:
            self._instruments.failures.add(1, {"sqlstate": error.sqlstate, "label_prefix": self._prefix})
        if (launched := self._moments.get(EventKind.LAUNCHED)) is not None:
            self._before(launched)

    @property
    def _prefix(self) -> str:
        return prefix_of(self._job.label or "")

    def _tell(self, how: str) -> None:
        self._instruments.jobs.add(1, {"outcome": how, "kind": str(self._job.kind), "label_prefix": self._prefix})

    def _before(self, launched: int) -> None:
        waited_since = self._moments.get(EventKind.WAITING_FOR_SLOT)
        if waited_since is not None and waited_since < launched:
            self._phase("wait for slot", waited_since, launched)
        self._phase("launch", self._began, launched)

    def _phase(self, name: str, start: int, end: int) -> None:
        self._instruments.tracer.start_span(f"pgbg {name}", start_time=start).end(end)
        self._instruments.phases.record((end - start) / 1e9, {"phase": name, "label_prefix": self._prefix})


def _is_set_up(instruments: _Instruments) -> bool:
    """Say whether anybody is told: what the API itself has, until an SDK is set up, tells nobody."""
    from opentelemetry import metrics, trace

    told = (instruments.tracer, instruments.jobs, trace.get_tracer_provider(), metrics.get_meter_provider())
    return not all(type(one).__module__.startswith(_OF_THE_API) for one in told)


@contextmanager
def observing(job: Job, options: Options) -> Iterator[tuple[Options, Callable[[Outcome], None]]]:
    """Observe one call for a job; gives the options to run it with, and a function to tell its outcome to.

    Parameters
    ----------
    job:
        The job.
    options:
        Those of the call.
    """
    instruments = _instruments()
    if instruments is None or not _is_set_up(instruments):
        yield options, _to_nobody
        return
    attributes = {"db.system": "postgresql", "pgbg.job_id": job.id, "pgbg.label": job.label, "pgbg.series": job.series}
    with instruments.tracer.start_as_current_span(
        "pgbg job",
        attributes={name: value for name, value in attributes.items() if value is not None},
        record_exception=False,
        set_status_on_exception=False,
    ) as span:
        observation = Observation(instruments, span, job, options.observer)
        try:
            # Without a recording span the caller's observer, or none, is all that there is to tell.
            yield replace(options, observer=observation.event) if span.is_recording() else options, observation.ended
        except PgbgError as error:
            observation.failed(error)
            raise


def _to_nobody(_: Outcome) -> None:
    """Telemetry is off."""


def _version() -> str:
    try:
        return version("pg-background-orchestration")
    except PackageNotFoundError:
        return ""
