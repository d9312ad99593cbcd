"""Connections of our own: how they are made, and how a lost one is told from an error of the server's."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import Any, TypeAlias

import psycopg
from psycopg import AsyncConnection, pq
from psycopg import conninfo as libpq

from pgbg_orchestration import pace
from pgbg_orchestration.errors import InvalidJob, ServerUnreachable

Conninfo: TypeAlias = str | Callable[[], Awaitable[str]]
"""A libpq connection string or URI, or what is asked for one whenever a connection is opened: tokens expire."""

Quote: TypeAlias = Callable[[str | int | bytes | None], str]
"""Makes a literal of a value."""

# A half-open connection is noticed by the kernel; connection strings may say otherwise.
KEEPALIVE: Mapping[str, Any] = {
    "connect_timeout": 10,
    "keepalives_idle": 20,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 30_000,
}
# What the package's own statements need, whatever the login's defaults are.
BOOKKEEPING = (
    ("default_transaction_isolation", "read committed"),
    ("default_transaction_read_only", "off"),
    ("standard_conforming_strings", "on"),
    ("client_min_messages", "warning"),
    ("statement_timeout", "0"),
    ("lock_timeout", "0"),
    ("idle_session_timeout", "0"),
    ("idle_in_transaction_session_timeout", "0"),
    ("search_path", "pg_catalog"),
    ("datestyle", "ISO"),
)


# No later try helps: wrong password, no such login, no such database.
REFUSED_LOGINS = ("28P01", "28000", "3D000")


# A cancel by somebody (pg_cancel_backend), a serialization failure, a deadlock, no memory: the same query may succeed
# a moment later.
PASSING = ("57014", "40001", "40P01", "53200")


SSL_REQUEST = struct.pack("!ii", 8, 80877103)


class ConnectionLost(Exception):
    """The connection is gone, or did not answer in time; the query may have been carried out."""


def check(conninfo: str) -> None:
    """Refuse a connection string that libpq cannot read.

    Raises
    ------
    InvalidJob
        It says so without libpq's own words, which quote parts of the string: a password may be in it.
    """
    try:
        libpq.conninfo_to_dict(conninfo)
    except psycopg.Error:
        raise InvalidJob(
            "the connection string cannot be read",
            todo="It is 'key=value …' or 'postgresql://…', as libpq takes it (PostgreSQL manual, 34.1.1).",
        ) from None


class ExtensionMoved(ConnectionLost):
    """pg_background's functions are not where they were: a session that knows the old place can launch nothing."""


async def connect(conninfo: Conninfo, application_name: str) -> AsyncConnection[Any]:
    """Open a connection in autocommit mode, with keepalives.

    Raises
    ------
    psycopg.OperationalError
        The server cannot be reached, or refuses.
    InvalidJob
        The connection string cannot be read, or asks for SSL of a server that has none.
    """
    given = _read(conninfo if isinstance(conninfo, str) else await conninfo())
    options = {**KEEPALIVE, "application_name": application_name, **given, "client_encoding": "utf8"}
    # No prepared statements of our own: a pooler in session mode may not keep them, and DISCARD drops them.
    opening = asyncio.create_task(
        AsyncConnection.connect(libpq.make_conninfo(**options), autocommit=True, prepare_threshold=None)
    )
    try:
        async with asyncio.timeout(pace.CALL):
            return await asyncio.shield(opening)
    except (asyncio.CancelledError, TimeoutError):
        # A connect that is cancelled half way stays open until it is garbage: let it finish, and close it.
        opening.add_done_callback(_finish)
        await asyncio.wait({opening}, timeout=pace.LOOK_SOONEST)
        raise
    except psycopg.OperationalError as error:
        if await _wants_ssl_in_vain(options):
            raise InvalidJob(
                f"the connection asks for SSL (sslmode={options['sslmode']}), and the server has none",
                todo="Turn SSL on in the server, or choose another sslmode where the network is trusted.",
            ) from error
        raise


async def _wants_ssl_in_vain(options: Mapping[str, Any]) -> bool:
    """Ask a server that could not be connected to whether it has SSL, where the connection demands that.

    libpq says so in a localised message only; the server answers with one byte (PostgreSQL manual, 54.2.10).
    """
    host, port = str(options.get("hostaddr") or options.get("host") or ""), str(options.get("port") or "5432")
    if options.get("sslmode") not in ("require", "verify-ca", "verify-full") or not host or host.startswith(("/", "@")):
        return False
    if "," in host + port or options.get("sslnegotiation") == "direct":
        return False
    try:
        async with asyncio.timeout(pace.STALLED):
            reader, writer = await asyncio.open_connection(host, int(port))
            try:
                writer.write(SSL_REQUEST)
                return await reader.read(1) == b"N"
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return False


