"""Which job a step stands for, so that every later try of the same work finds it again.

A job's *series* names the work: the asset's step, its partition, and the job's name where a step has several. Jobs of
one series never run at the same time. A job's *id* adds the run that first wanted this work. Later tries share it:

- a retry of the step is in the same run;
- an automatic re-execution (the run-retries daemon's) stands for the run that it repeats;
- a re-execution by hand stands for it too as long as this step has not succeeded there: its job may be running yet, or
  have committed without anybody seeing it. Of a step that has succeeded it wants another go: a new job.

The newest of a series is the one that was registered last in the database, so that a run storage that is reset, or
another Dagster on the same database, cannot turn the order around.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from pgbg_orchestration.errors import InvalidJob
from pgbg_orchestration.series import dagster_job_id

from . import contexts

if TYPE_CHECKING:
    from dagster import AssetKey, DagsterInstance, DagsterRun

RETRY_NUMBER = "dagster/retry_number"  # the run-retries daemon's; a re-execution by hand does not inherit it
DIRECT = "EPHEMERAL"  # the run id of a context that was built by hand, in a test

# Ids that a step has used, by the step's context: a second job with the first one's id would be taken for done.
_used: WeakKeyDictionary[Any, set[str]] = WeakKeyDictionary()


@dataclass(frozen=True, slots=True)
class Identity:
    """A step as seen from outside: what stays the same when it is tried again.

    Attributes
    ----------
    work:
        Names the step's work: the same for each materialization of the same partition.
    origin:
        Id of the run that first wanted it.
    partition:
        The partition key, or ``first...last`` for a range.
    is_range:
        Whether the partition is a range.
    by_hand:
        Whether this run re-executes another one by hand.
    run_id:
        Id of the run itself.
    label:
        What a person is to see on the worker.
    """

    work: str
    origin: str
    partition: str | None
    is_range: bool
    by_hand: bool
    run_id: str
    label: str

    def series(self, name: str | None) -> str:
        """Return the series of the job ``name``."""
        return f"{self.work}/{name}" if name else self.work

    def job_id(self, name: str | None, *, anew: bool = False) -> str:
        """Return the id of the job ``name``; ``anew``: as a generation of this very run's."""
        return dagster_job_id(self.series(name), self.run_id if anew else self.origin)


def of_step(context: Any, namespace: str) -> Identity:
    """Return the identity of the step that ``context`` belongs to.

    Parameters
    ----------
    context:
        An execution context of an asset, an op or an asset check. For any other, behind which there is no run, each
        call is work of its own.
    namespace:
        Keeps apart what several Dagsters do in one database.
    """
    op = contexts.of_step(context)
    if not has_run(context):
        once = uuid.uuid4().hex
        name = op.op_def.name if _has_op(op) else getattr(op, "_sensor_name", None) or "direct"
        partition, is_range = _partition(op) if is_direct(context) else (None, False)
        return Identity(f"{namespace}/{name}/{once}", once, partition, is_range, False, once, name)
    partition, is_range = _partition(op)
    run = op.run
    step_key = op.get_step_execution_context().step.key
    origin = _origin(op.instance, run, step_key)
    work = f"{namespace}/{step_key}"
    by_hand = run.parent_run_id is not None and RETRY_NUMBER not in run.tags
    if not contexts.is_tried_again(context):
        # What a hook does belongs to this end of the step, and no other try of it stands for that.
        origin, by_hand = f"{run.run_id}/{op.retry_number}", False
    if not op.has_assets_def:
        # Two runs of a job without assets may well do different things, told by their config: they are strangers.
        work = f"{namespace}/{run.job_name}/{step_key}/{run.root_run_id or run.run_id}"
    label = step_key if partition is None else f"{step_key} {partition}"
    work = work if partition is None else f"{work}/{partition}"
    place = contexts.place_of(context)
    if place is not None:
        work, label = f"{work}/{place}", f"{place.rpartition('/')[2]}: {label}"
    return Identity(
        work=work,
        origin=origin,
        partition=partition,
        is_range=is_range,
        by_hand=by_hand,
        run_id=run.run_id,
        label=label,
    )


def claim(context: Any, job_id: str) -> None:
    """Note that the step uses ``job_id``.

    Raises
    ------
    InvalidJob
        It did already in this try: the second job would be taken for the first, which is done.
    """
    if not has_run(context):
        return  # each call is work of its own
    step = contexts.of_step(context).get_step_execution_context()
    used = _used.setdefault(step, set())
    if job_id in used:
        raise InvalidJob(
            "this step has a job of that name already",
            job_id=job_id,
            todo="Give each job of a step a name of its own: run(context, sql, name=...).",
        )
    used.add(job_id)


def external_series(namespace: str, asset_key: AssetKey, partition_key: str | None) -> str:
    """Return the series of the jobs that an external asset's materializations come from.

    Raises
    ------
    InvalidJob
        The key has a bar, which tells a partition from its asset.
    """
    if "|" in asset_key.to_user_string():
        raise InvalidJob(f"the key of an external asset must not have a bar: {asset_key.to_user_string()!r}")
    series = f"{namespace}/external/{asset_key.to_user_string()}"
    return series if partition_key is None else f"{series}|{partition_key}"


def has_run(context: Any) -> bool:
    """Tell whether there is a run behind the context; not behind a sensor's, nor one that was built by hand."""
    return hasattr(contexts.of_step(context), "run_id") and not is_direct(context)


def is_step(context: Any) -> bool:
    """Tell whether a step, or code that is called as one, has this context: not a sensor, and not nobody."""
    return has_run(context) or is_direct(context)


def is_direct(context: Any) -> bool:
    """Tell whether the context was built by hand, to call an asset or op directly."""
    return bool(getattr(contexts.of_step(context), "run_id", None) == DIRECT)


def _has_op(op: Any) -> bool:
    # A context that was built by hand has an op only while the asset is being called with it.
    return getattr(op, "_per_invocation_properties", None) is not None


def _partition(op: Any) -> tuple[str | None, bool]:
    if not op.has_partition_key and not _has_range(op):
        return None, False
    if _has_range(op):
        keys = op.partition_key_range
        if keys.start != keys.end:
            return f"{keys.start}...{keys.end}", True
        return str(keys.start), False
    return str(op.partition_key), False


def _has_range(op: Any) -> bool:
    return bool(getattr(op, "has_partition_key_range", False))


def _origin(instance: DagsterInstance, run: DagsterRun, step_key: str) -> str:
    """Return the id of the first run that wanted this step's work."""
    origin = run
    while (parent_id := origin.parent_run_id) is not None:
        parent = instance.get_run_by_id(parent_id)
        if parent is None:  # deleted; its id still names the job
            return parent_id
        if RETRY_NUMBER not in origin.tags and _succeeded(instance, parent_id, step_key):
            break
        origin = parent
    return origin.run_id


def _succeeded(instance: DagsterInstance, run_id: str, step_key: str) -> bool:
    from dagster._core.execution.stats import StepEventStatus

    stats = instance.get_run_step_stats(run_id, [step_key])
    return any(step.status is StepEventStatus.SUCCESS for step in stats)
