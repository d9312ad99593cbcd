"""The sensors that end the workers of runs that are gone."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dagster import (
    DagsterRunStatus,
    DefaultSensorStatus,
    RunStatusSensorContext,
    SensorDefinition,
    SensorEvaluationContext,
    SkipReason,
    run_status_sensor,
    sensor,
)

from dagster_resource.steps.batch import RUN_IS_GONE
from pgbg_orchestration.outcome import Cause

from .reports import asking_for

if TYPE_CHECKING:
    from dagster import DagsterInstance

    from dagster_resource.resource import PgBackgroundResource
    from pgbg_orchestration import Launcher
    from pgbg_orchestration.ledger.history import JobEntry


ORPHANS_SECONDS = 60


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

    Returns
    -------
    list[SensorDefinition]
        One for each status: CANCELING, CANCELED and, with ``failed_runs``, FAILURE; and one that looks for what these
        have not seen: workers at work whose run has ended so, and whose launcher is gone.
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
            for line in asyncio.run(_sweep(pg, {run.run_id for run in group})):
                context.log.info(line)

        return run_status_sensor(
            run_status=status,
            name=f"{name}_{status.value.lower()}",
            default_status=default_status,
            minimum_interval_seconds=minimum_interval_seconds,
            description=f"Ends the workers of runs that are {status.value}.",
        )(asking_for(resource_key, sweep))

    return [make(status) for status in statuses] + [
        _orphans_sensor(
            f"{name}_orphans",
            resource_key,
            {DagsterRunStatus.CANCELED, *statuses},
            default_status=default_status,
            minimum_interval_seconds=max(minimum_interval_seconds, ORPHANS_SECONDS),
        )
    ]


def _orphans_sensor(
    name: str, resource_key: str, statuses: Collection[DagsterRunStatus], **options: Any
) -> SensorDefinition:
    """Make the sensor that asks the database what is at work, and Dagster whether its run is."""

    def look(context: SensorEvaluationContext, **resources: PgBackgroundResource) -> SkipReason:
        pg = resources[resource_key]
        lines = asyncio.run(_sweep_orphans(pg, context.instance, statuses))
        for line in lines:
            context.log.warning(line)
        return SkipReason("; ".join(lines) or "no worker is without a run")

    return sensor(
        name=name, description="Ends workers whose runs have ended, and whose launchers are gone.", **options
    )(asking_for(resource_key, look))


async def _sweep_orphans(
    pg: PgBackgroundResource, instance: DagsterInstance, statuses: Collection[DagsterRunStatus]
) -> list[str]:
    """Cancel what is at work for runs that ended otherwise; returns what was found and done, in sentences."""
    async with pg.launcher() as launcher:
        await launcher.facts()
        entries = await launcher.ledger.jobs(states=["running", "waiting"], series=f"{pg.namespace}/*")
        found = [entry for entry in entries if not entry.has_launcher and not _is_external(entry, pg.namespace)]
        gone = {run_id for run_id in {_run_of(entry) for entry in found} if _is_gone(instance, run_id, statuses)}
        mine = [entry for entry in found if _run_of(entry) in gone]
        if pg.cancel_on_termination == "never":
            return [f"job {entry.job_id}: its run is gone, and it is left at work" for entry in mine]
        return await _cancel(launcher, mine)


def _is_gone(instance: DagsterInstance, run_id: str, statuses: Collection[DagsterRunStatus]) -> bool:
    """Tell whether the run, and with it all that re-execute it, has ended in one of these, and is not tried again.

    A run that this Dagster does not know is not its own to judge.
    """
    group = instance.get_run_group(run_id) if instance.has_run(run_id) else None
    runs = list(group[1]) if group else []
    return bool(runs) and all(
        run.status in statuses and not (run.status is DagsterRunStatus.FAILURE and _will_retry(run.tags))
        for run in runs
    )


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
    async with pg.launcher() as launcher:
        await launcher.facts()
        entries = await launcher.ledger.jobs(states=["running", "waiting"], series=f"{pg.namespace}/*")
        mine = [entry for entry in entries if _run_of(entry) in run_ids and not _is_external(entry, pg.namespace)]
        return await _cancel(launcher, mine)


async def _cancel(launcher: Launcher, entries: Sequence[JobEntry]) -> list[str]:
    """Cancel jobs for good; a second sweep at the same time finds them cancelled."""
    ends = await asyncio.gather(
        *(
            launcher.cancel(
                entry.job_id, owner=entry.owner, series=entry.series, reason=RUN_IS_GONE, cause=Cause.RUN_GONE
            )
            for entry in entries
        ),
        return_exceptions=True,
    )
    lines = []
    for entry, end in zip(entries, ends, strict=True):
        if isinstance(end, BaseException):
            logging.getLogger("dagster_resource").error("job %s could not be cancelled: %s", entry.job_id, end)
        lines.append(f"job {entry.job_id}: its run is gone; {end}")
    return lines


def _run_of(entry: JobEntry) -> str:
    return entry.job_id.rpartition("#")[2].partition("/")[0]


def _is_external(entry: JobEntry, namespace: str) -> bool:
    """Tell whether nobody is to wait for the job, so that the end of its run means nothing for it."""
    return (entry.series or "").startswith((f"{namespace}/external/", f"{namespace}/submitted"))
