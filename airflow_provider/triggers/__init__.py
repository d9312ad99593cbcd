"""The triggers: they launch a job or attach to it, so any copy of one, in any triggerer, resumes rightly.

Airflow's database keeps them as ``airflow_provider.triggers.`` and their name, whatever module of this room they are
in: a row that one release wrote is read by the next.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .batch import PgBackgroundBatchTrigger
    from .job import PgBackgroundStartTrigger, PgBackgroundTrigger
    from .sensor import PgBackgroundSensorTrigger

__all__ = [
    "PgBackgroundBatchTrigger",
    "PgBackgroundSensorTrigger",
    "PgBackgroundStartTrigger",
    "PgBackgroundTrigger",
]

# Imported when they are first used: whoever names a task's state or a login needs no trigger.
_LATER = {
    "PgBackgroundBatchTrigger": "batch",
    "PgBackgroundSensorTrigger": "sensor",
    "PgBackgroundStartTrigger": "job",
    "PgBackgroundTrigger": "job",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_LATER[name]}", __name__), name)
