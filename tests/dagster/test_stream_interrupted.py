"""A stream of rows that ends before its time: what is committed, that the rest is gone, and that nothing stays open."""

import gc
import threading
import time
from collections.abc import Callable
from typing import Any

import psycopg
import pytest
from dagster import AssetExecutionContext, DagsterInstance, DagsterRunStatus, RetryPolicy, asset, materialize

from dagster_resource import PgBackgroundFailure, PgBackgroundResource
from dagster_resource.steps.step_stream import StepStream
from pgbg_orchestration import errors
from tests.conftest import Database
from tests.dagster.test_interrupted import EFFECT, PATIENCE, effects, interrupt, launches, send_interruption

__all__ = ["interrupt"]

pytestmark = [
    pytest.mark.servers("real"),
    pytest.mark.usefixtures("nothing_left"),
    pytest.mark.filterwarnings("ignore:.*currently in (beta|preview).*"),
]

ROWS = 100_000
MANY = f"{EFFECT}; select n, repeat('x', 1000) from generate_series(1, {ROWS}) as n"
LONG = f"{EFFECT}; select n from generate_series(1, 3) as n, pg_sleep(300)"
READING = "from pg_stat_activity where application_name = 'pgbg: launching' and datname = current_database()"


@pytest.fixture
def sql(database: Database) -> Any:
    with database.connect() as connection:
        connection.execute("create table effect (n int)")
        yield connection


@pytest.fixture
def nothing_left(no_worker_left: None, sql: psycopg.Connection[Any]) -> Any:
    """No worker, no session that launched one, and no thread that reads."""
    yield
    gc.collect()
    deadline = time.monotonic() + PATIENCE
    while (left := sql.execute(f"select pid, query {READING}".encode()).fetchall()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left == []
    assert [thread for thread in threading.enumerate() if thread.name == "pgbg jobs"] == []


def run_of(
    instance: DagsterInstance,
    pg: PgBackgroundResource,
    read: Callable[[StepStream], None],
    text: str = MANY,
    policy: RetryPolicy | None = None,
) -> DagsterRunStatus:
    """Materialize an asset that reads a stream; how its run ended."""

    @asset(retry_policy=policy)
    def streamed(context: AssetExecutionContext, pg: PgBackgroundResource) -> None:
        read(pg.stream(context, text))

    materialize([streamed], resources={"pg": pg}, instance=instance, raise_on_error=False)
    (run,) = instance.get_runs()
    return run.status


def states(sql: psycopg.Connection[Any]) -> list[str]:
    return [state for (state,) in sql.execute("select state from pgbg.jobs").fetchall()]


@pytest.mark.parametrize("policy", [None, RetryPolicy(max_retries=3)], ids=["plain", "retry_policy"])
@pytest.mark.parametrize("point", ["before_launch", "after_launch", "while_running"])
def test_terminated_before_the_first_row(
    pg: PgBackgroundResource,
    instance: DagsterInstance,
    sql: psycopg.Connection[Any],
    interrupt: Any,
    policy: RetryPolicy | None,
    point: str,
) -> None:
    interrupt(point, instance=instance, asked_for=True)

    assert run_of(instance, pg, lambda rows: [*rows].clear(), LONG, policy) is DagsterRunStatus.CANCELED
    assert effects(sql) == 0
    assert launches(sql) <= 1


@pytest.mark.parametrize("policy", [None, RetryPolicy(max_retries=3)], ids=["plain", "retry_policy"])
@pytest.mark.parametrize("number", [1, 1000, 2500], ids=["first", "last of a batch", "within a batch"])
def test_terminated_while_it_reads(
    pg: PgBackgroundResource,
    instance: DagsterInstance,
    sql: psycopg.Connection[Any],
    policy: RetryPolicy | None,
    number: int,
) -> None:
    """Its rows come after the commit, which stays; the next try is none."""
    seen: list[int] = []

    def read(rows: StepStream) -> None:
        for row in rows:
            seen.append(row[0])
            if row[0] == number:
                send_interruption(instance)

    assert run_of(instance, pg, read, policy=policy) is DagsterRunStatus.CANCELED
    assert seen[:number] == [*range(1, number + 1)]
    assert len(seen) < ROWS
    assert (states(sql), effects(sql), launches(sql)) == (["committed"], 1, 1)


def test_terminated_and_no_signal_came(
    pg: PgBackgroundResource, instance: DagsterInstance, sql: psycopg.Connection[Any]
) -> None:
    """Celery sends none: the run's status is looked at while rows are waited for."""
    quick = PgBackgroundResource(conninfo=pg.conninfo, run_status_interval=0.01)
    seen: list[int] = []

    def read(rows: StepStream) -> None:
        for row in rows:
            seen.append(row[0])
            if row[0] == 1:
                (run,) = instance.get_runs()
                instance.report_run_canceling(run)

    assert run_of(instance, quick, read) is DagsterRunStatus.CANCELED
    assert len(seen) < ROWS
    assert (states(sql), effects(sql)) == (["committed"], 1)


@pytest.mark.parametrize("with_policy", [False, True], ids=["plain", "retry_policy"])
def test_the_session_is_lost_half_way(
    pg: PgBackgroundResource, instance: DagsterInstance, sql: psycopg.Connection[Any], with_policy: bool
) -> None:
    caught: list[PgBackgroundFailure] = []
    seen: list[int] = []

    def read(rows: StepStream) -> None:
        try:
            for row in rows:
                seen.append(row[0])
                if row[0] == 1:
                    assert sql.execute(f"select pg_terminate_backend(pid) {READING}".encode()).fetchall() == [(True,)]
        except PgBackgroundFailure as failure:
            caught.append(failure)
            raise

    policy = RetryPolicy(max_retries=3) if with_policy else None
    assert run_of(instance, pg, read, policy=policy) is DagsterRunStatus.FAILURE
    (failure,) = caught
    assert 1 <= len(seen) < ROWS
    assert failure.error.data_state == errors.DONE
    assert "the job is committed, and the rest of its rows is lost, after" in str(failure.description)
    assert (states(sql), effects(sql), launches(sql)) == (["committed"], 1, 1)


@pytest.mark.parametrize("how", ["break", "with", "error"])
def test_the_reader_breaks_off(
    pg: PgBackgroundResource, instance: DagsterInstance, sql: psycopg.Connection[Any], how: str
) -> None:
    """Whatever the step does then, the job is committed."""

    def read(rows: StepStream) -> None:
        if how == "with":
            with rows:
                assert next(iter(rows))[0] == 1
            assert [*rows] == []
            return
        for row in rows:
            if how == "error":
                raise ZeroDivisionError
            assert row[0] == 1
            break
        assert rows.outcome is not None
        assert rows.outcome.proof == "receipt"

    ended = run_of(instance, pg, read)
    assert ended is (DagsterRunStatus.FAILURE if how == "error" else DagsterRunStatus.SUCCESS)
    assert (states(sql), effects(sql), launches(sql)) == (["committed"], 1, 1)
