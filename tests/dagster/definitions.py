"""The code location that the tests' Dagster processes load. Its database is named by an environment variable."""

from dagster import (
    AssetExecutionContext,
    Config,
    Definitions,
    EnvVar,
    MaterializeResult,
    RetryPolicy,
    asset,
    define_asset_job,
    in_process_executor,
    multiprocess_executor,
)

from dagster_resource import PgBackgroundResource

WORK = "insert into done (who) values ('{who}'); select pg_sleep({seconds})"


class Seconds(Config):
    seconds: float = 60.0


@asset
def plain(context: AssetExecutionContext, config: Seconds, pg: PgBackgroundResource) -> MaterializeResult[None]:
    return pg.run(context, WORK.format(who="plain", seconds=config.seconds)).to_materialize_result()


@asset(retry_policy=RetryPolicy(max_retries=3, delay=0.2))
def stubborn(context: AssetExecutionContext, config: Seconds, pg: PgBackgroundResource) -> MaterializeResult[None]:
    return pg.run(context, WORK.format(who="stubborn", seconds=config.seconds)).to_materialize_result()


@asset
def many(context: AssetExecutionContext, config: Seconds, pg: PgBackgroundResource) -> MaterializeResult[None]:
    jobs = {f"part_{number}": WORK.format(who="many", seconds=config.seconds) for number in range(30)}
    pg.run_many(context, jobs, max_running=8)
    return MaterializeResult()


ASSETS = [plain, stubborn, many]
EXECUTORS = {"in_process": in_process_executor, "multiprocess": multiprocess_executor}

defs = Definitions(
    assets=ASSETS,
    jobs=[
        define_asset_job(f"{asset.key.to_user_string()}_{name}", [asset], executor_def=executor)
        for asset in ASSETS
        for name, executor in EXECUTORS.items()
    ],
    resources={"pg": PgBackgroundResource(conninfo=EnvVar("PGBG_TEST_CONNINFO"))},
)
