"""Jobs that nobody waited for become materializations, each once; workers of runs that are gone are ended."""

import asyncio
import time
from typing import Any

import psycopg
import pytest
from dagster import (
    AssetCheckEvaluation,
    AssetMaterialization,
    AssetSpec,
    DagsterInstance,
    DagsterRun,
    DagsterRunStatus,
    Definitions,
    OpExecutionContext,
    SensorDefinition,
    SensorResult,
    build_run_status_sensor_context,
    build_sensor_context,
    job,
    op,
)

from dagster_resource import (
    PgBackgroundFailure,
    PgBackgroundResource,
    build_pg_background_job_checks,
    build_pg_background_sensor,
    build_pg_background_sweep_sensors,
)
from dagster_resource.external.reports import Cursor
from dagster_resource.external.submission import Submission
from dagster_resource.external.sweep import _sweep_orphans
from dagster_resource.steps.batch import Member
from dagster_resource.steps.sql import Sql
from pgbg_orchestration import Job, Launcher, run
from pgbg_orchestration.driver import Talk
from tests.conftest import Database

pytestmark = [pytest.mark.servers("real"), pytest.mark.filterwarnings("ignore:.*currently in (beta|preview).*")]

PATIENCE = 400.0  # seconds


def tick(
    sensor: SensorDefinition, instance: DagsterInstance, pg: PgBackgroundResource, cursor: str | None, keep: bool = True
) -> SensorResult:
    """One tick as the daemon does it: the events are stored, and after them the cursor."""
    with build_sensor_context(instance=instance, resources={"pg": pg}, cursor=cursor) as context:
        result = sensor(context)
    assert isinstance(result, SensorResult)
    if keep:
        for event in result.asset_events:
            assert isinstance(event, (AssetMaterialization, AssetCheckEvaluation))
            instance.report_runless_asset_event(event)
    return result


def made(result: SensorResult) -> list[tuple[str, str | None]]:
    events = [event for event in result.asset_events if isinstance(event, AssetMaterialization)]
    return sorted(((event.asset_key.to_user_string(), event.partition) for event in events), key=str)


def checked(result: SensorResult) -> list[tuple[str, bool]]:
    events = [event for event in result.asset_events if isinstance(event, AssetCheckEvaluation)]
    return sorted((event.asset_key.to_user_string(), event.passed) for event in events)


def wait_for_all(sql: psycopg.Connection[Any]) -> None:
    """Wait until no job is at work any more."""
    deadline = time.monotonic() + PATIENCE
    while sql.execute("select 1 from pgbg.jobs where state in ('running', 'waiting')").fetchone():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_each_end_is_reported_once(
    pg: PgBackgroundResource, instance: DagsterInstance, sql: psycopg.Connection[Any]
) -> None:
    sensor = build_pg_background_sensor(["good", "bad", "good_and_more"])
    pg.submit(None, "select 1", asset_key="good", key="1")
    pg.submit(None, "select 1", asset_key="good", partition_key="2013-01-01", key="1")
    pg.submit(None, "select 1", asset_key="of somebody else", key="1")
    wait_for_all(sql)
    first = tick(sensor, instance, pg, None)
    assert made(first) == [("good", "2013-01-01"), ("good", None)]
    assert checked(first) == [("good", True)]  # the last one of an asset is what Dagster shows
    second = tick(sensor, instance, pg, first.cursor)
    assert second.asset_events == []

    # What cannot be parsed never holds the job's lock; what fails later may have been seen at work, and is left then.
    with pytest.raises(PgBackgroundFailure):
        pg.submit(None, "select 1 from", asset_key="bad", key="1")
    third = tick(sensor, instance, pg, second.cursor)
    assert checked(third) == [("bad", False)]
    assert made(third) == []

    # The same job, once more: now it succeeds.
    pg.submit(None, "select 1", asset_key="bad", key="1")
    wait_for_all(sql)
    assert made(tick(sensor, instance, pg, third.cursor)) == [("bad", None)]


def test_a_job_that_takes_long_is_not_passed_over(
    pg: PgBackgroundResource, instance: DagsterInstance, sql: psycopg.Connection[Any]
) -> None:
    sensor = build_pg_background_sensor(["slow", "quick"])
    pg.submit(None, "select pg_sleep(2)", asset_key="slow", key="1")
    pg.submit(None, "select 1", asset_key="quick", key="1")
    while sql.execute("select count(*) from pgbg.jobs where state = 'committed'").fetchone() != (1,):
        time.sleep(0.02)
    first = tick(sensor, instance, pg, None)
    assert made(first) == [("quick", None)]
    wait_for_all(sql)
    assert made(tick(sensor, instance, pg, first.cursor)) == [("slow", None)]


