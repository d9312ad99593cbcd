"""A TCP proxy in front of a server that breaks connections at will.

It runs an event loop in a thread of its own, so that it works under tests with and without one, and is controlled by
plain calls from any thread, which have taken effect when they return.

>>> with Proxy.before(server.conninfo()) as proxy:              # doctest: +SKIP
...     when = proxy.when(TO_SERVER, b"pg_background_launch", stall=TO_CLIENT)
...     ...                                   # connect with proxy.conninfo and launch a job
...     when.wait()                           # the launch is on its way, its answer will not come back
...     proxy.cut()
"""

from __future__ import annotations

import asyncio
import errno
import socket
import struct
import threading
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass, field
from typing import Literal, Self, TypeVar

from psycopg.conninfo import conninfo_to_dict, make_conninfo

Direction = Literal["to_server", "to_client"]
TO_SERVER: Direction = "to_server"
TO_CLIENT: Direction = "to_client"
BOTH: tuple[Direction, Direction] = (TO_SERVER, TO_CLIENT)

CHUNK = 65536
CONTROL_TIMEOUT = 10.0
"""Seconds that a control call may take until the proxy counts as broken."""

T = TypeVar("T")


class When:
    """Something to do the moment that a byte string, or a number of bytes, passes in one direction.

    It acts once, on the connection on which it happened. Made by :meth:`Proxy.when`.
    """

    def __init__(self, direction: Direction, pattern: bytes | int, actions: Actions) -> None:
        self.direction: Direction = direction
        self.actions = actions
        self._pattern = pattern
        self._seen: dict[int, bytes | int] = {}
        self._happened = threading.Event()

    @property
    def happened(self) -> bool:
        """Whether it acted."""
        return self._happened.is_set()

    def wait(self, timeout: float = 30.0) -> None:
        """Wait until it acted; ``timeout`` in seconds."""
        if not self._happened.wait(timeout):
            raise TimeoutError(f"{self._pattern!r} did not pass {self.direction} within {timeout} s")

    def _feed(self, connection: int, chunk: bytes) -> bool:
        """Take note of a chunk; True when it completes what is waited for, which may span several chunks."""
        if self.happened:
            return False
        if isinstance(self._pattern, int):
            count = self._seen.get(connection, 0)
            assert isinstance(count, int)
            self._seen[connection] = count + len(chunk)
            found = count + len(chunk) >= self._pattern
        else:
            tail = self._seen.get(connection, b"")
            assert isinstance(tail, bytes)
            found = self._pattern in tail + chunk
            self._seen[connection] = (tail + chunk)[-(len(self._pattern) - 1) :] if len(self._pattern) > 1 else b""
        if found:
            self._happened.set()
        return found


@dataclass(frozen=True)
class Actions:
    """What a :class:`When` does, before the chunk that it waited for is forwarded."""

    stall: tuple[Direction, ...] = ()
    cut: bool = False


@dataclass
class _Connection:
    number: int
    client: asyncio.StreamWriter
    server: asyncio.StreamWriter
    gates: dict[Direction, asyncio.Event] = field(default_factory=dict)
    half_closed: set[Direction] = field(default_factory=set)

    def writer(self, direction: Direction) -> asyncio.StreamWriter:
        return self.server if direction == TO_SERVER else self.client

    def cut(self, *, reset: bool) -> None:
        for writer in (self.client, self.server):
            if reset:
                stream = writer.get_extra_info("socket")
                # fileno: a connection that its own end has closed meanwhile has no socket any more
                if stream is not None and stream.family != socket.AF_UNIX and stream.fileno() >= 0:
                    # Without lingering, closing sends RST in place of FIN (socket(7), SO_LINGER).
                    stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
        for gate in self.gates.values():
            gate.set()  # a pump of a stalled connection would wait there for ever


