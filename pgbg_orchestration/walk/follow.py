"""Following a worker by its handle: the report of its end, its result read to the end, and what its SQL raised.

What is learned goes into the case's memory; what it means is decided elsewhere (:mod:`.evidence`).
"""

from __future__ import annotations

import asyncio
from functools import partial

import psycopg

from pgbg_orchestration.outcome import ErrorFields, EventKind, level_of
from pgbg_orchestration.postgres import describe, worker_rows
from pgbg_orchestration.postgres.connection import ConnectionLost
from pgbg_orchestration.postgres.describe import Readable
from pgbg_orchestration.postgres.handles import Hearing, Worker
from pgbg_orchestration.statements.row_source import row_source
from pgbg_orchestration.testing import faults
from pgbg_orchestration.verdict import OURS, Report

from . import location
from .case import Case, broken_off
from .memory import NO_SLOT_FOR_WORKER
from .streamed_rows import Feed

BEFORE_ITS_SQL = (*OURS, NO_SLOT_FOR_WORKER)
"""Codes that a worker raises before the job's own SQL has begun."""


def begin_reading(case: Case, worker: Worker, readable: Readable) -> None:
    """Begin to read a worker's result to its end, and what it raises on its way."""
    loop = asyncio.get_running_loop()
    heard = partial(_hear, case) if case.options.notices else None
    if case.feed is not None:
        case.reading = loop.create_task(_stream(case, case.feed, worker, heard))
    else:
        case.reading = loop.create_task(worker.session.drain(worker, readable, heard))
    case.last_seen = loop.time()


async def hear_out(case: Case) -> None:
    """Wait for the end of a reading: as long as it takes where something keeps coming, else as long as a call may."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    while case.reading is not None and not case.reading.done():
        left = case.patience() - (loop.time() - max(case.last_heard, began))
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
        # 08006 is said of the worker's connection to this session. Class 42, and what lacks the context that a
        # worker's error has, is about our own call: thrown away before its end, the result proves nothing.
        # Behind a receipt it is read as tags, which fit any job: there class 42 is the SQL's own.
        about_call = not case.work.carries_receipt and (error.sqlstate or "").startswith("42")
        if error.sqlstate == "08006" or about_call or not error.diag.context:
            case.memory = case.memory.handle_lost()
        else:
            fields = describe.error_fields(error)
            _note_failure(case, fields, error)
            case.memory = case.memory.failed(fields)


async def _stream(case: Case, feed: Feed, worker: Worker, heard: Hearing | None) -> tuple[int | None, str | None]:
    """Wait for the end of a worker whose rows are streamed; they and its session are the reader's then."""
    texts = {column.type_oid for column in feed.columns} if feed.as_text else ()
    feed.rows = await worker_rows.read(worker.session, worker, feed.definition, heard, as_text=texts)
    feed.session, case.session = worker.session, None
    found = row_source(case.work.statements[-1])
    return None, found.tag if found else None


async def hear_failed(case: Case) -> None:
    """Read what a failed worker had raised, and where it failed. This forgets the handle: write the history first."""
    error = case.memory.launch.error
    if case.worker is None or error is None or error.sqlstate in BEFORE_ITS_SQL:
        return
    work = case.work
    if work.reports_numbers and not work.raises_numbers and not work.has_supervisor:
        told = (await case.worker.session.look_at_progress([case.worker])).get(case.worker)
        case.statement = location.number_in_progress(told.message, len(work.statements)) if told else None
    raised = await case.worker.session.hear_failed(case.worker, partial(_hear, case))
    if raised is not None:
        _note_failure(case, error, raised)


def _hear(case: Case, diag: psycopg.errors.Diagnostic) -> None:
    """Tell something that the job's SQL raised."""
    case.last_heard = asyncio.get_running_loop().time()
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
    """Remember where the worker failed."""
    diag = raised.diag
    same = raised.sqlstate == error.sqlstate
    position = diag.statement_position if same else None
    within = diag.internal_position if same else None
    of = len(case.work.statements)
    at_commit = same and case.statement == of and location.is_of_commit(diag.context)
    # An error without any context comes from outside of the statements: from the commit.
    number = case.statement if error.context and not at_commit else None
    inside = (diag.internal_query or "", int(within)) if within else None
    case.failure = location.ErrorPlace(int(position) if position else None, number, at_commit, inside)
