"""The spans of a deferred task's jobs are below the task's own, though another process makes them."""

from __future__ import annotations

import asyncio
import datetime as dt
from collections.abc import Iterator
from typing import Any
from unittest.mock import MagicMock

import pytest
from airflow.models.trigger import Trigger
from airflow.sdk.exceptions import TaskDeferred
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from pytest_mock import MockerFixture

from airflow_provider import PgBackgroundBatchOperator, PgBackgroundOperator
from airflow_provider.hook import PgBackgroundHook
from airflow_provider.triggers import PgBackgroundBatchTrigger, PgBackgroundTrigger
from pgbg_orchestration import telemetry
from tests.conftest import Database

pytestmark = [pytest.mark.airflow, pytest.mark.servers("real"), pytest.mark.usefixtures("no_worker_left")]


@pytest.fixture(autouse=True)
def _connection(monkeypatch: pytest.MonkeyPatch, database: Database) -> None:
    monkeypatch.setattr(PgBackgroundHook, "check", lambda _self: None)
    monkeypatch.setattr(PgBackgroundHook, "conninfo", lambda _self: database.conninfo)
    monkeypatch.setattr("airflow_provider.triggers.login._conninfos", {})
    monkeypatch.setattr("airflow_provider.triggers.task.RESUME_SECONDS", 0.0)


@pytest.fixture
def spans(mocker: MockerFixture) -> Iterator[InMemorySpanExporter]:
    """The spans that were made."""
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    mocker.patch("opentelemetry.trace.get_tracer", provider.get_tracer)
    telemetry._instruments.cache_clear()
    yield exporter
    telemetry._instruments.cache_clear()


def _deferred(operator: Any, kind: Any) -> Any:
    told = {"dag_id": "books", "run_id": "q1", "task_id": "t", "map_index": -1, "start_date": dt.datetime.now(dt.UTC)}
    ti = MagicMock(try_number=1, max_tries=0, **told)
    with pytest.raises(TaskDeferred) as caught:
        operator.execute({"ti": ti, "task_state_store": {"pgbg_first_run": 1}})
    _, stored = caught.value.trigger.serialize()
    return kind(**Trigger._decrypt_kwargs(Trigger.encrypt_kwargs(stored)))


async def _fire(trigger: Any) -> None:
    assert [event async for event in trigger.run()]


def _jobs(exporter: InMemorySpanExporter) -> list[ReadableSpan]:
    return [span for span in exporter.get_finished_spans() if span.name == "pgbg job"]


@pytest.mark.parametrize(
    ("operator", "kind"),
    [
        (lambda: PgBackgroundOperator(task_id="t", sql="select 1", deferrable=True), PgBackgroundTrigger),
        (
            lambda: PgBackgroundBatchOperator(task_id="t", jobs={"a": "select 1"}, deferrable=True),
            PgBackgroundBatchTrigger,
        ),
    ],
    ids=["one job", "a batch"],
)
def test_they_are_below_the_span_of_the_task(spans: InMemorySpanExporter, operator: Any, kind: Any) -> None:
    with trace.get_tracer("test").start_as_current_span("the task's") as task:
        trigger = _deferred(operator(), kind)
    asyncio.run(_fire(trigger))

    (job,) = _jobs(spans)
    assert job.parent is not None
    assert job.parent.span_id == task.get_span_context().span_id
    assert job.context.trace_id == task.get_span_context().trace_id


def test_without_a_trace_nothing_is_stored(spans: InMemorySpanExporter) -> None:
    """And a row of a release before has no such argument."""
    operator = PgBackgroundOperator(task_id="t", sql="select 1", deferrable=True)
    trigger = _deferred(operator, PgBackgroundTrigger)
    assert trigger.trace_parent is None
    _, stored = trigger.serialize()
    del stored["trace_parent"]
    asyncio.run(_fire(PgBackgroundTrigger(**stored)))
    (job,) = _jobs(spans)
    assert job.parent is None
