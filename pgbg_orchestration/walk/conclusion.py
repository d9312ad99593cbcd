"""The end of a job: the history is written, and the outcome returned, or the error raised that the verdict says."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from dataclasses import replace

import psycopg

from pgbg_orchestration import pace, phrases
from pgbg_orchestration.errors import PgbgError
from pgbg_orchestration.job import Kind
from pgbg_orchestration.ledger.ledger import Ledger
from pgbg_orchestration.ledger.sighting import Sighting
from pgbg_orchestration.outcome import AT_COMMIT, ErrorFields, EventKind, Outcome
from pgbg_orchestration.postgres.connection import ConnectionLost
from pgbg_orchestration.postgres.describe import Readable
from pgbg_orchestration.postgres.handles import Worker
from pgbg_orchestration.postgres.pg_background import ResultInfo
from pgbg_orchestration.statements import Statement, index_builds
from pgbg_orchestration.statements.row_source import row_source
from pgbg_orchestration.verdict import OURS, Intent, Report, Step

from . import failures, location
from .case import Case
from .follow import read_failure, read_on, read_report
from .memory import Stage
from .recording import record, write

logger = logging.getLogger("pgbg_orchestration")

HISTORY = {
    Step.FAILED: "failed",
    Step.CANCELLED: "cancelled",
    Step.SUPERSEDED: "cancelled",
    Step.LOST: "lost",
    Step.UNKNOWN: "unknown",
}
"""How the history names each outcome that is no success."""


async def conclude(case: Case, ledger: Ledger, step: Step, sighting: Sighting | None) -> Outcome:
    """Return the outcome of a job that committed, or raise the error of one that did not.

    The history is written before the handle is given up.

    Raises
    ------
    PgbgError
        The job did not commit, or nobody can tell.
    """
    try:
        if step is Step.COMMITTED:
            return await _committed(case, ledger, sighting)
        error = case.memory.launch.error
        turned_away = error is not None and error.sqlstate in OURS
        if (
            step is Step.FAILED
            and sighting is not None
            and (error is None or (turned_away and sighting.outcome == "failed"))
        ):
            error = sighting.error  # as another process, or a supervisor, wrote it down
        is_own = error is not None and error is case.memory.launch.error  # of this call's last launch
        error = case.work.telling(error) if error else None
        if case.attempts:
            await record(case, ledger, HISTORY[step], error=error)
        await read_failure(case)
        if step is Step.FAILED and error is not None and error.sqlstate not in OURS:
            with_place = await _with_place(case, ledger, error, is_own=is_own)
            if with_place != error and case.attempts and is_own:
                await record(case, ledger, HISTORY[step], error=with_place)
            error = with_place
        if step is Step.FAILED and sighting is not None and sighting.is_unreported:
            await _note_told_failure(case, ledger, sighting)
        invalid_indexes = await _invalid_indexes(case, ledger) if step is Step.FAILED else []
        raise _error(case, step, sighting, error, invalid_indexes)
    finally:
        if case.worker is not None:
            case.worker.release()


async def _with_place(case: Case, ledger: Ledger, fields: ErrorFields, *, is_own: bool) -> ErrorFields:
    """Return an error with the statement that it came from, and the place in it, as far as they are known."""
    work = case.work
    number: int | None = 0 if len(work.statements) == 1 else None
    at: int | None = None
    if is_own and not work.has_supervisor:
        has_receipt = work.kind is Kind.RECEIPT
        bodies = work.bodies(ledger.schema) if has_receipt else [part.text for part in work.statements]
        body = work.body(ledger.schema) if has_receipt else work.bare
        number, at = location.place(case.text, body, bodies, case.failure)
        if number is not None and at is not None:
            source, statement = row_source(work.statements[number]), work.statements[number].text
            at = location.offset_in(bodies[number], statement, source.verb_at if source else 0, at)
        if case.failure.at_commit and len(work.statements) > 1:
            return replace(fields, statement=AT_COMMIT)
    elif len(work.statements) > 1:
        fields, reported = location.without_number(fields, len(work.statements))
        number = reported - 1 if reported is not None else None
    if number is None:
        return fields
    shown = None if work.job.redact_details else await _display_text(case, ledger, number)
    at = shown.at(at) if shown is not None and at is not None and at >= 0 else None
    fields = location.telling(fields, number, len(work.statements), shown.text if shown else None, at)
    # A text inside of a function may have been made of a parameter.
    is_hidden = work.job.redact_details or work.job.parameters is not None or not is_own
    return fields if is_hidden else location.inside(fields, case.failure)


async def _display_text(case: Case, ledger: Ledger, number: int) -> location.DisplayText | None:
    """Return a statement as it may be shown: with placeholders for its parameters."""
    work = case.work
    if work.job.parameters is None:
        return location.DisplayText((work.statements[number].text,), (), ())
    try:
        texts = await ledger.run(lambda conn: location.display_texts(work.job, work.statements, conn))
    except (psycopg.Error, PgbgError) as failure:
        logger.warning("job %s: the statement that failed cannot be shown: %s", work.label, failure)
        return None
    return texts[number] if texts is not None else None


async def _committed(case: Case, ledger: Ledger, sighting: Sighting | None) -> Outcome:
    is_own = bool(case.attempts) if sighting is None else sighting.receipt_attempt in case.attempts
    is_last = sighting is None or sighting.receipt_attempt == case.attempt
    handle_is_the_workers = not case.work.has_supervisor  # else the supervisor has written count and tag down
    if case.reading is not None and not case.reading.done():
        # The first of its rows is about to come, or the rest of what it raised.
        await read_on(case)
        await read_report(case)
    if is_last and handle_is_the_workers and case.memory.launch.report is Report.RUNNING and case.worker is not None:
        await _poll_to_its_end(case.worker)
        await read_report(case)
    if sighting is None:
        outcome = _without_receipt(case)
    else:
        outcome = await _with_receipt(case, ledger, sighting, launched=is_own)
        if case.work.job.fetch is not None:
            outcome = await _with_rows(case, ledger, outcome)
    in_history = case.worker is not None and case.worker.proof is not None
    if case.work.kind is Kind.SUPERVISED and sighting is not None:  # whose supervisor writes it
        in_history = sighting.outcome == "committed" and sighting.attempt == sighting.receipt_attempt
    if is_own and not in_history:
        await record(case, ledger, "committed", outcome=outcome)
    what = ", ".join(phrases.summary(outcome)) or "done"
    how = "" if outcome.launched else " by an earlier or another launch"
    case.tell(EventKind.COMMITTED, f"committed{how}: {what}", pid=outcome.worker_pid)
    return outcome


async def _poll_to_its_end(worker: Worker) -> None:
    """Poll a worker whose commit is visible until its report is there, which is a moment later."""
    with suppress(TimeoutError):
        async with asyncio.timeout(pace.GRACE):
            while not worker.end.done():
                await asyncio.shield(worker.session.poll())
                await asyncio.wait({worker.end}, timeout=pace.HANDLE_SOONEST)


async def _with_receipt(case: Case, ledger: Ledger, sighting: Sighting, *, launched: bool) -> Outcome:
    outcome = Outcome(
        job_id=case.work.key.job_id,
        label=case.work.label,
        attempt=sighting.receipt_attempt,
        worker_pid=sighting.receipt_pid,
        started_at=sighting.receipt_started_at,
        launched=launched,
        proof="verify_sql" if case.memory.verification and case.memory.verification.done else "receipt",
    )
    info = case.memory.launch.info if sighting.receipt_attempt == case.attempt else None
    if launched and info is not None and case.work.kind is Kind.RECEIPT and not case.work.has_supervisor:
        row_count, tag = await _counts(case, info)
        return replace(
            outcome,
            row_count=row_count,
            command_tag=tag,
            finished_at=info.finished_at or sighting.looked_at,  # 1.9 and 1.10 do not tell it
        )
    if launched and case.memory.launch.result is not None and sighting.receipt_attempt == case.attempt:
        row_count, tag = _report_form(case.work.statements[-1], *case.memory.launch.result)
        return replace(outcome, row_count=row_count, command_tag=tag, finished_at=sighting.looked_at)
    # Whoever launched it, or its supervisor, writes the counts down after the commit.
    counted_elsewhere = not launched or case.work.adds_supervisor
    if counted_elsewhere and sighting.attempt is not None and case.memory.intent is Intent.NONE:
        sighting = await _await_counts(case, ledger, sighting)
    finished = sighting.ended_at or sighting.looked_at
    return replace(outcome, row_count=sighting.row_count, command_tag=sighting.command_tag, finished_at=finished)


def _report_form(last: Statement, row_count: int | None, tag: str | None) -> tuple[int | None, str | None]:
    """Turn count and tag as a result has them into the form that a handle's report has them in."""
    match last.keywords:
        case ("REFRESH", *_):
            return None, tag
        case ("CREATE", *rest) if tag == "SELECT":
            return row_count, "CREATE MATERIALIZED VIEW" if rest[:1] == ["MATERIALIZED"] else "CREATE TABLE AS"
        case _:
            return row_count, tag


