"""The door: ``run`` and ``arun`` for one job, :class:`Launcher` for many jobs over one connection string."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Literal, Self, Unpack
from weakref import WeakKeyDictionary, WeakSet

import psycopg

from .batch import Batch, Call, Preparation
from .call_options import Options, RunOptions
from .driver import Driver, to_its_end
from .errors import InvalidJob, PgbgError
from .job import Job
from .ledger.ledger import Ledger
from .ledger.readiness import ServerFacts
from .ledger.sighting import Key, Sighting
from .outcome import Cause, Outcome
from .postgres import connection
from .postgres.connection import Conninfo
from .rows import NoRows, Rows
from .stream import Stream
from .telemetry import observing
from .walk import failures
from .walk.host import Host
from .walk.recording import count
from .walk.run import cancel_job, run_job
from .walk.streamed_rows import Feed


class Launcher:
    """Runs any number of jobs side by side over a few connections.

    Use it as an async context manager, in one event loop. Closing it leaves workers alone: they go on, and their
    jobs can be attached to later.

    Parameters
    ----------
    conninfo:
        A libpq connection string or URI, or an async function that returns one: it is asked whenever a connection is
        opened, so that an expired token is no error.
    schema:
        Name of the package's schema (``pgbg install --schema``).

    Raises
    ------
    InvalidJob
        libpq cannot read the connection string.
    """

    def __init__(self, conninfo: Conninfo, *, schema: str = "pgbg") -> None:
        if isinstance(conninfo, str):
            connection.check(conninfo)
        self._host = Host(conninfo, schema)
        self._streams: WeakSet[Stream] = WeakSet()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close all connections. Workers go on; streams end."""
        if await to_its_end(self._close()):  # cancelled half way, it would leave connections open
            raise asyncio.CancelledError

    async def _close(self) -> None:
        for stream in list(self._streams):
            await stream.close()
        await self._host.close()

    @property
    def ledger(self) -> Ledger:
        """The receipts, series and history of the database."""
        return self._host.ledger

    async def facts(self) -> ServerFacts:
        """Return the server's facts; read once, and kept.

        Raises
        ------
        ServerUnreachable
            It cannot be reached.
        PoolerInTransactionMode
            The connection goes through a pooler in transaction mode.
        """
        return await self._host.facts()

    async def run(self, job: Job, **options: Unpack[RunOptions]) -> Outcome:
        """Launch the job's SQL in a labelled worker, or attach to the one that runs it, and wait for its outcome.

        Parameters
        ----------
        job:
            The job.
        options:
            As :class:`pgbg_orchestration.call_options.Options` takes them.

        Raises
        ------
        PgbgError
            As :func:`pgbg_orchestration.arun`.
        """
        with observing(job, Options(**options)) as (observed, tell):
            outcome = await run_job(self._host, job, observed)
            tell(outcome)
            return outcome

    def stream(self, job: Job, *, as_text: bool = False, **options: Unpack[RunOptions]) -> Stream:
        """Return the rows of the job's last statement, to be read once and as they come: ``async for``.

        For results that are too big to keep (``Job.fetch``) or to hold in memory. The job is launched when the first
        row is asked for, by a session of its own. The server collects its rows (beyond ``work_mem`` in a temporary
        file), so that the worker waits for no reader; they are sent when it has committed, as fast as they are read.

        Parameters
        ----------
        job:
            The job: of kind receipt or session, without ``fetch``.
        as_text:
            Give values as the texts of the server, to be written on: in ISO order, to the last digit; NULL is None.
        options:
            As :meth:`run` takes them.

        Raises (when read)
        ------------------
        PgbgError
            As :meth:`run`: nothing of the job is committed, or that is not known.
        RowsGone
            The job is committed, and its rows, or the rest of them, are lost.
        """

        async def start(feed: Feed) -> Outcome:
            with observing(job, Options(**options)) as (observed, tell):
                outcome = await run_job(self._host, job, observed, feed)
                tell(outcome)
                return outcome

        async def finish(stream: Stream, outcome: Outcome | None) -> None:
            self._streams.discard(stream)
            if outcome is not None and outcome.proof == "receipt":
                await count(self._host, job, outcome)

        stream = Stream(job, start, finish, as_text=as_text)
        self._streams.add(stream)
        return stream

    async def cancel(
        self,
        job_id: str,
        *,
        owner: str | None = None,
        series: str | None = None,
        reason: str = "cancelled",
        cause: Cause = Cause.ASKED,
        of_try: str | None = None,
    ) -> Literal["cancelled", "committed"]:
        """Cancel a job, for good, whoever launched it; returns how it ended: it may have been committed already.

        Parameters
        ----------
        job_id, owner, series:
            The job.
        reason:
            For people, in the receipt; no code looks at it.
        cause:
            By this it is decided who may take the cancel back.
        of_try:
            The orchestrator's try that is ended, as :class:`~pgbg_orchestration.call_options.Options` has it.

        Raises
        ------
        StillRunning
            Its worker does not end, or runs as a login that this one may not signal.
        """
        facts = await self._host.require(receipts=True)
        try:
            return await cancel_job(self.ledger, Key(owner or facts.login, job_id, series), cause, reason, of_try)
        except psycopg.Error as error:
            self._host.forget_facts()
            raise failures.ledger(error, job_id) from error

    async def run_many(
        self,
        jobs: Mapping[str, Job],
        *,
        at_once: int | None = None,
        fail_fast: bool = False,
        **options: Unpack[RunOptions],
    ) -> dict[str, Outcome | PgbgError]:
        """Run jobs side by side, each with a commit of its own, and wait for the end of each.

        Parameters
        ----------
        jobs:
            The jobs by name.
        at_once:
            How many run at the same time at most. Default: all; those without a worker slot wait for one.
        fail_fast:
            Cancel the others when one fails, with :attr:`Cause.FAILED_BESIDE`. A later call with that in its
            ``retry_cancelled`` runs them.
        options:
            As :meth:`run` takes them, for each job.

        Returns
        -------
        dict[str, Outcome | PgbgError]
            How each ended, by its name, in the order in which they ended: its outcome, or the error that :meth:`run`
            would have raised.

        Raises
        ------
        InvalidJob
            ``at_once`` is below 1.
        """

        def preparation(job: Job) -> Preparation:
            async def prepare() -> Call:
                return Call(job, options)

            return prepare

        members = {name: preparation(job) for name, job in jobs.items()}
        of_try = options.get("of_try")
        return await Batch(self, members, at_once=at_once, fail_fast=fail_fast, of_try=of_try).run()

    async def cancel_all(self) -> int:
        """Cancel all workers of this launcher, by the extension's own ``cancel_all``; returns how many.

        For a launcher that one task has to itself, when that task is killed: it hits every job of a session. It is not
        final, and skips sessions with a worker that is still starting: cancel the calls of :meth:`run` besides.
        """
        return await self._host.cancel_all()

    async def rows(self, job_id: str, *, owner: str | None = None) -> tuple[Rows, ...]:
        """Return the rows that a committed job kept, by statement, whoever ran it and however long ago.

        Parameters
        ----------
        job_id, owner:
            The job.

        Raises
        ------
        NoRows
            None are kept: it is not committed, was not asked for them, gives none, or is pruned.
        NoPrivilege
            The login is no member of the owner.
        """
        facts = await self._host.require(receipts=True)
        key = Key(owner or facts.login, job_id, None)
        try:
            kept = await self.ledger.rows(key)
        except psycopg.Error as error:
            self._host.forget_facts()
            raise failures.ledger(error, job_id) from error
        if not kept:
            raise NoRows(
                f"no rows are kept of the job {job_id!r}: it is not committed, was not asked for them "
                "(Job(fetch=True)), gives none, is pruned, or is not this login's to see"
            )
        return kept

    async def look(self, job_id: str, *, owner: str | None = None, series: str | None = None) -> Sighting:
        """Look at a job once: its lock, its receipt, its history."""
        facts = await self._host.require(receipts=True)
        return await self.ledger.look(Key(owner or facts.login, job_id, series))


