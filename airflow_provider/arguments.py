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
        "label": given.worker_label or label_of(ti.dag_id, ti.task_id),
        "settings": dict(given.settings) if given.settings else None,
        "role": given.role,
        "isolation": given.isolation,
        "kind": given.kind,
        "queue_size": given.queue_size,
        "verify_sql": given.verify_sql,
        "drop_invalid_index": given.drop_invalid_index,
        "redact_details": given.redact_details,
    }


def label_of(dag_id: str, task_id: str, name: str = "") -> str:
    """Return the DAG's and the task's id, shortened at its start: the end tells tasks of one DAG apart."""
    from pgbg_orchestration.job import LABEL_BYTES

    full = f"{dag_id}.{task_id}{name}".encode()
    if len(full) <= LABEL_BYTES:
        return full.decode()
    return f"…{full[-(LABEL_BYTES - 3) :].decode(errors='ignore')}"
