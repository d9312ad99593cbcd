"""A step that is interrupted at each named point of its job's way, as Dagster does it: by a signal to its process."""

import asyncio
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
from dagster_resource.external import submission
from dagster_resource.steps.caller import Caller
from dagster_resource.steps.step_driver import drive
from pgbg_orchestration import Launcher
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

        def should_cancel(asked: Caller) -> bool:
            interruption.known.set()
            return decide(asked)

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
        pytest.param("after_register", LONG, 0, "supervised", id="after_register_supervised"),
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
    earlier = 0
    if point == "after_register":
        # A series' first job is registered and launched in one message, without this point.
        with DagsterInstance.ephemeral() as other:
            assert run_asset(pg, other, "select 1") is DagsterRunStatus.SUCCESS
        earlier = launches(sql)
        assert earlier == 1
    interrupt(point, instance=instance, asked_for=True)

    assert run_asset(pg, instance, text, kind=kind, policy=policy) is DagsterRunStatus.CANCELED
    assert effects(sql) == committed
    assert launches(sql) - earlier <= 1


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


# A job that is submitted: the moments after its worker was seen at work ----------------------------------------------


def send_interruption(instance: DagsterInstance) -> None:
    (run,) = instance.get_runs()
    instance.report_run_canceling(run)
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture
def interrupt_a_submission(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Arranges for an interruption at a moment of a submission: ``arrange(moment, instance)``.

    In the event loop's thread the loop is held until its cancel is on its way, so the moment is that one and no other.
    """

    def arrange(moment: str, instance: DagsterInstance) -> None:
        seen = threading.Event()

        def interrupt_and_hold() -> None:
            if seen.is_set():
                return
            seen.set()
            loop, asked = asyncio.get_running_loop(), threading.Event()
            schedule = loop.call_soon_threadsafe

            def call_soon_threadsafe(*args: Any, **kwargs: Any) -> Any:
                handle = schedule(*args, **kwargs)
                asked.set()
                return handle

            monkeypatch.setattr(loop, "call_soon_threadsafe", call_soon_threadsafe)
            send_interruption(instance)
            assert asked.wait(PATIENCE)

        if moment == "seen_at_work":
            is_at_work = submission._is_at_work

            def after_the_look(sighting: Any) -> bool:
                if at_work := is_at_work(sighting):
                    interrupt_and_hold()
                return at_work

            monkeypatch.setattr(submission, "_is_at_work", after_the_look)
        elif moment == "connections_are_closed":
            close = Launcher.close

            async def close_interrupted(launcher: Launcher) -> None:
                interrupt_and_hold()
                await close(launcher)

            monkeypatch.setattr(Launcher, "close", close_interrupted)
        else:

            def drive_to_its_end(*args: Any, **kwargs: Any) -> Any:
                result = drive(*args, **kwargs)
                if moment == "handed_over":
                    send_interruption(instance)
                elif moment == "asked_for_and_not_yet_sent":
                    (run,) = instance.get_runs()
                    instance.report_run_canceling(run)
                return result

            monkeypatch.setattr("dagster_resource.steps.caller.drive", drive_to_its_end)

    return arrange


@pytest.mark.parametrize(
    "moment", ["seen_at_work", "connections_are_closed", "handed_over", "asked_for_and_not_yet_sent"]
)
def test_a_submission_that_is_terminated_leaves_no_worker(
    pg: PgBackgroundResource,
    instance: DagsterInstance,
    sql: psycopg.Connection[Any],
    interrupt_a_submission: Any,
    moment: str,
) -> None:
    sql.execute("create table effect (n int)")
    interrupt_a_submission(moment, instance)

    @asset
    def submitted(context: AssetExecutionContext, pg: PgBackgroundResource) -> None:
        pg.submit(context, LONG)

    materialize([submitted], resources={"pg": pg}, instance=instance, raise_on_error=False)

    (run,) = instance.get_runs()
    assert run.status is DagsterRunStatus.CANCELED
    assert sql.execute("select state, running_pid from pgbg.jobs").fetchall() == [("cancelled", None)]
    assert effects(sql) == 0


def test_a_submission_that_was_to_be_left_alone_goes_on(
    instance: DagsterInstance, sql: psycopg.Connection[Any], database: Database, interrupt_a_submission: Any
) -> None:
    sql.execute("create table effect (n int)")
    pg = PgBackgroundResource(conninfo=database.conninfo, cancel_on_termination="never")
    interrupt_a_submission("seen_at_work", instance)

    @asset
    def submitted(context: AssetExecutionContext, pg: PgBackgroundResource) -> None:
        pg.submit(context, UNTIL_RELEASED)

    with database.connect() as holder:
        holder.execute("select pg_advisory_lock(1)")
        materialize([submitted], resources={"pg": pg}, instance=instance, raise_on_error=False)
        (run,) = instance.get_runs()
        assert run.status is DagsterRunStatus.CANCELED
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