class Proxy:
    """A proxy on 127.0.0.1 with a port of its own; as a context manager it listens from the top to the end.

    Parameters
    ----------
    target:
        Where to connect to: (host, port), or the path of a Unix socket.
    conninfo:
        A connection string of the target, from which :attr:`conninfo` is made.
    """

    def __init__(self, target: tuple[str, int] | str, conninfo: str = "") -> None:
        self._target = target
        self._conninfo = conninfo
        self._port = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._connections: list[_Connection] = []
        self._stalled: set[Direction] = set()
        self._delays: dict[Direction, float] = {TO_SERVER: 0.0, TO_CLIENT: 0.0}
        self._whens: list[When] = []
        self._refusing = False
        self._accepted = 0

    @classmethod
    def before(cls, conninfo: str) -> Self:
        """Make a proxy in front of the server that a libpq connection string names."""
        parameters = conninfo_to_dict(conninfo)
        host, port = str(parameters["host"]), int(parameters.get("port") or 5432)
        target = f"{host}/.s.PGSQL.{port}" if host.startswith("/") else (host, port)
        return cls(target, conninfo)

    @property
    def port(self) -> int:
        """The port that it listens on."""
        return self._port

    @property
    def conninfo(self) -> str:
        """The connection string of the target, through the proxy. Unencrypted, so that bytes can be looked for."""
        return self.through(self._conninfo)

    def through(self, conninfo: str) -> str:
        """Any connection string of the target, sent through the proxy."""
        return make_conninfo(conninfo, host="127.0.0.1", port=str(self._port), sslmode="disable", gssencmode="disable")

    @property
    def connections(self) -> int:
        """How many connections are open through it."""
        return self._do(lambda: len(self._connections))

    @property
    def accepted(self) -> int:
        """How many connections it has accepted so far."""
        return self._do(lambda: self._accepted)

    def cut(self, *, reset: bool = True) -> int:
        """Cut every open connection, by RST or else by FIN; new ones are accepted. Returns how many were cut."""

        def act() -> int:
            cut = list(self._connections)
            for connection in cut:
                connection.cut(reset=reset)
            self._connections.clear()
            return len(cut)

        return self._do(act)

    def stall(self, *directions: Direction) -> None:
        """Forward nothing more in these directions (both by default), on connections old and new, until resumed.

        The proxy goes on reading, so neither side notices: as with a half-open connection.
        """

        def act() -> None:
            self._stalled.update(directions or BOTH)
            for connection in self._connections:
                for direction in directions or BOTH:
                    connection.gates[direction].clear()

        self._do(act)

    def resume(self) -> None:
        """Forward again in both directions, what was kept back first; undo ``delay`` and ``refuse`` as well."""

        def act() -> None:
            self._stalled.clear()
            self._refusing = False
            self._delays = dict.fromkeys(BOTH, 0.0)
            for connection in self._connections:
                for gate in connection.gates.values():
                    gate.set()

        self._do(act)

    def delay(self, seconds: float, *directions: Direction) -> None:
        """Keep every chunk back for some seconds in these directions (both by default)."""
        self._do(lambda: self._delays.update(dict.fromkeys(directions or BOTH, seconds)))

    def half_close(self, direction: Direction) -> None:
        """Tell the receivers of one direction that no more will come (FIN); the other direction stays open."""

        def act() -> None:
            for connection in self._connections:
                writer = connection.writer(direction)
                connection.half_closed.add(direction)
                if not writer.is_closing():
                    try:
                        writer.write_eof()
                    except OSError as error:
                        if error.errno != errno.ENOTCONN:  # its receiver has closed it in this moment
                            raise

        self._do(act)

    def refuse(self) -> None:
        """Cut new connections as soon as they are made, until resumed; open ones stay."""

        def act() -> None:
            self._refusing = True

        self._do(act)

    def when(
        self,
        direction: Direction,
        pattern: bytes | int,
        *,
        stall: Direction | Iterable[Direction] = (),
        cut: bool = False,
    ) -> When:
        """Arm an action for the moment that ``pattern`` passes in one direction, on any one connection.

        Parameters
        ----------
        direction:
            Where to look.
        pattern:
            A byte string, or a number of bytes counted from the start of a connection.
        stall:
            Directions to stall on that connection before the chunk with the pattern is forwarded. The same
            direction: the chunk itself is kept back. The other: the chunk goes through, its answer does not.
        cut:
            Cut that connection instead; the chunk with the pattern is lost.
        """
        stalls: tuple[Direction, ...] = (stall,) if stall in BOTH else tuple(stall)  # type: ignore[arg-type]
        when = When(direction, pattern, Actions(stalls, cut))
        self._do(lambda: self._whens.append(when))
        return when

    def disarm(self, when: When) -> None:
        """Forget an armed action, whether it has happened or not."""

        def act() -> None:
            self._whens.remove(when)

        self._do(act)

    def __enter__(self) -> Self:
        self._thread.start()
        self._server = self._await(self._listen())
        self._port = self._server.sockets[0].getsockname()[1]
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._await(self._close())
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(CONTROL_TIMEOUT)
            self._loop.close()

    def _do(self, act: Callable[[], T]) -> T:
        async def run() -> T:
            return act()

        return self._await(run())

    def _await(self, coroutine: Coroutine[object, object, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(CONTROL_TIMEOUT)

    async def _listen(self) -> asyncio.Server:
        return await asyncio.start_server(self._accept, "127.0.0.1", 0)

    async def _close(self) -> None:
        assert self._server is not None
        self._server.close()
        for connection in self._connections:
            connection.cut(reset=True)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self._accepted += 1
        if self._refusing:
            writer.transport.abort()
            return
        try:
            if isinstance(self._target, str):
                server_reader, server_writer = await asyncio.open_unix_connection(self._target)
            else:
                server_reader, server_writer = await asyncio.open_connection(*self._target)
        except OSError:
            writer.transport.abort()  # the server is down: the client sees what it would without a proxy
            return
        connection = _Connection(self._accepted, writer, server_writer)
        for direction in BOTH:
            connection.gates[direction] = asyncio.Event()
            if direction not in self._stalled:
                connection.gates[direction].set()
        self._connections.append(connection)
        try:
            await asyncio.gather(
                self._pump(connection, TO_SERVER, reader), self._pump(connection, TO_CLIENT, server_reader)
            )
        except OSError:
            connection.cut(reset=True)  # one side is gone without a word: so is the other, then
        finally:
            if connection in self._connections:
                self._connections.remove(connection)
            for end in (writer, server_writer):
                end.close()

    async def _pump(self, connection: _Connection, direction: Direction, reader: asyncio.StreamReader) -> None:
        writer = connection.writer(direction)
        while chunk := await reader.read(CHUNK):
            for when in self._whens:
                if when.direction == direction and when._feed(connection.number, chunk):
                    for stalled in when.actions.stall:
                        connection.gates[stalled].clear()
                    if when.actions.cut:
                        connection.cut(reset=True)
                        return
            if delay := self._delays[direction]:
                await asyncio.sleep(delay)
            await connection.gates[direction].wait()
            if direction not in connection.half_closed:
                writer.write(chunk)
                await writer.drain()
        await connection.gates[direction].wait()
        if writer.can_write_eof() and not writer.is_closing():
            writer.write_eof()
