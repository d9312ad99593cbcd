"""One connection of a process that hears when jobs commit.

A notification is a hint and never a proof: whoever gets it reads the receipt. It can be lost with the connection. So
everybody gets a hint when a new connection listens, and jobs are polled besides.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import psycopg
from psycopg import AsyncConnection

from pgbg_orchestration import pace
from pgbg_orchestration.errors import PgbgError

from . import connection

logger = logging.getLogger("pgbg_orchestration")
CHANNEL = "pgbg"  # the schema's function "notify" names it too


class Listener:
    """Calls back whoever follows a job when there may be something new to read of it.

    Parameters
    ----------
    conninfo:
        As :func:`connection.connect` takes it.
    """

    def __init__(self, conninfo: connection.Conninfo) -> None:
        self._conninfo = conninfo
        self._calls: dict[str, list[Callable[[], None]]] = {}
        self._listening: asyncio.Task[None] | None = None

    def call_at_hints(self, marker: str, call: Callable[[], None]) -> None:
        """Call ``call`` at each hint about the job of this marker, until :meth:`leave`."""
        self._calls.setdefault(marker, []).append(call)
        if self._listening is None or self._listening.done():
            self._listening = asyncio.create_task(self._listen())

    def leave(self, marker: str, call: Callable[[], None]) -> None:
        """Stop calling ``call`` for this marker."""
        calls = self._calls.get(marker, [])
        if call in calls:
            calls.remove(call)
        if not calls:
            self._calls.pop(marker, None)

    async def close(self) -> None:
        """Stop listening."""
        self._calls.clear()
        if self._listening is not None:
            self._listening.cancel()
            await asyncio.wait({self._listening})

    async def _listen(self) -> None:
        tries = 0
        while True:
            try:
                conn = await connection.connect(self._conninfo, "pgbg: listening")
                try:
                    await connection.configure(conn, connection.BOOKKEEPING)
                    await conn.execute(f"listen {CHANNEL}".encode())
                    tries = 0
                    for marker in [*self._calls]:
                        self._pass_on(marker)  # a notification may have been missed
                    await self._hear(conn)
                finally:
                    await connection.close(conn)
            except (psycopg.Error, OSError, TimeoutError, PgbgError) as error:
                if tries == 0:
                    logger.info("commits are not heard of now (%s); jobs are polled", connection.words(error))
            tries += 1
            await asyncio.sleep(max(pace.backoff(tries), pace.LOOK_SOONEST))

    async def _hear(self, conn: AsyncConnection[Any]) -> None:
        """Pass on what the connection hears, until it is lost. The event loop calls ``read``: no task has to wake.

        Raises
        ------
        psycopg.OperationalError
            The connection is lost.
        """
        loop, pgconn = asyncio.get_running_loop(), conn.pgconn
        lost: asyncio.Future[None] = loop.create_future()

        def read() -> None:
            try:
                pgconn.consume_input()
                while (notification := pgconn.notifies()) is not None:
                    self._pass_on(notification.extra.decode())
            except Exception as error:  # noqa: BLE001  (raised by "await lost")
                loop.remove_reader(socket)
                if not lost.done():
                    lost.set_exception(error)

        socket = pgconn.socket
        loop.add_reader(socket, read)
        try:
            await lost
        finally:
            loop.remove_reader(socket)

    def _pass_on(self, marker: str) -> None:
        for call in [*self._calls.get(marker, ())]:
            call()
