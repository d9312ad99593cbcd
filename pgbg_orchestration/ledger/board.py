"""A server at one moment, in one query: its jobs, its workers whoever launched them, and its slots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import datetime, timedelta
from importlib import resources
from typing import Any, LiteralString

from psycopg import AsyncConnection, sql
from psycopg.rows import dict_row

from pgbg_orchestration.postgres import activity
from pgbg_orchestration.postgres.activity import Activity

from . import queries
from .history import JobEntry

HIDDEN = "<insufficient privilege>"
"""What ``pg_stat_activity`` gives in the place of a query that the login may not see."""


@dataclass(frozen=True, slots=True)
class WorkerSeen:
    """A worker in this database, as ``pg_stat_activity`` shows it; what the login may not see of it is None.

    ``activity`` says what it waits for, and how far its command is.
    """

    pid: int
    login: str | None
    application_name: str
    began_at: datetime | None
    state: str | None
    query: str | None
    activity: Activity | None

    @property
    def is_visible(self) -> bool:
        """Whether the login may see more of it than that it is there, and whose."""
        return self.query is not None


@dataclass(frozen=True, slots=True)
class Board:
    """A server at one moment.

    Attributes
    ----------
    looked_at:
        The moment, on the server's clock.
    slots, slots_used, not_visible:
        ``max_worker_processes``; how many of them are seen in use, by whatever; how many processes the login may not
        see well enough to tell whether they hold one.
    jobs:
        Jobs that have not ended, and those that ended a short while ago.
    ended_left_out:
        How many more ended within that time.
    workers:
        By process id.
    """

    looked_at: datetime
    database: str
    server_version: str
    slots: int
    slots_used: int
    not_visible: int
    ended_left_out: int
    jobs: tuple[JobEntry, ...]
    workers: Mapping[int, WorkerSeen]


async def look_at_all(
    conn: AsyncConnection[Any],
    schema: str,
    views: Sequence[str],
    *,
    ended_within: timedelta,
    most_ended: int | None = None,
) -> Board:
    """Look at everything, in one query.

    Parameters
    ----------
    conn:
        A connection in autocommit mode.
    schema:
        Name of the package's schema.
    views:
        The progress views that the server has (:func:`activity.views_of`).
    ended_within:
        Jobs that ended within this time are listed too.
    most_ended:
        How many of them at most: first those that did not commit, then the latest; None: all.

    Raises
    ------
    psycopg.Error
        The server refuses the query, or is away.
    """
    of_workers = activity.query_for(views, sql.SQL("a.pid in (select w.pid from workers as w)"))
    query = sql.SQL(_query()).format(s=sql.Identifier(schema), activity=of_workers)
    cursor = await conn.cursor(row_factory=dict_row).execute(
        query, {"ended_within": ended_within, "most_ended": most_ended}
    )
    row = await cursor.fetchone()
    assert row is not None
    jobs = tuple(_entry(job) for job in row.pop("jobs"))
    at = {backend["pid"]: activity.activity_of(backend) for backend in row.pop("activity")}
    workers = {worker["pid"]: _worker(worker, at.get(worker["pid"])) for worker in row.pop("workers")}
    return Board(**row, jobs=jobs, workers=workers)


async def cancel_worker(conn: AsyncConnection[Any], worker: WorkerSeen) -> bool:
    """Cancel the statement of a worker without a known job; returns whether the signal was accepted.

    Nothing is cancelled where its pid is another process's by now.

    Raises
    ------
    psycopg.errors.InsufficientPrivilege
        The login may not signal it.
    """
    cursor = await conn.execute(
        queries.QUERIES["cancel_worker"], (worker.pid, worker.began_at, worker.application_name)
    )
    row = await cursor.fetchone()
    return bool(row and row[0])


def _query() -> LiteralString:
    return resources.files(__package__).joinpath("sql", "board.sql").read_text(encoding="utf-8")


_TIMES = tuple(field.name for field in fields(JobEntry) if "datetime" in str(field.type))


def _entry(job: dict[str, Any]) -> JobEntry:
    known: dict[str, Any] = {field.name: job.get(field.name) for field in fields(JobEntry)}
    return JobEntry(**{**known, **{name: _time(known[name]) for name in _TIMES}})


def _worker(worker: dict[str, Any], at: Activity | None) -> WorkerSeen:
    query = worker.pop("query")
    began_at = _time(worker.pop("began_at"))
    return WorkerSeen(**worker, began_at=began_at, query=None if query == HIDDEN else query, activity=at)


def _time(value: str | None) -> datetime | None:
    return None if value is None else datetime.fromisoformat(value)
