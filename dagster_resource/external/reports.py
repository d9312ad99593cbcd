"""The sensor that reports external assets when jobs have committed that nobody waited for."""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from dagster import (
    AssetCheckEvaluation,
    AssetCheckSeverity,
    AssetKey,
    AssetMaterialization,
    AssetRecordsFilter,
    DefaultSensorStatus,
    MetadataValue,
    SensorDefinition,
    SensorEvaluationContext,
    SensorResult,
    sensor,
)

from dagster_resource.steps.metadata import sql_of_block
from dagster_resource.steps.outcome import PgBackgroundOutcome
from pgbg_orchestration.ledger.history import error_of, outcome_of

from . import asset_jobs
from .asset_jobs import JOB_CHECK, Source

if TYPE_CHECKING:
    from dagster_resource.resource import PgBackgroundResource
    from pgbg_orchestration.ledger.history import JobEntry

    from .asset_jobs import ExternalAssets

TICK = 40.0  # seconds that a tick may take; Dagster ends it after 60 and then forgets its cursor
OVERLAP = timedelta(minutes=1)  # registrations become visible in another order than that of their times

PartitionOf = Callable[["JobEntry"], "str | None"]


@dataclass(frozen=True, slots=True)
class Cursor:
    """What a tick leaves to the next: how far back to look for each asset, and what has been reported from there on.

    Each asset has a place of its own: one that the sensor is given later begins at its first job, whatever the others
    have come to.
    """

    places: Mapping[str, datetime]
    reported: frozenset[str]

    @classmethod
    def read(cls, text: str | None) -> Cursor:
        """Return the cursor that a tick left; the first tick has none."""
        known = json.loads(text) if text else {}
        places = {name: datetime.fromisoformat(place) for name, place in known.get("places", {}).items()}
        return cls(places, frozenset(known.get("reported", ())))

    def write(self) -> str:
        """Return it as text."""
        places = {name: place.isoformat() for name, place in sorted(self.places.items())}
        return json.dumps({"places": places, "reported": sorted(self.reported)})


def build_pg_background_sensor(
    assets: ExternalAssets,
    *,
    name: str = "pg_background_sensor",
    resource_key: str = "pg",
    partition_of: PartitionOf | None = None,
    minimum_interval_seconds: int = 30,
    default_status: DefaultSensorStatus = DefaultSensorStatus.RUNNING,
    max_events: int = 1000,
) -> SensorDefinition:
    """Make a sensor that reports external assets as materialized when jobs submitted elsewhere have committed.

    A job that failed is reported by a failed check, ``pg_background_job``; Dagster shows it where the check is defined,
    which :func:`build_pg_background_job_checks` does. Each end of a job is reported once, also when the daemon is
    stopped in the middle; a tick that is cut off reports the rest the next time.

    Parameters
    ----------
    assets:
        The external assets whose jobs are submitted with ``submit(…, asset_key=…)``; or, for jobs of Airflow's, of
        ``pgbg run`` or of another step, a mapping from asset key to a pattern for their series (``*``, ``?``).
    name:
        Name of the sensor.
    resource_key:
        Key of the :class:`PgBackgroundResource`.
    partition_of:
        Returns the partition key of a job, for jobs that were not submitted with ``partition_key``.
    minimum_interval_seconds:
        Seconds between two ticks.
    default_status:
        Whether the sensor runs from the start.
    max_events:
        How many jobs one tick reports at most. The daemon stores some ten of them a second.

    Returns
    -------
    SensorDefinition
        The sensor; it takes the resource by its key.
    """

    def report(context: SensorEvaluationContext, **resources: PgBackgroundResource) -> SensorResult:
        pg = resources[resource_key]
        cursor = Cursor.read(context.cursor)
        wanted = asyncio.run(asset_jobs.jobs_of(pg, assets, cursor.places))
        events: list[AssetMaterialization | AssetCheckEvaluation] = []
        newest: dict[AssetKey, JobEntry] = {}
        reported: set[str] = set()
        unfinished: list[tuple[JobEntry, Source]] = []
        deadline = time.monotonic() + TICK
        earlier = Earlier(context, wanted)
        for number, (entry, source) in enumerate(wanted):
            mark = _mark(entry, source)
            if mark in cursor.reported:
                reported.add(mark)
            elif not asset_jobs.has_ended(entry):
                unfinished.append((entry, source))
            elif len(reported - cursor.reported) >= max_events or time.monotonic() > deadline:
                unfinished.extend(wanted[number:])
                break
            else:
                events += _events(earlier, entry, source.key, partition_of or asset_jobs.partition_of, pg.web_url)
                newest[source.key] = entry
                reported.add(mark)
        ended = len(reported - cursor.reported)
        # One for each asset: the daemon takes its time over every event, and the last one is what is shown.
        events += [_passed(entry, key, pg.web_url) for key, entry in newest.items() if error_of(entry) is None]
        sources = asset_jobs.sources_of(pg, assets)
        return SensorResult(
            asset_events=events,
            cursor=_advance(cursor, sources, wanted, unfinished, reported).write(),
            # Dagster shows it for a tick that launches no run, which is what every tick of this sensor does.
            skip_reason=_summary(ended, len(unfinished)),
        )

    return sensor(
        name=name,
        minimum_interval_seconds=minimum_interval_seconds,
        default_status=default_status,
        description="Reports external assets as materialized when their jobs have committed.",
    )(asking_for(resource_key, report))