def test_a_tick_whose_cursor_was_lost_reports_nothing_twice(
    pg: PgBackgroundResource, instance: DagsterInstance, sql: psycopg.Connection[Any]
) -> None:
    sensor = build_pg_background_sensor(["once"])
    pg.submit(None, "select 1", asset_key="once", key="1")
    wait_for_all(sql)
    assert made(tick(sensor, instance, pg, None)) == [("once", None)]
    again = tick(sensor, instance, pg, None)
    assert made(again) == []
    # Whether its check was stored before the daemon was stopped, the materialization does not tell.
    assert checked(again) == [("once", True)]


def test_a_tick_that_is_cut_off_leaves_the_rest_to_the_next(
    pg: PgBackgroundResource, instance: DagsterInstance, sql: psycopg.Connection[Any]
) -> None:
    sensor = build_pg_background_sensor(["many"], max_events=2)
    for number in range(5):
        pg.submit(None, "select 1", asset_key="many", partition_key=str(number), key="1")
    wait_for_all(sql)
    cursor: str | None = None
    seen: list[tuple[str, str | None]] = []
    for expected in (2, 2, 1, 0):
        result = tick(sensor, instance, pg, cursor)
        assert len(made(result)) == expected
        seen += made(result)
        cursor = result.cursor
    assert sorted(seen) == [("many", str(number)) for number in range(5)]


def test_a_materialization_tells_what_the_job_was(
    pg: PgBackgroundResource, instance: DagsterInstance, sql: psycopg.Connection[Any]
) -> None:
    text = "create table report as select generate_series(1, %s) as n"

    @op
    def order(context: OpExecutionContext, pg: PgBackgroundResource) -> None:
        pg.submit(context, (text, [3]), asset_key="report")
        pg.submit(context, "select 1 -- ```", asset_key="report", partition_key="2013", name="other")

    @job
    def ordering() -> None:
        order()

    assert ordering.execute_in_process(instance=instance, resources={"pg": pg}).success
    wait_for_all(sql)

    events = tick(build_pg_background_sensor(["report"]), instance, pg, None).asset_events
    found = {event.partition: event.metadata for event in events if isinstance(event, AssetMaterialization)}
    assert found[None]["pgbg/sql"].value == f"```sql\n{text}\n```"
    assert found["2013"]["pgbg/sql"].value == "````sql\nselect 1 -- ```\n````"
    assert {"pgbg/job_id", "pgbg/label", "pgbg/worker_pid", "pgbg/attempt"} <= set(found[None])


@pytest.mark.parametrize("supervisor", [True, False])
def test_the_end_of_a_job_that_nobody_waited_for(
    pg: PgBackgroundResource,
    instance: DagsterInstance,
    sql: psycopg.Connection[Any],
    database: Database,
    supervisor: bool,
) -> None:
    """Both were seen at work and left; then the one commits, and the other fails."""
    sql.execute("create table filled (n int)")
    sql.execute("grant insert on filled to public")
    wait = "select pg_advisory_xact_lock_shared(1)"
    failing = "do $$begin raise 'no good' using errcode = 'ZZ001', detail = 'none at all'; end$$"
    with database.connect() as holder:
        holder.execute("select pg_advisory_lock(1)")
        fill = "insert into filled select generate_series(1, 3)"
        pg.submit(None, f"{wait}; {fill}", asset_key="good", key="1", supervisor=supervisor)
        pg.submit(None, f"{wait}; {failing}", asset_key="bad", key="1", supervisor=supervisor)
    wait_for_all(sql)
    sql.execute("update pgbg.job set launched_at = launched_at - interval '61 s'")  # what is lost may be about to start
    result = tick(build_pg_background_sensor(["good", "bad"]), instance, pg, None)
    (event,) = (event for event in result.asset_events if isinstance(event, AssetMaterialization))
    known: dict[str, Any] = {name: value.value for name, value in event.metadata.items()}
    checks = {c.asset_key.to_user_string(): c for c in result.asset_events if isinstance(c, AssetCheckEvaluation)}
    told = {name: value.value for name, value in checks["bad"].metadata.items()}
    assert (checks["good"].passed, checks["bad"].passed) == (True, False)
    if not supervisor:
        assert told["pgbg/state"] == "lost"
        assert not {"pgbg/row_count", "pgbg/command_tag"} & set(known)
        return
    assert (known["pgbg/row_count"], known["pgbg/command_tag"]) == (3, "INSERT")
    assert known["pgbg/duration_seconds"] > 0
    assert (told["pgbg/state"], told["pgbg/sqlstate"]) == ("failed", "ZZ001")
    assert "none at all" in str(told["pgbg/error"])


