"""Flight delays of New York, 2013, as Dagster assets: a fact table, aggregates side by side, an index and a check.

The work of each asset is done by a PostgreSQL background worker, and each materialization tells its row count, its
SQL, its worker and how long it took.

Needs: the environment variable ``FLIGHTS_CONNINFO`` (a libpq connection string), and the tables of nycflights13 in a
schema of that name.
"""

from dagster import (
    AssetCheckExecutionContext,
    AssetCheckResult,
    AssetCheckSeverity,
    AssetExecutionContext,
    Definitions,
    EnvVar,
    MaterializeResult,
    asset,
    asset_check,
    define_asset_job,
    in_process_executor,
)

from dagster_resource import PgBackgroundFailure, PgBackgroundResource

FACTS = """
create schema if not exists by_dagster;
drop table if exists by_dagster.flight_facts;
create table by_dagster.flight_facts as
select f.time_hour, f.carrier, f.flight, f.tailnum, f.origin, f.dest, f.distance, f.air_time, f.dep_delay, f.arr_delay,
       p.manufacturer, p.model, p.seats, p.year as built,
       w.temp, w.wind_speed, w.precip, w.visib
from nycflights13.flights f
left join nycflights13.planes p on p.tailnum = f.tailnum
left join nycflights13.weather w on w.origin = f.origin and w.time_hour = f.time_hour
"""

DELAYS = """
drop table if exists by_dagster.{table};
create table by_dagster.{table} as
select {column}, count(*) as flights, count(*) filter (where dep_delay is null) as cancelled,
       round(avg(dep_delay), 1) as mean_delay,
       percentile_cont(0.9) within group (order by dep_delay) as delay_of_the_worst_tenth
from by_dagster.flight_facts
group by {column}
"""

CHECK = """
do $check$
declare
    unknown text;
begin
    select string_agg(distinct f.dest, ', ' order by f.dest) into unknown
    from by_dagster.flight_facts f
    where not exists (select from nycflights13.airports a where a.faa = f.dest);
    if unknown is not null then
        raise exception 'airports that are not in nycflights13.airports: %', unknown
            using errcode = 'foreign_key_violation';
    end if;
end $check$
"""


@asset(kinds={"postgres"}, group_name="flights")
def flight_facts(context: AssetExecutionContext, pg: PgBackgroundResource) -> MaterializeResult[None]:
    """Every flight with its plane and its weather."""
    return pg.run(context, FACTS, settings={"work_mem": "64MB"}).to_materialize_result()


@asset(kinds={"postgres"}, group_name="flights", deps=[flight_facts])
def flight_delays(context: AssetExecutionContext, pg: PgBackgroundResource) -> MaterializeResult[None]:
    """Delays per carrier and per airport, and an index: three jobs side by side, each with its own commit."""
    done = pg.run_many(
        context,
        {
            "by_carrier": DELAYS.format(table="delay_by_carrier", column="carrier"),
            "by_airport": DELAYS.format(table="delay_by_dest", column="dest"),
            "index": "create index flight_facts_of_plane on by_dagster.flight_facts (tailnum, time_hour)",
        },
    )
    return MaterializeResult(
        metadata={
            "carriers": done["by_carrier"].row_count,
            "airports": done["by_airport"].row_count,
        }
    )


@asset_check(asset=flight_facts)
def airports_known(context: AssetCheckExecutionContext, pg: PgBackgroundResource) -> AssetCheckResult:
    """Every flight lands at an airport that we know. An unknown one is a warning, any other error is an error."""
    try:
        pg.run(context, CHECK)
    except PgBackgroundFailure as failure:
        if failure.sqlstate != "23503":
            raise
        return AssetCheckResult(
            passed=False, severity=AssetCheckSeverity.WARN, description=failure.message, metadata=failure.metadata
        )
    return AssetCheckResult(passed=True)


defs = Definitions(
    assets=[flight_facts, flight_delays],
    asset_checks=[airports_known],
    jobs=[define_asset_job("flights", executor_def=in_process_executor)],
    resources={"pg": PgBackgroundResource(conninfo=EnvVar("FLIGHTS_CONNINFO"))},
)
