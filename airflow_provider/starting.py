"""Tasks that begin in the triggerer: what a DAG file may ask for, and what Airflow is told of it.

A DAG file imports this, so it imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from airflow.triggers.base import StartTriggerArgs

    from .operators import PgBackgroundOperator

_WITHOUT = "Leave start_from_trigger out: the task then begins on a worker, for a moment, and waits in the triggerer."
LEAD = timedelta(seconds=5)
"""From the deadline of a job that began in the triggerer to Airflow's own timeout.

That one ends the trigger where it stands: no ``on_kill``, no outcome of the job's, and its worker left at work.
"""
JOB_FIELDS = (
    "sql", "parameters", "worker_label", "settings", "role", "isolation", "kind", "queue_size", "verify_sql",
    "drop_invalid_index",
    "redact_details",
)  # fmt: skip
"""Attributes that say what is to be run: of the operator and, so that Airflow renders them, of the trigger."""

_STORABLE = ("str", "int", "float", "bool", "NoneType", "datetime", "date", "timedelta", "Decimal", "UUID")


def not_storable(value: object) -> str | None:
    """Return the name of a type in ``value`` that Airflow's trigger arguments cannot hold, or None."""
    if isinstance(value, Mapping):
        return next((found for item in value.values() if (found := not_storable(item))), None)
    if isinstance(value, list | tuple | set):
        return next((found for item in value if (found := not_storable(item))), None)
    name = type(value).__name__
    return None if name in _STORABLE else name


def check(operator: PgBackgroundOperator) -> None:
    """Refuse a task that cannot soundly begin in the triggerer.

    Raises
    ------
    ValueError
        With the reason, and what to do.
    """
    name = f"{type(operator).__name__} {operator.task_id!r} cannot have start_from_trigger=True"
    if not operator.can_start_from_trigger:
        raise ValueError(f"{name}: what it runs is put together on a worker. {_WITHOUT}")
    if getattr(operator, "_BaseOperator__from_mapped", False):
        check_mapped({"start_from_trigger": True, "task_id": operator.task_id})
    if operator.retries and operator.durable:
        raise ValueError(
            f"{name} with retries={operator.retries}: in a triggerer nothing tells an automatic retry, which must not "
            "run committed SQL again, from a clear, which must. Set retries=0, or durable=False where it does no harm "
            f"to run committed SQL once more. {_WITHOUT}"
        )
    for field, value in _given(operator).items():
        if strange := not_storable(value):
            raise ValueError(
                f"{name}: {field} is or holds a {strange}, which Airflow cannot store for a trigger. {_WITHOUT}"
            )


def check_mapped(kwargs: Mapping[str, Any]) -> None:
    """Refuse mapped tasks that are to begin in the triggerer: Airflow has no such thing, and says nothing of it.

    Raises
    ------
    ValueError
        With what to do.
    """
    # Airflow looks for the defaults of a mapped task's own arguments on a worker only.
    defaults = [getattr(kwargs.get(owner), "default_args", None) or {} for owner in ("dag", "task_group")]
    given = {name: value for layer in (*defaults, kwargs) for name, value in layer.items()}
    if given.get("start_from_trigger"):
        raise ValueError(
            f"the mapped task {kwargs.get('task_id')!r} cannot have start_from_trigger=True: Airflow starts no mapped "
            f"task in a triggerer. {_WITHOUT}"
        )


def arguments_of(operator: PgBackgroundOperator) -> StartTriggerArgs:
    """Return what Airflow's scheduler makes the trigger of."""
    from airflow.triggers.base import StartTriggerArgs

    timeout = operator.timeout
    if timeout is not None and not isinstance(timeout, timedelta):
        timeout = timedelta(seconds=timeout)
    return StartTriggerArgs(
        trigger_cls="airflow_provider.triggers.PgBackgroundStartTrigger",
        trigger_kwargs=_given(operator),
        next_method="execute_complete",
        # Airflow's clock begins with the try; the trigger's deadline comes a little before it.
        timeout=None if timeout is None else timeout + LEAD,
    )


def _given(operator: PgBackgroundOperator) -> dict[str, Any]:
    return {
        **{field: getattr(operator, field) for field in JOB_FIELDS},
        "end_task": operator.ends_in_trigger,
        "do_xcom_push": bool(operator.do_xcom_push),
        **operator.trigger_arguments(),
    }
