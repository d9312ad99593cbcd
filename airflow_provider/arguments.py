"""What a task's job is made of: the operator's attributes, in a form that Airflow can store."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .identity import Identity

JOB_FIELDS = (
    "sql", "parameters", "worker_label", "settings", "role", "isolation", "kind", "queue_size", "verify_sql",
    "drop_invalid_index", "redact_details",
)  # fmt: skip
"""Attributes that say what is to be run: of the operator and, so that Airflow renders them, of the start trigger."""

LEAD = timedelta(seconds=5)
"""From the deadline of a job that began in the triggerer to Airflow's own timeout.

That one ends the trigger where it stands: no ``on_kill``, no outcome of the job's, and its worker left at work.
"""

_STORABLE = ("str", "int", "float", "bool", "NoneType", "datetime", "date", "timedelta", "Decimal", "UUID")


def not_storable(value: object) -> str | None:
    """Return the name of a type in ``value`` that Airflow's trigger arguments cannot hold, or None."""
    if isinstance(value, Mapping):
        return next((found for item in value.values() if (found := not_storable(item))), None)
    if isinstance(value, list | tuple | set):
        return next((found for item in value if (found := not_storable(item))), None)
    name = type(value).__name__
    return None if name in _STORABLE else name


def job_arguments(given: Any, identity: Identity, ti: Any) -> dict[str, Any]:
    """Return the arguments of a task's job, in a form that Airflow can store.

    Parameters
    ----------
    given:
        The operator or trigger whose attributes say what is to be run.
    identity:
        Which job it is.
    ti:
        What has ``dag_id`` and ``task_id``, for a label where none is given.
    """
    return {
        "sql": given.sql if isinstance(given.sql, str) else list(given.sql),
        "parameters": dict(given.parameters) if isinstance(given.parameters, Mapping) else given.parameters,
        "id": identity.job_id,
        "series": identity.series,
        "generation": identity.generation,
        "label": label_of(given, identity, ti),
        "settings": dict(given.settings) if given.settings else None,
        "role": given.role,
        "isolation": given.isolation,
        "kind": given.kind,
        "queue_size": given.queue_size,
        "verify_sql": given.verify_sql,
        "drop_invalid_index": given.drop_invalid_index,
        "redact_details": given.redact_details,
    }


def label_of(given: Any, identity: Identity, ti: Any, member: str = "") -> str:
    """Return the label of a task's job: the one that is given, else the DAG's and the task's id and the map index.

    Parameters
    ----------
    given, identity, ti:
        As :func:`job_arguments` takes them.
    member:
        Name of the job in its batch; it stands at the end.
    """
    from pgbg_orchestration.labels import shorten_label

    mapped = "" if identity.map_index is None else f"[{identity.map_index}]"
    label: str = given.worker_label or f"{ti.dag_id}.{ti.task_id}{mapped}"
    if member:
        label = f"{label}.{member}"
    elif given.worker_label:
        return label  # as the user wants it, or an error that says how long it may be
    return shorten_label(label)
