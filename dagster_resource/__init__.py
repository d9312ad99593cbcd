"""Dagster integration: assets whose SQL runs in PostgreSQL's background workers."""

from __future__ import annotations

from dagster_shared.libraries import DagsterLibraryRegistry

from .assets import partition_parameters as partition_parameters
from .assets import pg_background_asset as pg_background_asset
from .assets import pg_background_asset_check as pg_background_asset_check
from .component import PgBackgroundSqlComponent as PgBackgroundSqlComponent
from .failures import PgBackgroundFailure as PgBackgroundFailure
from .failures import RunTerminated as RunTerminated
from .job_checks import build_pg_background_job_checks as build_pg_background_job_checks
from .jobs import JobOptions as JobOptions
from .jobs import Sql as Sql
from .outcome import PgBackgroundOutcome as PgBackgroundOutcome
from .resource import PgBackgroundResource as PgBackgroundResource
from .retry import RetryRule as RetryRule
from .sensors import build_pg_background_sensor as build_pg_background_sensor
from .sweeping import build_pg_background_sweep_sensors as build_pg_background_sweep_sensors

__version__ = "0.1.0"

DagsterLibraryRegistry.register("pg-background-orchestration", __version__, is_dagster_package=False)
