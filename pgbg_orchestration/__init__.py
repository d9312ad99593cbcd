"""Run labelled SQL in PostgreSQL's background workers: one job, one commit.

>>> from pgbg_orchestration import Job, run
>>> run("dbname=flights", Job("refresh materialized view delays", id="delays/2013-01-01"))  # doctest: +SKIP
Outcome(job_id='delays/2013-01-01', ...)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import errors
from .job import Job, Kind
from .outcome import Cause, ErrorFields, Event, EventKind, Outcome
from .rows import Column, Fetch, NoRows, Rows

if TYPE_CHECKING:
    from .launcher import Launcher, arun, run

__all__ = [
    "Cause",
    "Column",
    "ErrorFields",
    "Event",
    "EventKind",
    "Fetch",
    "Job",
    "Kind",
    "Launcher",
    "NoRows",
    "Outcome",
    "Rows",
    "arun",
    "errors",
    "run",
]

# Imported when they are first used: they need psycopg, and a DAG file that only names a Job does not.
_LATER = ("Launcher", "arun", "run")


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(".launcher", __name__), name)
