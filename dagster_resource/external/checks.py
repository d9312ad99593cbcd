"""The checks that show whether the newest jobs of external assets committed."""

# No `from __future__ import annotations` here: Dagster reads the annotation of the context itself.

import asyncio
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from dagster import (
    AssetCheckExecutionContext,
    AssetCheckResult,
    AssetChecksDefinition,
    AssetCheckSpec,
    multi_asset_check,
)

from pgbg_orchestration.ledger.history import error_of

from . import asset_jobs

if TYPE_CHECKING:
    from dagster_resource.resource import PgBackgroundResource

    from .asset_jobs import ExternalAssets


def build_pg_background_job_checks(
    assets: "ExternalAssets", *, name: str = "pg_background_job_checks", resource_key: str = "pg"
) -> Sequence[AssetChecksDefinition]:
    """Make the checks by which :func:`build_pg_background_sensor` reports jobs that failed, so that Dagster shows them.

    Run by hand, a check asks the database for the newest job of its asset that has ended.

    Parameters
    ----------
    assets:
        The external assets, as the sensor takes them.
    name:
        Name of the step that runs the checks.
    resource_key:
        Key of the :class:`PgBackgroundResource`.

    Returns
    -------
    Sequence[AssetChecksDefinition]
        A check ``pg_background_job`` for each asset, in one step.
    """
    description = "Whether the newest job that was submitted for the asset has committed."
    specs = [
        AssetCheckSpec(asset_jobs.JOB_CHECK, asset=key, description=description) for key in asset_jobs.keys_of(assets)
    ]

    @multi_asset_check(specs=specs, name=name, can_subset=True, required_resource_keys={resource_key})
    def look(context: AssetCheckExecutionContext) -> Iterator[AssetCheckResult]:
        pg: PgBackgroundResource = getattr(context.op_execution_context.resources, resource_key)
        jobs = asyncio.run(asset_jobs.jobs_of(pg, assets))
        ended = {source.key: entry for entry, source in jobs if asset_jobs.has_ended(entry)}
        for check in context.selected_asset_check_keys:
            if (entry := ended.get(check.asset_key)) is None:
                continue
            error = error_of(entry)
            yield AssetCheckResult(
                asset_key=check.asset_key,
                check_name=check.name,
                passed=error is None,
                metadata=asset_jobs.check_metadata(entry, error, pg.web_url),
            )

    return [look]