_shared: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[tuple[Conninfo, str], tuple[Launcher, int]]] = (
    WeakKeyDictionary()
)


@asynccontextmanager
async def shared_launcher(conninfo: Conninfo, *, schema: str = "pgbg") -> AsyncIterator[Launcher]:
    """Lend the launcher that all callers in this event loop share for one connection string; the last one closes it.

    Parameters
    ----------
    conninfo:
        As :class:`Launcher` takes it; functions that are equal share one.
    schema:
        Name of the package's schema.
    """
    launchers = _shared.setdefault(asyncio.get_running_loop(), {})
    key = (conninfo, schema)
    launcher, users = launchers.get(key) or (Launcher(conninfo, schema=schema), 0)
    launchers[key] = (launcher, users + 1)
    try:
        yield launcher
    finally:
        _, users = launchers[key]
        if users > 1:
            launchers[key] = (launcher, users - 1)
        else:
            del launchers[key]
            await launcher.close()


async def arun(conninfo: str, job: Job, *, schema: str = "pgbg", **options: Unpack[RunOptions]) -> Outcome:
    """Launch a job's SQL in a labelled worker, or attach to the one that runs it already, and wait for its outcome.

    Parameters
    ----------
    conninfo:
        A libpq connection string or URI. Calls with the same one in one event loop share their connections.
    job:
        The job.
    schema:
        Name of the package's schema.
    options:
        As :class:`pgbg_orchestration.call_options.Options` takes them: ``on_cancel``, ``on_superseded``,
        ``retry_cancelled``, ``accept_changed_sql``, ``slot_timeout``, ``poll_interval``, ``deadline``, ``observer``,
        ``of_try``, ``notices``, ``when_orphaned``, ``supervisor``.

    Returns
    -------
    Outcome
        Proof that the job is committed; ``launched`` is False when somebody else launched it.

    Raises
    ------
    WorkerError
        The SQL failed; nothing of it is committed.
    JobCancelled, Superseded, DeadlinePassed
        It was ended before it committed, for good.
    WorkerLost, LaunchFailed
        Its worker is gone without a commit.
    OutcomeUnknown
        A job without a receipt lost its session.
    NoWorkerSlot, StillRunning, SeriesHeld, ServerUnreachable
        A bound on a wait was reached.
    InvalidJob, JobIdReused, ExtensionMissing, ExtensionTooOld, SchemaMissing, SchemaVersionMismatch, NoPrivilege, \
    PoolerInTransactionMode, ReadOnlyServer
        Refused before anything was launched.
    """
    async with shared_launcher(conninfo, schema=schema) as launcher:
        return await launcher.run(job, **options)


def run(conninfo: str, job: Job, *, schema: str = "pgbg", **options: Unpack[RunOptions]) -> Outcome:
    """Do what :func:`arun` does, from code without an event loop. Ctrl-C counts as a cancel.

    Raises
    ------
    InvalidJob
        There is a running event loop: use ``await arun(...)`` there.
    PgbgError
        As :func:`arun`.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        pass
    else:
        raise InvalidJob("run() was called in a running event loop", todo="Use `await arun(...)` there.")
    return Driver(lambda _talk: arun(conninfo, job, schema=schema, **options)).run()
