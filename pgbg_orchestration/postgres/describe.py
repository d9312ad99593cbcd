"""What a statement's result looks like, before it is run; the fields of an error; and the answer of a verify_sql."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import psycopg
from psycopg import AsyncConnection, generators, pq, sql

from pgbg_orchestration.outcome import ErrorFields

from . import catalog


@dataclass(frozen=True, slots=True)
class Readable:
    """A text to launch, and how its result is read to its end.

    Attributes
    ----------
    columns:
        The column definition list of its last statement; None for one without rows, whose result is the tag of each
        statement.
    padded:
        Another statement, without rows, was put behind the job's own, so that no rows are sent: the job's tag is the
        last but one then.
    """

    text: str
    columns: sql.Composable | None
    padded: bool = False


class UnreadableResult(Exception):
    """No column definition list can name the result's columns, so ``result()`` cannot read it."""


async def named_columns_of(conn: AsyncConnection[Any], text: str) -> list[tuple[str, int, int]]:
    """Return name, type oid and modifier of each column that ``text`` gives, by a server-side describe; it is not run.

    Raises
    ------
    psycopg.Error
        The server refuses the statement.
    """
    # psycopg has no describe without a run: these are the calls that its execute() is made of.
    async with conn.lock:
        conn.pgconn.send_prepare(b"", text.encode())
        _accepted(await conn.wait(generators.execute(conn.pgconn)))
        conn.pgconn.send_describe_prepared(b"")
        result = _accepted(await conn.wait(generators.execute(conn.pgconn)))
    return [
        ((result.fname(number) or b"").decode(), result.ftype(number), result.fmod(number))
        for number in range(result.nfields)
    ]


async def gives_columns(conn: AsyncConnection[Any], text: str, settings: str) -> bool:
    """Return whether ``text`` gives columns, as :func:`named_columns_of` does, in one round trip.

    Not to be cancelled on its way: answers would be left on the connection, and taken for those of the next query.

    Parameters
    ----------
    settings:
        The query that sets what the statement's meaning depends on, such as the search_path, for a transaction.

    Raises
    ------
    psycopg.Error
        The server refuses the statement.
    """
    pgconn = conn.pgconn
    commands: deque[Callable[[], None]] = deque(
        [
            partial(pgconn.send_query_params, b"begin", None),
            partial(pgconn.send_query_params, settings.encode(), None),
            partial(pgconn.send_prepare, b"", text.encode()),
            partial(pgconn.send_describe_prepared, b""),
            partial(pgconn.send_query_params, b"rollback", None),
            pgconn.pipeline_sync,
        ]
    )
    async with conn.lock:
        pgconn.enter_pipeline_mode()
        results = [one[-1] for one in await conn.wait(generators.pipeline_communicate(pgconn, commands))]
        while not results or results[-1].status != pq.ExecStatus.PIPELINE_SYNC:
            more = await conn.wait(generators.fetch_many(pgconn))
            if not more:
                raise psycopg.OperationalError("the connection was lost")
            results.append(more[-1])
        pgconn.exit_pipeline_mode()
        refused = next((one for one in results if one.status == pq.ExecStatus.FATAL_ERROR), None)
        if refused is None:
            return bool(results[3].nfields)
        if pgconn.transaction_status == pq.TransactionStatus.INERROR:
            pgconn.send_query(b"rollback")
            await conn.wait(generators.execute(pgconn))
        raise psycopg.errors.error_from_result(refused)


def _accepted(results: list[pq.abc.PGresult]) -> pq.abc.PGresult:
    if results[-1].status != pq.ExecStatus.COMMAND_OK:
        raise psycopg.errors.error_from_result(results[-1])
    return results[-1]


async def type_names(conn: AsyncConnection[Any], columns: list[tuple[int, int]]) -> list[str]:
    """Return the types of columns as SQL has them.

    Raises
    ------
    UnreadableResult
        A column has a pseudo-type, such as the ``void`` of ``select pg_sleep(1)``.
    """
    if not columns:
        return []
    rows = await catalog.types(conn, columns)
    names = [name for name, _ in rows]
    if any(pseudo for _, pseudo in rows):
        raise UnreadableResult(f"a column of the type {next(name for name, pseudo in rows if pseudo)}")
    return names


def definition_of(types: list[str]) -> sql.Composable:
    """Return the column definition list of a result of those types."""
    return sql.SQL(", ").join(sql.SQL(f"c{n} ") + sql.SQL(name) for n, name in enumerate(types))


def error_fields(error: psycopg.Error) -> ErrorFields:
    """Return the fields of an error that a connection of our own raised."""
    diag = error.diag
    return ErrorFields(
        sqlstate=error.sqlstate,
        message=diag.message_primary or str(error),
        detail=diag.message_detail,
        hint=diag.message_hint,
        context=diag.context,
        schema_name=diag.schema_name,
        table_name=diag.table_name,
        column_name=diag.column_name,
        constraint_name=diag.constraint_name,
    )


async def verify(conn: AsyncConnection[Any], query: str) -> bool:
    """Run a ``verify_sql``; true only when its first column of its first row is true."""
    cursor = await conn.execute(query)
    row = await cursor.fetchone()
    return bool(row) and row is not None and row[0] is True
