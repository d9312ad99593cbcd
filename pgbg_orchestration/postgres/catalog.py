"""Questions to the server's own catalog: the named queries of ``queries.sql``, and the three that other rooms ask."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from psycopg import AsyncConnection

from pgbg_orchestration.statements import named

QUERIES = named.queries(__package__, "queries.sql")


async def types(conn: AsyncConnection[Any], columns: Iterable[tuple[int, int]]) -> list[tuple[str, bool]]:
    """Return types as SQL has them, and whether each is a pseudo-type, such as the ``void`` of ``select pg_sleep(1)``.

    Parameters
    ----------
    conn:
        A connection to the database.
    columns:
        OID and modifier of each.
    """
    wanted = list(columns)
    parameters = ([oid for oid, _ in wanted], [modifier for _, modifier in wanted])
    return await (await conn.execute(QUERIES["type_names"], parameters)).fetchall()


async def membership(conn: AsyncConnection[Any], role: str, how: Sequence[str]) -> tuple[bool, str]:
    """Return whether the login is a member of a role in each of these ways (``pg_has_role``), and its name, quoted.

    Raises
    ------
    psycopg.errors.UndefinedObject
        There is no such role.
    """
    row = await (await conn.execute(QUERIES["membership"], (role, [*how]))).fetchone()
    assert row is not None  # it is one aggregate
    return bool(row[0]), str(row[1])


class TemporaryPrivilege(NamedTuple):
    """Whether a role may make temporary tables in a database; both names are quoted."""

    may: bool
    role: str
    database: str


async def temporary_privilege(conn: AsyncConnection[Any], role: str | None = None) -> TemporaryPrivilege:
    """Tell whether a role, or the one in force, may make temporary tables in the connection's database."""
    row = await (await conn.execute(QUERIES["temporary_privilege"], (role,))).fetchone()
    assert row is not None  # it is one row of expressions
    return TemporaryPrivilege(*row)
