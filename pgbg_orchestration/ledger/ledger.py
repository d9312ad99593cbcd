"""The ``pgbg`` schema for those who run jobs: every look and every write but what workers write themselves.

Looks that are asked for while one is under way share the next query. Writes have a connection of their own, so that
one that waits (a cancel waits for a worker's commit) keeps no look waiting. So have the lists of many jobs.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import fields
from datetime import datetime, timedelta
from functools import cache
from itertools import groupby
from operator import attrgetter, itemgetter
from typing import Any, Literal, TypedDict, TypeVar, Unpack

import psycopg
from psycopg import AsyncConnection, sql
from psycopg.rows import dict_row, tuple_row

from pgbg_orchestration import pace
from pgbg_orchestration.call_options import WhenOrphaned
from pgbg_orchestration.errors import RowsGone, ServerUnreachable
from pgbg_orchestration.outcome import Cause, ErrorFields
from pgbg_orchestration.postgres import connection
from pgbg_orchestration.postgres.connection import Quote
from pgbg_orchestration.rows import ByColumn, Column, Rows

from . import queries
from .history import Durations, FirstRows, JobDetail, JobEntry, Orphan
from .sighting import SUPERVISES, AtWork, Key, Registration, Sighting
from .standing_connection import StandingConnection

T = TypeVar("T")
MARK_PATIENCE = "25ms"  # how long a mark waits for a worker to end, before that worker is signalled


def this_process() -> str:
    """Return what names this process to people."""
    return f"{socket.gethostname()}/{os.getpid()}"


class Which(TypedDict, total=False):
    """Which jobs are asked for.

    Parameters
    ----------
    label, series:
        Only those that fit; ``*`` and ``?`` stand for any characters, and for one.
    since:
        Only those launched at this moment (with time zone) or later; of one never launched, its end counts.
    limit:
        At most so many.
    """

    label: str | None
    series: str | None
    since: datetime | None
    limit: int | None


class NewLaunch(TypedDict):
    """A launch that is to be registered.

    Parameters
    ----------
    generation:
        That of the job; None for the one that its series has for it, or a new one.
    label, kind, sql_digest:
        What is launched.
    accept_changed_sql:
        Whether the id may stand for other SQL than before.
    when_orphaned:
        What is to become of its worker when whoever waits for it is gone.
    statement:
        Its SQL as the history keeps it; None for a history without.
    """

    generation: int | None
    label: str
    kind: str
    sql_digest: bytes
    accept_changed_sql: bool
    when_orphaned: WhenOrphaned | None
    statement: str | None


def _arguments(key: Key, launch: NewLaunch) -> tuple[Any, ...]:
    """Return the arguments of the schema's functions that register a launch."""
    return (
        key.owner, key.job_id, key.series, launch["generation"], launch["label"], str(launch["kind"]),
        launch["sql_digest"], launch["accept_changed_sql"], this_process(), launch["when_orphaned"],
        launch["statement"],
    )  # fmt: skip


