"""One job, as one call for it drives it: the work, what is remembered, the handles in hand, whom it told what."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import psycopg

from pgbg_orchestration import pace
from pgbg_orchestration.ledger.sighting import Registration
from pgbg_orchestration.options import Options
from pgbg_orchestration.outcome import Cause, ErrorFields, Event, EventKind
from pgbg_orchestration.postgres import describe, worker_rows
from pgbg_orchestration.postgres.connection import ConnectionLost
from pgbg_orchestration.postgres.describe import Readable
from pgbg_orchestration.postgres.handles import Hearing, Worker
from pgbg_orchestration.postgres.opening import Begun, MayBeLaunched, Opening
from pgbg_orchestration.postgres.session import LaunchingSession
from pgbg_orchestration.statements.row_source import row_source
from pgbg_orchestration.testing import faults
from pgbg_orchestration.verdict import Intent, Report

from . import location
from .memory import Memory, Terms
from .streamed_rows import Feed
from .worker_sql import Work

logger = logging.getLogger("pgbg_orchestration")
OURS = ("PB001", "PB002", "PB003", "PB004")  # raised before the job's own SQL began
LEVELS = {"DEBUG": logging.DEBUG, "WARNING": logging.WARNING}  # of what SQL raises; INFO for all other severities


@dataclass
class Case:
    """One job, as one call for it drives it.

    Attributes
    ----------
    terms, memory:
        What was asked for, and what is remembered: all that the evidence depends on besides a look.
    cause:
        Of the cancel, once the caller has gone away.
    attempts:
        The numbers of the launches that may have started a worker.
    opening, nudged:
        What registered and launched the job in one call, if that was tried; somebody should look before the time.
    call, worker, reading:
        The launch call on its way; the last worker; the task that reads its result to the end.
    text, statement, failure:
        What was launched last; the number of its statement that was last told to be at work; where it failed.
    call_forgotten:
        A launch call was given up before its answer: what it launched is refused, or is told by the receipt.
    launch_error:
        Why the last launch call failed on its way.
    slot_deadline, waited_for_slot, paired:
        Until when to wait for a worker slot, fixed at the first wait; whether the launch waits for one, or did when it
        was broken off; whether this job counts as one that needs two.
    session, readable, last_marked:
        Where the result is read (a kind without a receipt, or notices that are asked for): the session of its own, how
        that is done, when the worker was last seen (on the event loop's clock).
    feed:
        Where its rows come out that are streamed.
    worker_pid:
        The process that runs the job's SQL, as the last look saw it.
    limits:
        The timeouts in force for the SQL, in seconds by name.
    way_out:
        Once the call wants the end, until when it has to be decided, on the event loop's clock.
    """

    work: Work
    options: Options
    terms: Terms
    memory: Memory = field(default_factory=Memory)
    cause: Cause = Cause.INTERRUPTED
    attempts: list[int] = field(default_factory=list)
    call: asyncio.Task[Worker] | asyncio.Task[Begun] | None = None
    opening: Opening | None = None
    worker: Worker | None = None
    reading: asyncio.Task[tuple[int | None, str | None]] | None = None
    text: str = ""
    statement: int | None = None
    failure: location.Told = field(default_factory=location.Told)
    call_forgotten: bool = False
    launch_error: BaseException | None = None
    slot_deadline: float | None = None
    waited_for_slot: bool = False
    paired: bool = False
    feed: Feed | None = None
    session: LaunchingSession | None = None
    readable: Readable | None = None
    last_marked: float = 0.0
    worker_pid: int | None = None
    limits: Mapping[str, float] = field(default_factory=dict)
    way_out: float | None = None
    nudged: asyncio.Event = field(default_factory=asyncio.Event)
    told: set[str] = field(default_factory=set)

    @property
    def attempt(self) -> int:
        """The number of the launch that comes next, or of the last one, from 1."""
        if self.memory.registration is not None:
            return self.memory.registration.attempt
        return self.attempts[-1] if self.attempts else 1

    @property
    def is_at_work(self) -> bool:
        """Whether a worker of the job may be at work, as far as this call knows."""
        running = self.worker is not None and not self.worker.ended.done()
        return running or self.memory.attached_since is not None

    # The handle -----------------------------------------------------------------------------------------------------

    async def end_call(self) -> bool:
        """Take over what came of a launch call, on whose way this process may have been interrupted.

        Returns whether it may have started a worker.
        """
        call = self.call
        if call is None:
            return False
        # A worker with a receipt that starts after its cancel is refused: no need to wait for a call that may be
        # stalled. Any other has to be known before it can be cancelled.
        if not self.work.carries_receipt:
            await asyncio.wait({call})
        self.call = None  # not before: cancelled in that wait, it has to be found here again
        if not call.done():
            call.add_done_callback(_forget_worker)
            self.call_forgotten = True
            self.memory = self.memory.refused()
            return False
        # An opening comes before the first look, and every other call after it: that one registered itself.
        if self.opening is not None and self.opening.registration is not None and not self.memory.looked:
            self.memory = self.memory.registered(Registration.read(self.opening.registration))
        error = call.exception()
        if error is not None and not isinstance(error, MayBeLaunched):
            self.memory = self.memory.refused()
            return False
        result = call.result() if error is None else None
        if isinstance(result, Begun) and result.worker is None:
            self.memory = self.memory.refused()  # there is something to look at first
            return False
        self.attempts.append(self.attempt if self.work.carries_receipt else len(self.attempts) + 1)
        if result is not None:
            self.worker = result.worker if isinstance(result, Begun) else result
            self.memory = self.memory.running()
        else:
            self.memory = self.memory.call_lost()
        return True

    def begin_reading(self, worker: Worker, readable: Readable) -> None:
        """Begin to read a worker's result to its end, and what it raises on its way."""
        loop = asyncio.get_running_loop()
        heard = self._hear if self.options.notices else None
        if self.feed is not None:
            self.reading = loop.create_task(self._feed(self.feed, worker, heard))
        else:
            self.reading = loop.create_task(worker.session.drain(worker, readable, heard))
        self.last_marked = loop.time()

    async def _feed(self, feed: Feed, worker: Worker, heard: Hearing | None) -> tuple[int | None, str | None]:
        """Wait for the end of a worker whose rows are streamed; they and its session are the reader's then."""
        texts = {column.type_oid for column in feed.columns} if feed.as_text else ()
        feed.rows = await worker_rows.read(worker.session, worker, feed.definition, heard, as_text=texts)
        feed.session, self.session = worker.session, None
        found = row_source(self.work.statements[-1])
        return None, found.tag if found else None

    def _note_failure(self, error: ErrorFields, raised: psycopg.Error) -> None:
        """Remember where the worker failed."""
        position = raised.diag.statement_position if raised.sqlstate == error.sqlstate else None
        # An error without any context comes from outside of the statements: from the commit.
        number = self.statement if error.context else None
        self.failure = location.Told(int(position) if position else None, number)

    def _hear(self, diag: psycopg.errors.Diagnostic) -> None:
        """Tell something that the job's SQL raised."""
        if (number := location.number_of(diag)) is not None:
            self.statement = number
            if self.reading is not None:
                of = len(self.work.statements)
                self.tell(EventKind.PROGRESS, f"statement {number} of {of}", statement=number, of=of, percent=None)
            return
        if self.work.job.redact_details:
            return
        severity = diag.severity_nonlocalized or "NOTICE"
        lines = [f"{severity}: {diag.message_primary}"]
        lines += [
            f"{name}: {text}" for name, text in (("DETAIL", diag.message_detail), ("HINT", diag.message_hint)) if text
        ]
        self.tell(
            EventKind.NOTICE,
            "\n".join(lines),
            level=LEVELS.get(severity, logging.INFO),
            severity=severity,
            sqlstate=diag.sqlstate,
            text=diag.message_primary,
            detail=diag.message_detail,
            hint=diag.message_hint,
        )

    async def read_report(self) -> None:
        """Read the handle's report, when the worker has ended since the last time."""
        if self.reading is not None and self.reading.done():
            self._take_over_reading(self.reading)
        if self.reading is not None or self.memory.launch.report is not Report.RUNNING:
            return
        if self.worker is None or not self.worker.ended.done():
            return
        info = self.worker.ended.result()
        faults.point("after_end")
        error = await self.worker.error() if info is not None and info.has_error else None
        self.memory = self.memory.ended(info, error, self.terms)
        if self.memory.launch.report is Report.NONE:
            self.attempts.pop()  # it launched nothing
            self.waited_for_slot = True

    def _take_over_reading(self, reading: asyncio.Task[tuple[int | None, str | None]]) -> None:
        self.reading = None
        try:
            self.memory = self.memory.read(reading.result())
        except (ConnectionLost, asyncio.CancelledError):
            self.memory = self.memory.handle_lost()
        except psycopg.Error as error:
            # 08006 is said of the worker's connection to this session. Class 42, and what lacks the context that a
            # worker's error has, is about our own call: thrown away before its end, the result proves nothing.
            # Behind a receipt it is read as tags, which fit any job: there class 42 is the SQL's own.
            about_call = not self.work.carries_receipt and (error.sqlstate or "").startswith("42")
            if error.sqlstate == "08006" or about_call or not error.diag.context:
                self.memory = self.memory.handle_lost()
            else:
                fields = describe.error_fields(error)
                self._note_failure(fields, error)
                self.memory = self.memory.failed(fields)

    async def hear_failed(self) -> None:
        """Hear what a failed worker had raised, and where it failed. It costs the handle: record the end before."""
        error = self.memory.launch.error
        if self.worker is None or error is None or error.sqlstate in OURS:
            return
        raised = await self.worker.session.hear_failed(self.worker, self._hear)
        if raised is not None:
            self._note_failure(error, raised)

    async def stop_reading(self) -> None:
        """Break the reading of the result off; the worker goes on without its handle."""
        if self.reading is not None:
            await broken_off(self.reading)
            self._take_over_reading(self.reading)

    # Time -----------------------------------------------------------------------------------------------------------

    def seconds_left(self) -> float | None:
        """Return the seconds until the deadline, 0 after it, None without one."""
        if self.terms.deadline is None:
            return None
        return max(self.terms.deadline - asyncio.get_running_loop().time(), 0)

    def patience(self) -> float:
        """Return for how many seconds a question may take that only completes what is told of the end."""
        if self.way_out is None:
            return pace.CALL
        return min(max(self.way_out - asyncio.get_running_loop().time(), 0), pace.CALL)

    def bounded(self, seconds: float) -> float:
        """Return ``seconds``, or what is left until the deadline."""
        left = self.seconds_left()
        return seconds if left is None or self.memory.intent is not Intent.NONE else min(seconds, left)

    # Telling --------------------------------------------------------------------------------------------------------

    def tell_once(self, kind: EventKind, message: str, **data: Any) -> None:
        """Tell an event, however often its step is taken, once."""
        if kind not in self.told:
            self.told.add(kind)
            self.tell(kind, message, **data)

    def tell(self, kind: EventKind, message: str, *, level: int = logging.INFO, **data: Any) -> None:
        """Tell the log and the caller's observer, whose faults are no fault of the job's."""
        pid = data.get("pid")
        logger.log(level, "job %s: %s%s", self.work.label, message, f" (pid {pid})" if pid else "")
        if self.options.observer is None:
            return
        try:
            self.options.observer(Event(kind, message, self.work.key.job_id, self.work.label, data))
        except Exception:
            logger.exception("the observer of job %s failed", self.work.label)


def case_of(work: Work, options: Options, deadline: float | None) -> Case:
    """Return the case of a job that is bound; ``deadline`` is on the event loop's clock."""
    return Case(
        work,
        options,
        Terms(
            kind=work.kind,
            sql_digest=work.sql_digest,
            generation=work.job.generation,
            can_verify=work.verify_sql is not None,
            takes_back=frozenset(cause for cause in (None, *Cause) if options.takes_back(cause)),
            of_try=options.of_try,
            deadline=deadline,
            is_watched=work.is_watched,
        ),
    )


def deadline_of(timeout: float | None, deadline: datetime | None) -> float | None:
    """Return the earlier of the two on the event loop's clock: ``timeout`` seconds from now, and the moment given."""
    now = asyncio.get_running_loop().time()
    bounds = [] if timeout is None else [now + timeout]
    if deadline is not None:
        bounds.append(now + (deadline - datetime.now(deadline.tzinfo)).total_seconds())
    return min(bounds, default=None)


async def broken_off(task: asyncio.Task[Any], *, at: float | None = None) -> None:
    """Cancel a task, now or at a time of the event loop's clock, and wait until it has ended.

    psycopg answers a cancel by cancelling the query, and waits ten seconds behind a peer that is silent. Cancelled
    again there, it closes the connection.
    """
    if at is not None:
        await asyncio.wait({task}, timeout=max(at - asyncio.get_running_loop().time(), 0))
    while not task.done():
        task.cancel()
        await asyncio.wait({task}, timeout=pace.BREAK)
    if not task.cancelled():
        task.exception()  # it may be that nobody else asks


async def first_of(ended: asyncio.Future[Any] | None, nudged: asyncio.Event, pause: float) -> None:
    """Wait for an end, a hint, or so many seconds, whichever is first."""
    hint = asyncio.ensure_future(nudged.wait())
    try:
        either = {hint} if ended is None else {hint, ended}
        await asyncio.wait(either, timeout=pause, return_when=asyncio.FIRST_COMPLETED)
    finally:
        hint.cancel()
    nudged.clear()


def _forget_worker(call: asyncio.Task[Worker] | asyncio.Task[Begun]) -> None:
    """Forget the worker of a call that has ended: nobody waits for it."""
    if call.cancelled() or call.exception() is not None:
        return
    result = call.result()
    worker = result.worker if isinstance(result, Begun) else result
    if worker is not None:
        worker.release()
