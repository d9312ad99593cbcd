"""Launch a worker in as few round trips as there may be.

A job of which nothing is known takes one: a text of several statements, which makes two transactions. The first
registers the job, and leaves its generation and attempt in a setting of the session. The second launches the worker, if
it finds them there, behind a random word that only this call knows. Where the registration failed, or found that
something of the job is known, it finds none, and nothing is launched. Texts of several jobs may stand one behind the
other: the server stops at the first statement that fails, and has done nothing of the jobs behind it.

A launch by itself takes two, the settings and the call: where the connection was lost before the call, nothing was
launched.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import psycopg
from psycopg import AsyncConnection, generators, pq

from .connection import Quote, quoting
from .handles import Worker
from .pg_background import DEFAULT_QUEUE_BYTES, Handle

SETTING = "pgbg.opening"
AWAIT_NO_STANDBY = (
    "pg_catalog.set_config('synchronous_commit', case pg_catalog.current_setting('synchronous_commit') "
    "when 'off' then 'off' else 'local' end, true)"
)
"""Has the commit of this transaction wait for no synchronous standby."""
REGISTRATION, LAUNCH = 2, 6  # which statements of _SCRIPT register and launch, from 0
STATEMENTS = 8  # of _SCRIPT


class SlotsUsedUp(Exception):
    """The server has no worker slot free; nothing was launched. ``sqlstate`` tells which limit was reached."""

    def __init__(self, error: psycopg.Error) -> None:
        super().__init__(error.diag.message_primary or str(error))
        self.sqlstate = error.sqlstate


class LaunchRefused(Exception):
    """The server refused the launch before a worker was started; ``error`` says why.

    ``called`` is False where it refused a setting or the role, before the call itself.
    """

    def __init__(self, error: psycopg.Error, *, called: bool) -> None:
        super().__init__(str(error))
        self.error = error
        self.called = called


class MayBeLaunched(Exception):
    """The launch call failed on its way: a worker may be running, and nobody has its handle."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(str(error))
        self.error = error


class Begun(NamedTuple):
    """What came of an opening: the registration, and the worker where one was launched."""

    registration: dict[str, Any]
    worker: Worker | None


class StatementFailed(Exception):
    """A statement failed; ``called`` says whether it was the launch call itself, or came after it."""

    def __init__(self, error: psycopg.Error, *, called: bool) -> None:
        super().__init__(str(error))
        self.error = error
        self.called = called


class LaunchText(NamedTuple):
    """A text that names a launch, written before the launch is registered: generation and attempt are left open.

    They go, in this order, between ``head``, ``middle`` and ``tail``.
    """

    head: str
    middle: str
    tail: str

    def of(self, generation: int, attempt: int) -> str:
        """Return the text for one launch."""
        return f"{self.head}{generation}{self.middle}{attempt}{self.tail}"


_SCRIPT = """\
begin isolation level read committed read write;
select pg_catalog.set_config('statement_timeout', '0', true), {await_no_standby};
select r.*, pg_catalog.set_config({setting}, case r.verdict when 'registered'
    then pg_catalog.concat_ws(':', {word}, r.generation, r.attempt) else '' end, false)
from {registering} as r;
commit;
begin isolation level read committed;
select {local}
from pg_catalog.current_setting({setting}, true) as o;
select l.pid, l.cookie
from (
    select {text} as text
    from pg_catalog.current_setting({setting}, true) as o
    where pg_catalog.starts_with(o, {word} || ':')
    offset 0  -- so that the function is called for that row, and without one never
) as t
cross join lateral {launch}(t.text, {queue_size}, {label}) as l;
commit
"""


_VALUE = "{} || pg_catalog.split_part(o, ':', 2) || {} || pg_catalog.split_part(o, ':', 3) || {}"
_CALL = "select l.pid, l.cookie from {launch}({text}, {queue_size}, {label}) as l; commit"


@dataclass(slots=True)
class Opening:
    """A job to be registered and launched.

    Attributes
    ----------
    owner, job_id:
        The job.
    registering:
        Returns the call that registers it if it is new, as an item of FROM.
    text:
        What the worker runs.
    arguments:
        Name and value of the setting from which the worker reads which launch it is; None where its text says so.
    label, queue_size:
        As for any launch.
    is_counted:
        Whether handle or result have the job's own count and tag. Without them, a hint of its commit does not suffice
        to write its end down.
    is_padded:
        Whether a statement without rows stands behind the job's last one: then the result has count and tag, not the
        handle.
    registration:
        What came of registering it, once that is known to be committed.
    """

    owner: str
    job_id: str
    registering: Callable[[Quote], str]
    text: str | LaunchText
    arguments: tuple[str, LaunchText] | None
    label: str
    queue_size: int | None
    is_counted: bool = True
    is_padded: bool = False
    registration: dict[str, Any] | None = None
    _word: str = field(default_factory=lambda: secrets.token_hex(8))

    @property
    def size(self) -> int:
        """How many characters the text has."""
        return len(self.text) if isinstance(self.text, str) else sum(map(len, self.text))

    def script(self, conn: AsyncConnection[Any], settings: Mapping[str, str], launch: str) -> bytes:
        """Return the statements. ``settings`` hold for the worker, ``launch`` is the launch function's name."""
        quote = quoting(conn)

        def value(text: str | LaunchText) -> str:
            return quote(text) if isinstance(text, str) else _VALUE.format(*map(quote, text))

        local = _local(quote, settings)
        if self.arguments is not None:
            name, text = self.arguments
            local += f", pg_catalog.set_config({quote(name)}, {value(text)}, true)"
        return _SCRIPT.format(
            await_no_standby=AWAIT_NO_STANDBY,
            setting=quote(SETTING),
            word=quote(self._word),
            registering=self.registering(quote),
            local=local,
            launch=launch,
            text=value(self.text),
            queue_size=quote(self.queue_size or DEFAULT_QUEUE_BYTES),
            label=quote(self.label),
        ).encode()


