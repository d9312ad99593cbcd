"""Where a view gets what it shows, and what it may do: one launcher; what goes on now is one query."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Literal, Protocol

import psycopg

from pgbg_orchestration.launcher import Launcher
from pgbg_orchestration.ledger import board
from pgbg_orchestration.ledger.board import Board, WorkerSeen
from pgbg_orchestration.ledger.history import Durations, FirstRows, JobDetail, JobEntry
from pgbg_orchestration.postgres import activity

ENDED_WITHIN = timedelta(minutes=15)
"""How long a job that ended stays on the board."""
MOST_NAMES = 1_000  # of labels that fit one whose own characters are wildcards
FIRST_ROWS = 10  # of each statement's kept rows, on a job's page
REASON = "cancelled by a person who watched"


class Source(Protocol):
    """What a view needs of a server; a test may stand in for one."""

    async def board(self, *, most_ended: int | None = None) -> Board:
        """Look at everything; of the jobs that ended at so many at most, as :func:`board.look_at_all` does."""

    async def history(self, *, since: datetime | None, label: str | None, limit: int) -> list[JobEntry]:
        """Return jobs launched since then whose label fits, newest first."""

    async def job(self, owner: str | None, job_id: str) -> JobEntry | None:
        """Return one job; None where there is none, or none that the login may see. No owner: the newest of that id."""

    async def detail(self, job: JobEntry) -> JobDetail | None:
        """Return a job's SQL and its attempts; None where the login may not ask for them."""

    async def first_rows(self, job: JobEntry) -> list[FirstRows]:
        """Return the first rows that a job kept."""

    async def usual(self, label: str) -> Durations | None:
        """Return how jobs of a label went so far; None where none has ended."""

    async def cancel(self, job: JobEntry) -> Literal["cancelled", "committed"]:
        """Cancel a job for good; returns how it was decided."""

    async def cancel_worker(self, worker: WorkerSeen) -> bool:
        """Cancel a worker that no job is known of; returns whether the signal was accepted."""


class ServerSource:
    """A database, seen through a launcher.

    Parameters
    ----------
    launcher:
        Open; whoever opened it closes it.
    """

    def __init__(self, launcher: Launcher) -> None:
        self._launcher = launcher
        self._views: tuple[str, ...] | None = None

    async def board(self, *, most_ended: int | None = None) -> Board:
        """Look at everything; of the jobs that ended at so many at most, as :func:`board.look_at_all` does.

        Raises
        ------
        PgbgError
            The server is out of reach, or not ready.
        """
        ledger = self._launcher.ledger
        if self._views is None:
            self._views = await ledger.run(activity.views_of)
        views: tuple[str, ...] = self._views
        return await ledger.run(
            lambda conn: board.look_at_all(conn, ledger.schema, views, ended_within=ENDED_WITHIN, most_ended=most_ended)
        )

    async def history(self, *, since: datetime | None, label: str | None, limit: int) -> list[JobEntry]:
        """Return jobs launched since then whose label fits, newest first.

        Raises
        ------
        PgbgError
            As :meth:`board`.
        """
        return await self._launcher.ledger.jobs(since=since, label=label, limit=limit)

    async def job(self, owner: str | None, job_id: str) -> JobEntry | None:
        """Return one job; None where there is none, or none that the login may see. No owner: the newest of that id.

        Raises
        ------
        PgbgError
            As :meth:`board`.
        """
        found = await self._launcher.ledger.jobs(job_id=job_id)
        return next((entry for entry in found if owner in (None, entry.owner)), None)

    async def detail(self, job: JobEntry) -> JobDetail | None:
        """Return a job's SQL and its attempts; None where the login may not ask for them.

        Raises
        ------
        PgbgError
            As :meth:`board`.
        """
        try:
            return await self._launcher.ledger.detail(job.owner, job.job_id)
        except psycopg.errors.InsufficientPrivilege:
            return None

    async def first_rows(self, job: JobEntry) -> list[FirstRows]:
        """Return the first rows that a job kept; none where the login may not ask for them.

        Raises
        ------
        PgbgError
            As :meth:`board`.
        """
        try:
            return await self._launcher.ledger.first_rows(job.owner, job.job_id, FIRST_ROWS)
        except psycopg.errors.InsufficientPrivilege:
            return []

    async def usual(self, label: str) -> Durations | None:
        """Return how jobs of a label went so far; None where none has ended.

        Raises
        ------
        PgbgError
            As :meth:`board`.
        """
        # The label itself, and not what its * and ? would stand for.
        found = await self._launcher.ledger.durations(label=label, limit=MOST_NAMES)
        return next((durations for durations in found if durations.name == label), None)

    async def cancel(self, job: JobEntry) -> Literal["cancelled", "committed"]:
        """Cancel a job for good; returns how it was decided.

        Raises
        ------
        PgbgError
            As :meth:`pgbg_orchestration.Launcher.cancel`.
        """
        return await self._launcher.cancel(job.job_id, owner=job.owner, series=job.series, reason=REASON)

    async def cancel_worker(self, worker: WorkerSeen) -> bool:
        """Cancel a worker that no job is known of; returns whether the signal was accepted.

        Raises
        ------
        psycopg.errors.InsufficientPrivilege
            The login may not signal it.
        """
        return await self._launcher.ledger.run(lambda conn: board.cancel_worker(conn, worker))