def test_a_tick_says_what_it_did(
    pg: PgBackgroundResource, instance: DagsterInstance, sql: psycopg.Connection[Any], database: Database
) -> None:
    sensor = build_pg_background_sensor(["said"])
    with database.connect() as holder:
        holder.execute("select pg_advisory_lock(1)")
        pg.submit(None, "select pg_advisory_xact_lock_shared(1)", asset_key="said", key="1")
        first = sensor.evaluate_tick(build_sensor_context(instance, resources={"pg": pg}))
        assert first.skip_message == "no job has ended since the last tick; at work or left to the next tick: 1"
    wait_for_all(sql)
    second = sensor.evaluate_tick(build_sensor_context(instance, cursor=first.cursor, resources={"pg": pg}))
    assert second.skip_message == "jobs reported: 1"


def submitted_long_ago(sql: psycopg.Connection[Any], asset: str) -> None:
    """Make it so that the asset's jobs were launched an hour ago."""
    sql.execute(
        "update pgbg.job set launched_at = launched_at - interval '1 hour',"
        " registered_at = registered_at - interval '1 hour' where right(series, length(%(end)s)) = %(end)s",
        {"end": f"/{asset}"},
    )


def test_an_asset_that_is_added_later_begins_at_its_own_first_job(
    pg: PgBackgroundResource, instance: DagsterInstance, sql: psycopg.Connection[Any]
) -> None:
    pg.submit(None, "select 1", asset_key="added", key="1")
    pg.submit(None, "select 1", asset_key="known", key="1")
    wait_for_all(sql)
    submitted_long_ago(sql, "added")
    first = tick(build_pg_background_sensor(["known"]), instance, pg, None)
    assert made(first) == [("known", None)]
    both = build_pg_background_sensor(["known", "added"])
    second = tick(both, instance, pg, first.cursor)
    assert made(second) == [("added", None)]
    assert tick(both, instance, pg, second.cursor).asset_events == []


def test_an_asset_whose_pattern_is_another_one_later_begins_anew(
    pg: PgBackgroundResource, instance: DagsterInstance, database: Database, sql: psycopg.Connection[Any]
) -> None:
    for series in ("airflow/load", "airflow/clean"):
        run(database.conninfo, Job("select 1", series=series, generation=1))
    submitted_long_ago(sql, "clean")
    first = tick(build_pg_background_sensor({"books": "airflow/load"}), instance, pg, None)
    assert made(first) == [("books", None)]
    other = build_pg_background_sensor({"books": "airflow/clean", "again": "airflow/load"})
    second = tick(other, instance, pg, first.cursor)
    assert made(second) == [("again", None), ("books", None)]
    assert tick(other, instance, pg, second.cursor).asset_events == []


def test_an_asset_without_a_job_does_not_make_each_tick_read_all_of_them(
    pg: PgBackgroundResource, instance: DagsterInstance, sql: psycopg.Connection[Any]
) -> None:
    sensor = build_pg_background_sensor(["busy", "idle"])
    pg.submit(None, "select 1", asset_key="busy", key="1")
    wait_for_all(sql)
    cursor = Cursor.read(tick(sensor, instance, pg, None).cursor)
    assert sorted(name.partition(" ")[0] for name in cursor.places) == ["busy", "idle"]
    pg.submit(None, "select 1", asset_key="idle", key="1")
    wait_for_all(sql)
    assert made(tick(sensor, instance, pg, cursor.write())) == [("idle", None)]


def test_jobs_of_another_orchestrator(pg: PgBackgroundResource, instance: DagsterInstance, database: Database) -> None:
    run(database.conninfo, Job("create table t as select 1", series="airflow/load/2013-01-01", generation=1))
    sensor = build_pg_background_sensor(
        {"loaded": "airflow/load/*"}, partition_of=lambda entry: str(entry.series).rpartition("/")[2]
    )
    result = tick(sensor, instance, pg, None)
    assert made(result) == [("loaded", "2013-01-01")]
    (event, _) = result.asset_events
    assert isinstance(event, AssetMaterialization)
    assert event.metadata["pgbg/row_count"].value == 1