async def _counts(case: Case, info: ResultInfo) -> tuple[int | None, str | None]:
    """Return row count and tag of the job's last statement; where it is padded, its result has them, not the report."""
    if not case.work.is_padded or case.worker is None or case.worker.proof is not None:
        return info.row_count, info.command_tag or None
    try:
        # It has ended: nothing is waited for.
        async with asyncio.timeout(case.patience()):
            return await case.worker.session.drain(case.worker, Readable("", None, padded=True))
    except (psycopg.Error, ConnectionLost, TimeoutError) as error:
        logger.warning("job %s: how many rows it gave is not known: %s", case.work.label, case.work.server_text(error))
        return None, None


async def _await_counts(case: Case, ledger: Ledger, sighting: Sighting) -> Sighting:
    with suppress(TimeoutError):
        async with asyncio.timeout(pace.GRACE):
            while sighting.outcome is None:
                await asyncio.sleep(pace.RETRY_SOONEST)
                sighting = await ledger.look(case.work.key)
    return sighting


async def _with_rows(case: Case, ledger: Ledger, outcome: Outcome) -> Outcome:
    """Add the rows that were kept. With those of the last statement come its count and tag, which no report has."""
    try:
        async with asyncio.timeout_at(case.way_out):
            results = await ledger.rows(case.work.key)
    except TimeoutError as error:
        raise failures.unread(case.work) from error
    if case.work.kept and not results:
        logger.warning(
            "job %s: no rows of it are kept: the launch that committed did not ask for them, or they are pruned",
            case.work.label,
        )
    last = results[-1] if results and results[-1].statement == len(case.work.statements) else None
    if last is None:
        return replace(outcome, results=results)
    return replace(outcome, results=results, row_count=last.row_count, command_tag=last.command_tag)


