"""Launch or attach: the way of one job, from its first look to its outcome.

Each turn looks (the handle's report, then the lock, then the receipt), has :mod:`.evidence` say what that means, asks
:func:`verdict.judge` for the next step, and takes it. So any process can come to a job at any point, after any fault,
and go on from there.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any, Literal, TypeVar

import psycopg

from pgbg_orchestration import errors, pace
from pgbg_orchestration.call_options import Options
from pgbg_orchestration.driver import to_its_end
from pgbg_orchestration.errors import InvalidJob, JobCancelled, PgbgError, ServerUnreachable
from pgbg_orchestration.job import Job, Kind
from pgbg_orchestration.ledger.ledger import Ledger
from pgbg_orchestration.ledger.sighting import Key, Sighting
from pgbg_orchestration.outcome import OF_A_TRY, Cause, EventKind, Outcome
from pgbg_orchestration.postgres import markers
from pgbg_orchestration.postgres.connection import ConnectionLost
from pgbg_orchestration.postgres.handles import Nudge
from pgbg_orchestration.testing import faults
from pgbg_orchestration.verdict import OUTCOMES, Evidence, Holder, Intent, Receipt, Report, Step, judge

from . import evidence, failures
from .case import Case, broken_off, case_of, deadline_of, first_of
from .conclusion import conclude
from .evidence import Doubt, Sign
from .follow import begin_reading, read_report, stop_reading
from .host import Host
from .launch import Launches
from .streamed_rows import Feed, check, prepare

T = TypeVar("T")
logger = logging.getLogger("pgbg_orchestration")


async def run_job(host: Host, job: Job, options: Options, feed: Feed | None = None) -> Outcome:
    """Bind a job and follow it until its outcome is certain.

    Parameters
    ----------
    feed:
        Where its rows are to come out, of a job that is streamed.
    """
    deadline = deadline_of(job.timeout, options.deadline)
    try:
        try:
            if options.notices:
                job = job.with_notices()
                _check_notices(job)
            _check_supervisor(job, options, feed)
            if feed is not None:
                check(job)
            work = await host.bind(job)
            if options.supervisor and work.kind is Kind.RECEIPT:
                work = replace(work, adds_supervisor=True)
            case = case_of(work, options, deadline)
            if feed is not None:
                case.feed = feed
                case.work, case.session = await prepare(lambda: host.session(exclusive=True), work, feed)
            return await Run(host, case).outcome()
        except psycopg.Error as error:
            host.forget_facts()  # the server may have changed: the next job looks at it anew
            raise failures.ledger(error, job.id or "", redact=job.redact_details) from error
    except PgbgError as error:
        if job.redact_details:
            error.__cause__ = error.__context__ = None  # in a traceback they would show the server's own words
        raise


def _check_notices(job: Job) -> None:
    if job.redact_details:
        raise InvalidJob(
            "no notices are told of a job whose details are redacted: what SQL raises may hold data",
            job_id=job.id,
            label=job.label,
        )
    if job.kind is Kind.SUPERVISED:
        raise InvalidJob(
            "the notices of a supervised job cannot be read: its supervisor alone has its worker's output",
            job_id=job.id,
            label=job.label,
            todo="Leave them out, or choose kind='session', whose outcome goes with the session.",
        )


def _check_supervisor(job: Job, options: Options, feed: Feed | None) -> None:
    if not options.supervisor:
        return
    why = None
    if job.kind is Kind.SESSION:
        why = "a supervisor writes into the history, where jobs of kind session do not stand"
    elif options.notices or feed is not None:
        why = "a supervisor alone has its worker's output: neither notices nor rows can be read as they come"
    if why is not None:
        raise InvalidJob(why, job_id=job.id, label=job.label)


class Run:
    """One call for one job: from its first look to its outcome."""

    def __init__(self, host: Host, case: Case) -> None:
        self._host = host
        self._ledger = host.ledger
        self._case = case
        self._launches = Launches(host, case)
        self._loop = asyncio.get_running_loop()
        self._sighting: Sighting | None = None  # the last look
        self._step: tuple[Step | None, float] = (None, 0.0)  # the step that is being taken, and since when

    async def outcome(self) -> Outcome:
        """Follow the job; when the caller goes away, cancel it or leave it at work, as the caller chose."""
        following = self._loop.create_task(self._follow())
        self._host.onlooker.add(self._case)
        listener = self._host.listener if self._case.work.carries_receipt else None
        marker = self._case.work.marker if listener is not None else ""
        if listener is not None:
            listener.call_at_hints(marker, self._take_hint)
        try:
            return await asyncio.shield(following)
        except asyncio.CancelledError:
            # Not to be cancelled itself: it ends within pace.CANCEL and pace.BREAK seconds.
            await to_its_end(self._let_go(following))
            raise
        finally:
            if listener is not None:
                listener.leave(marker, self._take_hint)
            self._host.onlooker.leave(self._case)
            if self._case.reading is None and self._case.session is None:
                self._give_back_slots()
            elif await to_its_end(self._close()):
                raise asyncio.CancelledError

    def _take_hint(self) -> None:
        """Have the worker's session read its receipt; without a worker, end the wait for the next look."""
        worker = self._case.worker
        if worker is None or worker.end.done():
            self._case.nudge.set()
        else:
            worker.session.hear(worker)

    async def _close(self) -> None:
        await stop_reading(self._case)
        self._give_back_slots()
        if self._case.session is not None:
            await self._host.give_back(self._case.session)

    def _give_back_slots(self) -> None:
        if self._case.slots:
            self._host.turns.give_back(self._case.slots)

    async def _let_go(self, following: asyncio.Task[Outcome]) -> None:
        """End the job, or leave it; what comes of that is told by an event: the caller gets its CancelledError."""
        case = self._case
        await broken_off(following)
        case.way_out = self._loop.time() + pace.CANCEL
        try:
            if following.cancelled():
                cause = case.options.cause_of_cancel()
                if cause is None:
                    await self._leave()
                    return
                case.memory, case.cause = case.memory.wanting_end(Intent.ASKED), cause
                outcome = await self._decided(self._loop.create_task(self._follow()))
            else:
                outcome = following.result()  # it ended in the same moment
        except PgbgError as error:
            self._tell_end(error)
        except psycopg.Error as error:
            self._tell_end(failures.ledger(error, case.work.key.job_id, redact=case.work.job.redact_details))
        except Exception:
            logger.exception("it is not known how the job %s ended, whose caller was cancelled", case.work.label)
        else:
            case.tell(EventKind.LET_GO, "the cancel came too late: committed", outcome=outcome.to_dict())

    async def _decided(self, following: asyncio.Task[Outcome]) -> Outcome:
        await broken_off(following, at=_known(self._case.way_out) + pace.BREAK)
        if following.cancelled():
            raise self._undecided()
        return following.result()

    def _tell_end(self, error: PgbgError) -> None:
        self._case.tell(EventKind.LET_GO, f"let go: {error.message}", error=error.to_dict())
        if not isinstance(error, JobCancelled):
            logger.error("the job was let go: %s", error)

    async def _leave(self) -> None:
        case = self._case
        with suppress(TimeoutError):
            async with asyncio.timeout_at(case.way_out):
                if case.call is not None:
                    await asyncio.wait({case.call}, timeout=pace.CALL)
                await self._launches.take_over_call()
        await stop_reading(case)
        if case.worker is not None:
            case.worker.release()

    # The turn -----------------------------------------------------------------------------------------------------

    async def _follow(self) -> Outcome:
        case = self._case
        while True:
            limit = asyncio.timeout_at(self._bound())
            try:
                async with limit:
                    await self._launches.take_over_call()
                    await self._launches.begin()
                    step = judge(await self._look())
                    if step not in OUTCOMES:
                        await self._take_patiently(step)
                        continue
            except TimeoutError:
                if not limit.expired():
                    raise
                if case.way_out is not None:
                    raise self._undecided() from None
                continue  # the deadline passed
            except ServerUnreachable as error:
                if self._launched_nothing:
                    error.data_state = errors.NOT_BY_THIS_CALL
                raise
            return await conclude(case, self._ledger, step, self._sighting)

    def _bound(self) -> float | None:
        """Return until when a turn may take: the deadline, or one bound for all that comes once the end is wanted."""
        case, now = self._case, self._loop.time()
        case.memory = case.memory.at(now, case.terms)
        if case.memory.intent is Intent.NONE:
            return case.terms.deadline
        if case.way_out is None:
            case.way_out = now + pace.CANCEL
        return case.way_out

    def _undecided(self) -> PgbgError:
        """Return the error of a call that wanted the end, and could not have it decided in time."""
        case = self._case
        if self._step[0] is Step.SIGNAL:
            return failures.survivor(case.work.key, self._sighting, "the worker")
        work = case.work
        return failures.undecided(work.key.job_id, work.label, nothing_launched=self._launched_nothing)

    @property
    def _launched_nothing(self) -> bool:
        case = self._case
        called = bool(case.attempts) or case.call is not None or case.call_forgotten
        return not called and case.memory.attached_since is None

    async def _look(self) -> Evidence:
        """Look at the job, again while the look is doubted, and return what it means."""
        case = self._case
        await read_report(case)
        if case.memory.launch.report is Report.GONE:
            case.tell_once(EventKind.SESSION_LOST, "its handle is lost; following the worker by its lock and receipt")
        now = self._loop.time
        commit = await self._commit()
        if commit is not None:
            self._sighting = commit
            weighed, case.memory = evidence.weigh_proof(case.terms, case.memory, now())
            return weighed
        if case.work.carries_receipt:
            sighting = await look(
                self._ledger, case.work.key, lambda s: evidence.doubt(s, case.terms, case.memory, now())
            )
            self._check_digest(sighting)
            self._sighting = sighting
            if sighting.holds_this_job:
                case.last_sign = now()
            case.worker_pid = sighting.marked_pid
            # The holder of a supervised job's lock is its supervisor.
            if case.worker_pid is None and sighting.holds_this_job and case.work.kind is not Kind.SUPERVISED:
                case.worker_pid = sighting.holder_pid
            weighed, case.memory = evidence.weigh(sighting, case.terms, case.memory, now())
            return weighed
        launch, end_wanted = case.memory.launch, case.memory.intent is not Intent.NONE
        if launch.result is not None or (launch.report is Report.ENDED and not end_wanted and case.reading is None):
            # Its result is read, or will be, which waits for the worker's end: no need to look for the worker.
            weighed, case.memory = evidence.weigh_marker(False, None, case.terms, case.memory, now())
            return weighed
        marked = await self._ledger.run(lambda conn: markers.find(conn, case.work.marker, case.work.key.owner))
        case.worker_pid = marked.pid if marked else None
        if marked is not None:
            case.last_sign = now()
        wait_event = marked.wait_event if marked else None
        weighed, case.memory = evidence.weigh_marker(marked is not None, wait_event, case.terms, case.memory, now())
        return weighed

    async def _commit(self) -> Sighting | None:
        """Return the receipt of this call's own launch, where that is read by itself."""
        case, worker = self._case, self._case.worker
        if worker is not None and worker.proof is not None:
            return Sighting.of_commit(case.attempt, *worker.proof)
        if worker is not None and case.work.kind is Kind.SUPERVISED:
            return await self._ledger.supervised_end(case.work.key, case.attempt)
        return None

    def _check_digest(self, sighting: Sighting) -> None:
        case = self._case
        if sighting.sql_digest in (None, case.work.sql_digest) or case.has_other_sql:
            return
        if not case.options.accept_changed_sql:
            raise failures.reused(case.work)
        case.has_other_sql = True
        logger.warning("job %s has other SQL than when it was first registered", case.work.label)

    async def _take_patiently(self, step: Step) -> None:
        if step is not self._step[0]:
            self._step = (step, self._loop.time())
        try:
            await self._take(step, self._sighting)
        except ConnectionLost as error:
            # A connection for verify_sql or an index: the step is taken again, and nothing was launched.
            if self._waited() > pace.RECONNECT:
                raise ServerUnreachable(str(error), job_id=self._case.work.key.job_id) from error
            await self._sleep()

    async def _take(self, step: Step, sighting: Sighting | None) -> None:
        match step:
            case Step.REGISTER:
                await self._launches.register()
            case Step.LAUNCH:
                if not await self._launches.launch():
                    await self._sleep()
            case Step.WAIT:
                await self._wait(sighting)
            case Step.WAIT_FOR_SERIES:
                await self._wait_for_series(_known(sighting))
            case Step.CLEAR_OLDER:
                await self._clear_older(_known(sighting))
            case Step.UNBLOCK:
                await self._unblock()
            case Step.SIGNAL:
                await self._signal(sighting)
            case Step.MARK:
                await self._mark(sighting)
            case Step.LIFT:
                await self._ledger.lift_cancel(self._case.work.key)
            case Step.READ_RESULT:
                await self._read_result()
            case Step.VERIFY:
                await self._verify(sighting)
            case Step.SETTLE:
                await self._settle(_known(sighting))

    # Waiting ------------------------------------------------------------------------------------------------------

    async def _wait(self, sighting: Sighting | None) -> None:
        case, worker = self._case, self._case.worker
        if case.reading is not None:
            await self._read_result()
            return
        if worker is not None and not worker.end.done():
            if sighting is not None and sighting.marked_pid is not None:
                case.tell_once(EventKind.AT_WORK, "its worker is at work", pid=sighting.marked_pid)
            interval = case.options.poll_interval
            await self._wait_for_news(
                sighting,
                lambda: pace.look_behind(self._loop.time() - worker.launched_at, interval),
                worker.nudge,
                worker.end,
            )
            return
        if sighting is not None and case.memory.attached_since is not None:
            message = "attached to the worker that already runs this job"
            case.tell_once(EventKind.ATTACHED, message, pid=sighting.worker_pid)
        await self._wait_for_news(sighting, self._pause, case.nudge)

    async def _wait_for_news(
        self,
        sighting: Sighting | None,
        pause: Callable[[], float],
        nudge: Nudge,
        end: asyncio.Future[Any] | None = None,
    ) -> None:
        """Wait until it is time for the next look.

        Where the last look showed a worker at work, :class:`.rounds.Rounds` looks for all such jobs, and ends this wait
        once it sees a change.

        Parameters
        ----------
        pause:
            Returns the seconds to the next look.
        """
        case = self._case
        seconds = pause()
        at_work = None if sighting is None or seconds < pace.LOOK_SOONEST else sighting.at_work(case.work.key)
        if at_work is None:
            await first_of(end, nudge, case.bounded(seconds))
            return
        with self._host.rounds.waiting(at_work, pause, nudge.set):
            await first_of(end, nudge, case.bounded(math.inf))

    async def _wait_for_series(self, sighting: Sighting) -> None:
        if sighting.holder(self._case.memory.generation) is Holder.STRANGER and self._waited() > pace.STRANGER:
            raise failures.stranger(self._case.work, sighting)
        message = "another session holds the series; waiting for it"
        self._case.tell_once(EventKind.WAITING_FOR_SERIES, message, pid=sighting.holder_pid)
        await self._sleep()

    async def _clear_older(self, sighting: Sighting) -> None:
        if self._case.options.on_superseded == "wait":
            message = f"an older generation is at work, {sighting.holder_job}; waiting for it"
            self._case.tell_once(EventKind.WAITING_FOR_SERIES, message, pid=sighting.holder_pid)
            await self._sleep()
            return
        message = f"cancelling the worker of an older generation, {sighting.holder_job}"
        self._case.tell_once(EventKind.CANCELLING_OLDER, message, pid=sighting.worker_pid)
        if self._waited() > pace.CANCEL:
            raise failures.survivor(self._case.work.key, sighting, "the worker of an older generation")
        await _signal_worker(self._ledger, self._case.work.key, sighting, sighting.holder_job)
        await self._sleep()

    async def _unblock(self) -> None:
        """Help a worker that waits for its output to be read: read its result, or detach it, so that it goes on."""
        if not self._case.work.carries_receipt or self._case.reading is not None:
            await self._read_result()
            return
        case, worker = self._case, _known(self._case.worker)
        case.memory = case.memory.detached(await worker.error())
        case.tell_once(EventKind.OUTPUT_BLOCKED, "the worker's output is full and nobody reads it: it is dropped")
        await worker.detach()

    # Cancelling ---------------------------------------------------------------------------------------------------

    async def _signal(self, sighting: Sighting | None) -> None:
        case = self._case
        faults.point("before_cancel")
        case.tell_once(EventKind.CANCELLING, "cancelling the worker", pid=sighting.worker_pid if sighting else None)
        if self._waited() > pace.CANCEL:
            raise failures.survivor(case.work.key, sighting, "the worker")
        if case.work.carries_receipt:
            await _signal_worker(self._ledger, case.work.key, _known(sighting), case.work.key.job_id)
        else:
            await self._ledger.run(lambda conn: markers.signal(conn, case.work.marker, case.work.key.owner))
        supervised = case.work.has_supervisor
        if case.memory.launch.report is Report.RUNNING and self._waited() > pace.LOOK_SOONEST and not supervised:
            # A worker that reports an error into a full queue takes no cancel: it ends once it is detached, or read.
            await self._unblock()
        await self._sleep()

    async def _mark(self, sighting: Sighting | None) -> None:
        faults.point("before_mark")
        case = self._case
        match case.memory.intent:
            case Intent.ASKED:
                cause, reason = case.cause, "the caller was cancelled"
            case Intent.DEADLINE:
                cause, reason = Cause.DEADLINE, "the deadline passed"
            case _ if evidence.is_superseded(_known(sighting), case.terms, case.memory):
                cause, reason = Cause.SUPERSEDED, "a newer generation is registered"
            case _:
                cause = Cause.GIVEN_UP
                reason = "another launch of it ended, and one that was lost must not commit any more"
        status = await self._ledger.mark_cancelled(case.work.key, cause, reason, of_try=case.options.of_try)
        case.memory = case.memory.marked(gave_up=cause is Cause.GIVEN_UP and status == "cancelled")
        faults.point("after_mark")

    # Without a receipt --------------------------------------------------------------------------------------------

    async def _read_result(self) -> None:
        """Read the result, for a while at a time: between these the turn keeps the deadline, and cancels the worker."""
        case = self._case
        if case.reading is None:
            begin_reading(case, _known(case.worker), _known(case.readable))
        elif self._loop.time() - max(case.last_sign, case.last_notice) > pace.CALL:
            # No sign of the worker for so long, and still no result: the connection must be dead.
            await stop_reading(case)
            return
        # A cancel may have to be signalled again soon.
        patience = pace.LOOK_LATEST if case.memory.intent is Intent.NONE else pace.LOOK_SOONEST
        await asyncio.wait({_known(case.reading)}, timeout=case.bounded(min(patience, pace.CALL)))

    async def _verify(self, sighting: Sighting | None) -> None:
        case, work = self._case, self._case.work
        claim = (sighting.receipt_attempt, sighting.may_begin) if sighting else None
        try:
            done = await self._host.verify(_known(work.verify_sql), work.job.role)
        except psycopg.Error as error:
            raise failures.unverified(work, error) from error
        case.memory = case.memory.verified(done, claim)

    async def _settle(self, sighting: Sighting) -> None:
        """Write down what verify_sql said; where the work is not done, another launch may follow."""
        case = self._case
        done = case.memory.verification is not None and case.memory.verification.done
        await self._ledger.settle(case.work.key, sighting.receipt_attempt, committed=done)
        case.memory = case.memory.settled()

    # Time ---------------------------------------------------------------------------------------------------------

    def _waited(self) -> float:
        """Return for how many seconds the step that is being taken has been taken again and again."""
        return self._loop.time() - self._step[1]

    def _pause(self) -> float:
        return pace.poll(self._waited(), self._case.options.poll_interval)

    async def _sleep(self) -> None:
        await first_of(None, self._case.nudge, self._case.bounded(self._pause()))


