"""What the ledger tells of jobs: the view ``pgbg.jobs``, read as anybody may read it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

import psycopg
from psycopg.rows import class_row

OF_SERIES = """
select job_id, series, state, attempt, worker_pid, row_count, command_tag, sqlstate, message,
       started_at, launched_at, ended_at
from pgbg.jobs
where starts_with(series, %s) and launched_at >= %s
order by launched_at
"""


@dataclass(frozen=True)
class JobRow:
    """A job as the view shows it now. ``attempt`` is the newest one; a later attempt takes the place of an earlier."""

    job_id: str
    series: str
    state: str
    attempt: int
    worker_pid: int | None
    row_count: int | None
    command_tag: str | None
    sqlstate: str | None
    message: str | None
    started_at: datetime | None
    launched_at: datetime
    ended_at: datetime | None

    @property
    def seconds(self) -> float | None:
        """How long the worker was at it."""
        if self.ended_at is None:
            return None
        return max((self.ended_at - (self.started_at or self.launched_at)).total_seconds(), 0.0)


def of_series(conn: psycopg.Connection, beginning: str, since: datetime) -> list[JobRow]:
    """Return the jobs launched since a moment whose series begins with a text, oldest first.

    The connection is in autocommit mode: the view refuses any other isolation than READ COMMITTED.
    """
    with conn.cursor(row_factory=class_row(JobRow)) as cursor:
        return cursor.execute(OF_SERIES, (beginning, since)).fetchall()
