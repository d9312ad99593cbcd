"""Workers without a lock, found by the ``application_name`` that they were launched with.

It is a marker, the same for all runs of one job, and then the job's label for people, as far as there is room.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from psycopg import AsyncConnection
from psycopg.rows import dict_row

from pgbg_orchestration.labels import NAME_BYTES, shorten_label

from .catalog import QUERIES

LENGTH = 18
"""Characters of a marker."""


def marker(owner: str, job_id: str) -> str:
    """Return what the ``application_name`` of a worker without a lock begins with; the schema's ``marker`` does too."""
    return f"pgbg:{hashlib.sha256(f'{owner}:{job_id}'.encode()).hexdigest()[:12]}:"


def worker_name(owner: str, job_id: str, label: str) -> str:
    """Return the ``application_name`` of such a worker: its marker, and as much of its label as the server shows."""
    head = marker(owner, job_id)
    return head + shorten_label(label, NAME_BYTES - len(head))


@dataclass(frozen=True, slots=True)
class Marked:
    """A backend that bears a marker; ``wait_event`` is None when it is not visible to the login."""

    pid: int
    wait_event: str | None


async def find(conn: AsyncConnection[Any], marker: str, owner: str) -> Marked | None:
    """Return a backend of the owner's with the marker."""
    cursor = conn.cursor(row_factory=dict_row)
    row = await (await cursor.execute(QUERIES["marked"], (marker, owner))).fetchone()
    return Marked(**row) if row else None


async def signal(conn: AsyncConnection[Any], marker: str, owner: str) -> bool:
    """Cancel the statement of every backend of the owner's with the marker; returns whether a signal was accepted.

    Raises
    ------
    psycopg.errors.InsufficientPrivilege
        The login may not signal it.
    """
    row = await (await conn.execute(QUERIES["signal_marked"], (marker, owner))).fetchone()
    return bool(row and row[0])
