"""A code location of external assets: their jobs are submitted elsewhere, and a sensor reports them."""

from dagster import AssetSpec, Definitions, EnvVar

from dagster_resource import PgBackgroundResource, build_pg_background_sensor

ASSETS = [f"external_{number}" for number in range(200)]

defs = Definitions(
    assets=[AssetSpec(name) for name in ASSETS],
    # Few at a time, so that it takes many ticks.
    sensors=[build_pg_background_sensor(ASSETS, minimum_interval_seconds=1, max_events=20)],
    resources={"pg": PgBackgroundResource(conninfo=EnvVar("PGBG_TEST_CONNINFO"))},
)
