"""The resource in assets, ops and checks, run in process on a real server."""

import asyncio
from collections.abc import Mapping
from typing import Any

import psycopg
import pytest
from dagster import (
    AssetExecutionContext,
    AssetKey,
    DagsterInstance,
    EnvVar,
    MaterializeResult,
    MetadataValue,
    OpExecutionContext,
    ReexecutionOptions,
    RetryPolicy,
    SensorEvaluationContext,
    SkipReason,
    asset,
    build_asset_context,
    build_sensor_context,
    execute_job,
    job,
    materialize,
    op,
    reconstructable,
    sensor,
)
from pydantic import ValidationError

from dagster_resource import (
    PgBackgroundFailure,
    PgBackgroundResource,
    RetryRule,
    Sql,
    partition_parameters,
    pg_background_asset,
)
from pgbg_orchestration.ledger.history import JobEntry
from pgbg_orchestration.view.lines import orchestrator_of
from pgbg_orchestration.view.web.data import link_of
from tests.conftest import Database
from tests.core.kit import only_long

pytestmark = [pytest.mark.servers("real"), pytest.mark.filterwarnings("ignore:.*currently in (beta|preview).*")]


def values(metadata: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value.value for name, value in metadata.items() if hasattr(value, "value")}


def count(sql: psycopg.Connection[Any], query: str) -> int:
    (number,) = sql.execute(query.encode()).fetchone() or (0,)
    return int(number)


def test_an_asset_tells_what_its_job_did(pg: PgBackgroundResource) -> None:
    @asset
    def numbers(context: AssetExecutionContext, pg: PgBackgroundResource) -> MaterializeResult[None]:
        done = pg.run(context, "create table numbers as select generate_series(1, %s) as n", parameters=[7])
        return done.to_materialize_result(metadata={"mine": 1})

    run = materialize([numbers], resources={"pg": pg})
    (made,) = run.asset_materializations_for_node("numbers")
    told = values(made.metadata)

    assert told["dagster/row_count"] == told["pgbg/row_count"] == 7
    assert told["pgbg/label"] == "numbers"
    assert told["pgbg/job_id"] == f"dagster/numbers#{run.run_id}"
    assert told["pgbg/sql"] == "```sql\ncreate table numbers as select generate_series(1, %s) as n\n```"
    assert told["pgbg/worker_pid"] > 0
    assert told["pgbg/duration_seconds"] >= 0
    assert told["pgbg/launched"] is True
    assert told["mine"] == 1


def test_metadata_leads_to_the_jobs_page(database: Database) -> None:
    """Of a job that committed and of one that failed; and from that page, back to the run."""
    pg = PgBackgroundResource(conninfo=database.conninfo, web_url="http://127.0.0.1:8474/", namespace="books")

    @asset
    def numbers(context: AssetExecutionContext, pg: PgBackgroundResource) -> MaterializeResult[None]:
        return pg.run(context, "select 1").to_materialize_result()

    @asset
    def broken(context: AssetExecutionContext, pg: PgBackgroundResource) -> None:
        pg.run(context, "select 1 / 0")

    run = materialize([numbers, broken], resources={"pg": pg}, raise_on_error=False)
    (made,) = run.asset_materializations_for_node("numbers")
    failed = run.failure_data_for_node("broken")
    assert failed is not None
    assert failed.user_failure_data is not None
    pages = [made.metadata["pgbg/page"], failed.user_failure_data.metadata["pgbg/page"]]
    assert pages == [
        MetadataValue.url(f"http://127.0.0.1:8474/#job=/books%2F{name}%23{run.run_id}")
        for name in ("numbers", "broken")
    ]

    async def entries() -> list[JobEntry]:
        async with pg.launcher() as launcher:
            return await launcher.ledger.jobs()

    found = asyncio.run(entries())
    assert {link_of(job.series or "", job.job_id, {"dagster": "https://dagster.example.com"}) for job in found} == {
        f"https://dagster.example.com/runs/{run.run_id}"
    }
    assert {orchestrator_of(job.series, job.job_id) for job in found} == {
        "Dagster books/numbers",
        "Dagster books/broken",
    }


def test_a_failure_names_its_sqlstate(pg: PgBackgroundResource) -> None:
    @asset
    def broken(context: AssetExecutionContext, pg: PgBackgroundResource) -> None:
        pg.run(context, "select 1 / 0")

    run = materialize([broken], resources={"pg": pg}, raise_on_error=False)
    told = run.failure_data_for_node("broken")

    assert told is not None
    assert told.user_failure_data is not None
    assert values(told.user_failure_data.metadata)["pgbg/sqlstate"] == "22012"


