"""Airflow provider: deferrable SQL in PostgreSQL background workers."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

__all__ = [
    "PgBackgroundBatchOperator",
    "PgBackgroundHook",
    "PgBackgroundOperator",
    "PgBackgroundSensor",
    "PgBackgroundTrigger",
    "SqlStateRetryPolicy",
]

if find_spec("airflow") is None:
    raise ImportError(
        "airflow_provider needs Apache Airflow, which is not installed here: "
        "pip install 'pg-background-orchestration[airflow]'"
    )

# Imported when they are first used, so that a DAG file pays for what it names.
_LATER = {
    "PgBackgroundBatchOperator": "operators",
    "PgBackgroundHook": "hook",
    "PgBackgroundOperator": "operators",
    "PgBackgroundSensor": "sensors",
    "PgBackgroundTrigger": "triggers",
    "SqlStateRetryPolicy": "retry_policy",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_LATER[name]}", __name__), name)