async def cancel_job(
    ledger: Ledger, key: Key, cause: Cause, reason: str, of_try: str | None = None
) -> Literal["cancelled", "committed"]:
    """Cancel a job from outside, for good; returns how it ended.

    Raises
    ------
    StillRunning
        Its worker does not end within ``pace.CANCEL`` seconds, or this login may not signal it.
    ServerUnreachable
        Within that time it could not be decided.
    OutcomeUnknown
        It was supervised, and its supervisor is gone without a word of how it ended.
    """
    cancelling = asyncio.create_task(_cancel(ledger, key, cause, reason, of_try))
    try:
        async with asyncio.timeout(pace.CANCEL):
            return await asyncio.shield(cancelling)
    except TimeoutError as error:
        raise failures.undecided(key.job_id) from error
    finally:
        await broken_off(cancelling)


async def _cancel(
    ledger: Ledger, key: Key, cause: Cause, reason: str, of_try: str | None
) -> Literal["cancelled", "committed"]:
    loop = asyncio.get_running_loop()
    began = loop.time()
    while True:
        sighting = await look(ledger, key, evidence.doubt_the_look)
        if sighting.receipt is Receipt.COMMITTED:
            return "committed"
        # A mark that a later call may take back is replaced by this one, which stays.
        if sighting.receipt is Receipt.CANCELLED and not (
            sighting.is_provisional or (cause is Cause.ASKED and sighting.cause in OF_A_TRY)
        ):
            return "cancelled"
        if sighting.is_unsupervised:
            raise failures.unknown_end(key)
        if loop.time() - began > pace.CANCEL - pace.BREAK:
            raise failures.survivor(key, sighting, "the worker")
        faults.point("before_cancel")
        await _signal_worker(ledger, key, sighting, key.job_id)
        if sighting.receipt is Receipt.LAUNCHING:
            # The receipt is its supervisor's until that has written down how its worker ended.
            await asyncio.sleep(pace.poll(loop.time() - began))
            continue
        faults.point("before_mark")
        await ledger.mark_cancelled(key, cause, reason, of_try=of_try)
        faults.point("after_mark")


async def look(ledger: Ledger, key: Key, doubt: Callable[[Sighting], Doubt | None]) -> Sighting:
    """Look at a job, and again until ``doubt`` returns none, or one that has stood for its time."""
    loop = asyncio.get_running_loop()
    doubted: dict[tuple[Sign, int | None], float] = {}  # since when each doubt stands
    while True:
        sighting = await ledger.look(key)
        doubtful = doubt(sighting)
        if (
            doubtful is None
            or loop.time() >= doubted.setdefault((doubtful.sign, doubtful.claim), loop.time()) + doubtful.seconds
        ):
            break
        await asyncio.sleep(pace.RETRY_SOONEST)
    if (attempt := evidence.claim_without_pid(sighting)) is not None and sighting.marked_pid is not None:
        await ledger.follow(key, attempt, sighting.marked_pid)
    return sighting


async def _signal_worker(ledger: Ledger, key: Key, sighting: Sighting, job_id: str | None) -> None:
    try:
        await ledger.signal(key, job_id=job_id)
    except psycopg.errors.InsufficientPrivilege as error:
        raise failures.may_not_cancel(key, sighting) from error


def _known(value: T | None) -> T:
    assert value is not None  # the verdict says this step only where there is one
    return value
