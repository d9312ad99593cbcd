"""Workers without a lock, found by the ``application_name`` that they were launched with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from psycopg import AsyncConnection
from psycopg.rows import dict_row

_WHERE = (
    " from pg_catalog.pg_stat_activity as a"
    " where a.application_name = %s and a.datname = pg_catalog.current_database()"
    " and a.pid <> pg_catalog.pg_backend_pid()"
    # Anybody can take any name.
    " and pg_catalog.pg_has_role(a.usesysid, %s, 'MEMBER')"
)


@dataclass(frozen=True, slots=True)
class Marked:
    """A backend that bears a marker; ``wait_event`` is None when it is not visible to the login."""

    pid: int
    wait_event: str | None


async def find(conn: AsyncConnection[Any], marker: str, owner: str) -> Marked | None:
    """Return a backend of the owner's with the marker."""
    cursor = conn.cursor(row_factory=dict_row)
    row = await (await cursor.execute(b"select a.pid, a.wait_event" + _WHERE.encode(), (marker, owner))).fetchone()
    return Marked(**row) if row else None


async def signal(conn: AsyncConnection[Any], marker: str, owner: str) -> bool:
    """Cancel the statement of every backend of the owner's with the marker; returns whether a signal was accepted.

    Raises
    ------
    psycopg.errors.InsufficientPrivilege
        The login may not signal it.
    """
    query = b"select coalesce(bool_or(pg_catalog.pg_cancel_backend(a.pid)), false)" + _WHERE.encode()
    row = await (await conn.execute(query, (marker, owner))).fetchone()
    return bool(row and row[0])
