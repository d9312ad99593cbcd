"""External assets, and the jobs that make them: submitted for an asset, or launched elsewhere under a known series."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from dagster import AssetKey

from dagster_resource.steps import identity

if TYPE_CHECKING:
    from dagster._core.definitions.events import CoercibleToAssetKey

    from dagster_resource.resource import PgBackgroundResource
    from pgbg_orchestration.errors import PgbgError
    from pgbg_orchestration.ledger.history import JobEntry

    ExternalAssets = Sequence[CoercibleToAssetKey] | Mapping[str, str]

JOB_CHECK = "pg_background_job"
"""Name of the check that says whether an external asset's newest job committed: Dagster has no event for a failure."""

SETTLED = timedelta(seconds=60)  # a job that looks lost may be about to start
LOST = "lost"


def keys_of(assets: ExternalAssets) -> list[AssetKey]:
    """Return the keys of external assets, however they are told."""
    if isinstance(assets, Mapping):
        return [AssetKey.from_user_string(key) for key in assets]
    return [AssetKey.from_coercible(key) for key in assets]


async def jobs_of(
    pg: PgBackgroundResource, assets: ExternalAssets, since: datetime | None = None
) -> list[tuple[JobEntry, AssetKey]]:
    """Return the jobs launched since then, each with the asset that it makes, in the order of their launches."""
    from pgbg_orchestration import Launcher

    async with Launcher(pg.conninfo, schema=pg.pgbg_schema) as launcher:
        await launcher.facts()
        if isinstance(assets, Mapping):
            found = [
                (entry, AssetKey.from_user_string(key))
                for key, pattern in assets.items()
                for entry in await launcher.ledger.jobs(series=pattern, since=since)
            ]
        else:
            by_series = {identity.external_series(pg.namespace, key, None): key for key in keys_of(assets)}
            found = [
                (entry, by_series[_unpartitioned(entry)])
                for entry in await launcher.ledger.jobs(series=f"{pg.namespace}/external/*", since=since)
                if _unpartitioned(entry) in by_series
            ]
    return sorted(found, key=lambda pair: launched(pair[0]))


def launched(entry: JobEntry) -> datetime:
    """Return the moment by which jobs are put in order."""
    # A job that was only ever cancelled has never been launched.
    return entry.launched_at or entry.ended_at or datetime.now().astimezone()


def _unpartitioned(entry: JobEntry) -> str:
    return (entry.series or "").partition("|")[0]


def is_settled(entry: JobEntry) -> bool:
    """Tell whether the job has ended, for all that can be told."""
    if entry.state == LOST and entry.launched_at is not None:
        return datetime.now(entry.launched_at.tzinfo) - entry.launched_at > SETTLED
    return entry.state not in ("running", "waiting")


def partition_of(entry: JobEntry) -> str | None:
    """Return the partition that the job was submitted for."""
    _, bar, partition = (entry.series or "").partition("|")
    return partition if bar else None


def failure_metadata(entry: JobEntry, error: PgbgError) -> dict[str, Any]:
    """Return what a failed check tells of a job that did not commit."""
    return {
        "pgbg/job_id": entry.job_id,
        "pgbg/state": entry.state,
        "pgbg/error": str(error),
        **({"pgbg/sqlstate": error.sqlstate} if error.sqlstate else {}),
    }