def test_the_check_shows_how_the_newest_job_ended(
    pg: PgBackgroundResource, instance: DagsterInstance, sql: psycopg.Connection[Any]
) -> None:
    definitions = Definitions(
        assets=[AssetSpec("good"), AssetSpec("bad"), AssetSpec("never")],
        asset_checks=build_pg_background_job_checks(["good", "bad", "never"]),
        resources={"pg": pg},
    )
    pg.submit(None, "select 1", asset_key="bad", key="1")
    with pytest.raises(PgBackgroundFailure):
        pg.submit(None, "select 1 from", asset_key="bad", key="2")  # see above: it never holds the job's lock
    pg.submit(None, "select 1", asset_key="good", key="1")
    wait_for_all(sql)
    run = definitions.resolve_implicit_global_asset_job_def().execute_in_process(instance=instance)

    found = {check.asset_key.to_user_string(): check for check in run.get_asset_check_evaluations()}
    assert {key: check.passed for key, check in found.items()} == {"good": True, "bad": False}
    assert found["bad"].metadata["pgbg/sqlstate"].value == "42601"
    # The sensor's evaluations are this check's.
    sensor = build_pg_background_sensor(["good", "bad", "never"])
    events = tick(sensor, instance, pg, None).asset_events
    names = {event.check_name for event in events if isinstance(event, AssetCheckEvaluation)}
    assert names == {check.check_name for check in found.values()}


async def test_jobs_since_a_moment(database: Database, sql: psycopg.Connection[Any]) -> None:
    async with Launcher(database.conninfo) as launcher:
        await launcher.run(Job("select 1", id="before"))
        (moment,) = sql.execute("select clock_timestamp()").fetchone() or (None,)
        await launcher.run(Job("select 1", id="after"))
        # One that was never launched has an end only.
        assert await launcher.cancel("never launched") == "cancelled"

        assert {entry.job_id for entry in await launcher.ledger.jobs(since=moment)} == {"after", "never launched"}


