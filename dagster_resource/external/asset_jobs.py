"""External assets, and the jobs that make them: submitted for an asset, or launched elsewhere under a known series."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from dagster import AssetKey, MetadataValue

from dagster_resource.steps import identity
from dagster_resource.steps.metadata import page_of

if TYPE_CHECKING:
    from dagster._core.definitions.events import CoercibleToAssetKey

    from dagster_resource.resource import PgBackgroundResource
    from pgbg_orchestration import Launcher
    from pgbg_orchestration.errors import PgbgError
    from pgbg_orchestration.ledger.history import JobEntry

    ExternalAssets = Sequence[CoercibleToAssetKey] | Mapping[str, str]

JOB_CHECK = "pg_background_job"
"""Name of the check that says whether an external asset's newest job committed: Dagster has no event for a failure."""

SURELY_LOST = timedelta(seconds=60)  # a job that looks lost may be about to start
LOST = "lost"
LOOKS, PAUSE = 5, 0.2  # at jobs whose end is about to be written down, and seconds between two of them


def keys_of(assets: ExternalAssets) -> list[AssetKey]:
    """Return the keys of external assets, however they are told."""
    if isinstance(assets, Mapping):
        return [AssetKey.from_user_string(key) for key in assets]
    return [AssetKey.from_coercible(key) for key in assets]


@dataclass(frozen=True, slots=True)
class Source:
    """An external asset, and the series of the jobs that make it.

    Attributes
    ----------
    key:
        The asset.
    series:
        A pattern for their series; of submitted jobs the series itself, without the partition.
    """

    key: AssetKey
    series: str

    @property
    def name(self) -> str:
        """Tells it apart from others, and from what it was with another pattern."""
        return f"{self.key.to_user_string()} {self.series}"


def sources_of(pg: PgBackgroundResource, assets: ExternalAssets) -> list[Source]:
    """Return where the jobs of external assets are found."""
    if isinstance(assets, Mapping):
        return [Source(AssetKey.from_user_string(key), pattern) for key, pattern in assets.items()]
    return [Source(key, identity.external_series(pg.namespace, key, None)) for key in keys_of(assets)]


async def jobs_of(
    pg: PgBackgroundResource, assets: ExternalAssets, since: Mapping[str, datetime] | None = None
) -> list[tuple[JobEntry, Source]]:
    """Return the jobs of external assets, each with its source, in the order of their launches.

    Parameters
    ----------
    pg:
        For the database.
    assets:
        The assets.
    since:
        By a source's name, the moment from which on its jobs are wanted; all of them where there is none.
    """
    places = since or {}
    async with pg.launcher() as launcher:
        await launcher.facts()
        found = await _look(launcher, pg, assets, places)
        for _ in range(LOOKS):
            # A commit is told once, with the count and the duration that follow it at once.
            if not any(entry.is_being_written for entry, _ in found):
                break
            await asyncio.sleep(PAUSE)
            found = await _look(launcher, pg, assets, places)
    return sorted(found, key=lambda pair: launched(pair[0]))


async def _look(
    launcher: Launcher, pg: PgBackgroundResource, assets: ExternalAssets, places: Mapping[str, datetime]
) -> list[tuple[JobEntry, Source]]:
    sources = sources_of(pg, assets)
    if isinstance(assets, Mapping):
        return [
            (entry, source)
            for source in sources
            for entry in await launcher.ledger.jobs(series=source.series, since=places.get(source.name))
        ]
    by_series = {source.series: source for source in sources}
    known = [places.get(source.name) for source in sources]
    # One look for all of them, as far back as the one that needs most.
    first = None if None in known else min(filter(None, known), default=None)
    entries = await launcher.ledger.jobs(series=f"{pg.namespace}/external/*", since=first)
    return [
        (entry, source)
        for entry in entries
        if (source := by_series.get(_unpartitioned(entry))) is not None and _is_since(entry, places.get(source.name))
    ]


def _is_since(entry: JobEntry, moment: datetime | None) -> bool:
    return moment is None or launched(entry) >= moment


def launched(entry: JobEntry) -> datetime:
    """Return the moment by which jobs are put in order."""
    # A job that was only ever cancelled has never been launched.
    return entry.launched_at or entry.ended_at or datetime.now().astimezone()


def _unpartitioned(entry: JobEntry) -> str:
    return (entry.series or "").partition("|")[0]


def has_ended(entry: JobEntry) -> bool:
    """Tell whether the job has ended, for all that can be told."""
    if entry.state == LOST and entry.launched_at is not None:
        return datetime.now(entry.launched_at.tzinfo) - entry.launched_at > SURELY_LOST
    return entry.state not in ("running", "waiting")


def partition_of(entry: JobEntry) -> str | None:
    """Return the partition that the job was submitted for."""
    _, bar, partition = (entry.series or "").partition("|")
    return partition if bar else None


def check_metadata(entry: JobEntry, error: PgbgError | None, web_url: str | None) -> dict[str, Any]:
    """Return what a check tells of a job: of one that did not commit, why.

    Parameters
    ----------
    entry:
        The job.
    error:
        How it ended; None for one that committed.
    web_url:
        Address of the jobs' page; None where there is none.
    """
    metadata: dict[str, Any] = {"pgbg/job_id": entry.job_id}
    if error is not None:
        metadata |= {"pgbg/state": entry.state, "pgbg/error": str(error)}
        if error.sqlstate:
            metadata["pgbg/sqlstate"] = error.sqlstate
    if web_url:
        metadata["pgbg/page"] = MetadataValue.url(page_of(web_url, entry.job_id))
    return metadata
