"""The ``pgbg`` schema as Python sees it: the only module that knows its functions.

Looks of all jobs of a process are gathered into one query. Writes go through a connection of their own, so that one
that waits (a cancel for a worker's commit) keeps no look waiting.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import datetime, timedelta
from typing import Any, LiteralString, TypeVar

import psycopg
from psycopg import AsyncConnection, sql
from psycopg.rows import dict_row

from pgbg_orchestration import pace
from pgbg_orchestration.errors import ServerUnreachable
from pgbg_orchestration.outcome import ErrorFields
from pgbg_orchestration.postgres import connection
from pgbg_orchestration.verdict import Holder, Receipt

T = TypeVar("T")
RECEIPTS = {
    None: Receipt.NONE,
    "launching": Receipt.LAUNCHING,
    "committed": Receipt.COMMITTED,
    "cancelled": Receipt.CANCELLED,
}
BLOCKED = ("MessageQueuePutMessage", "ClientWrite")  # a worker's own, and a stand-in's
MARK_PATIENCE = "25ms"  # how long a mark waits for a worker that began just now; then that worker is signalled


@dataclass(frozen=True, slots=True)
class Key:
    """A job as the ledger knows it."""

    owner: str
    job_id: str
    series: str | None = None  # None, for looking at it from outside: the one that it was registered with

    @property
    def digests(self) -> tuple[bytes, bytes | None]:
        """SHA-256 of the job's id and of its series."""
        series = None if self.series is None else hashlib.sha256(self.series.encode()).digest()
        return hashlib.sha256(self.job_id.encode()).digest(), series


SUPERVISES = "pgbg supervises: "
"""What the application_name of a supervisor begins with."""


@dataclass(frozen=True, slots=True)
class Sighting:
    """What one look saw of a job: the lock first, then the receipt, then the history."""

    looked_at: datetime
    holder_pid: int | None
    holder_user: str | None
    holder_is_owner: bool
    holder_job: str | None
    holder_generation: int | None
    holds_this_job: bool
    marked_pid: int | None
    may_begin: bool
    wait_event: str | None
    status: str | None
    receipt_attempt: int | None
    receipt_pid: int | None
    receipt_started_at: datetime | None
    cause: str | None
    reason: str | None
    decided_by: str | None
    decided_at: datetime | None
    newest: int | None
    generation: int | None
    attempt: int | None
    sql_digest: bytes | None
    outcome: str | None
    ended_at: datetime | None
    reported_at: datetime | None
    row_count: int | None
    command_tag: str | None
    error: ErrorFields

    @property
    def receipt(self) -> Receipt:
        """What the receipt says."""
        return RECEIPTS[self.status]

    @property
    def is_unsupervised(self) -> bool:
        """Whether the receipt is claimed, and nobody of the job is seen at work."""
        return self.receipt is Receipt.LAUNCHING and not self.holds_this_job and self.marked_pid is None

    @property
    def is_untold(self) -> bool:
        """Whether the last launch failed, as its supervisor wrote down, and nobody was there to be told."""
        return self.outcome == "failed" and self.reported_at is None

    @property
    def is_provisional(self) -> bool:
        """Whether the job is cancelled by a mark that its next call takes back: nobody asked for that cancel."""
        return self.receipt is Receipt.CANCELLED and self.cause in ("deadline", "given up")

    @property
    def is_between_locks(self) -> bool:
        """Whether a session holds the lock of the series, and none of a job that is known."""
        return self.holder_pid is not None and not self.holds_this_job and self.holder_job is None

    def holder(self, generation: int | None) -> Holder:
        """Return who holds the series, as a job of that generation sees it."""
        if self.holder_pid is None:
            return Holder.NOBODY
        if not self.holder_is_owner:
            return Holder.STRANGER
        if self.holds_this_job:
            return Holder.THIS_JOB
        if self.holder_generation is None or generation is None:
            return Holder.STRANGER if self.holder_generation is None else Holder.SIBLING
        if self.holder_generation == generation:
            return Holder.SIBLING
        return Holder.OLDER if self.holder_generation < generation else Holder.NEWER


@dataclass(frozen=True, slots=True)
class Registration:
    """What came of registering a launch.

    ``verdict`` is ``registered``, or why it was not: ``reused``, ``committed``, ``cancelled``, ``superseded`` or
    ``untold``.
    """

    verdict: str
    generation: int
    newest: int
    attempt: int
    sql_changed: bool


