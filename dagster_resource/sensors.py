"""The sensor that reports external assets when jobs have committed that nobody waited for."""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from dagster import (
    AssetCheckEvaluation,
    AssetCheckSeverity,
    AssetKey,
    AssetMaterialization,
    AssetRecordsFilter,
    DefaultSensorStatus,
    SensorDefinition,
    SensorEvaluationContext,
    SensorResult,
    sensor,
)

from . import identity
from .elsewhere import error_of, outcome_of
from .outcome import PgBackgroundOutcome

if TYPE_CHECKING:
    from dagster._core.definitions.events import CoercibleToAssetKey

    from pgbg_orchestration.ledger import JobEntry

    from .resource import PgBackgroundResource

JOB_CHECK = "pg_background_job"
"""Name of the check that says whether an external asset's newest job committed: Dagster has no event for a failure."""

TICK = 40.0  # seconds that a tick may take; Dagster ends it after 60 and then forgets its cursor
OVERLAP = timedelta(minutes=1)  # registrations become visible in another order than that of their times
SETTLED = timedelta(seconds=60)  # a job that looks lost may be about to start
LOST = "lost"

PartitionOf = Callable[["JobEntry"], "str | None"]


@dataclass(frozen=True, slots=True)
class Cursor:
    """What a tick leaves to the next: how far back to look, and what has been reported from there on."""

    since: datetime | None
    reported: frozenset[str]

    @classmethod
    def read(cls, text: str | None) -> Cursor:
        """Return the cursor that a tick left; the first tick has none."""
        if not text:
            return cls(None, frozenset())
        known = json.loads(text)
        since = known["since"]
        return cls(datetime.fromisoformat(since) if since else None, frozenset(known["reported"]))

    def write(self) -> str:
        """Return it as text."""
        since = self.since.isoformat() if self.since else None
        return json.dumps({"since": since, "reported": sorted(self.reported)})


def build_pg_background_sensor(
    assets: Sequence[CoercibleToAssetKey] | Mapping[str, str],
    *,
    name: str = "pg_background_sensor",
    resource_key: str = "pg",
    partition_of: PartitionOf | None = None,
    minimum_interval_seconds: int = 30,
    default_status: DefaultSensorStatus = DefaultSensorStatus.RUNNING,
    max_events: int = 1000,
) -> SensorDefinition:
    """Make a sensor that reports external assets as materialized when jobs submitted elsewhere have committed.

    A job that failed is reported by a failed check, ``pg_background_job``. Each end of a job is reported once, also
    when the daemon is stopped in the middle; a tick that is cut off reports the rest the next time.

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
        wanted = asyncio.run(_list_jobs(pg, assets, cursor.since))
        events: list[AssetMaterialization | AssetCheckEvaluation] = []
        reported: set[str] = set()
        unfinished: list[JobEntry] = []
        deadline = time.monotonic() + TICK
        earlier = Earlier(context, wanted)
        for number, (entry, key) in enumerate(wanted):
            mark = _mark(entry)
            if mark in cursor.reported:
                reported.add(mark)
            elif not _is_settled(entry):
                unfinished.append(entry)
            elif len(reported - cursor.reported) >= max_events or time.monotonic() > deadline:
                unfinished.extend(entry for entry, _ in wanted[number:])
                break
            else:
                partition = partition_of(entry) if partition_of else _partition(entry)
                events += _events(earlier, entry, key, partition)
                reported.add(mark)
        return SensorResult(
            asset_events=events, cursor=_advance(cursor, [entry for entry, _ in wanted], unfinished, reported).write()
        )

    return sensor(
        name=name,
        minimum_interval_seconds=minimum_interval_seconds,
        default_status=default_status,
        description="Reports external assets as materialized when their jobs have committed.",
    )(asking_for(resource_key, report))


def asking_for(resource_key: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function with a parameter of that name: a sensor finds its resources by the signature alone."""
    from .resource import PgBackgroundResource as Resource

    positional = inspect.Parameter.POSITIONAL_OR_KEYWORD
    function.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter("context", positional), inspect.Parameter(resource_key, positional, annotation=Resource)]
    )
    return function


# Reporting ----------------------------------------------------------------------------------------------------------