def asking_for(resource_key: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function with a parameter of that name: a sensor finds its resources by the signature alone."""
    from dagster_resource.resource import PgBackgroundResource as Resource

    positional = inspect.Parameter.POSITIONAL_OR_KEYWORD
    function.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter("context", positional), inspect.Parameter(resource_key, positional, annotation=Resource)]
    )
    return function


# Reporting ----------------------------------------------------------------------------------------------------------


def _mark(entry: JobEntry, source: Source) -> str:
    """Name one end of a job, for one asset, in few characters: the cursor may hold thousands."""
    text = f"{source.name}\0{entry.owner}\0{entry.job_id}\0{entry.attempt}\0{entry.state}"
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _events(
    earlier: Earlier, entry: JobEntry, key: AssetKey, partition_of: PartitionOf, web_url: str | None
) -> list[AssetMaterialization | AssetCheckEvaluation]:
    """Return what a job that has ended is reported by, but for the check that it passed."""
    error = error_of(entry)
    if error is not None:
        return [_evaluation(key, asset_jobs.check_metadata(entry, error, web_url), passed=False)]
    if entry.job_id in earlier.of(key):
        return []
    partition, block = partition_of(entry), earlier.sql_of(key, entry.job_id)
    sql = (sql_of_block(block) if block else None) or ""
    outcome = replace(PgBackgroundOutcome.of(outcome_of(entry), sql, None, web_url=web_url), partition=partition)
    known = {name: value for name, value in outcome.metadata().items() if name != "pgbg/launched"}
    if block:
        known["pgbg/sql"] = MetadataValue.md(block)
    return [AssetMaterialization(asset_key=key, partition=partition, metadata=known)]


def _summary(ended: int, left: int) -> str:
    """Say in a sentence what a tick did."""
    what = "no job has ended since the last tick" if ended == 0 else f"jobs reported: {ended}"
    return f"{what}; at work or left to the next tick: {left}" if left else what


def _passed(entry: JobEntry, key: AssetKey, web_url: str | None) -> AssetCheckEvaluation:
    return _evaluation(key, asset_jobs.check_metadata(entry, None, web_url), passed=True)


def _evaluation(key: AssetKey, metadata: Mapping[str, Any], *, passed: bool) -> AssetCheckEvaluation:
    return AssetCheckEvaluation(
        asset_key=key, check_name=JOB_CHECK, passed=passed, severity=AssetCheckSeverity.ERROR, metadata=metadata
    )


class Earlier:
    """What Dagster's event log has of the jobs: who submitted them, and what a tick reported that lost its cursor."""

    def __init__(self, context: SensorEvaluationContext, wanted: Sequence[tuple[JobEntry, Source]]) -> None:
        self._context = context
        self._since: dict[AssetKey, datetime] = {}
        for entry, source in wanted:
            at = entry.registered_at or asset_jobs.launched(entry)
            self._since[source.key] = min(at, self._since.get(source.key, at))
        self._reported: dict[AssetKey, set[str]] = {}
        self._submitted: dict[AssetKey, dict[str, str]] = {}

    def of(self, key: AssetKey) -> set[str]:
        """Return the ids of the jobs that have a materialization of this asset."""
        if key not in self._reported:
            fetch = self._context.instance.fetch_materializations
            self._reported[key] = {job_id for job_id, _ in self._jobs_of_events(fetch, key)}
        return self._reported[key]

    def sql_of(self, key: AssetKey, job_id: str) -> str | None:
        """Return the SQL of a job as it was submitted for this asset, as a block; None where nothing tells."""
        if key not in self._submitted:
            fetch = self._context.instance.fetch_observations
            self._submitted[key] = {
                job_id: str(metadata["pgbg/sql"].value)
                for job_id, metadata in self._jobs_of_events(fetch, key)
                if "pgbg/sql" in metadata
            }
        return self._submitted[key].get(job_id)

    def _jobs_of_events(
        self, fetch: Callable[..., Any], key: AssetKey
    ) -> Iterator[tuple[str, Mapping[str, MetadataValue[Any]]]]:
        # The two clocks may differ.
        after = (self._since[key] - OVERLAP).timestamp()
        filtered = AssetRecordsFilter(asset_key=key, after_timestamp=after)
        cursor: str | None = None
        more = True
        while more:
            page = fetch(filtered, limit=1000, cursor=cursor)
            for record in page.records:
                event = record.asset_materialization or record.asset_observation
                if event and (metadata := event.metadata.get("pgbg/job_id")):
                    yield str(metadata.value), event.metadata
            cursor, more = page.cursor, page.has_more


def _advance(
    cursor: Cursor,
    sources: Sequence[Source],
    wanted: Sequence[tuple[JobEntry, Source]],
    unfinished: Sequence[tuple[JobEntry, Source]],
    reported: set[str],
) -> Cursor:
    """Return the next cursor: before an asset's place in it nothing can still change."""
    if not wanted:
        return cursor
    # Where an asset has no job, its place is that of the newest of all: the list need not be read from its beginning.
    newest = asset_jobs.launched(wanted[-1][0])
    places: dict[str, datetime] = {}
    for source in sources:
        mine = (asset_jobs.launched(entry) for entry, other in unfinished if other == source)
        moments = [min(mine, default=newest) - OVERLAP, cursor.places.get(source.name)]
        places[source.name] = max(filter(None, moments))
    kept = {_mark(entry, source) for entry, source in wanted if asset_jobs.launched(entry) >= places[source.name]}
    return Cursor(places, frozenset(reported & kept))
