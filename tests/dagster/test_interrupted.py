"""A step that is interrupted at each named point of its job's way, as Dagster does it: by a signal to its process."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from dagster import (
    AssetExecutionContext,
    DagsterInstance,
    DagsterRunStatus,
    EnvVar,
    JobDefinition,
    OpExecutionContext,
    ReexecutionOptions,
    RetryPolicy,
    asset,
    execute_job,
    in_process_executor,
    job,
    materialize,
    op,
    reconstructable,
)

from dagster_resource import PgBackgroundResource
from dagster_resource.steps.caller import Caller
from pgbg_orchestration.testing import faults
from tests.conftest import Database

pytestmark = [pytest.mark.servers("real"), pytest.mark.usefixtures("no_worker_left")]

PATIENCE = 60.0  # seconds
EFFECT = "insert into effect values (1)"
LONG = f"{EFFECT}; select pg_sleep(300)"
FETCHED = f"{EFFECT}; select n, repeat('x', 1000), pg_sleep(0.001) from generate_series(1, 1000000) as n"
UNTIL_RELEASED = f"{EFFECT}; select pg_advisory_xact_lock_shared(1)"


class Interruption:
    """Interrupts the step, once, when its job passes a point; the point is left when the step knows of it."""

    def __init__(self, point: str, instance: DagsterInstance, asked_for: bool) -> None:
        self.known = threading.Event()
        self._point: str | None = point
        self._instance = instance
        self._asked_for = asked_for

    def __call__(self, passed: str) -> None:
        if passed != self._point:
            return
        self._point = None
        if self._asked_for:
            (run,) = self._instance.get_runs()
            self._instance.report_run_canceling(run)
        os.kill(os.getpid(), signal.SIGTERM)
        assert self.known.wait(PATIENCE)


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Arranges for an interruption: ``interrupt(point, instance=…, asked_for=…)``."""

    def arrange(point: str, *, instance: DagsterInstance, asked_for: bool) -> None:
        interruption = Interruption(point, instance, asked_for)
        faults.install(interruption)
        decide = Caller._should_cancel

        def should_cancel(caller: Caller) -> bool:
            interruption.known.set()
            return decide(caller)

        monkeypatch.setattr(Caller, "_should_cancel", should_cancel)

    yield arrange
    faults.install(None)


def run_asset(
    pg: PgBackgroundResource,
    instance: DagsterInstance,
    text: str,
    *,
    kind: str = "receipt",
    policy: RetryPolicy | None = None,
) -> DagsterRunStatus:
    """Materialize an asset of this SQL; how its run ended."""

    @asset(retry_policy=policy)
    def interrupted(context: AssetExecutionContext, pg: PgBackgroundResource) -> None:
        pg.run(context, text, kind=kind)

    materialize([interrupted], resources={"pg": pg}, instance=instance, raise_on_error=False)
    (run,) = instance.get_runs()
    return run.status


def effects(sql: psycopg.Connection[Any]) -> int:
    (number,) = sql.execute("select count(*) from effect").fetchone() or (0,)
    return int(number)


def launches(sql: psycopg.Connection[Any]) -> int:
    (number,) = sql.execute("select coalesce(sum(attempt), 0) from pgbg.jobs").fetchone() or (0,)
    return int(number)


def wait_for_effect(sql: psycopg.Connection[Any]) -> None:
    deadline = time.monotonic() + PATIENCE
    while effects(sql) == 0:
        assert time.monotonic() < deadline, sql.execute("select state, attempt from pgbg.jobs").fetchall()
        time.sleep(0.05)


@pytest.mark.parametrize("policy", [None, RetryPolicy(max_retries=3)], ids=["plain", "retry_policy"])
@pytest.mark.parametrize(
    ("point", "text", "committed", "kind"),
    [
        pytest.param("before_register", LONG, 0, "receipt", id="before_register"),
        pytest.param("after_register", LONG, 0, "receipt", id="after_register"),
        pytest.param("before_launch", LONG, 0, "receipt", id="before_launch"),
        pytest.param("after_launch", LONG, 0, "receipt", id="after_launch"),
        pytest.param("while_running", LONG, 0, "receipt", id="while_running"),
        pytest.param("while_running", FETCHED, 0, "receipt", id="while_its_rows_are_fetched"),
        pytest.param("after_launch", LONG, 0, "supervised", id="after_launch_supervised"),
        pytest.param("while_running", LONG, 0, "supervised", id="while_running_supervised"),
        pytest.param("before_record", EFFECT, 1, "receipt", id="before_record"),
    ],
)
def test_terminated_by_a_user(
    pg: PgBackgroundResource,
    instance: DagsterInstance,
    sql: psycopg.Connection[Any],
    interrupt: Any,
    policy: RetryPolicy | None,
    point: str,
    text: str,
    committed: int,
    kind: str,
) -> None:
    sql.execute("create table effect (n int)")
    interrupt(point, instance=instance, asked_for=True)

    assert run_asset(pg, instance, text, kind=kind, policy=policy) is DagsterRunStatus.CANCELED
    assert effects(sql) == committed
    assert launches(sql) <= 1


