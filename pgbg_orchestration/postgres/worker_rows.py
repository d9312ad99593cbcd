"""The rows of a worker, read from its launching session a few at a time."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable
from contextlib import suppress
from typing import Any

from psycopg import sql

from . import connection
from .handles import HandleSession, Hearing, Worker

TEXT_FORMS = (
    ("datestyle", "ISO, YMD"),
    ("intervalstyle", "postgres"),
    ("bytea_output", "hex"),
    ("extra_float_digits", "1"),
)
"""Settings under which texts of values are those that every reader can read: as kept rows have them."""


async def read(
    session: HandleSession,
    worker: Worker,
    columns: sql.Composable,
    heard: Hearing | None = None,
    *,
    as_text: Iterable[int] = (),
) -> AsyncGenerator[tuple[Any, ...], None]:
    """Wait for a worker's end, which proves its commit, and return its rows, to be read from its session.

    The session is to be the worker's alone: nothing can be asked of it before they are read or closed. Raises as
    :meth:`HandleSession.drain`. Values of the types ``as_text`` (by their oids) come as the server's texts.
    """
    forms = TEXT_FORMS if as_text else ()
    async with session.reading(worker, heard) as conn:
        bounds = ["statement_timeout", *(["transaction_timeout"] if conn.info.server_version >= 170000 else [])]
        await connection.configure(conn, (*forms, *((name, "0") for name in bounds)))  # a reader may take its time
        rows = session.extension.rows(conn, worker.handle, columns, as_text)
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