STATES = ("running", "waiting", "committed", "cancelled", "failed", "lost", "unknown")


@dataclass(frozen=True, slots=True)
class JobEntry:
    """A line of the ``jobs`` view: a job's true state, and what its launching side wrote down of it."""

    owner: str
    job_id: str
    label: str | None
    series: str | None
    generation: int | None
    kind: str | None
    state: str
    attempt: int | None
    running_pid: int | None
    launched_by: str | None
    registered_at: datetime | None
    launched_at: datetime | None
    ended_at: datetime | None
    row_count: int | None
    command_tag: str | None
    sqlstate: str | None
    message: str | None
    detail: str | None
    hint: str | None
    context: str | None
    cancelled_by: str | None
    reason: str | None
    worker_pid: int | None
    started_at: datetime | None


class Ledger:
    """The receipts, series and history of one database, over two connections that come back when they are lost.

    Parameters
    ----------
    conninfo:
        A libpq connection string.
    schema:
        Name of the package's schema.
    on_trouble:
        Called with a sentence when the server cannot be reached for a while.
    """

    def __init__(self, conninfo: connection.Conninfo, schema: str, on_trouble: Callable[[str], None]) -> None:
        self.schema = schema
        self._reader = _Line(conninfo, "pgbg: looking", on_trouble)
        self._writer = _Line(conninfo, "pgbg: ledger", on_trouble)
        self._wanted: dict[Key, asyncio.Future[Sighting]] = {}
        self._looking: asyncio.Task[None] | None = None
        self._queries: dict[str, sql.Composed] = {}

    async def close(self) -> None:
        """Close the connections."""
        if self._looking:
            self._looking.cancel()
        await self._reader.close()
        await self._writer.close()

    def _query(self, text: LiteralString) -> sql.Composed:
        if text not in self._queries:
            self._queries[text] = sql.SQL(text).format(s=sql.Identifier(self.schema))
        return self._queries[text]

    # Looking ------------------------------------------------------------------------------------------------------

    async def look(self, key: Key) -> Sighting:
        """Look at a job: its lock, then its receipt. Looks that are asked for at the same time share a query.

        Raises
        ------
        NoPrivilege
            The login is no member of the owner.
        ServerUnreachable
            The server did not answer for a long time.
        """
        future = self._wanted.get(key)
        if future is None:
            future = self._wanted[key] = asyncio.get_running_loop().create_future()
            if self._looking is None or self._looking.done():
                self._looking = asyncio.create_task(self._look_for_all())
        return await asyncio.shield(future)

    async def _look_for_all(self) -> None:
        while self._wanted:
            wanted, self._wanted = self._wanted, {}
            try:
                seen = await self._look_at(list(wanted))
            except Exception as error:  # noqa: BLE001  (whoever waits gets it)
                if len(wanted) == 1 or isinstance(error, ServerUnreachable):
                    _fail(wanted, error)
                    continue
                # One job's fault (an owner that was dropped, say) must not be another's.
                for key, future in wanted.items():
                    try:
                        _give(future, (await self._look_at([key]))[0])
                    except Exception as own:  # noqa: BLE001
                        _fail({key: future}, own)
                continue
            except BaseException as error:
                _fail(wanted, ServerUnreachable(f"the look was ended: {type(error).__name__}"))
                raise
            for future, sighting in zip(wanted.values(), seen, strict=True):
                _give(future, sighting)

    async def _look_at(self, keys: list[Key]) -> list[Sighting]:
        digests = [key.digests for key in keys]
        query = self._query(
            "select l.*, a.wait_event from {s}.look(%s::text[], %s::bytea[], %s::bytea[]) as l"
            " left join pg_catalog.pg_stat_activity as a on a.pid = l.holder_pid order by l.number"
        )
        arguments = ([key.owner for key in keys], [d[0] for d in digests], [d[1] for d in digests])

        async def ask(conn: AsyncConnection[Any]) -> list[dict[str, Any]]:
            cursor = await conn.cursor(row_factory=dict_row).execute(query, arguments)
            return await cursor.fetchall()

        rows: dict[int, dict[str, Any]] = {}
        for row in await self._reader.ask(ask):
            # Only one session can hold the lock; a stranger may hold it in shared mode beside others: take the worker.
            if row["number"] not in rows or row["holds_this_job"]:
                rows[row["number"]] = row
        return [_sighting(rows[number]) for number in range(1, len(keys) + 1)]

    # Writing ------------------------------------------------------------------------------------------------------

    async def register(
        self,
        key: Key,
        *,
        generation: int | None,
        label: str,
        kind: str,
        sql_digest: bytes,
        accept_changed_sql: bool,
    ) -> Registration:
        """Register a launch: committed when this returns, so that everybody knows of it before it runs."""
        query = self._query("select * from {s}.register(%s, %s, %s, %s, %s, %s, %s, %s, %s)")
        here = f"{socket.gethostname()}/{os.getpid()}"
        arguments = (key.owner, key.job_id, key.series, generation, label, kind, sql_digest, accept_changed_sql, here)
        row = await self._writer.ask(lambda conn: _one(conn, query, arguments))
        return Registration(**row)

    async def mark_cancelled(self, key: Key, cause: str, reason: str) -> str | None:
        """Make a cancel final; returns ``cancelled``, ``committed``, or None while a worker is at work."""
        query = self._query(
            "select {s}.mark_cancelled(%s, %s, %s, %s) as status from pg_catalog.set_config('lock_timeout', %s, true)"
        )
        status: str | None = await self._patiently(query, (key.owner, key.job_id, cause, reason, MARK_PATIENCE))
        return status

    async def mark_older(self, key: Key, generation: int) -> Sequence[str] | None:
        """Cancel every older generation for good; returns None while a worker of one is at work.

        Returned are the ids of older jobs whose supervisors are gone: their workers are at work without a lock.
        """
        query = self._query(
            "select {s}.mark_older(%s, %s, %s) as status from pg_catalog.set_config('lock_timeout', %s, true)"
        )
        at_work: list[str] | None = await self._patiently(query, (key.owner, key.series, generation, MARK_PATIENCE))
        return at_work

    async def _patiently(self, query: sql.Composed, arguments: tuple[Any, ...]) -> Any:
        try:
            return (await self._writer.ask(lambda conn: _one(conn, query, arguments)))["status"]
        except psycopg.errors.LockNotAvailable:
            return None

    async def lift_cancel(self, key: Key) -> bool:
        """Take a cancel back; returns whether there was one that can be taken back."""
        query = self._query("select {s}.lift_cancel(%s, %s) as lifted")
        return bool((await self._writer.ask(lambda conn: _one(conn, query, (key.owner, key.job_id))))["lifted"])

    async def signal(self, key: Key, *, job_id: str | None = None) -> bool:
        """Ask the job's worker to cancel its statement; returns whether a signal was accepted.

        It is the one that holds the job's lock, or the one below it where that is a supervisor: the supervisor is
        the one to tell how its worker ended.

        Raises
        ------
        psycopg.errors.InsufficientPrivilege
            The worker runs as another login of the owner's, which this login may not signal.
        """
        query = self._query(
            "with job as materialized ("
            "  select {s}.lock_key('job', %(o)s, {s}.digest(%(j)s)) as key, {s}.marker(%(o)s, %(j)s) as marker"
            "), holder as materialized ("
            "  select l.pid from job, pg_catalog.pg_locks as l"
            "  where l.locktype = 'advisory' and l.objsubid = 1 and l.granted and l.pid is not null"
            "  and l.database = (select d.oid from pg_catalog.pg_database as d"
            "    where d.datname = pg_catalog.current_database())"
            "  and (l.classid::bigint << 32) | l.objid::bigint = job.key"
            "), target as materialized ("
            "  select h.pid from job, holder as h join pg_catalog.pg_stat_activity as a on a.pid = h.pid"
            # Anybody can take the lock. A supervisor bears the marker itself while it launches.
            "  where {s}.is_member(a.usesysid, %(o)s) and"
            "    coalesce(a.application_name <> job.marker and not starts_with(a.application_name, %(s)s), true)"
            "  union all"
            "  select w.pid from {s}.supervised(%(o)s, %(j)s) as w (pid)"
            "  where not exists (select from holder as h where h.pid = w.pid)"
            ") select coalesce(bool_or(pg_catalog.pg_cancel_backend(t.pid)), false) as sent from target as t"
        )
        arguments = {"o": key.owner, "j": job_id or key.job_id, "s": SUPERVISES}
        row = await self._writer.ask(lambda conn: _one(conn, query, arguments))
        return bool(row["sent"])

    async def follow(self, key: Key, attempt: int, worker_pid: int) -> None:
        """Name a worker that is seen at work in its claimed receipt: its supervisor was gone before it could."""
        query = self._query("select {s}.follow(%s, %s, %s, %s)")
        await self._writer.ask(lambda conn: _one(conn, query, (key.owner, key.job_id, attempt, worker_pid)))

    async def settle(self, key: Key, attempt: int | None, *, committed: bool) -> None:
        """Write down how a supervised job ended whose supervisor is gone; ``attempt`` is the one of its receipt."""
        query = self._query("select {s}.end_supervision(%s, %s, %s, %s, null, null, null, null)")
        outcome = "committed" if committed else "unlaunched"
        await self._writer.ask(lambda conn: _one(conn, query, (key.owner, key.job_id, attempt, outcome)))

    async def at_work(self, pids: Sequence[int]) -> bool:
        """Tell whether each of these processes holds an advisory lock, as a worker does from its first statement on.

        A supervisor is never said to be at work: it is not to be cancelled, but the worker below it.
        """
        query = self._query(
            "select count(distinct l.pid) as holders from pg_catalog.pg_locks as l"
            " where l.locktype = 'advisory' and l.granted and l.pid = any(%s) and not exists ("
            "   select from pg_catalog.pg_stat_activity as a"
            "   where a.pid = l.pid and (starts_with(a.application_name, %s) or a.application_name like 'pgbg:%%'))"
        )
        row = await self._reader.ask(lambda conn: _one(conn, query, (list(pids), SUPERVISES)))
        return bool(row["holders"] == len(set(pids)))

    async def record(
        self,
        key: Key,
        attempt: int,
        outcome: str,
        *,
        worker_pid: int | None = None,
        started_at: datetime | None = None,
        row_count: int | None = None,
        command_tag: str | None = None,
        error: ErrorFields | None = None,
    ) -> None:
        """Write an attempt's outcome into the history."""
        query = self._query("select {s}.record(%s, %s, %s, %s, %s, %s, %s, %s, %s::text[])")
        told = [getattr(error, field.name) for field in fields(error)] if error else None
        arguments = (
            key.owner, key.job_id, attempt, outcome, worker_pid, started_at, row_count, command_tag, told,
        )  # fmt: skip
        await self._writer.ask(lambda conn: _one(conn, query, arguments))

    async def reported(self, key: Key, attempt: int) -> None:
        """Say that somebody was told how an attempt ended."""
        query = self._query("select {s}.reported(%s, %s, %s)")
        await self._writer.ask(lambda conn: _one(conn, query, (key.owner, key.job_id, attempt)))

    # All jobs -----------------------------------------------------------------------------------------------------

    async def jobs(
        self,
        *,
        states: Sequence[str] = (),
        label: str | None = None,
        series: str | None = None,
        job_id: str | None = None,
        since: datetime | None = None,
        limit: int | None = None,
    ) -> list[JobEntry]:
        """Return every job that the login may see, with its true state, newest launch first.

        Parameters
        ----------
        states:
            Only these of ``STATES``; none: all.
        label, series:
            Only those that fit; ``*`` and ``?`` stand for any characters, and for one.
        job_id:
            Only this one (of each owner).
        since:
            Only those launched at this moment (with time zone) or later; of one never launched, its end counts.
        limit:
            At most so many.
        """
        columns = sql.SQL(", ").join(sql.Identifier("j", field.name) for field in fields(JobEntry))
        query = sql.SQL(
            "select {columns} from {view} as j where (%(states)s::text[] = '{{}}' or j.state = any(%(states)s))"
            " and (%(label)s::text is null or j.label like %(label)s)"
            " and (%(series)s::text is null or j.series like %(series)s)"
            " and (%(job_id)s::text is null or j.job_id = %(job_id)s)"
            " and (%(since)s::timestamptz is null or coalesce(j.launched_at, j.ended_at) >= %(since)s)"
            " order by coalesce(j.launched_at, j.ended_at) desc, j.job_id limit %(limit)s"
        ).format(columns=columns, view=sql.Identifier(self.schema, "jobs"))
        arguments = {
            "states": list(states),
            "label": _like(label),
            "series": _like(series),
            "job_id": job_id,
            "since": since,
            "limit": limit,
        }

        async def ask(conn: AsyncConnection[Any]) -> list[dict[str, Any]]:
            return await (await conn.cursor(row_factory=dict_row).execute(query, arguments)).fetchall()

        return [JobEntry(**row) for row in await self._reader.ask(ask)]

    async def prune(self, older_than: timedelta) -> tuple[int, int]:
        """Forget what ended longer ago; returns how many receipts and how many jobs of the history went.

        A retry of a job whose receipt is gone runs the job again.
        """
        query = self._query("select receipts, jobs from {s}.prune(%s)")
        row = await self._writer.ask(lambda conn: _one(conn, query, (older_than,)))
        return row["receipts"], row["jobs"]

    async def run(self, work: Callable[[AsyncConnection[Any]], Awaitable[T]]) -> T:
        """Run a piece of work that may be repeated on the writing connection."""
        return await self._writer.ask(work)