@pytest.mark.parametrize("kind", ["receipt", "supervised"])
@pytest.mark.parametrize("point", ["after_launch", "while_running"])
def test_interrupted_though_nobody_asked_for_it(
    pg: PgBackgroundResource,
    instance: DagsterInstance,
    sql: psycopg.Connection[Any],
    database: Database,
    interrupt: Any,
    point: str,
    kind: str,
) -> None:
    sql.execute("create table effect (n int)")
    interrupt(point, instance=instance, asked_for=False)

    with database.connect() as holder:
        holder.execute("select pg_advisory_lock(1)")
        assert run_asset(pg, instance, UNTIL_RELEASED, kind=kind) is DagsterRunStatus.FAILURE
        # A worker that was launched lives on, though the session that launched it is gone.
        assert (launches(sql), effects(sql)) == (1, 0)
    wait_for_effect(sql)


# A cancel that ended a try ends no later one --------------------------------------------------------------------------


@op(config_schema={"submits": bool})
def interrupted_op(context: OpExecutionContext, pg: PgBackgroundResource) -> None:
    text = f"{EFFECT}; select pg_sleep(case when exists (select from released) then 0 else 300 end)"
    if context.op_config["submits"]:
        pg.submit(context, text)
    else:
        pg.run(context, text)


@job(executor_def=in_process_executor, resource_defs={"pg": PgBackgroundResource(conninfo=EnvVar("PGBG_TEST_DSN"))})
def interrupted_job() -> None:
    interrupted_op()


@job(
    executor_def=in_process_executor,
    resource_defs={"pg": PgBackgroundResource(conninfo=EnvVar("PGBG_TEST_DSN"), cancel_on_termination="always")},
)
def always_cancelled_job() -> None:
    interrupted_op()


@pytest.mark.parametrize(
    ("definition", "submits", "asked_for", "tags"),
    [
        pytest.param(always_cancelled_job, False, False, {"dagster/retry_number": "1"}, id="always_run"),
        pytest.param(always_cancelled_job, True, False, {"dagster/retry_number": "1"}, id="always_submit"),
        pytest.param(interrupted_job, False, True, {}, id="terminated_run"),
        pytest.param(interrupted_job, True, True, {}, id="terminated_submit"),
    ],
)
def test_a_job_that_was_cancelled_with_its_step_runs_when_the_run_is_executed_again(
    database: Database,
    sql: psycopg.Connection[Any],
    interrupt: Any,
    monkeypatch: pytest.MonkeyPatch,
    definition: JobDefinition,
    submits: bool,
    asked_for: bool,
    tags: dict[str, str],
) -> None:
    sql.execute("create table effect (n int); create table released ()")
    monkeypatch.setenv("PGBG_TEST_DSN", database.conninfo)
    config = {"ops": {"interrupted_op": {"config": {"submits": submits}}}}
    with DagsterInstance.local_temp() as instance:
        interrupt("after_launch", instance=instance, asked_for=asked_for)
        first = execute_job(reconstructable(definition), instance, run_config=config, raise_on_error=False)
        run = instance.get_run_by_id(first.run_id)
        assert run is not None
        assert run.status is (DagsterRunStatus.CANCELED if asked_for else DagsterRunStatus.FAILURE)
        assert sql.execute("select state from pgbg.jobs").fetchall() == [("cancelled",)]

        sql.execute("insert into released default values")
        options = ReexecutionOptions(parent_run_id=first.run_id)
        second = execute_job(
            reconstructable(definition), instance, run_config=config, reexecution_options=options, tags=tags
        )
        assert second.success
    wait_for_effect(sql)
    assert effects(sql) == 1
    assert sql.execute("select count(*) from pgbg.jobs").fetchone() == (1,)
