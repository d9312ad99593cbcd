"""What this room asks the server's own catalog: the named queries of ``queries.sql``, and two that others ask too."""

from __future__ import annotations

from collections.abc import Iterable
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
