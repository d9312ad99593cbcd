"""The rows of a worker, read from its launching session a few at a time."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import suppress
from typing import Any

from psycopg import sql

from . import connection
from .handles import HandleSession, Hearing, Worker


async def read(
    session: HandleSession, worker: Worker, columns: sql.Composable, heard: Hearing | None = None
) -> AsyncGenerator[tuple[Any, ...], None]:
    """Wait for a worker's end, which proves its commit, and return its rows, to be read from its session.

    The session is to be the worker's alone: nothing can be asked of it before they are read or closed. Raises as
    :meth:`HandleSession.drain`.
    """
    async with session.reading(worker, heard) as conn:
        bounds = ["statement_timeout", *(["transaction_timeout"] if conn.info.server_version >= 170000 else [])]
        await connection.configure(conn, tuple((name, "0") for name in bounds))  # a reader may take its time
        rows = session.extension.rows(conn, worker.handle, columns)
        first: list[tuple[Any, ...]] = []
        with suppress(StopAsyncIteration):
            first.append(await anext(rows))
    session.is_clean = False
    return _both(first, rows)


async def _both(
    first: list[tuple[Any, ...]], rows: AsyncGenerator[tuple[Any, ...], None]
) -> AsyncGenerator[tuple[Any, ...], None]:
    try:
        for row in first:
            yield row
        async for row in rows:
            yield row
    finally:
        await rows.aclose()
