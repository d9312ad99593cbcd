"""``run`` and ``arun``: one job, one call."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Literal
from weakref import WeakKeyDictionary

from .errors import InvalidJob
from .job import Job
from .launcher import Launcher
from .outcome import Event, Outcome

_shared: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[tuple[str, str], tuple[Launcher, int]]] = WeakKeyDictionary()


@asynccontextmanager
async def shared_launcher(conninfo: str, *, schema: str = "pgbg") -> AsyncIterator[Launcher]:
    """Lend the launcher that all callers in this event loop share for one connection string; the last one closes it.

    Parameters
    ----------
    conninfo:
        A libpq connection string or URI.
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


async def arun(
    conninfo: str,
    job: Job,
    *,
    on_cancel: Literal["cancel", "leave"] = "cancel",
    on_superseded: Literal["cancel", "wait"] = "cancel",
    retry_cancelled: bool = False,
    accept_changed_sql: bool = False,
    slot_timeout: float | None = None,
    poll_interval: float | None = None,
    deadline: datetime | None = None,
    schema: str = "pgbg",
    observer: Callable[[Event], None] | None = None,
) -> Outcome:
    """Launch a job's SQL in a labelled worker, or attach to the one that runs it already, and wait for its outcome.

    Parameters
    ----------
    conninfo:
        A libpq connection string or URI. Calls with the same one in one event loop share their connections.
    job:
        The job.
    on_cancel:
        What happens to the worker when the awaiting task is cancelled: ``cancel`` it and wait until that is decided
        (at most a minute), or ``leave`` it at work, to be attached to later.
    on_superseded:
        What to do with a worker of an older generation of the series: ``cancel`` it, or ``wait`` for it.
    retry_cancelled:
        Run a job that was cancelled before all the same. One that only met its deadline is run again without it.
    accept_changed_sql:
        Let an id that stands for other SQL pass, with a warning.
    slot_timeout:
        Seconds to wait for a worker slot at most. Default: as long as the job may take.
    poll_interval:
        The longest time between two looks at the job, in seconds, from 0.01. Looks come at a pace of their own (a look
        comes late by at most 4 % of the time that the job has run), and this is where the pauses stop growing. Default:
        5, and 15 for progress and blocked output, which are looked at once a second at most.
    deadline:
        The moment until which the job has time, with time zone; like ``Job.timeout``, but absolute.
    schema:
        Name of the package's schema.
    observer:
        Called with each event of the job's way.

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
        return await launcher.run(
            job,
            on_cancel=on_cancel,
            on_superseded=on_superseded,
            retry_cancelled=retry_cancelled,
            accept_changed_sql=accept_changed_sql,
            slot_timeout=slot_timeout,
            poll_interval=poll_interval,
            deadline=deadline,
            observer=observer,
        )


def run(
    conninfo: str,
    job: Job,
    *,
    on_cancel: Literal["cancel", "leave"] = "cancel",
    on_superseded: Literal["cancel", "wait"] = "cancel",
    retry_cancelled: bool = False,
    accept_changed_sql: bool = False,
    slot_timeout: float | None = None,
    poll_interval: float | None = None,
    deadline: datetime | None = None,
    schema: str = "pgbg",
    observer: Callable[[Event], None] | None = None,
) -> Outcome:
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
    return asyncio.run(
        arun(
            conninfo,
            job,
            on_cancel=on_cancel,
            on_superseded=on_superseded,
            retry_cancelled=retry_cancelled,
            accept_changed_sql=accept_changed_sql,
            slot_timeout=slot_timeout,
            poll_interval=poll_interval,
            deadline=deadline,
            schema=schema,
            observer=observer,
        )
    )