def _read(conninfo: str) -> dict[str, Any]:
    """Return the values of a connection string.

    libpq's own words about a string that it cannot read quote it, and an unquoted blank, or an @ or / in a URI, makes
    a part of the password one of the things that they quote.
    """
    try:
        given: dict[str, Any] = libpq.conninfo_to_dict(conninfo)
    except psycopg.ProgrammingError:
        given = {"host": "@"}
    hosts, ports = str(given.get("host") or ""), str(given.get("port") or "")
    if "@" in hosts or not all(port.isdigit() for port in ports.split(",") if port):
        raise InvalidJob(
            "the connection string cannot be read; it is not shown, since its password may be what went wrong",
            todo="Quote a value that has a blank: password='…'. In a URI write %40 for @, and %2F for /.",
        )
    return given


def _finish(opening: asyncio.Task[AsyncConnection[Any]]) -> None:
    if not opening.cancelled() and opening.exception() is None:
        opening.result().pgconn.finish()


async def configure(conn: AsyncConnection[Any], settings: tuple[tuple[str, str], ...], *, local: bool = False) -> None:
    """Change settings in one round trip, for the session or (``local``) for its transaction."""
    calls = ", ".join(["pg_catalog.set_config(%s, %s, %s)"] * len(settings))
    await conn.execute(f"select {calls}".encode(), [part for pair in settings for part in (*pair, local)])


def quoting(conn: AsyncConnection[Any]) -> Quote:
    """Return what makes a literal of a value, by libpq's own quoting: ten times as fast as ``sql.Literal``."""
    escape = pq.Escaping(conn.pgconn).escape_literal

    def quote(value: str | int | bytes | None) -> str:
        if value is None:
            return "null"
        if isinstance(value, str):
            return bytes(escape(value.encode())).decode()
        return str(value).lower() if isinstance(value, int) else f"pg_catalog.decode('{value.hex()}', 'hex')"

    return quote


def is_lost(conn: AsyncConnection[Any], error: BaseException) -> bool:
    """Tell whether ``error`` means that the connection is gone, and not that the server refused a statement."""
    if isinstance(error, TimeoutError | OSError):
        return True
    return isinstance(error, psycopg.Error) and (conn.closed or conn.broken)


def is_passing(error: BaseException) -> bool:
    """Tell whether the query may succeed when it is tried again: it was cancelled, or the victim of others."""
    return isinstance(error, psycopg.Error) and error.sqlstate in PASSING


async def break_off(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel tasks that ask over a connection, and wait until they have ended: before the connection is closed.

    The event loop waits for its socket on their behalf. Another connection may be given the number of a socket that was
    closed under them, and then fails to wait for its own, or waits in vain (seen with psycopg 3.3.4).

    When psycopg's task is cancelled, it cancels the query, and waits up to ten seconds for a server that is silent.
    Cancelled once more, it closes the connection.
    """
    left = {task for task in tasks if not task.done()}
    while left:
        for task in left:
            task.cancel()
        _, left = await asyncio.wait(left, timeout=pace.BREAK)


async def close(conn: AsyncConnection[Any]) -> None:
    """Close a connection, a broken one too."""
    try:
        await conn.close()
    except (psycopg.Error, OSError):
        return  # it was gone already


@asynccontextmanager
async def for_a_question(conninfo: Conninfo, application_name: str) -> AsyncIterator[AsyncConnection[Any]]:
    """Lend a connection of its own for a few statements, and close it.

    Raises
    ------
    ConnectionLost
        The server cannot be reached now, or went away meanwhile; it may be tried again.
    psycopg.OperationalError
        It refuses the login.
    """
    try:
        conn = await connect(conninfo, application_name)
    except (psycopg.OperationalError, OSError, TimeoutError) as error:
        if getattr(error, "sqlstate", None) in REFUSED_LOGINS:
            raise
        raise ConnectionLost(str(error)) from error
    try:
        yield conn
    except psycopg.Error as error:
        if is_lost(conn, error):
            raise ConnectionLost(str(error)) from error
        raise
    finally:
        await close(conn)


def words(error: BaseException) -> str:
    """Return an error's text; a timeout has none, and its name says what it is."""
    return str(error).strip() or type(error).__name__


def unreachable(error: BaseException, what: str) -> ServerUnreachable:
    """Return the error for a server that cannot be reached."""
    state = getattr(error, "sqlstate", None)
    return ServerUnreachable(
        f"{what}: {words(error)}",
        sqlstate=state or "08006",
        todo=what_to_check(error),
    )


def what_to_check(error: BaseException) -> str:
    """Return what to look at when a connection cannot be made.

    libpq keeps the SQLSTATE of a refused connection to itself, and its messages are localised: whether nobody listens
    or the server knows no such login is for the reader to see.
    """
    pgconn = getattr(error, "pgconn", None)
    if pgconn is not None and pgconn.needs_password:
        return "The server wants a password: give it in ~/.pgpass or in PGPASSWORD."
    return (
        "Check that the server runs and has connections left (a limit can be the server's, the database's or the "
        "login's), and the host, port, database, login and password that it was asked with."
    )