def _without_receipt(case: Case) -> Outcome:
    launch, worker = case.memory.launch, case.worker
    row_count, tag = _report_form(case.work.statements[-1], *(launch.result or (None, None)))
    info = launch.info
    if info is not None and not (case.readable and case.readable.padded):
        row_count, tag = info.row_count, info.command_tag or None
    return Outcome(
        job_id=case.work.key.job_id,
        label=case.work.label,
        launched=bool(case.attempts),
        attempt=case.attempt,
        worker_pid=worker.handle.pid if worker else None,
        row_count=row_count,
        command_tag=tag,
        started_at=info.started_at if info else None,
        finished_at=info.finished_at if info else None,
        proof="result" if launch.result else "verify_sql",
    )


async def _invalid_indexes(case: Case, ledger: Ledger) -> list[str]:
    """Return what a failed build of an index has left, as far as it can be told."""
    index = index_builds.concurrent_index(case.work.statements)
    if index is None:
        return []
    try:
        async with asyncio.timeout(case.patience()):
            return await ledger.run(lambda conn: index_builds.invalid_indexes(conn, index))
    except (psycopg.Error, PgbgError, TimeoutError) as failure:
        logger.warning("job %s: whether an invalid index is left is not known: %s", case.work.label, failure)
        return []


def _error(
    case: Case, step: Step, sighting: Sighting | None, fields: ErrorFields | None, invalid_indexes: list[str]
) -> PgbgError:
    work, by_deadline = case.work, case.memory.intent is Intent.DEADLINE
    match step:
        case Step.FAILED:
            at = sighting.ended_at if sighting is not None and sighting.is_unreported and not case.attempts else None
            ran_for = _ran_for(case)
            return failures.failed(
                work, fields or ErrorFields(), invalid_indexes, at, ran_for=ran_for, limits=case.limits
            )
        case Step.SUPERSEDED:
            return failures.superseded(work, sighting)
        case Step.CANCELLED if by_deadline and case.waited_for_slot and not case.attempts:
            return failures.no_slot(work, case.options)
        case Step.CANCELLED if by_deadline:
            # Also one whose launch call was never answered, where a look showed it at work.
            worker = bool(case.attempts) or not case.events.isdisjoint({EventKind.ATTACHED, EventKind.CANCELLING})
            return failures.deadline_passed(work, case.options, worker=worker)
        case Step.CANCELLED:
            return failures.cancelled(work, sighting, case.cause if case.memory.intent is Intent.ASKED else None)
        case Step.LOST if case.launch_error is not None:
            return failures.launch_failed(work, case.launch_error)
        case Step.LOST:
            return failures.lost(work, output_dropped=case.memory.launch.stage is Stage.DETACHED)
        case _:
            verification = case.memory.verification
            return failures.unknown(work, verified=verification.done if verification else None)


def _ran_for(case: Case) -> float | None:
    """Return the seconds that this call's last worker ran: by the server's clock, where the handle reports it."""
    info, worker = case.memory.launch.info, case.worker
    if worker is None or info is None:
        return None
    if not case.work.has_supervisor and info.started_at is not None and info.finished_at is not None:
        return (info.finished_at - info.started_at).total_seconds()
    return asyncio.get_running_loop().time() - worker.launched_at


async def _note_told_failure(case: Case, ledger: Ledger, sighting: Sighting) -> None:
    """Note in the history that the failure that a supervisor wrote down is told now: the next call launches again."""
    if not case.attempts:
        case.tell(EventKind.FOUND_FAILED, "its last launch failed when nobody was there to be told")
    attempt = sighting.attempt or case.attempt
    await write(ledger.reported(case.work.key, attempt), label=case.work.label, patience=case.patience())
