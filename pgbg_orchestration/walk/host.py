"""What the jobs of one database share: launching sessions, the queue for slots, the listener and the ledger."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable
from typing import Any

import psycopg
from psycopg import AsyncConnection

from pgbg_orchestration import pace, telemetry
from pgbg_orchestration.errors import NOT_BY_THIS_CALL, PgbgError, PoolerInTransactionMode
from pgbg_orchestration.job import Job, Kind
from pgbg_orchestration.ledger import queries, readiness
from pgbg_orchestration.ledger.ledger import Ledger
from pgbg_orchestration.ledger.readiness import ServerFacts
from pgbg_orchestration.postgres import connection, describe
from pgbg_orchestration.postgres.handles import KEYS
from pgbg_orchestration.postgres.listener import Listener
from pgbg_orchestration.postgres.pg_background import Extension
from pgbg_orchestration.postgres.session import LaunchingSession
from pgbg_orchestration.postgres.slots import SlotQueue, SlotTurns
from pgbg_orchestration.statements import index_builds

from .onlooker import Onlooker
from .rounds import Rounds
from .worker_sql import Work, bind

logger = logging.getLogger("pgbg_orchestration")
SESSIONS = 3  # at most; a further one is opened when the others are busy launching
LOOKS = 4  # tries to read the server's facts, before it counts as unreachable


class Host:
    """What the jobs of one connection string share.

    Parameters
    ----------
    conninfo:
        A libpq connection string or URI, or an async function that returns one.
    schema:
        Name of the package's schema.
    """

    def __init__(self, conninfo: connection.Conninfo, schema: str) -> None:
        self.conninfo = conninfo
        self.schema = schema
        self.slots = SlotQueue()
        self.ledger = Ledger(conninfo, schema, logger.warning)
        self._facts: ServerFacts | None = None
        self._turns: SlotTurns | None = None
        self._sessions: list[LaunchingSession] = []
        self._opening = asyncio.Lock()
        self.onlooker = Onlooker(self.ledger)
        self.rounds = Rounds(self.ledger)
        self._listener = Listener(conninfo)
        telemetry.observe(self)

    @property
    def session_count(self) -> int:
        """How many launching sessions are open, those of single jobs left out."""
        return len(self._sessions)

    @property
    def worker_count(self) -> int:
        """How many workers are followed by their handles in these sessions."""
        return sum(len(session.workers) for session in self._sessions)

    async def close(self) -> None:
        """Close all connections. Workers go on."""
        await self.onlooker.close()
        await self.rounds.close()
        await self._listener.close()
        sessions, self._sessions = self._sessions, []
        await asyncio.gather(*(session.close() for session in sessions))  # behind a silent server each takes a while
        await self.ledger.close()

    async def facts(self) -> ServerFacts:
        """Return the server's facts; read once, and kept.

        Raises
        ------
        ServerUnreachable
            It cannot be reached.
        PoolerInTransactionMode
            The connection goes through a pooler in transaction mode.
        """
        if self._facts is not None:
            return self._facts
        async with self._opening:
            for tries in range(LOOKS):
                if self._facts is not None:
                    break
                try:
                    self._facts = await self._look_at_server()
                except connection.ConnectionLost as lost:
                    # Somebody terminated the session that read them, or the network cut it.
                    if tries == LOOKS - 1:
                        raise connection.unreachable(lost.__cause__ or lost, "the server cannot be reached") from lost
                    await asyncio.sleep(pace.backoff(tries))
                except (psycopg.OperationalError, OSError, TimeoutError) as error:
                    raise connection.unreachable(error, "the server cannot be reached") from error
            assert self._facts is not None
            return self._facts

    @property
    def max_worker_processes(self) -> int | None:
        """Worker slots of the whole server; None before its facts were read."""
        return self._facts.max_worker_processes if self._facts else None

    @property
    def turns(self) -> SlotTurns:
        """Turns for jobs that need several worker slots at once."""
        if self._turns is None:
            self._turns = SlotTurns(self.max_worker_processes or 2)
        return self._turns

    def forget_facts(self) -> None:
        """Have the server's facts read anew before the next launch: they may have changed."""
        self._facts = None

    async def _look_at_server(self) -> ServerFacts:
        conn = await connection.connect(self.conninfo, "pgbg: looking")
        try:
            async with asyncio.timeout(pace.CALL):
                facts = await readiness.look_at(conn, self.schema)
                if facts.through_pooler:
                    await self._refuse_transaction_pooling(conn)
        except psycopg.Error as error:
            if connection.is_lost(conn, error):
                raise connection.ConnectionLost(str(error)) from error
            raise
        finally:
            await connection.close(conn)
        return facts

    async def _refuse_transaction_pooling(self, conn: AsyncConnection[Any]) -> None:
        """Refuse a pool in transaction mode.

        A second connection holds a server session in a transaction. In transaction mode that is the one which ``conn``
        was given last, or ``conn`` gets another one meanwhile, or none. In session mode ``conn`` keeps its own.
        """
        other = await connection.connect(self.conninfo, "pgbg: looking")
        try:
            before = await _backend_pid(conn)
            async with other.transaction():
                held = await _backend_pid(other)
                try:
                    async with asyncio.timeout(pace.STALLED):
                        after = await _backend_pid(conn)
                except TimeoutError:
                    after = None
        finally:
            await connection.close(other)
        if held == before or after != before:
            raise PoolerInTransactionMode(
                "this connection goes through a pooler in transaction mode, where a worker's handle is lost between "
                "two statements",
                todo="Connect to the server itself, or through a pool in session mode.",
            )

    async def bind(self, job: Job) -> Work:
        """Check the server for this job, and bind it; nothing has been launched when this raises."""
        read_only = str((job.settings or {}).get("default_transaction_read_only", "")).lower()
        read_write = read_only in ("off", "false", "0", "no")
        try:
            facts = await self.require(receipts=job.kind is not Kind.SESSION, read_write=read_write)
        except PgbgError as error:
            error.data_state = NOT_BY_THIS_CALL  # an earlier call may have launched it: nobody looked
            raise
        may_number = facts.runs_blocks
        progress = facts.extension.text("report_progress") if may_number and facts.reports else None

        def bound(conn: AsyncConnection[Any] | None) -> Awaitable[Work]:
            return bind(job, conn, facts.login, may_number=may_number, progress_function=progress)

        if job.parameters is None and job.role is None and job.owner is None and job.fetch is None:
            return await bound(None)  # nothing to ask the server for
        return await self.ledger.run(bound)

    async def require(self, *, receipts: bool, read_write: bool = False) -> ServerFacts:
        """Return the server's facts, and refuse a server on which a job cannot run.

        Raises
        ------
        PgbgError
            As :func:`pgbg_orchestration.ledger.readiness.require`; a later call reads the facts anew.
        """
        facts = await self.facts()
        try:
            readiness.require(facts, self.schema, receipts=receipts, read_write=read_write)
        except Exception:
            self.forget_facts()  # somebody may mend what was wrong
            raise
        return facts

    async def verify(self, query: str, role: str | None) -> bool:
        """Ask a job's ``verify_sql``, in a session with the login's own settings.

        Raises
        ------
        psycopg.Error
            The server refuses it.
        ConnectionLost
            The server is away.
        """
        async with connection.for_a_question(self.conninfo, "pgbg: verifying") as conn:
            if role is not None:
                await conn.execute("select pg_catalog.set_config('role', %s, false)", (role,))
            return await describe.verify(conn, query)

    async def drop_invalid_index(self, index: index_builds.ConcurrentIndex, job: Job) -> str | None:
        """Drop the invalid index that an earlier build left, as the job's role; returns its name, if there was one.

        Raises
        ------
        psycopg.Error
            The server refuses.
        ConnectionLost
            The server is away.
        """
        async with connection.for_a_question(self.conninfo, "pgbg: dropping an invalid index") as conn:
            settings = {**(job.settings or {}), **({"role": job.role} if job.role else {})}
            if settings:
                await connection.configure(conn, tuple(settings.items()))
            return await index_builds.drop_invalid_index(conn, index)

    async def session(self, *, exclusive: bool = False) -> LaunchingSession:
        """Return a launching session with room; ``exclusive``: one that nobody else uses until it is given back.

        Raises
        ------
        ServerUnreachable
            The server did not answer for a long time.
        ExtensionMissing
            The extension was dropped.
        """
        extension = (await self.facts()).extension
        if exclusive:
            idle = next((session for session in self._sessions if session.is_idle), None)
            if idle is None:
                return await self._open(extension)
            self._sessions.remove(idle)
            return idle
        if not any(session.worn for session in self._sessions) and (usable := self._with_room()):
            return usable
        async with self._opening:
            for session in [s for s in self._sessions if s.lost or (s.worn and not s.load)]:
                self._sessions.remove(session)
                await session.close()
            if usable := self._with_room():
                return usable
            if len([s for s in self._sessions if not s.worn and not s.stalled]) >= self._most_sessions():
                return min(self._sessions, key=lambda session: (session.worn, session.stalled, session.load))
            session = await self._open(extension)
            self._sessions.append(session)
            return session

    def _with_room(self) -> LaunchingSession | None:
        usable = (session for session in self._sessions if session.room)
        return min(usable, key=lambda session: session.load, default=None)

    async def give_back(self, session: LaunchingSession) -> None:
        """Take back an exclusive session: it is shared from now on if it is as good as new, and closed otherwise."""
        if session.is_idle and len(self._sessions) < self._most_sessions():
            self._sessions.append(session)
        else:
            await session.close()

    @property
    def listener(self) -> Listener | None:
        """What hears of commits; None where the server does not notify, or the login lacks a connection for it."""
        facts = self._facts
        if facts is None or not facts.notifies:
            return None
        limit = facts.connection_limit
        return self._listener if limit is None or limit[0] > readiness.CONNECTIONS_NEEDED + 1 else None

    def _most_sessions(self) -> int:
        """Return how many sessions to share at most: fewer where the login may have few connections."""
        limit = self._facts.connection_limit if self._facts else None
        spare = SESSIONS if limit is None else limit[0] - readiness.CONNECTIONS_NEEDED - 1
        return max(min(SESSIONS, spare), 1)

    async def cancel_all(self) -> int:
        """Cancel every worker of every session by the extension's own ``cancel_all``; returns how many."""
        return sum([await session.cancel_all(self.ledger.at_work) for session in list(self._sessions)])

    async def _open(self, extension: Extension) -> LaunchingSession:
        loop = asyncio.get_running_loop()
        until = loop.time() + pace.RECONNECT
        attempt, warned_at = 0, -pace.WARN_AGAIN
        while True:
            try:
                parts = {name: extension.text(name) for name in ("result_info", "result")}
                recording = queries.filled("recording", self.schema, keys=KEYS, **parts)
                return await LaunchingSession.open(self.conninfo, extension, recording)
            except (psycopg.OperationalError, OSError, TimeoutError) as error:
                if loop.time() >= until or getattr(error, "sqlstate", None) in connection.REFUSED_LOGINS:
                    raise connection.unreachable(error, "no launching session can be opened") from error
                if loop.time() >= warned_at + pace.WARN_AGAIN:
                    warned_at = loop.time()
                    logger.warning("no launching session (%s), trying again", connection.words(error))
                await asyncio.sleep(pace.backoff(attempt))
                attempt += 1


async def _backend_pid(conn: AsyncConnection[Any]) -> int:
    row = await (await conn.execute("select pg_catalog.pg_backend_pid()")).fetchone()
    assert row is not None
    return int(row[0])
