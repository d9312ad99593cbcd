"""Launch or attach: the way of one job, from its registration to its outcome.

Each turn gathers evidence (the handle's report, then the lock, then the receipt), asks :func:`verdict.judge` for the
next step, and takes it. So any process can come to a job at any point, after any fault, and go on from there.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Literal, TypeVar

import psycopg

from pgbg_orchestration import pace, statements
from pgbg_orchestration.errors import JobCancelled, PgbgError, ServerUnreachable
from pgbg_orchestration.job import Job, Kind
from pgbg_orchestration.ledger.ledger import Ledger
from pgbg_orchestration.ledger.sighting import Key, Registration, Sighting
from pgbg_orchestration.options import Options
from pgbg_orchestration.outcome import OF_A_TRY, Cause, EventKind, Outcome
from pgbg_orchestration.postgres import describe, markers
from pgbg_orchestration.postgres.connection import ConnectionLost, ExtensionMoved
from pgbg_orchestration.postgres.describe import Readable
from pgbg_orchestration.postgres.session import LaunchingSession, LaunchRefused, MayBeLaunched, SlotsUsedUp
from pgbg_orchestration.statements import index_builds
from pgbg_orchestration.testing import faults
from pgbg_orchestration.verdict import OUTCOMES, REFUSED, TURNED_AWAY, Holder, Intent, Receipt, Report, Step, judge

from . import failures
from .case import Case, Launch, deadline_of
from .conclusion import conclude, record
from .evidence import RELAUNCHES, gather, look
from .host import Host

T = TypeVar("T")
logger = logging.getLogger("pgbg_orchestration")


async def run_job(host: Host, job: Job, options: Options) -> Outcome:
    """Bind a job and follow it until its outcome is certain."""
    deadline = deadline_of(job.timeout, options.deadline)
    try:
        try:
            work = await host.bind(job)
            return await Run(host, Case(work, options, deadline)).outcome()
        except psycopg.Error as error:
            host.forget_facts()  # what was true of the server may not be now
            raise failures.ledger(error, job.id or "", redact=job.redact_details) from error
    except PgbgError as error:
        if job.redact_details:
            error.__cause__ = error.__context__ = None  # a traceback shows these, the server's own words with them
        raise


class Run:
    """One call for one job: from its first look to its outcome."""

    def __init__(self, host: Host, case: Case) -> None:
        self._host = host
        self._ledger = host.ledger
        self._case = case
        self._loop = asyncio.get_running_loop()
        self._step: tuple[Step | None, float] = (None, 0.0)  # the step that is being taken, and since when

    async def outcome(self) -> Outcome:
        """Follow the job; when the caller goes away, cancel it or leave it at work, as the caller chose."""
        following = self._loop.create_task(self._follow())
        self._host.onlooker.watch(self._case)
        try:
            return await asyncio.shield(following)
        except asyncio.CancelledError:
            # It is bounded (pace.CANCEL): a second cancel does not make it quicker.
            await _to_its_end(self._let_go(following))
            raise
        finally:
            await _to_its_end(self._close())

    async def _close(self) -> None:
        self._host.onlooker.leave(self._case)
        await self._case.launch.stop_reading()
        if self._case.paired:
            self._host.pairs.release()
        if self._case.session is not None:
            await self._case.session.close()

    async def _let_go(self, following: asyncio.Task[Outcome]) -> None:
        following.cancel()
        await asyncio.wait({following})
        cause = self._case.options.cause_of_cancel()
        if cause is None:
            await self._leave()
            return
        self._case.intent, self._case.cause = Intent.ASKED, cause
        try:
            outcome = await self._follow()
        except PgbgError as error:
            # First for those who asked: what they have been told by an event they need not read in a log.
            self._case.tell(EventKind.LET_GO, f"let go: {error.message}", error=error.to_dict())
            if not isinstance(error, JobCancelled):
                logger.error("the job was let go: %s", error)  # noqa: TRY400  (its text says it all)
        else:
            self._case.tell(EventKind.LET_GO, "the cancel came too late: committed", outcome=outcome.to_dict())

    async def _leave(self) -> None:
        launch = self._case.launch
        if launch.call is not None:
            await asyncio.wait({launch.call}, timeout=pace.CALL)
        await self._take_over_call()
        await launch.stop_reading()
        if launch.worker is not None:
            await launch.worker.detach()

    # The turn -----------------------------------------------------------------------------------------------------

    async def _follow(self) -> Outcome:
        await self._take_over_call()
        while True:
            evidence, seen = await gather(self._case, self._ledger)
            step = judge(evidence)
            if step in OUTCOMES:
                return await conclude(self._case, self._ledger, step, seen)
            if step is not self._step[0]:
                self._step = (step, self._loop.time())
            try:
                await self._take(step, seen)
            except ConnectionLost as error:
                # On a question beside the job's way: nothing was launched.
                if self._waited() > pace.RECONNECT:
                    raise ServerUnreachable(str(error), job_id=self._case.work.key.job_id) from error
                await self._sleep()

    async def _take(self, step: Step, seen: Sighting | None) -> None:
        match step:
            case Step.REGISTER:
                await self._register()
            case Step.LAUNCH:
                await self._launch()
            case Step.WAIT:
                await self._wait(seen)
            case Step.WAIT_FOR_SERIES:
                await self._wait_for_series(_there(seen))
            case Step.CLEAR_OLDER:
                await self._clear_older(_there(seen))
            case Step.UNBLOCK:
                await self._unblock()
            case Step.SIGNAL:
                await self._signal(seen)
            case Step.MARK:
                await self._mark(seen)
            case Step.LIFT:
                await self._ledger.lift_cancel(self._case.work.key)
            case Step.READ_RESULT:
                await self._read_result()
            case Step.VERIFY:
                await self._verify(seen)
            case Step.SETTLE:
                await self._settle(_there(seen))

    # Launching ----------------------------------------------------------------------------------------------------

    async def _register(self) -> None:
        case, work = self._case, self._case.work
        faults.point("before_register")
        case.registration = registration = await self._ledger.register(
            work.key,
            generation=work.job.generation,
            label=work.label,
            kind=work.kind,
            sql_digest=work.sql_digest,
            accept_changed_sql=case.options.accept_changed_sql,
        )
        faults.point("after_register")
        if registration.verdict == "reused":
            raise failures.reused(work)
        # A superseded one is seen to be by the next look.
        case.registered = registration.verdict == "registered"

    async def _launch(self) -> None:
        case, work = self._case, self._case.work
        registration = case.registration if work.carries_receipt else None
        if registration is not None and not await self._mark_older(registration):
            return
        if registration is None:
            text = await self._prepare_session()
        elif work.kind is Kind.SUPERVISED:
            if work.job.drop_invalid_index:
                await self._drop_invalid_index()
            text = await self._compose_supervisor(registration)
        else:
            text = work.text(self._host.schema, registration)
        await self._put_last_launch_away()
        try:
            async with asyncio.timeout(case.patience_for_slot()):
                if work.kind is Kind.SUPERVISED and not case.paired:
                    await self._host.pairs.acquire()
                    case.paired = True
                await self._host.slots.launch(lambda: self._call_launch(text), self._on_slots_used_up)
        except TimeoutError:
            case.intent = Intent.DEADLINE
        except MayBeLaunched as error:
            case.launch_error = error.error
        except LaunchRefused as error:
            await record(case, self._ledger, "failed", error=work.telling(describe.error_fields(error.error)))
            facts = await self._host.facts()
            raise failures.launch_refused(work, error.error, facts, called=error.called) from error.error
        await self._take_over_call()
        faults.point("while_running")
        if case.launch.worker is not None:
            # Most of what a look would tell now, it tells better a little later.
            await asyncio.wait({case.launch.worker.ended}, timeout=case.bounded(pace.LOOK_SOONEST))

    async def _mark_older(self, registration: Registration) -> bool:
        """Make sure that no older generation starts or is at work; returns False when one was."""
        key = self._case.work.key
        at_work = await self._ledger.mark_older(key, registration.generation)
        if at_work is not None and not at_work:
            return True
        if at_work and self._case.options.on_superseded == "cancel":
            for job_id in at_work:
                await self._ledger.signal(key, job_id=job_id)
        await self._sleep()
        return False

    async def _put_last_launch_away(self) -> None:
        """Make room for another launch, and keep within the number of further ones."""
        case = self._case
        sqlstate = case.launch.error.sqlstate if case.launch.error else None
        if case.found_no_slot:
            case.slot_misses += 1
            case.tell_once(EventKind.WAITING_FOR_SLOT, "waiting for a second worker slot, below the supervisor")
            await asyncio.sleep(pace.backoff(case.slot_misses))
        elif sqlstate in (TURNED_AWAY, REFUSED):
            case.rejections += 1
            await asyncio.sleep(pace.backoff(case.rejections))
        elif case.launches:
            case.relaunches += 1
        if case.launch.worker is not None:
            case.launch.worker.release()
        case.launch = Launch()
        case.attached_since = case.verified = case.launch_error = None

    async def _call_launch(self, text: str) -> None:
        case, work = self._case, self._case.work
        defaults = (await self._host.facts()).defaults

        async def call(session: LaunchingSession) -> None:
            case.launch.call = session.launch(
                text,
                label=work.label,
                queue_size=work.job.queue_size,
                settings=work.launch_settings(case.seconds_left(), defaults),
                role=work.job.role if work.kind is Kind.SESSION else None,
                poll_interval=case.options.poll_interval,
            )
            await asyncio.shield(case.launch.call)

        await self._on_session(call)

    async def _on_session(self, ask: Callable[[LaunchingSession], Awaitable[T]]) -> T:
        """Ask a launching session, or another one when it ended between being chosen and being used."""
        case = self._case
        for attempt in range(RELAUNCHES * 2):
            session = case.session or await self._host.session()
            try:
                return await ask(session)
            except ConnectionLost as lost:
                if isinstance(lost, ExtensionMoved):
                    self._host.forget_facts()
                if case.session is not None:
                    await case.session.close()
                    case.session = await self._host.session(exclusive=True)
                await asyncio.sleep(pace.backoff(attempt))
        raise ServerUnreachable("every launching session was lost before the launch call", job_id=case.work.key.job_id)

    async def _take_over_call(self) -> None:
        """Take over what came of a launch call, on whose way this process may have been interrupted."""
        case = self._case
        if case.launch.call is None:
            return
        # A worker with a receipt that starts after its cancel is refused: no need to wait for a call that may be
        # stalled. Any other has to be known before it can be cancelled.
        call = await case.launch.end_call(patient=not case.work.carries_receipt)
        if call is not None:
            self._host.abandon(call)
            return
        worker = case.launch.worker
        if case.launch.report is Report.NONE:
            return  # nothing was launched
        case.launches.append(case.registration.attempt if case.registration else len(case.launches) + 1)
        case.registered = False
        case.stray = case.stray or case.launch.lost
        if worker is not None:
            worker.ended.add_done_callback(lambda _: self._host.slots.freed())
            # A supervisor's pid is nothing for people: cancelling it is not what they would want.
            pid = None if case.work.kind is Kind.SUPERVISED else worker.handle.pid
            case.tell(EventKind.LAUNCHED, f"launched attempt {case.attempt}", pid=pid)

    def _on_slots_used_up(self, error: SlotsUsedUp) -> None:
        self._case.slot_missing = True
        where = {"53400": "this session's table", "53100": "shared memory (/dev/shm)"}.get(
            error.sqlstate or "", f"max_worker_processes ({self._host.max_worker_processes})"
        )
        message = f"waiting for a worker slot: {where} is used up"
        self._case.tell_once(EventKind.WAITING_FOR_SLOT, message, sqlstate=error.sqlstate)

    # Waiting ------------------------------------------------------------------------------------------------------

    async def _wait(self, seen: Sighting | None) -> None:
        worker = self._case.launch.worker
        if self._case.launch.reading is not None:
            await self._read_result()
            return
        if worker is not None and not worker.ended.done():
            age = self._loop.time() - worker.launched_at
            if seen is not None and seen.marked_pid is not None:
                self._case.tell_once(EventKind.AT_WORK, "its worker is at work", pid=seen.marked_pid)
            pause = pace.look(age, self._case.options.poll_interval)
            await asyncio.wait({worker.ended}, timeout=self._case.bounded(pause))
            return
        if seen is not None and self._case.attached_since is not None:
            message = "attached to the worker that already runs this job"
            self._case.tell_once(EventKind.ATTACHED, message, pid=seen.worker_pid)
        await self._sleep()

    async def _wait_for_series(self, seen: Sighting) -> None:
        if seen.holder(self._case.generation(seen)) is Holder.STRANGER and self._waited() > pace.STRANGER:
            raise failures.stranger(self._case.work, seen)
        message = "another session holds the series; waiting for it"
        self._case.tell_once(EventKind.WAITING_FOR_SERIES, message, pid=seen.holder_pid)
        await self._sleep()

    async def _clear_older(self, seen: Sighting) -> None:
        if self._case.options.on_superseded == "wait":
            message = "an older generation is at work; waiting for it"
            self._case.tell_once(EventKind.WAITING_FOR_SERIES, message, pid=seen.holder_pid)
            await self._sleep()
            return
        message = "cancelling the worker of an older generation"
        self._case.tell_once(EventKind.CANCELLING_OLDER, message, pid=seen.worker_pid)
        if self._waited() > pace.CANCEL:
            raise failures.survivor(self._case.work.key, seen, "the worker of an older generation")
        await _signal_worker(self._ledger, self._case.work.key, seen, seen.holder_job)
        await self._sleep()

    async def _unblock(self) -> None:
        """Let a worker go on, or end, that waits for its output to be read: nobody reads it."""
        if not self._case.work.carries_receipt:
            await self._read_result()
            return
        case, launch = self._case, self._case.launch
        worker = _there(launch.worker)
        launch.error = await worker.error()
        launch.detached = case.stray = True
        case.tell_once(EventKind.OUTPUT_BLOCKED, "the worker's output is full and nobody reads it: it is dropped")
        await worker.detach()

    # Cancelling ---------------------------------------------------------------------------------------------------

    async def _signal(self, seen: Sighting | None) -> None:
        case = self._case
        faults.point("before_cancel")
        case.tell_once(EventKind.CANCELLING, "cancelling the worker", pid=seen.worker_pid if seen else None)
        if self._waited() > pace.CANCEL:
            raise failures.survivor(case.work.key, seen, "the worker")
        if case.work.carries_receipt:
            await _signal_worker(self._ledger, case.work.key, _there(seen), case.work.key.job_id)
        else:
            await self._ledger.run(lambda conn: markers.signal(conn, case.work.marker, case.work.key.owner))
        supervised = case.work.kind is Kind.SUPERVISED
        if case.launch.report is Report.RUNNING and self._waited() > pace.LOOK_SOONEST and not supervised:
            # One that reports an error into a full queue ends only when it is detached, or read.
            await self._unblock()
        await self._sleep()

    async def _mark(self, seen: Sighting | None) -> None:
        faults.point("before_mark")
        case = self._case
        match case.intent:
            case Intent.ASKED:
                cause, reason = case.cause, "the caller was cancelled"
            case Intent.DEADLINE:
                cause, reason = Cause.DEADLINE, "the deadline passed"
            case _ if case.is_superseded(_there(seen)):
                cause, reason = Cause.SUPERSEDED, "a newer generation is registered"
            case _:
                cause, reason = (
                    Cause.GIVEN_UP,
                    "another launch of it ended, and one that was lost must not commit any more",
                )
        status = await self._ledger.mark_cancelled(case.work.key, cause, reason, of_try=case.options.of_try)
        case.gave_up = cause is Cause.GIVEN_UP and status == "cancelled"
        faults.point("after_mark")

    async def _compose_supervisor(self, registration: Registration) -> str:
        case, work = self._case, self._case.work
        readable = await self._make_readable()
        facts = await self._host.facts()
        settings = {**facts.defaults, **work.settings(case.seconds_left(), facts.defaults)}
        calls = facts.extension.supervision(readable.columns, padded=readable.padded)
        return work.supervisor(self._host.schema, registration, readable.text, calls, settings)

    async def _make_readable(self) -> Readable:
        """Return the text to launch, with a result that can be read to its end."""
        work = self._case.work
        text, last = statements.join(work.statements), work.statements[-1].text
        try:
            columns = await self._on_session(lambda session: session.describe(last, work.meaning()))
            return Readable(text, columns)
        except describe.UnreadableResult:
            pass
        except psycopg.Error as error:
            if len(work.statements) == 1:
                raise failures.statement_refused(work, error) from None  # its text quotes the line, parameters and all
            # It may need what the statements before it make.
        # Behind a statement that gives no rows, the result is the statements' tags.
        return Readable(text + statements.SEPARATOR.rstrip(";"), None, padded=True)

    async def _drop_invalid_index(self) -> None:
        case, work = self._case, self._case.work
        found = index_builds.concurrent_index(work.statements)
        if found is None:
            return
        try:
            async with asyncio.timeout(case.seconds_left()):
                dropped = await self._host.drop_invalid_index(found, work.job)
        except TimeoutError:
            return  # the next look sees that the deadline passed
        except psycopg.Error as error:
            raise failures.cannot_drop(work, error) from error
        if dropped is not None:
            case.tell(EventKind.DROPPED_INVALID_INDEX, f"dropped {dropped}, which an earlier build left invalid")

    # Without a receipt --------------------------------------------------------------------------------------------

    async def _prepare_session(self) -> str:
        case = self._case
        marked = await self._ledger.run(lambda conn: markers.find(conn, case.work.marker, case.work.key.owner))
        if marked is not None:
            raise failures.already_at_work(case.work, marked.pid)
        if case.session is None or case.session.lost:
            case.session = await self._host.session(exclusive=True)
        case.readable = await self._make_readable()
        return case.readable.text

    async def _read_result(self) -> None:
        """Read the result to its end; the worker is cancelled and the deadline is kept meanwhile."""
        case, launch = self._case, self._case.launch
        if launch.reading is None:
            worker = _there(launch.worker)
            launch.reading = self._loop.create_task(worker.session.drain(worker, _there(case.readable)))
            case.last_marked = self._loop.time()
        elif self._loop.time() - case.last_marked > pace.CALL:
            await launch.stop_reading()  # the worker is gone, and its result would be here: the connection is not
            return
        patience = pace.LOOK_LATEST if case.intent is Intent.NONE else pace.LOOK_SOONEST  # then it is signalled again
        await asyncio.wait({launch.reading}, timeout=case.bounded(min(patience, pace.CALL)))

    async def _verify(self, seen: Sighting | None) -> None:
        work = self._case.work
        try:
            self._case.verified_of = (seen.receipt_attempt, seen.may_begin) if seen else None
            self._case.verified = await self._host.verify(_there(work.verify_sql), work.job.role)
        except psycopg.Error as error:
            raise failures.unverified(work, error) from error

    async def _settle(self, seen: Sighting) -> None:
        """Write down what verify_sql said; where the work is not done, the way is free for another launch."""
        case = self._case
        done = bool(case.verified)
        await self._ledger.settle(case.work.key, seen.receipt_attempt, committed=done)
        if not done:
            case.launch.error, case.launch.lost, case.verified = None, True, None

    # Time ---------------------------------------------------------------------------------------------------------

    def _waited(self) -> float:
        """Return for how many seconds the step that is being taken has been taken again and again."""
        return self._loop.time() - self._step[1]

    async def _sleep(self) -> None:
        pause = pace.poll(self._waited(), self._case.options.poll_interval)
        await asyncio.sleep(self._case.bounded(pause))


async def cancel_job(
    ledger: Ledger, key: Key, cause: Cause, reason: str, of_try: str | None = None
) -> Literal["cancelled", "committed"]:
    """Cancel a job from outside, for good; returns how it ended.

    Raises
    ------
    StillRunning
        Its worker does not end within ``pace.CANCEL`` seconds, or this login may not signal it.
    OutcomeUnknown
        It was supervised, and its supervisor is gone without a word of how it ended.
    """
    loop = asyncio.get_running_loop()
    began = loop.time()
    while True:
        seen = await look(ledger, key)
        if seen.receipt is Receipt.COMMITTED:
            return "committed"
        # A mark that somebody may take back becomes the one of whoever asks for good.
        if seen.receipt is Receipt.CANCELLED and not (
            seen.is_provisional or (cause is Cause.ASKED and seen.cause in OF_A_TRY)
        ):
            return "cancelled"
        if seen.is_unsupervised:
            raise failures.untold(key)
        if loop.time() - began > pace.CANCEL:
            raise failures.survivor(key, seen, "the worker")
        faults.point("before_cancel")
        await _signal_worker(ledger, key, seen, key.job_id)
        if seen.receipt is Receipt.LAUNCHING:
            # Its supervisor frees the receipt when it has told how its worker ended.
            await asyncio.sleep(pace.poll(loop.time() - began))
            continue
        faults.point("before_mark")
        await ledger.mark_cancelled(key, cause, reason, of_try=of_try)
        faults.point("after_mark")


async def _signal_worker(ledger: Ledger, key: Key, seen: Sighting, job_id: str | None) -> None:
    try:
        await ledger.signal(key, job_id=job_id)
    except psycopg.errors.InsufficientPrivilege as error:
        raise failures.may_not_cancel(key, seen) from error


async def _to_its_end(work: Coroutine[Any, Any, None]) -> None:
    """Await ``work``, however often the caller is cancelled meanwhile."""
    task = asyncio.create_task(work)
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:
            continue
    task.result()


def _there(value: T | None) -> T:
    assert value is not None  # the verdict asks for this step only when it is there
    return value