async def _list_jobs(
    pg: PgBackgroundResource, assets: Sequence[CoercibleToAssetKey] | Mapping[str, str], since: datetime | None
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
            keys = [AssetKey.from_coercible(key) for key in assets]
            by_series = {identity.external_series(pg.namespace, key, None): key for key in keys}
            found = [
                (entry, by_series[_unpartitioned(entry)])
                for entry in await launcher.ledger.jobs(series=f"{pg.namespace}/external/*", since=since)
                if _unpartitioned(entry) in by_series
            ]
    return sorted(found, key=lambda pair: _launched(pair[0]))


def _launched(entry: JobEntry) -> datetime:
    # A job that was only ever cancelled has never been launched.
    return entry.launched_at or entry.ended_at or datetime.now().astimezone()


def _unpartitioned(entry: JobEntry) -> str:
    return (entry.series or "").partition("|")[0]


def _mark(entry: JobEntry) -> str:
    """Name one end of a job, in few characters: the cursor may hold thousands."""
    text = f"{entry.owner}\0{entry.job_id}\0{entry.attempt}\0{entry.state}"
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _is_settled(entry: JobEntry) -> bool:
    if entry.state == LOST and entry.launched_at is not None:
        return datetime.now(entry.launched_at.tzinfo) - entry.launched_at > SETTLED
    return entry.state not in ("running", "waiting")


def _partition(entry: JobEntry) -> str | None:
    _, bar, partition = (entry.series or "").partition("|")
    return partition if bar else None


def _events(
    earlier: Earlier, entry: JobEntry, key: AssetKey, partition: str | None
) -> list[AssetMaterialization | AssetCheckEvaluation]:
    error = error_of(entry)
    if error is not None:
        metadata: dict[str, Any] = {
            "pgbg/job_id": entry.job_id,
            "pgbg/state": entry.state,
            "pgbg/error": str(error),
            **({"pgbg/sqlstate": error.sqlstate} if error.sqlstate else {}),
        }
        return [_evaluation(key, metadata, passed=False)]
    check = _evaluation(key, {"pgbg/job_id": entry.job_id}, passed=True)
    if entry.job_id in earlier.of(key):
        return [check]  # the daemon may have been stopped between the two
    outcome = PgBackgroundOutcome.of(outcome_of(entry), "", None)
    known = {name: value for name, value in outcome.metadata().items() if name not in ("pgbg/sql", "pgbg/launched")}
    return [AssetMaterialization(asset_key=key, partition=partition, metadata=known), check]


def _evaluation(key: AssetKey, metadata: Mapping[str, Any], *, passed: bool) -> AssetCheckEvaluation:
    return AssetCheckEvaluation(
        asset_key=key, check_name=JOB_CHECK, passed=passed, severity=AssetCheckSeverity.ERROR, metadata=metadata
    )


class Earlier:
    """The jobs that an earlier tick has reported, and was ended before its cursor was kept."""

    def __init__(self, context: SensorEvaluationContext, wanted: Sequence[tuple[JobEntry, AssetKey]]) -> None:
        self._context = context
        self._since: dict[AssetKey, datetime] = {}
        for entry, key in wanted:
            at = entry.registered_at or _launched(entry)
            self._since[key] = min(at, self._since.get(key, at))
        self._known: dict[AssetKey, set[str]] = {}

    def of(self, key: AssetKey) -> set[str]:
        """Return the ids of the jobs that have a materialization of this asset."""
        if key not in self._known:
            self._known[key] = set()
            # The two clocks may differ.
            after = (self._since[key] - OVERLAP).timestamp()
            filtered = AssetRecordsFilter(asset_key=key, after_timestamp=after)
            cursor: str | None = None
            more = True
            while more:
                page = self._context.instance.fetch_materializations(filtered, limit=1000, cursor=cursor)
                for record in page.records:
                    told = record.asset_materialization and record.asset_materialization.metadata.get("pgbg/job_id")
                    if told:
                        self._known[key].add(str(told.value))
                cursor, more = page.cursor, page.has_more
        return self._known[key]


def _advance(cursor: Cursor, wanted: Sequence[JobEntry], unfinished: Sequence[JobEntry], reported: set[str]) -> Cursor:
    """Return the next cursor: nothing before it can still change."""
    if not wanted:
        return cursor
    oldest = min((_launched(entry) for entry in unfinished), default=_launched(wanted[-1]))
    since = max(filter(None, (oldest - OVERLAP, cursor.since)))
    kept = {_mark(entry) for entry in wanted if _launched(entry) >= since}
    return Cursor(since, frozenset(reported & kept))