def test_a_serialization_failure_is_tried_again(pg: PgBackgroundResource, sql: psycopg.Connection[Any]) -> None:
    sql.execute("create sequence tries")

    @asset
    def unlucky(context: AssetExecutionContext, pg: PgBackgroundResource) -> None:
        pg.run(context, "do $$ begin if nextval('tries') < 3 then raise sqlstate '40001'; end if; end $$")

    run = materialize([unlucky], resources={"pg": pg})

    assert [event for event in run.all_events if event.is_step_up_for_retry].__len__() == 2
    assert sql.execute("select attempt from pgbg.jobs").fetchall() == [(3,)]


def test_a_rule_of_the_resources_configuration(database: Database, sql: psycopg.Connection[Any]) -> None:
    sql.execute("create sequence tries")
    rule = RetryRule(action="retry", first_delay=0, max_tries=2)
    pg = PgBackgroundResource(conninfo=database.conninfo, retry_rules={"23505": rule})

    @asset
    def unlucky(context: AssetExecutionContext, pg: PgBackgroundResource) -> None:
        pg.run(context, "do $$ begin if nextval('tries') < 2 then raise sqlstate '23505'; end if; end $$")

    assert materialize([unlucky], resources={"pg": pg}).success


def test_work_that_did_commit_is_not_run_again(pg: PgBackgroundResource, sql: psycopg.Connection[Any]) -> None:
    sql.execute("create table t (i int)")
    tries: list[bool] = []

    @asset(retry_policy=RetryPolicy(max_retries=1))
    def then_fails(context: AssetExecutionContext, pg: PgBackgroundResource) -> None:
        tries.append(pg.run(context, "insert into t values (1)").launched)
        if len(tries) == 1:
            raise ValueError("something else, after the commit")

    assert materialize([then_fails], resources={"pg": pg}).success
    assert tries == [True, False]
    assert count(sql, "select count(*) from t") == 1


def test_each_materialization_by_hand_is_a_generation_of_its_own(
    pg: PgBackgroundResource, sql: psycopg.Connection[Any]
) -> None:
    sql.execute("create table t (i int)")

    @pg_background_asset
    def twice() -> str:
        return "insert into t values (1)"

    # Two storages that know nothing of one another: the order is the database's.
    assert materialize([twice], resources={"pg": pg}).success
    assert materialize([twice], resources={"pg": pg}).success
    assert count(sql, "select count(*) from t") == 2
    assert sql.execute("select generation from pgbg.jobs order by 1").fetchall() == [(0,), (1,)]
    assert count(sql, "select count(distinct series) from pgbg.jobs") == 1


def test_two_jobs_of_one_step_need_names(pg: PgBackgroundResource, sql: psycopg.Connection[Any]) -> None:
    @asset
    def nameless(context: AssetExecutionContext, pg: PgBackgroundResource) -> None:
        pg.run(context, "create table first ()")
        pg.run(context, "create table second ()")

    @asset
    def named(context: AssetExecutionContext, pg: PgBackgroundResource) -> None:
        pg.run(context, "create table third ()", name="third")
        pg.run(context, "create table fourth ()", name="fourth")

    run = materialize([nameless], resources={"pg": pg}, raise_on_error=False)
    assert not run.success
    assert "name" in str(run.failure_data_for_node("nameless"))
    assert materialize([named], resources={"pg": pg}).success


