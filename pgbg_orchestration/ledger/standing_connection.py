"""A connection of the ledger that is opened again when it is lost."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import psycopg
from psycopg import AsyncConnection

from pgbg_orchestration import pace
from pgbg_orchestration.postgres import connection

T = TypeVar("T")
LOCK_PATIENCE = "250ms"  # longer than registrations of one series keep one another waiting


class StandingConnection:
    """A connection that is opened again when it is lost; the query is repeated then, and must allow that.

    A query that waits for another session's lock gives up after a moment, lets others ask, and is tried again.
    """

    def __init__(self, conninfo: connection.Conninfo, name: str, on_trouble: Callable[[str], None]) -> None:
        self._conninfo = conninfo
        self._name = name
        self._on_trouble = on_trouble
        self._conn: AsyncConnection[Any] | None = None
        self._turn = asyncio.Lock()
        self._asking: set[asyncio.Task[Any]] = set()

    async def close(self) -> None:
        try:
            await connection.break_off(self._asking)
        finally:
            await self._drop()

    async def _drop(self) -> None:
        if self._conn is not None:
            conn, self._conn = self._conn, None
            await connection.close(conn)

    async def ask(self, question: Callable[[AsyncConnection[Any]], Awaitable[T]], *, patient: bool = True) -> T:
        """Ask, for ``pace.RECONNECT`` seconds at most; ``patient``: also while somebody holds a lock that it needs.

        Raises
        ------
        ServerUnreachable
            The server did not answer in that time, or refuses the login.
        psycopg.Error
            It refuses what was asked; 55P03 where a lock was held all that time, or at once where not ``patient``.
        """
        # All jobs share the connection, which a cancel half way would cost: the query goes on to its end.
        asking = asyncio.create_task(self._ask(question, patient))
        self._asking.add(asking)
        asking.add_done_callback(self._asking.discard)
        try:
            return await asyncio.shield(asking)
        except asyncio.CancelledError:
            asking.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
            raise

    async def _ask(self, question: Callable[[AsyncConnection[Any]], Awaitable[T]], patient: bool) -> T:
        loop, asking = asyncio.get_running_loop(), asyncio.current_task()
        until = loop.time() + pace.RECONNECT
        attempt, warned_at = 0, -pace.WARN_AGAIN
        while True:
            try:
                async with self._turn, asyncio.timeout(pace.CALL):
                    if self._conn is None:
                        self._conn = await connection.connect(self._conninfo, self._name)
                        await connection.configure(
                            self._conn, (*connection.BOOKKEEPING, ("lock_timeout", LOCK_PATIENCE))
                        )
                    return await question(self._conn)
            except (psycopg.Error, OSError, TimeoutError) as error:
                lost = self._conn is None or connection.is_lost(self._conn, error)
                held = isinstance(error, psycopg.errors.LockNotAvailable)
                if lost:
                    await self._drop()
                elif held and patient and loop.time() < until:
                    pass
                elif held or not connection.is_passing(error):
                    raise
                # Python 3.11's wait_for, which psycopg uses, can swallow a cancel: close() must end this all the same.
                if asking is not None and asking.cancelling():
                    raise asyncio.CancelledError from error
                if loop.time() >= until or getattr(error, "sqlstate", None) in connection.REFUSED_LOGINS:
                    raise connection.unreachable(error, "the server cannot be reached") from error
                if loop.time() >= warned_at + pace.WARN_AGAIN:
                    warned_at = loop.time()
                    what = "somebody holds a lock on the package's tables" if held else "no connection to the server"
                    self._on_trouble(f"{what} ({connection.words(error)}), trying again")
                await asyncio.sleep(pace.backoff(attempt))
                attempt += 1
