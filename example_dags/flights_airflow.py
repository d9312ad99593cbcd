"""Flight delays of New York, 2013: a fact table, aggregates side by side, and two data-quality checks.

Every task waits in the triggerer while a PostgreSQL background worker does the work, and whether a failed one is tried
again is decided by its SQLSTATE:

- ``check_airlines`` meets a lock for longer than its ``lock_timeout`` (55P03) and is tried again;
- ``check_planes`` finds flights of planes that nobody knows and raises 23503: trying again would not help, so it fails
  at once, and ``set_aside`` puts those flights where somebody can look at them. When all planes are known it is
  skipped.

Needs: a connection ``flights`` of type ``postgres``, and the tables of nycflights13 in a schema of that name.
"""

from __future__ import annotations

from datetime import timedelta

from airflow.sdk import DAG

from airflow_provider import PgBackgroundOperator, SqlStateRetryPolicy
from pgbg_orchestration.retry import RETRY, Rule

FACTS = """
create schema if not exists by_airflow;
drop table if exists by_airflow.flight_facts;
create table by_airflow.flight_facts as
select f.time_hour, f.carrier, f.flight, f.tailnum, f.origin, f.dest, f.distance, f.air_time, f.dep_delay, f.arr_delay,
       p.manufacturer, p.model, p.seats, p.year as built,
       w.temp, w.wind_speed, w.precip, w.visib
from nycflights13.flights f
left join nycflights13.planes p on p.tailnum = f.tailnum
left join nycflights13.weather w on w.origin = f.origin and w.time_hour = f.time_hour
"""

# One text for both aggregates. The name of a table or column cannot be a parameter of SQL's, so Airflow's template
# puts it in.
DELAYS_BY = """
{%- set column, table = params.column, 'by_airflow.delay_by_' ~ params.column -%}
drop table if exists {{ table }};
create table {{ table }} as
select {{ column }}, count(*) as flights, count(*) filter (where dep_delay is null) as cancelled,
       round(avg(dep_delay), 1) as mean_delay,
       percentile_cont(0.9) within group (order by dep_delay) as delay_of_the_worst_tenth,
       round(avg(dep_delay) filter (where precip > 0), 1) as mean_delay_in_rain
from by_airflow.flight_facts
group by {{ column }}
"""

CHECK_AIRLINES = """
do $check$
declare
    unknown text;
begin
    select string_agg(distinct f.carrier, ', ') into unknown
    from by_airflow.flight_facts f
    where not exists (select from nycflights13.airlines a where a.carrier = f.carrier);
    if unknown is not null then
        raise exception 'unknown airlines: %', unknown using errcode = 'foreign_key_violation';
    end if;
end $check$
"""

# A check may say more than "no": all of it travels to the task's log and into `pgbg jobs`.
CHECK_PLANES = """
do $check$
declare
    flights bigint;
    planes  bigint;
begin
    select count(*), count(distinct f.tailnum) into flights, planes
    from by_airflow.flight_facts f
    where not exists (select from nycflights13.planes p where p.tailnum = f.tailnum);
    if flights > 0 then
        raise exception using
            errcode = 'foreign_key_violation',
            message = format('%s flights of %s planes that are not in nycflights13.planes', flights, planes),
            hint    = 'Look at by_airflow.flights_set_aside.',
            schema  = 'by_airflow', table = 'flight_facts', column = 'tailnum';
    end if;
end $check$
"""

SET_ASIDE = """
drop table if exists by_airflow.flights_set_aside;
create table by_airflow.flights_set_aside as
select f.*
from by_airflow.flight_facts f
where not exists (select from nycflights13.planes p where p.tailnum = f.tailnum)
"""

with DAG(
    "flights",
    description="Flight delays of New York, 2013",
    schedule=None,
    max_active_runs=1,
    tags=["example", "pg_background"],
    default_args={
        "postgres_conn_id": "flights",
        "deferrable": True,
        "retries": 3,
        "retry_delay": timedelta(seconds=5),  # for what is no error of the SQL's, such as a worker that was killed
        "timeout": timedelta(minutes=10),
    },
) as dag:
    facts = PgBackgroundOperator(task_id="facts", sql=FACTS, settings={"work_mem": "64MB"})
    by_carrier = PgBackgroundOperator(task_id="by_carrier", sql=DELAYS_BY, params={"column": "carrier"})
    by_airport = PgBackgroundOperator(task_id="by_airport", sql=DELAYS_BY, params={"column": "dest"})
    index = PgBackgroundOperator(
        task_id="index", sql="create index flight_facts_of_plane on by_airflow.flight_facts (tailnum, time_hour)"
    )
    check_airlines = PgBackgroundOperator(
        task_id="check_airlines",
        sql=CHECK_AIRLINES,
        settings={"lock_timeout": "1s"},
        # The default for this code waits longer; one's own rules win over the defaults.
        retry_policy=SqlStateRetryPolicy({"55P03": Rule(RETRY, "somebody changes the table", first_delay=1)}),
    )
    check_planes = PgBackgroundOperator(task_id="check_planes", sql=CHECK_PLANES)
    set_aside = PgBackgroundOperator(task_id="set_aside", sql=SET_ASIDE, trigger_rule="all_failed")

    facts >> [by_carrier, by_airport, index, check_airlines, check_planes]
    check_planes >> set_aside
