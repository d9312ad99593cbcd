"""Sensors: report jobs that nobody waited for, and end the workers of runs that are gone."""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import json
import logging
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
    DagsterRunStatus,
    DefaultSensorStatus,
    RunStatusSensorContext,
    SensorDefinition,
    SensorEvaluationContext,
    SensorResult,
    run_status_sensor,
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
        How many jobs one tick reports at most.
    """

    def report(context: SensorEvaluationContext, **resources: PgBackgroundResource) -> SensorResult:
        pg = resources[resource_key]
        cursor = Cursor.read(context.cursor)
        found = asyncio.run(_list_jobs(pg, assets))
        wanted = [pair for pair in found if cursor.since is None or _launched(pair[0]) >= cursor.since]
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
    )(_asking_for(resource_key, report))


def build_pg_background_sweep_sensors(
    *,
    name: str = "pg_background_sweep",
    resource_key: str = "pg",
    failed_runs: bool = True,
    default_status: DefaultSensorStatus = DefaultSensorStatus.RUNNING,
    minimum_interval_seconds: int = 15,
) -> list[SensorDefinition]:
    """Make sensors that end the workers of runs that are gone: a step that was killed could not end them itself.

    Parameters
    ----------
    name:
        The sensors' common name; each has the status that it watches behind it.
    resource_key:
        Key of the :class:`PgBackgroundResource`.
    failed_runs:
        Also those of runs that failed and that Dagster is not going to retry. Without this they go on, and can be
        attached to by a re-execution by hand.
    default_status:
        Whether the sensors run from the start.
    minimum_interval_seconds:
        Seconds between two ticks.
    """
    statuses = [DagsterRunStatus.CANCELING, DagsterRunStatus.CANCELED]
    if failed_runs:
        statuses.append(DagsterRunStatus.FAILURE)

    def make(status: DagsterRunStatus) -> SensorDefinition:
        def sweep(context: RunStatusSensorContext, **resources: PgBackgroundResource) -> None:
            pg = resources[resource_key]
            # The event may be old by now, or come twice: what counts is how things are.
            group = _relatives(context)
            if any(not run.is_finished and run.status is not DagsterRunStatus.CANCELING for run in group):
                context.log.info("another run of the same group is under way: its workers are left alone")
                return
            if any(run.status is DagsterRunStatus.FAILURE and _will_retry(run.tags) for run in group[:1]):
                context.log.info("the run is going to be retried: its workers are left to be attached to")
                return
            ended = asyncio.run(_sweep(pg, {run.run_id for run in group}))
            for line in ended:
                context.log.info(line)

        return run_status_sensor(
            run_status=status,
            name=f"{name}_{status.value.lower()}",
            default_status=default_status,
            minimum_interval_seconds=minimum_interval_seconds,
            description=f"Ends the workers of runs that are {status.value}.",
        )(_asking_for(resource_key, sweep))

    return [make(status) for status in statuses]


def _asking_for(resource_key: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function with a parameter of that name: a sensor finds its resources by the signature alone."""
    from .resource import PgBackgroundResource as Resource

    positional = inspect.Parameter.POSITIONAL_OR_KEYWORD
    function.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter("context", positional), inspect.Parameter(resource_key, positional, annotation=Resource)]
    )
    return function


# Reporting ----------------------------------------------------------------------------------------------------------


async def _list_jobs(
    pg: PgBackgroundResource, assets: Sequence[CoercibleToAssetKey] | Mapping[str, str]
) -> list[tuple[JobEntry, AssetKey]]:
    """Return the jobs that the assets come from, each with its asset, in the order of their launches."""
    from pgbg_orchestration import Launcher

    async with Launcher(pg.conninfo, schema=pg.pgbg_schema) as launcher:
        await launcher.facts()
        if isinstance(assets, Mapping):
            found = [
                (entry, AssetKey.from_user_string(key))
                for key, pattern in assets.items()
                for entry in await launcher.ledger.jobs(series=pattern)
            ]
        else:
            keys = [AssetKey.from_coercible(key) for key in assets]
            by_series = {identity.external_series(pg.namespace, key, None): key for key in keys}
            found = [
                (entry, by_series[_unpartitioned(entry)])
                for entry in await launcher.ledger.jobs(series=f"{pg.namespace}/external/*")
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
    if entry.job_id in earlier.of(key):
        return []
    outcome = PgBackgroundOutcome.of(outcome_of(entry), "", None)
    known = {name: value for name, value in outcome.metadata().items() if name not in ("pgbg/sql", "pgbg/launched")}
    return [
        AssetMaterialization(asset_key=key, partition=partition, metadata=known),
        _evaluation(key, {"pgbg/job_id": entry.job_id}, passed=True),
    ]


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


# Sweeping -----------------------------------------------------------------------------------------------------------


def _relatives(context: RunStatusSensorContext) -> list[Any]:
    """Return the run as it is now, and the runs that it re-executes or that re-execute it."""
    run = context.instance.get_run_by_id(context.dagster_run.run_id) or context.dagster_run
    group = context.instance.get_run_group(run.run_id)
    others = list(group[1]) if group else []
    return [run, *(other for other in others if other.run_id != run.run_id)]


def _will_retry(tags: Mapping[str, str]) -> bool:
    return tags.get("dagster/will_retry", "false").lower() == "true"


async def _sweep(pg: PgBackgroundResource, run_ids: set[str]) -> list[str]:
    """Cancel what still runs for these runs; returns what was done, in sentences."""
    from pgbg_orchestration import Launcher

    async with Launcher(pg.conninfo, schema=pg.pgbg_schema) as launcher:
        await launcher.facts()
        entries = await launcher.ledger.jobs(states=["running", "waiting"], series=f"{pg.namespace}/*")
        mine = [entry for entry in entries if _run_of(entry) in run_ids and not _is_external(entry, pg.namespace)]
        ends = await asyncio.gather(
            *(
                launcher.cancel(entry.job_id, owner=entry.owner, series=entry.series, reason="dagster: its run is gone")
                for entry in mine
            ),
            return_exceptions=True,
        )
    lines = []
    for entry, end in zip(mine, ends, strict=True):
        if isinstance(end, BaseException):
            logging.getLogger("dagster_resource").error("job %s could not be cancelled: %s", entry.job_id, end)
        lines.append(f"job {entry.job_id}: {end}")
    return lines


def _run_of(entry: JobEntry) -> str:
    return entry.job_id.rpartition("#")[2].partition("/")[0]


def _is_external(entry: JobEntry, namespace: str) -> bool:
    """Tell whether nobody is to wait for the job, so that the end of its run means nothing for it."""
    return (entry.series or "").startswith((f"{namespace}/external/", f"{namespace}/submitted"))
