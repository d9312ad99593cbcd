"""Following a worker by its handle: the report of its end, its result read to the end, and what its SQL raised.

What is learned goes into the case's memory; :mod:`.evidence` says what it means.
"""

from __future__ import annotations

import asyncio
from functools import partial

import psycopg

from pgbg_orchestration.outcome import ErrorFields, EventKind, level_of
from pgbg_orchestration.postgres import describe, worker_rows
from pgbg_orchestration.postgres.connection import ConnectionLost
from pgbg_orchestration.postgres.describe import Readable
from pgbg_orchestration.postgres.handles import OnNotice, Worker
from pgbg_orchestration.statements.row_source import row_source
from pgbg_orchestration.testing import faults
from pgbg_orchestration.verdict import OURS, Report

from . import location
from .case import Case, broken_off
from .memory import NO_SLOT_FOR_WORKER
from .streamed_rows import Feed

BEFORE_ITS_SQL = (*OURS, NO_SLOT_FOR_WORKER)
"""Codes that a worker ends with before the job's own SQL has begun."""


def begin_reading(case: Case, worker: Worker, readable: Readable) -> None:
    """Begin to read a worker's result to its end, and what it raises before that."""
    loop = asyncio.get_running_loop()
    on_notice = partial(_take_notice, case) if case.options.notices else None
    if case.feed is not None:
        case.reading = loop.create_task(_stream(case, case.feed, worker, on_notice))
    else:
        case.reading = loop.create_task(worker.session.drain(worker, readable, on_notice))
    case.last_sign = loop.time()


async def read_on(case: Case) -> None:
    """Wait for the end of a reading, as long as notices keep coming, or for the time of one call without any."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    while case.reading is not None and not case.reading.done():
        left = case.patience() - (loop.time() - max(case.last_notice, began))
        if left <= 0:
            break
        await asyncio.wait({case.reading}, timeout=left)


async def stop_reading(case: Case) -> None:
    """Break the reading of the result off; the worker goes on without its handle."""
    if case.reading is not None:
        await broken_off(case.reading)
        _take_over(case, case.reading)


async def read_report(case: Case) -> None:
    """Read the handle's report, when the worker has ended since the last time."""
    if case.reading is not None and case.reading.done():
        _take_over(case, case.reading)
    if case.reading is not None or case.memory.launch.report is not Report.RUNNING:
        return
    if case.worker is None or not case.worker.end.done():
        return
    info = case.worker.end.result()
    faults.point("after_end")
    error = await case.worker.error() if info is not None and info.has_error else None
    case.memory = case.memory.ended(info, error, case.terms)
    if case.memory.launch.report is Report.NONE:
        case.attempts.pop()  # it launched nothing
        case.waited_for_slot = True


def _take_over(case: Case, reading: asyncio.Task[tuple[int | None, str | None]]) -> None:
    case.reading = None
    try:
        case.memory = case.memory.read(reading.result())
    except (ConnectionLost, asyncio.CancelledError):
        case.memory = case.memory.handle_lost()
    except psycopg.Error as error:
        # Is it the worker's error, or one of reading it? Only the worker's has a context. 08006 is about the connection
        # to the worker. Class 42 says that the columns asked for do not fit; a worker with a receipt is read as tags,
        # which always fit, so there it is the SQL's own. Without its end, the result proves nothing.
        columns_misfit = not case.work.carries_receipt and (error.sqlstate or "").startswith("42")
        if error.sqlstate == "08006" or columns_misfit or not error.diag.context:
            case.memory = case.memory.handle_lost()
        else:
            fields = describe.error_fields(error)
            _note_failure(case, fields, error)
            case.memory = case.memory.failed(fields)


async def _stream(case: Case, feed: Feed, worker: Worker, on_notice: OnNotice | None) -> tuple[int | None, str | None]:
    """Wait for the end of a worker whose rows are streamed, and give its rows and session over to their reader."""
    texts = {column.type_oid for column in feed.columns} if feed.as_text else ()
    feed.rows = await worker_rows.read(worker.session, worker, feed.definition, on_notice, as_text=texts)
    feed.session, case.session = worker.session, None
    source = row_source(case.work.statements[-1])
    return None, source.tag if source else None


async def read_failure(case: Case) -> None:
    """Read what a failed worker had raised, and where it failed. This forgets the handle: write the history first."""
    error = case.memory.launch.error
    if case.worker is None or error is None or error.sqlstate in BEFORE_ITS_SQL:
        return
    work = case.work
    if work.reports_numbers and not work.raises_numbers and not work.has_supervisor:
        progress = (await case.worker.session.look_at_progress([case.worker])).get(case.worker)
        case.statement = location.number_in_progress(progress.message, len(work.statements)) if progress else None
    raised = await case.worker.session.read_failed(case.worker, partial(_take_notice, case))
    if raised is not None:
        _note_failure(case, error, raised)


def _take_notice(case: Case, diag: psycopg.errors.Diagnostic) -> None:
    """Tell the caller what the job's SQL raised; where it is a statement's number, remember that."""
    case.last_notice = asyncio.get_running_loop().time()
    if (number := location.number_of(diag)) is not None:
        case.statement = number
        if case.reading is not None:
            of = len(case.work.statements)
            case.tell(EventKind.PROGRESS, f"statement {number} of {of}", statement=number, of=of, percent=None)
        return
    if case.work.job.redact_details:
        return
    severity = diag.severity_nonlocalized or "NOTICE"
    lines = [f"{severity}: {diag.message_primary}"]
    lines += [
        f"{name}: {text}" for name, text in (("DETAIL", diag.message_detail), ("HINT", diag.message_hint)) if text
    ]
    case.tell(
        EventKind.NOTICE,
        "\n".join(lines),
        level=level_of(severity),
        severity=severity,
        sqlstate=diag.sqlstate,
        text=diag.message_primary,
        detail=diag.message_detail,
        hint=diag.message_hint,
    )


def _note_failure(case: Case, error: ErrorFields, raised: psycopg.Error) -> None:
    """Remember where the worker failed: ``error`` is its report, ``raised`` the same as its result has it."""
    diag = raised.diag
    same = raised.sqlstate == error.sqlstate
    position = diag.statement_position if same else None
    within = diag.internal_position if same else None
    of = len(case.work.statements)
    at_commit = same and case.statement == of and location.is_of_commit(diag.context)
    # A statement's error has a context; without one it comes from the commit.
    number = case.statement if error.context and not at_commit else None
    inside = (diag.internal_query or "", int(within)) if within else None
    case.failure = location.ErrorPlace(int(position) if position else None, number, at_commit, inside)
