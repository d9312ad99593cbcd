"""What OpenTelemetry is told of a job, by the SDK's own collectors in memory; and that it costs nothing without one."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from pytest_mock import MockerFixture

from pgbg_orchestration import Job, arun, errors, telemetry
from tests.core.kit import Watched, effect, slow, within

pytestmark = [pytest.mark.servers("real", "standin20"), pytest.mark.any_surface]


class Told:
    """What was told."""

    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        self.reader = InMemoryMetricReader()
        self.tracers = TracerProvider()
        self.tracers.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.meters = MeterProvider([self.reader])

    @property
    def spans(self) -> dict[str, ReadableSpan]:
        return {span.name: span for span in self.exporter.get_finished_spans()}

    def metrics(self) -> dict[str, list[dict[str, Any]]]:
        """Data points by the metric's name: their attributes, and their value or count."""
        found: dict[str, list[dict[str, Any]]] = {}
        data = self.reader.get_metrics_data()
        for resource in data.resource_metrics if data else ():
            for scope in resource.scope_metrics:
                for metric in scope.metrics:
                    for point in metric.data.data_points:
                        value = getattr(point, "value", getattr(point, "count", None))
                        found.setdefault(metric.name, []).append({**(point.attributes or {}), "value": value})
        return found


@pytest.fixture
def told(mocker: MockerFixture) -> Iterator[Told]:
    """An SDK for this test alone: the process-wide one can be set once only."""
    made = Told()
    mocker.patch("opentelemetry.trace.get_tracer", made.tracers.get_tracer)
    mocker.patch("opentelemetry.metrics.get_meter", made.meters.get_meter)
    telemetry._instruments.cache_clear()
    yield made
    telemetry._instruments.cache_clear()
    made.meters.shutdown()


async def test_spans_below_another_processs(db: Watched, told: Told) -> None:
    """As a triggerer's are: it gets the text that the task's process stored."""
    with told.tracers.get_tracer("test").start_as_current_span("the task's") as task:
        parent = telemetry.parent()
        with telemetry.below(parent):
            assert telemetry.parent() == parent
    assert telemetry.parent() is None
    with telemetry.below(parent):
        await within(arun(db.conninfo, Job(effect("j"), id="j")))
        assert telemetry.parent() == parent
    assert telemetry.parent() is None
    job = told.spans["pgbg job"]
    assert job.parent is not None
    assert (job.parent.trace_id, job.parent.span_id) == (
        task.get_span_context().trace_id,
        task.get_span_context().span_id,
    )


@pytest.mark.parametrize("parent", [None, "", "nonsense", "00-0-0-00"])
async def test_no_parent_is_none(db: Watched, told: Told, parent: str | None) -> None:
    with told.tracers.get_tracer("test").start_as_current_span("own") as own, telemetry.below(parent):
        await within(arun(db.conninfo, Job(effect("j"), id="j")))
    found = told.spans["pgbg job"].parent
    assert found is not None
    assert found.span_id == own.get_span_context().span_id


async def test_a_job_is_a_span_with_its_phases(db: Watched, told: Told) -> None:
    with told.tracers.get_tracer("test").start_as_current_span("the caller's"):
        outcome = await within(arun(db.conninfo, Job(effect("j"), id="j", label="load/2026-01-01")))

    spans = told.spans
    assert set(spans) == {"the caller's", "pgbg job", "pgbg launch", "pgbg run", "pgbg hear"}
    job = spans["pgbg job"]
    assert job.parent is not None
    assert job.parent.span_id == spans["the caller's"].context.span_id
    assert {
        span.parent.span_id for name, span in spans.items() if name not in ("the caller's", "pgbg job") and span.parent
    } == {job.context.span_id}
    attributes = dict(job.attributes or {})
    assert attributes["pgbg.job_id"] == "j"
    assert attributes["pgbg.worker_pid"] == outcome.worker_pid
    assert [event.name for event in job.events] == ["launched", "committed"]
    metrics = told.metrics()
    assert metrics["pgbg.jobs"] == [{"outcome": "committed", "kind": "receipt", "label_prefix": "load", "value": 1}]
    assert {point["phase"] for point in metrics["pgbg.phase.duration"]} == {"launch", "run", "hear"}


async def test_a_failure_tells_its_code_and_no_text(db: Watched, told: Told) -> None:
    secret = Job("select 'a secret'::int", id="j", label="load")
    with pytest.raises(errors.WorkerError):
        await within(arun(db.conninfo, secret))

    job = told.spans["pgbg job"]
    assert job.status.description == "22P02"
    assert (job.attributes or {})["error.type"] == "22P02"
    assert "a secret" not in str(job.to_json())
    metrics = told.metrics()
    assert metrics["pgbg.failures"] == [{"sqlstate": "22P02", "label_prefix": "load", "value": 1}]
    assert metrics["pgbg.jobs"][0]["outcome"] == "WorkerError"


async def test_the_trace_is_found_in_the_server(db: Watched, told: Told) -> None:
    running = asyncio.create_task(arun(db.conninfo, Job(slow("j", 2), id="j")))
    at_work = await db.at_work("j")
    queries = [query for pid, *_, query in db.workers() if pid == at_work]
    await within(running)

    context = told.spans["pgbg job"].context
    traceparent = f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}"
    assert [query.startswith(f"/* traceparent='{traceparent}' */") for query in queries] == [True]


async def test_sessions_and_queue_of_this_process(db: Watched, told: Told) -> None:
    await within(arun(db.conninfo, Job(effect("j"), id="j")))

    metrics = told.metrics()
    assert {"pgbg.sessions", "pgbg.workers", "pgbg.slot_queue"} <= set(metrics)
    assert metrics["pgbg.slot_queue"][0]["value"] == 0


def test_without_opentelemetry_nothing_is_told() -> None:
    """As where it is not installed: the import fails."""
    probe = (
        "import sys; sys.modules['opentelemetry'] = None\n"
        "from pgbg_orchestration import Job, telemetry\nfrom pgbg_orchestration.call_options import Options\n"
        "options = Options()\n"
        "with telemetry.observing(Job('select 1'), options) as (given, tell):\n"
        "    assert given is options\n"
        "print(repr(telemetry.comment()))\n"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "''"


def test_without_an_sdk_there_is_no_comment_and_no_observer() -> None:
    assert not trace.get_current_span().get_span_context().is_valid
    assert telemetry.comment() == ""
