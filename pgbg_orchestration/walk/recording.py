"""Writing into the history. It is no proof of anything, so a fault here ends no job: it is logged."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable

import psycopg

from pgbg_orchestration import pace
from pgbg_orchestration.errors import PgbgError
from pgbg_orchestration.job import Job
from pgbg_orchestration.ledger.ledger import Ledger
from pgbg_orchestration.ledger.sighting import Key
from pgbg_orchestration.outcome import ErrorFields, Outcome
from pgbg_orchestration.testing import faults

from .case import Case
from .host import Host

logger = logging.getLogger("pgbg_orchestration")


async def count(host: Host, job: Job, outcome: Outcome) -> None:
    """Add to the history how many rows a streamed job gave."""
    facts = await host.facts()
    key = Key(job.owner or facts.login, outcome.job_id, job.series)
    writing = host.ledger.record(
        key,
        outcome.attempt or 1,
        "committed",
        worker_pid=outcome.worker_pid,
        started_at=outcome.started_at,
        row_count=outcome.row_count,
        command_tag=outcome.command_tag,
    )
    await write(writing, label=job.label, patience=pace.CALL)


async def record(
    case: Case, ledger: Ledger, name: str, *, outcome: Outcome | None = None, error: ErrorFields | None = None
) -> None:
    """Write the outcome of a registered launch into the history."""
    if not case.work.carries_receipt:
        return
    faults.point("before_record")
    worker, info = case.worker, case.memory.launch.info
    # The handle of a supervisor is not the worker's: the supervisor writes down that one's pid.
    own_pid = worker.handle.pid if worker and not case.work.has_supervisor else None
    writing = ledger.record(
        case.work.key,
        case.attempt,
        name,
        worker_pid=outcome.worker_pid if outcome else own_pid,
        started_at=outcome.started_at if outcome else info.started_at if info else None,
        row_count=outcome.row_count if outcome else None,
        command_tag=outcome.command_tag if outcome else None,
        error=error,
    )
    await write(writing, label=case.work.label, patience=case.patience())
    faults.point("after_record")


async def write(writing: Awaitable[object], *, label: str | None, patience: float) -> None:
    """Write into the history, for ``patience`` seconds at most; a fault is logged and goes no further."""
    try:
        async with asyncio.timeout(patience):
            await writing
    except (psycopg.Error, PgbgError, TimeoutError) as failure:
        logger.warning("the history of job %s could not be written: %s", label, failure)
