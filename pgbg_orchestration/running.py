"""``run`` and ``arun``: one job, one call."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Unpack
from weakref import WeakKeyDictionary

from .errors import InvalidJob
from .job import Job
from .launcher import Launcher
from .options import RunOptions
from .outcome import Outcome
from .postgres.connection import Conninfo

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
        As :class:`pgbg_orchestration.options.Options` takes them: ``on_cancel``, ``on_superseded``,
        ``retry_cancelled``, ``accept_changed_sql``, ``slot_timeout``, ``poll_interval``, ``deadline``, ``observer``.

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
    return asyncio.run(arun(conninfo, job, schema=schema, **options))
