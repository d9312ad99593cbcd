"""The rows of a worker, read from its launching session a few at a time."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable
from contextlib import suppress
from typing import Any

from psycopg import sql

from . import connection
from .handles import HandleSession, OnNotice, Worker

TEXT_FORMS = (
    ("datestyle", "ISO, YMD"),
    ("intervalstyle", "postgres"),
    ("bytea_output", "hex"),
    ("extra_float_digits", "1"),
)
"""Settings that give values as texts in one form, whatever the login has set: the same as for kept rows."""


async def read(
    session: HandleSession,
    worker: Worker,
    columns: sql.Composable,
    on_notice: OnNotice | None = None,
    *,
    as_text: Iterable[int] = (),
) -> AsyncGenerator[tuple[Any, ...], None]:
    """Wait for a worker's end, which proves its commit, and return its rows, to be read from its session.

    The session has to be the worker's alone: it answers nothing else before the rows are read or closed. Raises as
    :meth:`HandleSession.drain`. Values of the types ``as_text`` (by their oids) come as the server's texts.
    """
    forms = TEXT_FORMS if as_text else ()
    async with session.reading(worker, on_notice) as conn:
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