class Ledger:
    """The receipts, series and history of one database, over a few connections that come back when they are lost.

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
        self._conninfo = conninfo
        self._on_trouble = on_trouble
        self._reader = StandingConnection(conninfo, "pgbg: looking", on_trouble)
        self._writer = StandingConnection(conninfo, "pgbg: ledger", on_trouble)
        self._lister = StandingConnection(conninfo, "pgbg: listing", on_trouble)
        self._wanted: dict[Key, asyncio.Future[Sighting]] = {}
        self._looking: asyncio.Task[None] | None = None

    async def close(self) -> None:
        """Close the connections."""
        if self._looking:
            self._looking.cancel()
        await self._reader.close()
        await self._writer.close()
        await self._lister.close()

    def _query(self, name: str) -> bytes:
        return queries.query(name, self.schema)

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
                sightings = await self._look_at(list(wanted))
            except Exception as error:  # noqa: BLE001  (those who wait for a look get it)
                if len(wanted) == 1 or isinstance(error, ServerUnreachable):
                    _fail(wanted, error)
                    continue
                # One key may fail the query for all (its owner was dropped, say): look at each by itself.
                for key, future in wanted.items():
                    try:
                        _give(future, (await self._look_at([key]))[0])
                    except Exception as own:  # noqa: BLE001
                        _fail({key: future}, own)
                continue
            except BaseException as error:
                _fail(wanted, ServerUnreachable(f"the look was ended: {type(error).__name__}"))
                raise
            for future, sighting in zip(wanted.values(), sightings, strict=True):
                _give(future, sighting)

    async def _look_at(self, keys: list[Key]) -> list[Sighting]:
        digests = [key.digests for key in keys]
        query = self._query("look")
        arguments = ([key.owner for key in keys], [d[0] for d in digests], [d[1] for d in digests])

        async def ask(conn: AsyncConnection[Any]) -> list[dict[str, Any]]:
            cursor = await conn.cursor(row_factory=dict_row).execute(query, arguments)
            return await cursor.fetchall()

        rows: dict[int, dict[str, Any]] = {}
        for row in await self._reader.ask(ask):
            # Several sessions may hold the lock only where strangers took it in shared mode: prefer the job's worker.
            if row["number"] not in rows or row["holds_this_job"]:
                rows[row["number"]] = row
        return [Sighting.of(rows[number]) for number in range(1, len(keys) + 1)]

    async def supervised_end(self, key: Key, attempt: int) -> Sighting | None:
        """Return the receipt of a launch that its supervisor says has committed, and its history; None without one.

        Nothing else is looked at, which takes a tenth of the server's time for a look. Raises as :meth:`look`.
        """
        query, arguments = self._query("supervised_end"), (key.owner, key.job_id, attempt)
        row = await self._reader.ask(lambda conn: _one(conn, query, arguments))
        return Sighting.of_commit(attempt, **row) if row else None

    async def changed(self, jobs: Sequence[AtWork]) -> list[int]:
        """Look at jobs that were at work; returns the indexes of those that show anything else by now.

        Raises
        ------
        NoPrivilege
            The login is no member of an owner any more.
        ServerUnreachable
            The server did not answer for a long time.
        """
        query = self._query("changed")
        columns = [[*column] for column in zip(*map(attrgetter(*AtWork.__slots__), jobs), strict=True)]

        async def ask(conn: AsyncConnection[Any]) -> list[tuple[int]]:
            return await (await conn.cursor(row_factory=tuple_row).execute(query, columns)).fetchall()

        return [number for (number,) in await self._reader.ask(ask)]

    # Writing ------------------------------------------------------------------------------------------------------

    async def register(self, key: Key, **launch: Unpack[NewLaunch]) -> Registration:
        """Register a launch; it is committed when this returns, and so before the job runs."""
        query, arguments = self._query("register"), _arguments(key, launch)
        row = await self._writer.ask(lambda conn: _one(conn, query, arguments))
        return Registration(**row)

    def registering(self, key: Key, quote: Quote, **launch: Unpack[NewLaunch]) -> str:
        """Return the call, as an item of FROM, that registers a job if nothing is known of it or of its series."""
        *values, statement = _arguments(key, launch)
        given = (*values, True, statement)
        return f"{self._name('register_launch')}({', '.join(map(quote, given))})"

    def _name(self, function: str) -> str:
        return _named(self.schema, function)

    async def mark_cancelled(self, key: Key, cause: Cause, reason: str, *, of_try: str | None = None) -> str | None:
        """Make a cancel final; returns ``cancelled``, ``committed``, or None while a worker is at work.

        It is in force at once. For one that a person asked for, this returns only when a synchronous standby has it,
        too, or, with a warning, after ``pace.CONFIRM`` seconds.
        """
        query = self._query("mark_cancelled")
        arguments = {
            "owner": key.owner,
            "job_id": key.job_id,
            "cause": cause,
            "reason": reason,
            "of_try": of_try,
            "patience": MARK_PATIENCE,
        }
        try:
            row = await self._writer.ask(lambda conn: _one(conn, query, arguments), patient=False)
        except psycopg.errors.LockNotAvailable:
            return None
        status: str | None = row["status"]
        if cause is Cause.ASKED and status == "cancelled" and row["awaits"]:
            await self._confirm(key)
        return status

    async def _confirm(self, key: Key) -> None:
        """Wait for a synchronous standby to have the cancel, for ``pace.CONFIRM`` seconds, on another connection."""
        try:
            async with (
                asyncio.timeout(pace.CONFIRM),
                connection.for_a_question(self._conninfo, "pgbg: confirming") as conn,
            ):
                await connection.configure(conn, connection.BOOKKEEPING)
                await conn.execute(self._query("confirm"))
        except (psycopg.Error, connection.ConnectionLost, TimeoutError):
            self._on_trouble(
                f"the cancel of the job {key.job_id!r} is in force on this server, and no synchronous standby has "
                "confirmed it: a failover now would lose it"
            )

    async def mark_older(self, key: Key, generation: int) -> Sequence[str] | None:
        """Cancel every older generation for good; returns None while a worker of one is at work.

        Otherwise it returns the ids of older jobs whose workers are at work without a lock, their supervisors gone.
        """
        query = self._query("mark_older")
        at_work: list[str] | None = await self._ask_unless_locked(
            query, (key.owner, key.series, generation, MARK_PATIENCE)
        )
        return at_work

    async def _ask_unless_locked(self, query: bytes, arguments: tuple[Any, ...] | Mapping[str, Any]) -> Any:
        """Return the status that a query gives; None where somebody holds a lock that it needs."""
        try:
            return (await self._writer.ask(lambda conn: _one(conn, query, arguments), patient=False))["status"]
        except psycopg.errors.LockNotAvailable:
            return None

    async def lift_cancel(self, key: Key) -> bool:
        """Take a cancel back; returns whether there was one that can be taken back."""
        query = self._query("lift_cancel")
        return bool((await self._writer.ask(lambda conn: _one(conn, query, (key.owner, key.job_id))))["lifted"])

    async def signal(self, key: Key, *, job_id: str | None = None) -> bool:
        """Ask the job's worker to cancel its statement; returns whether a signal was accepted.

        That is the holder of the job's lock, or, where the holder is a supervisor, the worker below it: the supervisor
        has to go on, to write down how its worker ended.

        Raises
        ------
        psycopg.errors.InsufficientPrivilege
            The worker runs as another login of the owner's, which this login may not signal.
        """
        query = self._query("signal")
        arguments = {"owner": key.owner, "job_id": job_id or key.job_id, "supervises": SUPERVISES}
        row = await self._writer.ask(lambda conn: _one(conn, query, arguments))
        return bool(row["sent"])

    async def follow(self, key: Key, attempt: int, worker_pid: int) -> None:
        """Write a worker's pid into its claimed receipt, where its supervisor was gone before it could."""
        query = self._query("follow")
        await self._writer.ask(lambda conn: _one(conn, query, (key.owner, key.job_id, attempt, worker_pid)))

    async def settle(self, key: Key, attempt: int | None, *, committed: bool) -> None:
        """Write down how a supervised job ended whose supervisor is gone; ``attempt`` is the one of its receipt."""
        query = self._query("settle")
        outcome = "committed" if committed else "unlaunched"
        await self._writer.ask(lambda conn: _one(conn, query, (key.owner, key.job_id, attempt, outcome)))

    async def at_work(self, pids: Sequence[int]) -> bool:
        """Tell whether each of these processes holds an advisory lock, as a worker does from its first statement on.

        Never true of a supervisor, which holds locks too: its worker is the one to cancel.
        """
        query = self._query("at_work")
        row = await self._reader.ask(lambda conn: _one(conn, query, {"pids": list(pids), "supervises": SUPERVISES}))
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
        query = self._query("record")
        kept = error.as_history() if error else None
        values = [getattr(kept, field.name) for field in fields(kept)] if kept else None
        arguments = (
            key.owner, key.job_id, attempt, outcome, worker_pid, started_at, row_count, command_tag, values,
        )  # fmt: skip
        await self._writer.ask(lambda conn: _one(conn, query, arguments))

    async def reported(self, key: Key, attempt: int) -> None:
        """Note that somebody was told how an attempt ended: the job may be launched again."""
        query = self._query("reported")
        await self._writer.ask(lambda conn: _one(conn, query, (key.owner, key.job_id, attempt)))

    # All jobs -----------------------------------------------------------------------------------------------------

    async def jobs(
        self,
        *,
        states: Sequence[str] = (),
        job_id: str | None = None,
        **which: Unpack[Which],
    ) -> list[JobEntry]:
        """Return every job that the login may see, with its true state, newest launch first.

        Parameters
        ----------
        states:
            Only these of ``STATES``; none: all.
        job_id:
            Only this one (of each owner).
        which:
            As :class:`Which` has them.
        """
        rows = await self._which("jobs", which, states=list(states) or None, job_id=job_id)
        return [JobEntry.of(row) for row in rows]

    async def orphans(self, *, series: str | None = None, job_id: str | None = None) -> list[Orphan]:
        """Return the jobs that are at work, or may begin, without the session that registered their launch.

        Only those whose caller gave ``Options.when_orphaned``. Another process may be attached to one by now: whoever
        asks has to know whether anybody still wants it.

        Parameters
        ----------
        series:
            Only those that fit; ``*`` and ``?`` stand for any characters, and for one.
        job_id:
            Only this one (of each owner).
        """
        query = self._query("orphans")
        arguments = {"series": _like(series), "job_id": job_id}

        async def ask(conn: AsyncConnection[Any]) -> list[dict[str, Any]]:
            return await (await conn.cursor(row_factory=dict_row).execute(query, arguments)).fetchall()

        return [Orphan(**row) for row in await self._lister.ask(ask)]

    async def detail(self, owner: str, job_id: str) -> JobDetail | None:
        """Return what the history has of a job besides its line; None where the login may not see the job.

        Raises
        ------
        psycopg.errors.InsufficientPrivilege
            The login may see jobs, and may not call the function that tells this.
        """
        query = self._query("job_detail")
        row = await self._lister.ask(lambda conn: _one(conn, query, (owner, job_id)))
        return JobDetail.of(row) if row else None

    async def first_rows(self, owner: str, job_id: str, limit: int) -> list[FirstRows]:
        """Return the first rows that each statement of a job kept, values cut to 200 characters; none for none.

        Raises
        ------
        psycopg.errors.InsufficientPrivilege
            As :meth:`detail`.
        """
        query = self._query("first_rows")

        async def ask(conn: AsyncConnection[Any]) -> list[dict[str, Any]]:
            return await (await conn.cursor(row_factory=dict_row).execute(query, (owner, job_id, limit))).fetchall()

        return [FirstRows.of(row) for row in await self._lister.ask(ask)]

    async def durations(
        self,
        *,
        by: Literal["label", "series"] = "label",
        **which: Unpack[Which],
    ) -> list[Durations]:
        """Return how the jobs of each name went that the login may see, the name that was launched last first.

        Parameters
        ----------
        by:
            What the names are.
        which:
            As :class:`Which` has them; its ``limit`` is one of names.
        """
        return [Durations(**row) for row in await self._which("durations", which, by=by)]

    async def _which(self, name: str, which: Which, **further: object) -> list[dict[str, Any]]:
        query = self._query(name)
        arguments = {
            "label": _like(which.get("label")),
            "series": _like(which.get("series")),
            "since": which.get("since"),
            "limit": which.get("limit"),
            **further,
        }

        async def ask(conn: AsyncConnection[Any]) -> list[dict[str, Any]]:
            return await (await conn.cursor(row_factory=dict_row).execute(query, arguments)).fetchall()

        return await self._lister.ask(ask)

    async def prune(self, older_than: timedelta) -> tuple[int, int]:
        """Forget what ended longer ago; returns how many receipts and how many jobs of the history went.

        A retry of a job whose receipt is gone runs the job again.
        """
        query = self._query("prune")
        row = await self._writer.ask(lambda conn: _one(conn, query, (older_than,)))
        return row["receipts"], row["jobs"]

    async def rows(self, key: Key) -> tuple[Rows, ...]:
        """Return the rows that were kept of a job's statements; none where none were.

        Raises
        ------
        RowsGone
            They hold bytes that no client can be sent, as texts of a database of the encoding SQL_ASCII may.
        """
        query = self._query("kept_rows")

        async def ask(conn: AsyncConnection[Any]) -> list[Any]:
            return await (await conn.execute(query, (key.owner, key.job_id), binary=True)).fetchall()

        try:
            lines = await self._reader.ask(ask)
        except (psycopg.errors.CharacterNotInRepertoire, psycopg.errors.UntranslatableCharacter) as error:
            raise RowsGone(
                "the job is committed, and its rows hold bytes that are no UTF-8: the server sends them to no client",
                sqlstate=error.sqlstate,
                job_id=key.job_id,
                todo="Have the SQL give such a column as bytea, by convert_to(column, 'SQL_ASCII').",
            ) from error
        kept: list[Rows] = []
        for number, parts in groupby(lines, key=itemgetter(0)):
            head, *rest = parts
            _, columns, tag, total, *_ = head
            named = tuple(Column(c["name"], c["oid"], c["typmod"], c["type"]) for c in columns)
            held: list[list[str | None]] = [[] for _ in named]
            count = 0
            for *_, rows, cells in (head, *rest):
                count += rows or 0
                for place, column in enumerate(held if cells else ()):
                    column.extend(cells[place * rows : (place + 1) * rows])
            kept.append(Rows(named, ByColumn(held, count), total, tag, number))
        return tuple(kept)

    async def run(self, work: Callable[[AsyncConnection[Any]], Awaitable[T]]) -> T:
        """Run work that writes nothing and may be repeated, on the connection of the looks."""
        return await self._reader.ask(work)


def _like(pattern: str | None) -> str | None:
    if pattern is None:
        return None
    escaped = pattern.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")
    return escaped.replace("*", "%").replace("?", "_")


@cache
def _named(schema: str, function: str) -> str:
    return sql.Identifier(schema, function).as_string(None)


async def _one(
    conn: AsyncConnection[Any], query: bytes, arguments: tuple[Any, ...] | Mapping[str, Any]
) -> dict[str, Any]:
    cursor = await conn.cursor(row_factory=dict_row).execute(query, arguments)
    return await cursor.fetchone() or {}


def _give(future: asyncio.Future[Sighting], sighting: Sighting) -> None:
    if not future.done():
        future.set_result(sighting)


def _fail(wanted: dict[Key, asyncio.Future[Sighting]], error: Exception) -> None:
    for future in wanted.values():
        if not future.done():
            future.set_exception(error)
            future.exception()  # its waiter may be gone