class TestRunMany:
    def test_all_of_them(self, pg: PgBackgroundResource, sql: psycopg.Connection[Any]) -> None:
        sql.execute("create table t (i int)")
        peak = "(select count(*) from pg_stat_activity where backend_type = 'pg_background')"

        @asset
        def many(context: AssetExecutionContext, pg: PgBackgroundResource) -> None:
            jobs = {f"part {i}": Sql(f"insert into t select {peak}; select pg_sleep(0.05)") for i in range(12)}
            done = pg.run_many(context, jobs, max_running=3)
            assert list(done) == list(jobs)

        assert materialize([many], resources={"pg": pg}).success
        assert count(sql, "select count(*) from t") == 12
        assert count(sql, "select max(i) from t") <= 3

    def test_one_failure_ends_the_others_and_a_retry_takes_them_up_again(
        self, pg: PgBackgroundResource, sql: psycopg.Connection[Any]
    ) -> None:
        sql.execute("create table t (who text); create sequence tries")
        jobs = {
            "quick": "insert into t values ('quick')",
            "fails": "select pg_sleep(0.3); do $$ begin if nextval('tries') = 1 then raise sqlstate '40001'; end if; "
            "end $$; insert into t values ('fails')",
            "long": "insert into t values ('long'); select pg_sleep(case when (select last_value from tries) = 1 and "
            "not (select is_called from tries) then 60 else 0 end)",
        }

        @asset
        def many(context: AssetExecutionContext, pg: PgBackgroundResource) -> None:
            pg.run_many(context, jobs)

        assert materialize([many], resources={"pg": pg}).success
        assert sorted(sql.execute("select who from t").fetchall()) == [("fails",), ("long",), ("quick",)]

    def test_without_fail_fast_the_others_commit(self, pg: PgBackgroundResource, sql: psycopg.Connection[Any]) -> None:
        sql.execute("create table t (i int)")

        @asset
        def many(context: AssetExecutionContext, pg: PgBackgroundResource) -> None:
            jobs = {"bad": "select 1 / 0", "good": "select pg_sleep(0.3); insert into t values (1)"}
            pg.run_many(context, jobs, fail_fast=False)

        assert not materialize([many], resources={"pg": pg}, raise_on_error=False).success
        assert count(sql, "select count(*) from t") == 1


def test_op_of_a_job_without_assets(pg: PgBackgroundResource, sql: psycopg.Connection[Any]) -> None:
    sql.execute("create table t (i int)")

    @op
    def insert(context: OpExecutionContext, pg: PgBackgroundResource) -> None:
        pg.run(context, "insert into t values (1)")

    @job
    def two_runs() -> None:
        insert()

    assert two_runs.execute_in_process(resources={"pg": pg}).success
    assert two_runs.execute_in_process(resources={"pg": pg}).success
    assert count(sql, "select count(*) from t") == 2
    # Runs of one job may have different configuration, and must not wait for one another.
    assert count(sql, "select count(distinct series) from pgbg.jobs") == 2


def test_called_directly_with_a_context_built_by_hand(pg: PgBackgroundResource, sql: psycopg.Connection[Any]) -> None:
    sql.execute("create table t (i int)")

    @asset
    def direct(context: AssetExecutionContext, pg: PgBackgroundResource) -> MaterializeResult[None]:
        return pg.run(context, "insert into t values (1)").to_materialize_result()

    for _ in range(2):
        with build_asset_context() as context:
            direct(context, pg)
    assert count(sql, "select count(*) from t") == 2

    @asset
    def broken(context: AssetExecutionContext, pg: PgBackgroundResource) -> None:
        pg.run(context, "select 1 / 0")

    with build_asset_context() as context, pytest.raises(PgBackgroundFailure) as caught:
        broken(context, pg)
    assert caught.value.sqlstate == "22012"


def test_called_in_a_sensor(pg: PgBackgroundResource, sql: psycopg.Connection[Any]) -> None:
    sql.execute("create table t (i int)")

    @sensor(job_name="any")
    def looks(context: SensorEvaluationContext, pg: PgBackgroundResource) -> SkipReason:
        outcomes = [pg.run(context, "insert into t values (1)"), pg.run(context, "insert into t values (1)")]
        assert [outcome.launched for outcome in outcomes] == [True, True]
        assert pg.check(context, "select from t where i > 1").passed
        assert list(pg.run_many(context, {"a": "select 1", "b": "select 2"})) == ["a", "b"]
        # There is no step to be tried again.
        with pytest.raises(PgBackgroundFailure) as caught:
            pg.run(context, "do $$ begin raise sqlstate '40001'; end $$")
        assert caught.value.sqlstate == "40001"
        return SkipReason("all done")

    with build_sensor_context(resources={"pg": pg}) as context:
        looks(context)
    assert count(sql, "select count(*) from t") == 2


def test_submitted_job_is_awaited_by_its_id(pg: PgBackgroundResource) -> None:
    ids: list[str] = []

    @asset
    def submits(context: AssetExecutionContext, pg: PgBackgroundResource) -> None:
        ids.append(pg.submit(context, "create table t as select 1; select pg_sleep(0.5)", asset_key=AssetKey("ext")))

    @asset(deps=[submits])
    def waits(context: AssetExecutionContext, pg: PgBackgroundResource) -> None:
        assert pg.wait_for(context, ids[0], timeout=30).job_id == ids[0]

    assert materialize([submits, waits], resources={"pg": pg}).success