def call(conn: AsyncConnection[Any], function: str, text: str, *, label: str, queue_size: int | None) -> bytes:
    """Return the statements that launch ``text`` in a worker by ``function``, behind :func:`begin`."""
    quote = quoting(conn)
    return _CALL.format(
        launch=function,
        text=quote(text),
        queue_size=quote(queue_size or DEFAULT_QUEUE_BYTES),
        label=quote(label),
    ).encode()


def _local(quote: Quote, settings: Mapping[str, str]) -> str:
    return ", ".join(f"pg_catalog.set_config({quote(name)}, {quote(value)}, true)" for name, value in settings.items())


def local(conn: AsyncConnection[Any], settings: Mapping[str, str]) -> str:
    """Return the query that changes settings for a transaction."""
    return f"select {_local(quoting(conn), settings)}"


async def run(
    conn: AsyncConnection[Any], openings: Sequence[tuple[Opening, bytes]]
) -> list[Handle | StatementFailed | None]:
    """Run the statements of openings in one message, up to the first that fails; of those behind it nothing is done.

    Returns
    -------
    list
        Of each opening that was run the handle of its worker, None where there was something to look at first; last of
        all the failure, if there was one. The connection is in no transaction any more.

    Raises
    ------
    psycopg.OperationalError
        The connection was lost on the way.
    """
    results = await _send(conn, b";".join(script for _, script in openings))
    ran: list[Handle | StatementFailed | None] = []
    for number, (opening, _) in enumerate(openings):
        own = results[number * STATEMENTS : (number + 1) * STATEMENTS]
        if not own:
            break
        if len(own) > REGISTRATION + 1 and own[REGISTRATION + 1].status == pq.ExecStatus.COMMAND_OK:  # its commit
            opening.registration = _registration(own[REGISTRATION])
        try:
            await _accept(conn, own, called=len(own) > LAUNCH)
        except StatementFailed as failure:
            ran.append(failure)
        else:
            ran.append(_handle(own[LAUNCH]))
    return ran


async def begin(conn: AsyncConnection[Any], settings: Mapping[str, str]) -> None:
    """Begin the transaction of a launch, with what its worker is to have set.

    Raises
    ------
    StatementFailed
        The server refuses a setting; the connection is in no transaction any more.
    psycopg.OperationalError
        The connection was lost.
    """
    script = f"begin isolation level read committed; {local(conn, settings)}"
    await _accept(conn, await _send(conn, script.encode()), called=False)


async def launch(conn: AsyncConnection[Any], script: bytes) -> Handle:
    """Run the statements of :func:`call`; returns the worker's handle. Raises as :func:`run`."""
    results = await _send(conn, script)
    await _accept(conn, results, called=True)
    handle = _handle(results[0])
    if handle is None:
        raise StatementFailed(psycopg.errors.InternalError_("the launch call gave no handle"), called=True)
    return handle


async def _accept(conn: AsyncConnection[Any], results: Sequence[pq.abc.PGresult], *, called: bool) -> None:
    """Raise :class:`StatementFailed` where the last statement failed, once its transaction is ended."""
    if results[-1].status != pq.ExecStatus.FATAL_ERROR:
        return
    error = psycopg.errors.error_from_result(results[-1])
    if conn.pgconn.transaction_status == pq.TransactionStatus.INERROR:
        await _send(conn, b"rollback")
    raise StatementFailed(error, called=called)


def _handle(result: pq.abc.PGresult) -> Handle | None:
    pid, cookie = (result.get_value(0, column) if result.ntuples else None for column in (0, 1))
    return None if pid is None or cookie is None else Handle(int(pid), int(cookie))


async def _send(conn: AsyncConnection[Any], script: bytes) -> list[pq.abc.PGresult]:
    # execute() of psycopg keeps the results before a failed one to itself: these are the calls that it is made of.
    async with conn.lock:
        conn.pgconn.send_query(script)
        return list(await conn.wait(generators.execute(conn.pgconn)))


def _registration(result: pq.abc.PGresult) -> dict[str, Any]:
    def text(column: int) -> str:
        return (result.get_value(0, column) or b"").decode()

    return {
        "verdict": text(0), "generation": int(text(1) or 0), "newest": int(text(2) or 0), "attempt": int(text(3) or 0),
        "sql_changed": text(4) == "t",
    }  # fmt: skip
