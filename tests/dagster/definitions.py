"""The code location that the tests' Dagster processes load. Its databases are named by environment variables."""

import os
import time
from pathlib import Path
from typing import Any

from dagster import (
    AssetExecutionContext,
    AssetSpec,
    BackfillPolicy,
    Config,
    DailyPartitionsDefinition,
    DefaultSensorStatus,
    Definitions,
    EnvVar,
    MaterializeResult,
    MetadataValue,
    RetryPolicy,
    asset,
    define_asset_job,
    in_process_executor,
    multiprocess_executor,
)

from dagster_resource import (
    PgBackgroundResource,
    build_pg_background_sensor,
    partition_parameters,
    pg_background_asset,
)

# Leaves one effect and works until the test opens the gate.
GATED = """
    insert into done (who) values (%(who)s);
    do $$
    begin
        for i in 1..12000 loop
            if exists (select from gate where who = current_setting('test.who')) then
                return;
            end if;
            perform pg_sleep(0.05);
        end loop;
        raise 'the gate was never opened';
    end $$
"""
# The same, but for the gate, with rows that nobody asked for: more than a worker's output queue holds.
ROWS = """
    insert into done (who) values (%(who)s);
    select repeat('x', 1000), pg_sleep(0.01) from generate_series(1, 60000)
"""
EXTERNALS = [f"external_{number}" for number in range(int(os.environ.get("PGBG_TEST_EXTERNALS", "1")))]


class Who(Config):
    who: str = "nobody"
    rows: bool = False
    stalls: bool = False


def work(context: AssetExecutionContext, config: Who, pg: PgBackgroundResource) -> MaterializeResult[None]:
    # The name makes it a series of its own: runs of one asset would wait for one another.
    who, sql = config.who, ROWS if config.rows else GATED
    return pg.run(context, sql, parameters={"who": who}, settings={"test.who": who}, name=who).to_materialize_result()


@asset
def plain(context: AssetExecutionContext, config: Who, pg: PgBackgroundResource) -> MaterializeResult[None]:
    return work(context, config, pg)


@asset
def fetching(context: AssetExecutionContext, config: Who, pg: PgBackgroundResource) -> MaterializeResult[None]:
    """Has rows that no second run of the SQL would give. Where it ``stalls``, the first process to have them hangs."""
    who = config.who
    sql = f"{GATED}; select g, gen_random_uuid()::text, pg_backend_pid() from generate_series(1, 1000) g"
    rows = pg.fetch(context, sql, parameters={"who": who}, settings={"test.who": who}, name=who)
    mark = Path(os.environ["DAGSTER_HOME"]) / f"fetched-{who}"
    if config.stalls and not mark.exists():
        mark.touch()
        time.sleep(600)
    return MaterializeResult(metadata={"rows": MetadataValue.json([list(row) for row in rows])})


@asset(retry_policy=RetryPolicy(max_retries=3, delay=0.2))
def stubborn(context: AssetExecutionContext, config: Who, pg: PgBackgroundResource) -> MaterializeResult[None]:
    return work(context, config, pg)


@asset
def many(context: AssetExecutionContext, config: Who, few_slots: PgBackgroundResource) -> MaterializeResult[None]:
    sql = "insert into done (who) values (%(who)s); select pg_sleep(0.1)"
    few_slots.run_many(context, {f"part_{number}": (sql, {"who": config.who}) for number in range(30)})
    return MaterializeResult()


@pg_background_asset(
    partitions_def=DailyPartitionsDefinition("2013-01-01", end_date="2013-02-01"),
    backfill_policy=BackfillPolicy.single_run(),
)
def days(context: AssetExecutionContext) -> tuple[str, Any]:
    return "insert into done (who) select unnest(%(partition_keys)s::text[])", partition_parameters(context)


WORKING = [plain, stubborn]
EXECUTORS = {"in_process": in_process_executor, "multiprocess": multiprocess_executor}

defs = Definitions(
    assets=[*WORKING, fetching, many, days, *[AssetSpec(name) for name in EXTERNALS]],
    jobs=[
        define_asset_job(f"{asset.key.to_user_string()}_{name}", [asset], executor_def=executor)
        for asset in [*WORKING, fetching, many]
        for name, executor in EXECUTORS.items()
    ],
    sensors=[
        build_pg_background_sensor(
            EXTERNALS,
            minimum_interval_seconds=1,
            max_events=max(len(EXTERNALS) // 10, 1),  # few at a time, so that it takes many ticks
            default_status=DefaultSensorStatus.STOPPED,
        )
    ],
    resources={
        "pg": PgBackgroundResource(conninfo=EnvVar("PGBG_TEST_CONNINFO")),
        "few_slots": PgBackgroundResource(conninfo=EnvVar("PGBG_TEST_CONNINFO_8")),
    },
)
