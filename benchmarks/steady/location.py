"""The code location of the steady load: external assets, whose jobs are submitted elsewhere, and the sensors."""

import os

from dagster import AssetSpec, Definitions, EnvVar

from dagster_resource import (
    PgBackgroundResource,
    build_pg_background_job_checks,
    build_pg_background_sensor,
    build_pg_background_sweep_sensors,
)

from .reports import ASSETS

TICKS = round(float(os.environ["PGBG_STEADY_TICKS"]))

defs = Definitions(
    assets=[AssetSpec(name) for name in ASSETS],
    asset_checks=build_pg_background_job_checks(ASSETS),
    sensors=[
        build_pg_background_sensor(ASSETS, minimum_interval_seconds=TICKS),
        *build_pg_background_sweep_sensors(minimum_interval_seconds=TICKS),
    ],
    resources={"pg": PgBackgroundResource(conninfo=EnvVar("PGBG_STEADY_CONNINFO"))},
)