def test_job_of_the_core_is_awaited_by_its_id(pg: PgBackgroundResource, database: Database) -> None:
    from pgbg_orchestration import Job, errors, run

    run(database.conninfo, Job("create table t as select generate_series(1, 3)", id="airflow/dag/task#1"))
    with pytest.raises(errors.WorkerError):
        run(database.conninfo, Job("select 1 / 0", id="airflow/dag/task#2"))

    @asset
    def waits(context: AssetExecutionContext, pg: PgBackgroundResource) -> None:
        assert pg.wait_for(context, "airflow/dag/task#1").row_count == 3
        with pytest.raises(PgBackgroundFailure) as caught:
            pg.wait_for(context, "airflow/dag/task#2")
        assert caught.value.sqlstate == "22012"
        with pytest.raises(PgBackgroundFailure, match=r"within 0\.2 s"):
            pg.wait_for(context, "nobody knows this", timeout=0.2)

    assert materialize([waits], resources={"pg": pg}).success


def test_waiting_for_a_job_that_is_tried_again(pg: PgBackgroundResource, database: Database) -> None:
    from pgbg_orchestration import Job, errors, run

    def job(sql: str) -> Job:
        return Job(sql, id="airflow/dag/task#3", series="airflow/dag/task")

    with pytest.raises(errors.WorkerError):
        run(database.conninfo, job("select 1 / 0"))

    @asset
    def waits(context: AssetExecutionContext, pg: PgBackgroundResource) -> None:
        with pytest.raises(PgBackgroundFailure, match=r"within 0\.2 s"):
            pg.wait_for(context, "airflow/dag/task#3", timeout=0.2, fail_on=["cancelled"])
        run(database.conninfo, job("create table t as select generate_series(1, 3)"), accept_changed_sql=True)
        assert pg.wait_for(context, "airflow/dag/task#3", fail_on=["cancelled"]).row_count == 3
        with pytest.raises(ValueError, match="fail_on"):
            pg.wait_for(context, "airflow/dag/task#3", fail_on=["committed"])

    assert materialize([waits], resources={"pg": pg}).success


