"""Dagster integration: assets whose SQL runs in PostgreSQL's background workers."""

from __future__ import annotations

try:
    from dagster_shared.libraries import DagsterLibraryRegistry
except ModuleNotFoundError as missing:
    raise ImportError(
        "dagster_resource needs Dagster, which is not installed here: "
        "pip install 'pg-background-orchestration[dagster]'"
    ) from missing

from .assets import partition_parameters as partition_parameters
from .assets import pg_background_asset as pg_background_asset
from .assets import pg_background_asset_check as pg_background_asset_check
from .component import PgBackgroundSqlComponent as PgBackgroundSqlComponent
from .external.checks import build_pg_background_job_checks as build_pg_background_job_checks
from .external.reports import build_pg_background_sensor as build_pg_background_sensor
from .external.sweep import build_pg_background_sweep_sensors as build_pg_background_sweep_sensors
from .resource import PgBackgroundResource as PgBackgroundResource
from .steps.failures import PgBackgroundFailure as PgBackgroundFailure
from .steps.failures import RunTerminated as RunTerminated
from .steps.outcome import PgBackgroundOutcome as PgBackgroundOutcome
from .steps.retry_rules import RetryRule as RetryRule
from .steps.sql import JobOptions as JobOptions
from .steps.sql import Sql as Sql

__version__ = "0.1.0"

DagsterLibraryRegistry.register("pg-background-orchestration", __version__, is_dagster_package=False)