class _Line:
    """One connection that is made again when it is lost. What is asked must be sound when it is asked twice."""

    def __init__(self, conninfo: connection.Conninfo, name: str, on_trouble: Callable[[str], None]) -> None:
        self._conninfo = conninfo
        self._name = name
        self._on_trouble = on_trouble
        self._conn: AsyncConnection[Any] | None = None
        self._turn = asyncio.Lock()
        self._asking: set[asyncio.Task[Any]] = set()

    async def close(self) -> None:
        for task in self._asking:
            task.cancel()
        await self._drop()

    async def _drop(self) -> None:
        if self._conn is not None:
            conn, self._conn = self._conn, None
            await connection.close(conn)

    async def ask(self, question: Callable[[AsyncConnection[Any]], Awaitable[T]]) -> T:
        # A question that is cancelled half way would cost the connection that all jobs share: it is let end.
        asking = asyncio.create_task(self._ask(question))
        self._asking.add(asking)
        asking.add_done_callback(self._asking.discard)
        try:
            return await asyncio.shield(asking)
        except asyncio.CancelledError:
            asking.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
            raise

    async def _ask(self, question: Callable[[AsyncConnection[Any]], Awaitable[T]]) -> T:
        loop, asking = asyncio.get_running_loop(), asyncio.current_task()
        until = loop.time() + pace.RECONNECT
        attempt = 0
        while True:
            try:
                async with self._turn, asyncio.timeout(pace.CALL):
                    if self._conn is None:
                        self._conn = await connection.connect(self._conninfo, self._name)
                        await connection.settle(self._conn, connection.BOOKKEEPING)
                    return await question(self._conn)
            except (psycopg.Error, OSError, TimeoutError) as error:
                lost = self._conn is None or connection.is_lost(self._conn, error)
                if lost:
                    await self._drop()
                elif not connection.is_passing(error):
                    raise
                # Python 3.11's wait_for, which psycopg uses, can swallow a cancel: a closed line connects no more.
                if asking is not None and asking.cancelling():
                    raise asyncio.CancelledError from error
                if loop.time() >= until or getattr(error, "sqlstate", None) in connection.REFUSED_LOGINS:
                    raise connection.unreachable(error, "the server cannot be reached") from error
                self._on_trouble(f"no connection to the server ({str(error).strip()}), trying again")
                await asyncio.sleep(pace.backoff(attempt))
                attempt += 1


def _like(pattern: str | None) -> str | None:
    if pattern is None:
        return None
    escaped = pattern.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")
    return escaped.replace("*", "%").replace("?", "_")


async def _one(
    conn: AsyncConnection[Any], query: sql.Composed, arguments: tuple[Any, ...] | Mapping[str, Any]
) -> dict[str, Any]:
    cursor = await conn.cursor(row_factory=dict_row).execute(query, arguments)
    return await cursor.fetchone() or {}


def _sighting(row: dict[str, Any]) -> Sighting:
    error = ErrorFields(**{field.name: row.pop(field.name) for field in fields(ErrorFields)})
    row.pop("number")
    return Sighting(**row, error=error)


def _give(future: asyncio.Future[Sighting], sighting: Sighting) -> None:
    if not future.done():
        future.set_result(sighting)


def _fail(wanted: dict[Key, asyncio.Future[Sighting]], error: Exception) -> None:
    for future in wanted.values():
        if not future.done():
            future.set_exception(error)
            future.exception()  # its waiter may be gone