class TestSecrets:
    def test_no_password_in_what_can_be_printed(self, database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PGBG_TEST_DSN", f"{database.conninfo} password=topsecret")
        seen: list[str] = []

        @asset
        def prints(context: AssetExecutionContext, pg: PgBackgroundResource) -> None:
            seen.extend([repr(pg), str(pg), f"{context.run.run_config}"])
            pg.run(context, "select 1")

        run = materialize([prints], resources={"pg": PgBackgroundResource(conninfo=EnvVar("PGBG_TEST_DSN"))})
        events = [str(event) for event in run.all_events]
        assert seen
        assert [text for text in [*seen, *events] if "topsecret" in text] == []

    def test_no_bound_value_in_an_error(self, pg: PgBackgroundResource) -> None:
        bound = "".join(["top", "secret"])  # the line itself is shown, in the stack

        @asset
        def broken(context: AssetExecutionContext, pg: PgBackgroundResource) -> None:
            pg.run(context, "select 1 / (length(%s) * 0)", parameters=[bound])

        run = materialize([broken], resources={"pg": pg}, raise_on_error=False)
        assert "topsecret" not in str(run.all_events)

    @pytest.mark.parametrize(
        "conninfo",
        [
            "host=localhost password=top secret",
            "host=localhost password='topsecret",
            "postgresql://etl:top/secret@localhost/books",
            "postgresql://etl:top@secret@localhost/books",
        ],
    )
    def test_nothing_of_a_connection_string_that_cannot_be_read(self, conninfo: str) -> None:
        @asset
        def misled(context: AssetExecutionContext, pg: PgBackgroundResource) -> None:
            pg.run(context, "select 1")

        given = {"pg": PgBackgroundResource(conninfo=conninfo)}
        run = materialize([misled], resources=given, raise_on_error=False)
        told = str(run.all_events)
        assert not run.success
        assert "the connection string cannot be read" in told
        assert [part for part in ("topsecret", '"secret', '"top"') if part in told] == []


@pytest.mark.parametrize("field", ["cancel_on_termination", "on_superseded"])
def test_choices_are_checked(field: str) -> None:
    with pytest.raises(ValidationError, match=field):
        PgBackgroundResource(**dict[str, Any]({"conninfo": "", field: "perhaps"}))


def test_choices_may_come_from_the_environment(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGBG_TEST_CHOICE", "always")
    pg = PgBackgroundResource(conninfo=database.conninfo, cancel_on_termination=EnvVar("PGBG_TEST_CHOICE"))

    @asset
    def told(context: AssetExecutionContext, pg: PgBackgroundResource) -> None:
        assert pg.cancel_on_termination == "always"

    assert materialize([told], resources={"pg": pg}).success
    monkeypatch.setenv("PGBG_TEST_CHOICE", "perhaps")
    assert not materialize([told], resources={"pg": pg}, raise_on_error=False).success


@pytest.mark.parametrize(("key", "action"), [("23505", "perhaps"), ("nonsense", "retry")])
def test_rules_are_checked_before_an_error_needs_them(key: str, action: str) -> None:
    with pytest.raises(ValidationError, match="retry_rules"):
        PgBackgroundResource(conninfo="", retry_rules={key: RetryRule(action=action)})


def test_partitions_by_key_and_by_range(pg: PgBackgroundResource, sql: psycopg.Connection[Any]) -> None:
    from dagster import BackfillPolicy, DailyPartitionsDefinition

    sql.execute("create table t (day date)")

    @pg_background_asset(
        partitions_def=DailyPartitionsDefinition("2013-01-01", end_date="2013-02-01"),
        backfill_policy=BackfillPolicy.single_run(),
    )
    def days(context: AssetExecutionContext) -> tuple[str, Any]:
        text = """
            insert into t select day from unnest(%(partition_keys)s::date[]) as day
            where day >= %(partition_start)s and day < %(partition_end)s
        """
        return text, partition_parameters(context)

    one = materialize([days], resources={"pg": pg}, partition_key="2013-01-01")
    span = {"dagster/asset_partition_range_start": "2013-01-02", "dagster/asset_partition_range_end": "2013-01-05"}
    several = materialize([days], resources={"pg": pg}, tags=span)

    (first,) = one.asset_materializations_for_node("days")
    assert values(first.metadata)["dagster/partition_row_count"] == 1
    assert len(several.asset_materializations_for_node("days")) == 4
    assert count(sql, "select count(distinct day) from t") == 5
    assert {series for (series,) in sql.execute("select series from pgbg.jobs")} == {
        "dagster/days/2013-01-01",
        "dagster/days/2013-01-02...2013-01-05",
    }


@pytest.mark.parametrize("empty", [{}, [], ()])
def test_empty_parameters_are_none(pg: PgBackgroundResource, empty: Any) -> None:
    assert pg.run(None, ("select 1 where 'a%b' like '%b' and 5 % 2 = 1", empty)).row_count == 1
    assert pg.run(None, "select 1 where 'a%b' like '%b'", parameters=empty).row_count == 1


def test_partition_parameters_of_an_asset_without_partitions(pg: PgBackgroundResource) -> None:
    @pg_background_asset
    def plain(context: AssetExecutionContext) -> tuple[str, Any]:
        return "select 1 where 'a%b' like '%b'", partition_parameters(context)

    assert materialize([plain], resources={"pg": pg}).success


# Re-executions --------------------------------------------------------------------------------------------------------


@op(config_schema={"sql": str})
def configured(context: OpExecutionContext, pg: PgBackgroundResource) -> None:
    context.log.info("launched: %s", pg.run(context, "insert into t values (1)").launched)
    pg.run(context, context.op_config["sql"], name="second")


@job(resource_defs={"pg": PgBackgroundResource(conninfo=EnvVar("PGBG_TEST_DSN"))})
def reexecuted() -> None:
    configured()


@pytest.mark.parametrize("by", [pytest.param("hand", marks=only_long), "daemon"])
def test_reexecution_after_a_failure_shares_what_committed(
    database: Database, sql: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    sql.execute("create table t (i int)")
    monkeypatch.setenv("PGBG_TEST_DSN", database.conninfo)

    def configuration(text: str) -> dict[str, Any]:
        return {"ops": {"configured": {"config": {"sql": text}}}}

    with DagsterInstance.local_temp() as instance:
        first = execute_job(reconstructable(reexecuted), instance, run_config=configuration("select 1 / 0"))
        assert not first.success
        tags = {"dagster/retry_number": "1"} if by == "daemon" else {}
        options = ReexecutionOptions(parent_run_id=first.run_id)
        second = execute_job(
            reconstructable(reexecuted),
            instance,
            run_config=configuration("select 1"),
            reexecution_options=options,
            tags=tags,
        )
        assert second.success
        assert count(sql, "select count(*) from t") == 1
        third = execute_job(
            reconstructable(reexecuted),
            instance,
            run_config=configuration("select 1"),
            reexecution_options=ReexecutionOptions(parent_run_id=second.run_id),
            tags=tags,
        )
        assert third.success
    # By hand, a step that has succeeded is wanted once more; the daemon only ever repeats what has not.
    assert count(sql, "select count(*) from t") == (2 if by == "hand" else 1)