class TestSweep:
    def run_of(self, instance: DagsterInstance, status: DagsterRunStatus, **tags: str) -> DagsterRun:
        run = DagsterRun(job_name="any", status=status, tags=tags)
        return instance.add_run(run)

    def sweep(
        self, pg: PgBackgroundResource, instance: DagsterInstance, run: DagsterRun, status: DagsterRunStatus
    ) -> None:
        (sensor,) = [
            one for one in build_pg_background_sweep_sensors() if one.name.endswith(f"_{status.value.lower()}")
        ]
        event = instance.report_engine_event("the end", run)
        with build_run_status_sensor_context(
            sensor_name=sensor.name, dagster_instance=instance, dagster_run=run, dagster_event=event
        ) as context:
            sensor(context, pg=pg)

    def orphan(self, pg: PgBackgroundResource, run: DagsterRun, name: str = "orphan") -> str:
        """A job as a step of the run would have launched it, whose process is gone."""
        series = f"{pg.namespace}/{name}"
        job = Job("select pg_sleep(300)", id=f"{series}#{run.run_id}", series=series)

        launched = Submission(
            Member("", Sql(""), job), lambda: Launcher(pg.conninfo), keep_on_interrupt=False, options={}
        )
        asyncio.run(launched.launch(Talk()))
        return f"{series}#{run.run_id}"

    @pytest.mark.parametrize(
        ("status", "tags", "state"),
        [
            (DagsterRunStatus.CANCELED, {}, "cancelled"),
            (DagsterRunStatus.CANCELING, {}, "cancelled"),
            (DagsterRunStatus.FAILURE, {}, "cancelled"),
            (DagsterRunStatus.FAILURE, {"dagster/will_retry": "true"}, "running"),
        ],
    )
    def test_workers_of_a_run_that_is_gone(
        self,
        pg: PgBackgroundResource,
        instance: DagsterInstance,
        sql: psycopg.Connection[Any],
        status: DagsterRunStatus,
        tags: dict[str, str],
        state: str,
    ) -> None:
        gone, alive = self.run_of(instance, status, **tags), self.run_of(instance, DagsterRunStatus.STARTED)
        mine, other = self.orphan(pg, gone), self.orphan(pg, alive, "another")
        pg.submit(None, "select pg_sleep(300)", asset_key="kept", key=gone.run_id)
        self.sweep(pg, instance, gone, status)

        states: dict[str, str] = dict(sql.execute("select job_id, state from pgbg.jobs").fetchall())
        kept = states.pop(f"dagster/external/kept#{gone.run_id}")
        assert states == {mine: state, other: "running"}
        assert kept == "running"
        sql.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity where backend_type = 'pg_background' and "
            "datname = current_database()"
        )

    def sweep_orphans(self, pg: PgBackgroundResource, instance: DagsterInstance, **options: Any) -> str:
        (sensor,) = [one for one in build_pg_background_sweep_sensors(**options) if one.name.endswith("_orphans")]
        found = sensor.evaluate_tick(build_sensor_context(instance, resources={"pg": pg}))
        return str(found.skip_message)

    def end_all(self, sql: psycopg.Connection[Any]) -> None:
        sql.execute("select pg_terminate_backend(running_pid) from pgbg.jobs where running_pid is not null")
        wait_for_all(sql)

    @pytest.mark.parametrize(
        ("status", "tags", "state"),
        [
            (DagsterRunStatus.CANCELED, {}, "cancelled"),
            (DagsterRunStatus.CANCELING, {}, "cancelled"),
            (DagsterRunStatus.FAILURE, {}, "cancelled"),
            (DagsterRunStatus.FAILURE, {"dagster/will_retry": "true"}, "running"),
            (DagsterRunStatus.STARTED, {}, "running"),
            (DagsterRunStatus.SUCCESS, {}, "running"),
        ],
    )
    def test_an_orphan_is_found_without_an_event(
        self,
        pg: PgBackgroundResource,
        instance: DagsterInstance,
        sql: psycopg.Connection[Any],
        status: DagsterRunStatus,
        tags: dict[str, str],
        state: str,
    ) -> None:
        self.orphan(pg, self.run_of(instance, status, **tags))

        self.sweep_orphans(pg, instance)

        assert sql.execute("select state from pgbg.jobs").fetchall() == [(state,)]
        self.end_all(sql)

    def test_what_is_healthy_or_of_others_is_left_alone(
        self, pg: PgBackgroundResource, instance: DagsterInstance, sql: psycopg.Connection[Any], database: Database
    ) -> None:
        gone = self.run_of(instance, DagsterRunStatus.CANCELED)
        self.orphan(pg, DagsterRun(job_name="of another Dagster"), "unknown")
        pg.submit(None, "select pg_sleep(300)", key=gone.run_id)
        pg.submit(None, "select pg_sleep(300)", asset_key="ext", key=gone.run_id)
        never = PgBackgroundResource(conninfo=database.conninfo, cancel_on_termination="never", namespace="kept")
        self.orphan(never, gone, "kept")
        launched_and_waited_for = Job("select pg_sleep(300)", id=f"dagster/held#{gone.run_id}", series="dagster/held")

        async def sweep_beside_its_launcher() -> None:
            async with Launcher(pg.conninfo) as launcher:
                held = asyncio.ensure_future(launcher.run(launched_and_waited_for))
                try:
                    while not (await launcher.look(str(launched_and_waited_for.id))).holds_this_job:
                        await asyncio.sleep(0.05)
                    for resource in (pg, never):
                        await asyncio.to_thread(self.sweep_orphans, resource, instance)
                    states = await launcher.ledger.jobs()
                    assert [entry.state for entry in states] == ["running"] * 5
                finally:
                    held.cancel()
                    await asyncio.wait({held})

        asyncio.run(sweep_beside_its_launcher())
        self.end_all(sql)

    def test_two_sweeps_at_once_do_no_harm(
        self, pg: PgBackgroundResource, instance: DagsterInstance, sql: psycopg.Connection[Any]
    ) -> None:
        run = self.run_of(instance, DagsterRunStatus.CANCELED)
        for number in range(3):
            self.orphan(pg, run, f"orphan{number}")

        async def both() -> list[list[str]]:
            statuses = {DagsterRunStatus.CANCELED}
            return await asyncio.gather(*(_sweep_orphans(pg, instance, statuses) for _ in range(2)))

        for lines in asyncio.run(both()):
            assert all(line.endswith("; cancelled") for line in lines)
        assert sql.execute("select distinct state from pgbg.jobs").fetchall() == [("cancelled",)]
