"""Launch or attach: the way of one job, from its registration to its outcome.

Each turn gathers evidence (the handle's report, then the lock, then the receipt), asks :func:`verdict.judge` for the
next step, and takes it. So any process can come to a job at any point, after any fault, and go on from there.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import psycopg
from psycopg import sql

from . import blame, describing, faults, markers, pace
from .composing import Work
from .connecting import ConnectionLost
from .errors import JobCancelled, PgbgError, ServerUnreachable, StillRunning
from .extension import ResultInfo
from .job import Job
from .launching import LaunchingSession, LaunchRefused, MayBeLaunched, SlotsUsedUp, Worker
from .ledger import BLOCKED, Key, Ledger, Registration, Sighting
from .options import Options
from .outcome import ErrorFields, Event, Outcome
from .verdict import OUTCOMES, TURNED_AWAY, Evidence, Holder, Intent, Receipt, Report, Step, judge

if TYPE_CHECKING:
    from .launcher import Launcher

T = TypeVar("T")
logger = logging.getLogger("pgbg_orchestration")

RELAUNCHES = 3  # of a job whose worker is lost without a trace
REJECTIONS = 10  # of a worker that is turned away while nobody is seen to hold the lock


@dataclass(slots=True)
class _Launch:
    """What this process knows of the launch that it made last."""

    call: asyncio.Task[Worker] | None = None
    worker: Worker | None = None
    lost: bool = False  # its handle; the worker may be at work
    info: ResultInfo | None = None
    error: ErrorFields | None = None
    detached: bool = False  # on purpose, since its output was blocked

    @property
    def report(self) -> Report:
        """What the handle tells, as far as it was read."""
        if self.lost:
            return Report.GONE
        if self.worker is None:
            return Report.NONE
        if self.error is not None:
            return Report.FAILED
        if self.info is not None or self.detached:
            return Report.ENDED
        return Report.RUNNING


class Run:
    """One call for one job: from its first look to its outcome."""

    def __init__(self, launcher: Launcher, job: Job, options: Options) -> None:
        self._launcher = launcher
        self._ledger = launcher.ledger
        self._job = job
        self._options = options
        self._loop = asyncio.get_running_loop()
        self._deadline = self._find_deadline()
        self._intent = Intent.NONE
        self._registration: Registration | None = None  # of the last launch, or of the one that comes next
        self._registered = False  # the one that comes next is
        self._launch = _Launch()
        self._launched = 0
        self._relaunches = 0
        self._rejections = 0
        self._slot_missing = False
        self._launch_error: BaseException | None = None
        self._attached_since: datetime | None = None  # on the server's clock
        self._step: tuple[Step, float] = (Step.WAIT, 0.0)  # the step that is being taken, and since when
        self._told: set[str] = set()
        # Of the kinds without a receipt:
        self._session: LaunchingSession | None = None
        self._columns: sql.Composable | None = None
        self._result: tuple[int | None, str | None] | None = None
        self._verified: bool | None = None

    async def outcome(self) -> Outcome:
        """Follow the job until its outcome is certain."""
        self._work: Work = await self._launcher.bind(self._job)
        following = self._loop.create_task(self._follow())
        try:
            return await asyncio.shield(following)
        except asyncio.CancelledError:
            await self._let_go(following)
            raise
        finally:
            if self._session is not None:
                await self._session.close()

    async def _let_go(self, following: asyncio.Task[Outcome]) -> None:
        """The caller went away: leave the worker, or cancel it and wait until that is decided."""
        following.cancel()
        await asyncio.wait({following})
        if self._options.on_cancel == "leave":
            await self._end_call(adopt=False)
            if self._launch.worker is not None:
                await self._launch.worker.detach()
            return
        self._intent = Intent.ASKED
        deciding = self._loop.create_task(self._follow())
        while not deciding.done():
            try:
                await asyncio.shield(deciding)
            except asyncio.CancelledError:
                continue  # it is bounded (pace.CANCEL): a second cancel does not make it quicker
            except JobCancelled as error:
                logger.info("the job was let go: %s", error)
            except PgbgError as error:
                logger.error("the job was let go: %s", error)  # noqa: TRY400  (its text says it all)
            else:
                logger.warning("the cancel came too late: job %s is committed", self._work.label)

    # The turn -----------------------------------------------------------------------------------------------------

    async def _follow(self) -> Outcome:
        await self._end_call(adopt=True)
        while True:
            evidence, seen = await self._observe()
            step = judge(evidence)
            if step in OUTCOMES:
                return await self._conclude(step, seen)
            if step is not self._step[0]:
                self._step = (step, self._loop.time())
            await self._take(step, seen)

    async def _take(self, step: Step, seen: Sighting | None) -> None:
        match step:
            case Step.REGISTER:
                await self._register()
            case Step.LAUNCH:
                await self._launch_worker()
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
                await self._mark()
            case Step.LIFT:
                await self._ledger.lift_cancel(self._work.key)
            case Step.READ_RESULT:
                await self._read_result()
            case Step.VERIFY:
                await self._verify()

    # Evidence -----------------------------------------------------------------------------------------------------

    async def _observe(self) -> tuple[Evidence, Sighting | None]:
        """Gather the evidence, in the order that makes it mean something: report, lock, receipt."""
        if self._intent is Intent.NONE and self._seconds_left() == 0:
            self._intent = Intent.DEADLINE
        await self._read_report()
        evidence = Evidence(
            carries_receipt=self._work.carries_receipt,
            registered=self._registered,
            report=self._launch.report,
            sqlstate=self._launch.error.sqlstate if self._launch.error else None,
            intent=self._intent,
            launches_left=RELAUNCHES - self._relaunches,
            rejections_left=REJECTIONS - self._rejections,
            can_verify=self._job.verify_sql is not None,
            verified=self._verified,
        )
        if self._work.carries_receipt:
            return await self._observe_ledger(evidence)
        return await self._observe_marker(evidence), None

    async def _read_report(self) -> None:
        launch = self._launch
        if launch.report is not Report.RUNNING or launch.worker is None or not launch.worker.ended.done():
            return
        launch.info = launch.worker.ended.result()
        faults.point("after_end")
        if launch.info is not None and launch.info.has_error:
            launch.error = await launch.worker.error()
        if launch.info is None or (launch.info.has_error and launch.error is None):
            launch.lost = True
            self._tell("session_lost", "the launching session is lost; following the worker by its lock and receipt")

    async def _observe_ledger(self, evidence: Evidence) -> tuple[Evidence, Sighting]:
        seen = await self._ledger.look(self._work.key)
        if seen.sql_digest not in (None, self._work.sql_digest) and "changed" not in self._told:
            if not self._options.accept_changed_sql:
                raise blame.reused(self._work)
            self._told.add("changed")
            logger.warning("job %s has other SQL than when it was first registered", self._work.label)
        generation = self._generation(seen)
        holder = seen.holder(generation)
        recorded = False
        if holder is not Holder.NOBODY:
            self._rejections = 0
        somebody_elses = evidence.report in (Report.NONE, Report.GONE) or evidence.sqlstate == TURNED_AWAY
        if holder is Holder.THIS_JOB and somebody_elses:
            self._attached_since = self._attached_since or seen.looked_at
        elif self._attached_since and holder is Holder.NOBODY and seen.receipt is Receipt.NONE:
            seen = await self._await_history(seen)
            recorded = _failed_since(seen, self._attached_since)
            if not recorded:
                self._attached_since = None
        return replace(
            evidence,
            receipt=seen.receipt,
            holder=holder,
            superseded=_is_superseded(seen, generation),
            recorded_failure=recorded,
            output_blocked=seen.wait_event == BLOCKED and evidence.report is Report.RUNNING,
            lift=self._options.retry_cancelled or seen.cause == "deadline",
        ), seen

    def _generation(self, seen: Sighting) -> int | None:
        if self._registration is not None:
            return self._registration.generation
        return seen.generation if self._job.generation is None else self._job.generation

    async def _await_history(self, seen: Sighting) -> Sighting:
        """Give the launching side of a worker that just ended a moment to write down how."""
        until = self._loop.time() + pace.GRACE
        while seen.outcome is None and seen.receipt is Receipt.NONE and self._patient(until):
            await asyncio.sleep(pace.RETRY_SOONEST)
            seen = await self._ledger.look(self._work.key)
        return seen

    async def _observe_marker(self, evidence: Evidence) -> Evidence:
        marked = await self._ledger.run(lambda conn: markers.find(conn, self._work.marker))
        mine = marked is not None and evidence.report is not Report.NONE
        return replace(
            evidence,
            receipt=Receipt.COMMITTED if self._result else Receipt.NONE,
            holder=Holder.THIS_JOB if mine else Holder.NOBODY,
            output_blocked=marked is not None and marked.wait_event == BLOCKED and evidence.report is Report.RUNNING,
        )

    # Launching ----------------------------------------------------------------------------------------------------

    async def _register(self) -> None:
        faults.point("before_register")
        self._registration = registration = await self._ledger.register(
            self._work.key,
            generation=self._job.generation,
            label=self._work.label,
            kind=self._work.kind,
            sql_digest=self._work.sql_digest,
            accept_changed_sql=self._options.accept_changed_sql,
        )
        faults.point("after_register")
        if registration.verdict == "reused":
            raise blame.reused(self._work)
        # A superseded one is seen to be by the next look.
        self._registered = registration.verdict == "registered"

    async def _launch_worker(self) -> None:
        registration = self._registration if self._work.carries_receipt else None
        if registration is not None and not await self._ledger.mark_older(self._work.key, registration.generation):
            return  # a worker of an older generation began in between
        text = self._work.text(self._launcher.schema, registration)
        if registration is None:
            await self._prepare_session(text)
        await self._count_relaunch()
        try:
            async with asyncio.timeout(self._patience()):
                await self._launcher.slots.launch(lambda: self._call_launch(text), self._on_slots_used_up)
        except TimeoutError:
            self._intent = Intent.DEADLINE
            await self._end_call(adopt=True)
            return
        except MayBeLaunched as error:
            self._launch.lost, self._launch_error = True, error.error
            self._launched += 1
            self._tell("session_lost", "the launch call was lost on its way; a worker may be running")
            return
        except LaunchRefused as error:
            await self._record("failed", describing.error_fields(error.error))
            raise blame.launch_refused(self._work, error.error, await self._launcher.facts()) from error.error
        await self._end_call(adopt=True)
        faults.point("while_running")
        if self._launch.worker is not None:
            # Most of what a look would tell now, it tells better a little later.
            await asyncio.wait({self._launch.worker.ended}, timeout=self._bounded(pace.LOOK_SOONEST))

    async def _count_relaunch(self) -> None:
        """Put the last launch away, and keep within the number of further ones."""
        if self._launch.error is not None and self._launch.error.sqlstate == TURNED_AWAY:
            self._rejections += 1
            await asyncio.sleep(pace.backoff(self._rejections))
        elif self._launched:
            self._relaunches += 1
        if self._launch.worker is not None:
            self._launch.worker.release()
        self._launch = _Launch()
        self._attached_since = self._verified = None

    async def _call_launch(self, text: str) -> None:
        for attempt in range(RELAUNCHES * 2):
            session = self._session or await self._launcher.session()
            self._launch.call = session.launch(
                text,
                label=self._work.label,
                queue_size=self._job.queue_size,
                settings=self._work.settings(self._seconds_left()),
                role=None if self._work.carries_receipt else self._job.role,
            )
            try:
                await asyncio.shield(self._launch.call)
            except ConnectionLost:
                # The session ended between being chosen and being used: nothing was launched.
                if self._session is not None:
                    await self._session.close()
                    self._session = await self._launcher.session(exclusive=True)
                await asyncio.sleep(pace.backoff(attempt))
            else:
                return
        raise ServerUnreachable("every launching session was lost before the launch call", job_id=self._work.key.job_id)

    async def _end_call(self, *, adopt: bool) -> None:
        """Let a launch call that is on its way end, and take its worker over, or forget it."""
        call, self._launch.call = self._launch.call, None
        if call is None:
            return
        if not adopt:
            await asyncio.wait({call}, timeout=pace.CALL)
        elif self._work.carries_receipt and not call.done():
            pass  # a worker that starts after the cancel is refused: no need to wait for a call that may be stalled
        else:
            await asyncio.wait({call})
        if not adopt or not call.done():
            self._launcher.abandon(call)
        elif call.exception() is None:
            worker = call.result()
            self._launch.worker = worker
            self._launched += 1
            self._registered = False
            worker.ended.add_done_callback(lambda _: self._launcher.slots.freed())
            self._notify("launched", f"launched attempt {self._attempt}", pid=worker.handle.pid)
        elif isinstance(call.exception(), MayBeLaunched):
            self._launch.lost = True
            self._launched += 1

    def _on_slots_used_up(self, error: SlotsUsedUp) -> None:
        self._slot_missing = True
        where = {"53400": "this session's table", "53100": "shared memory (/dev/shm)"}.get(
            error.sqlstate or "", "max_worker_processes"
        )
        self._tell("waiting_for_slot", f"waiting for a worker slot: {where} is used up", sqlstate=error.sqlstate)

    # Waiting ------------------------------------------------------------------------------------------------------

    async def _wait(self, seen: Sighting | None) -> None:
        worker = self._launch.worker
        if worker is not None and not worker.ended.done():
            age = self._loop.time() - worker.launched_at
            await self._look_at_progress(worker, age)
            await asyncio.wait({worker.ended}, timeout=self._bounded(pace.look(age)))
            return
        if seen is not None and self._attached_since is not None:
            self._tell("attached", "attached to the worker that already runs this job", pid=seen.holder_pid)
        await self._sleep()

    async def _look_at_progress(self, worker: Worker, age: float) -> None:
        if self._options.observer is None or age < pace.LOOK_SOONEST or worker.session.stalled:
            return
        progress = await worker.session.look_at_progress(worker)
        if progress is not None and progress != worker.progress:
            worker.progress = progress
            self._notify("progress", f"{progress.percent} % {progress.message or ''}".strip(), percent=progress.percent)

    async def _wait_for_series(self, seen: Sighting) -> None:
        if seen.holder(self._generation(seen)) is Holder.STRANGER and self._waited() > pace.STRANGER:
            raise blame.stranger(self._work, seen)
        self._tell("waiting_for_series", "another session holds the series; waiting for it", pid=seen.holder_pid)
        await self._sleep()

    async def _clear_older(self, seen: Sighting) -> None:
        if self._options.on_superseded == "wait":
            self._tell("waiting_for_series", "an older generation is at work; waiting for it", pid=seen.holder_pid)
            await self._sleep()
            return
        self._tell("cancelling_older", "cancelling the worker of an older generation", pid=seen.holder_pid)
        if self._waited() > pace.CANCEL:
            raise blame.survivor(self._work, seen, "the worker of an older generation")
        await self._ledger.signal(self._work.key, job_id=seen.holder_job)
        await self._sleep()

    async def _unblock(self) -> None:
        """Nobody reads the worker's output, and it waits for that: let it go on, or end."""
        if not self._work.carries_receipt:
            await self._read_result()
            return
        worker = _there(self._launch.worker)
        self._launch.error = await worker.error()
        self._launch.detached = True
        self._tell("output_blocked", "the worker's output is full and nobody reads it: it is dropped")
        await worker.detach()

    # Cancelling ---------------------------------------------------------------------------------------------------

    async def _signal(self, seen: Sighting | None) -> None:
        faults.point("before_cancel")
        self._tell("cancelling", "cancelling the worker", pid=seen.holder_pid if seen else None)
        if self._waited() > pace.CANCEL:
            raise blame.survivor(self._work, seen, "the worker")
        if self._work.carries_receipt:
            await self._ledger.signal(self._work.key)
        else:
            await self._ledger.run(lambda conn: markers.signal(conn, self._work.marker))
        if self._launch.report is Report.RUNNING and self._waited() > pace.LOOK_SOONEST:
            # One that reports an error into a full queue ends only when it is detached, or read.
            await self._unblock()
        await self._sleep()

    async def _mark(self) -> None:
        faults.point("before_mark")
        cause, reason = {
            Intent.NONE: ("superseded", "a newer generation is registered"),
            Intent.ASKED: ("asked", "the caller was cancelled"),
            Intent.DEADLINE: ("deadline", "the deadline passed"),
        }[self._intent]
        await self._ledger.mark_cancelled(self._work.key, cause, reason)
        faults.point("after_mark")

    # Without a receipt --------------------------------------------------------------------------------------------

    async def _prepare_session(self, text: str) -> None:
        marked = await self._ledger.run(lambda conn: markers.find(conn, self._work.marker))
        if marked is not None:
            raise blame.already_at_work(self._work, marked.pid)
        if self._session is None or self._session.lost:
            self._session = await self._launcher.session(exclusive=True)
        try:
            self._columns = await self._session.describe(text, self._job.role)
        except psycopg.Error as error:
            raise blame.statement_refused(self._work, error) from error

    async def _read_result(self) -> None:
        worker = _there(self._launch.worker)
        try:
            self._result = await worker.session.drain(worker, self._columns)
        except (ConnectionLost, psycopg.errors.DatatypeMismatch):
            self._launch.lost = True  # thrown away before its end, the result proves nothing
        except psycopg.Error as error:
            if error.sqlstate == "08006":  # said of the worker's connection to this session
                self._launch.lost = True
            else:
                self._launch.error = describing.error_fields(error)

    async def _verify(self) -> None:
        query = _there(self._job.verify_sql)
        self._verified = await self._ledger.run(lambda conn: describing.verify(conn, query))

    # The end ------------------------------------------------------------------------------------------------------

    async def _conclude(self, step: Step, seen: Sighting | None) -> Outcome:
        try:
            if step is Step.COMMITTED:
                return await self._committed(seen)
            fields = self._launch.error
            if step is Step.FAILED and fields is None and seen is not None:
                fields = seen.error  # as the launching side of another process wrote it down
            if self._launched:
                await self._record(blame.OUTCOME_NAMES[step], fields)
            raise self._error(step, seen, fields)
        finally:
            if self._launch.worker is not None:
                self._launch.worker.release()

    async def _committed(self, seen: Sighting | None) -> Outcome:
        launch = self._launch
        own = launch.worker is not None and (seen is None or seen.receipt_attempt == self._attempt)
        if own and launch.report is Report.RUNNING and launch.worker is not None:
            # The commit is visible a little before the worker has ended and its report is there.
            await asyncio.wait({launch.worker.ended}, timeout=pace.GRACE)
            await self._read_report()
        outcome = Outcome(job_id=self._work.key.job_id, label=self._work.label, launched=own)
        if seen is None:
            outcome = self._outcome_without_receipt(outcome)
        else:
            outcome = await self._outcome_with_receipt(outcome, seen)
        if own:
            await self._record("committed", None, outcome)
        rows = f", {outcome.row_count} rows" if outcome.row_count is not None else ""
        how = "" if outcome.launched else " by an earlier or another launch"
        self._notify("committed", f"committed{how}: {outcome.command_tag or 'done'}{rows}", pid=outcome.worker_pid)
        return outcome

    async def _outcome_with_receipt(self, outcome: Outcome, seen: Sighting) -> Outcome:
        outcome = replace(
            outcome, attempt=seen.receipt_attempt, worker_pid=seen.receipt_pid, started_at=seen.receipt_started_at
        )
        if outcome.launched and self._launch.info is not None:
            info = self._launch.info
            return replace(
                outcome, row_count=info.row_count, command_tag=info.command_tag or None, finished_at=info.finished_at
            )
        until = self._loop.time() + pace.COUNTS
        while self._attached_since and seen.outcome is None and self._patient(until):
            await asyncio.sleep(pace.RETRY_SOONEST)
            seen = await self._ledger.look(self._work.key)
        return replace(outcome, row_count=seen.row_count, command_tag=seen.command_tag, finished_at=seen.ended_at)

    def _outcome_without_receipt(self, outcome: Outcome) -> Outcome:
        row_count, tag = self._result or (None, None)
        info, worker = self._launch.info, self._launch.worker
        return replace(
            outcome,
            launched=self._launched > 0,
            attempt=max(self._launched, 1),
            worker_pid=worker.handle.pid if worker else None,
            row_count=row_count if info is None else info.row_count,
            command_tag=(tag if info is None else info.command_tag) or None,
            started_at=info.started_at if info else None,
            finished_at=info.finished_at if info else None,
            proof="result" if self._result else "verify_sql",
        )

    def _error(self, step: Step, seen: Sighting | None, fields: ErrorFields | None) -> PgbgError:
        work = self._work
        match step:
            case Step.FAILED:
                return blame.failed(work, fields or ErrorFields())
            case Step.SUPERSEDED:
                return blame.superseded(work, seen)
            case Step.CANCELLED if self._slot_missing and not self._launched and self._intent is Intent.DEADLINE:
                return blame.no_slot(work)
            case Step.CANCELLED if self._intent is Intent.DEADLINE:
                return blame.deadline_passed(work)
            case Step.CANCELLED:
                return blame.cancelled(work, seen)
            case Step.LOST if self._launch_error is not None:
                return blame.launch_failed(work, self._launch_error)
            case Step.LOST:
                return blame.lost(work)
            case _:
                return blame.unknown(work)

    async def _record(self, outcome: str, error: ErrorFields | None, told: Outcome | None = None) -> None:
        if self._registration is None:
            return
        faults.point("before_record")
        worker, info = self._launch.worker, self._launch.info
        try:
            await self._ledger.record(
                self._work.key,
                self._attempt,
                outcome,
                worker_pid=told.worker_pid if told else worker.handle.pid if worker else None,
                started_at=told.started_at if told else info.started_at if info else None,
                row_count=told.row_count if told else None,
                command_tag=told.command_tag if told else None,
                error=error,
            )
        except (psycopg.Error, PgbgError) as failure:
            # The history is no proof: what happened to the job is certain without it.
            logger.warning("the history of job %s could not be written: %s", self._work.label, failure)
        faults.point("after_record")

    # Small things -------------------------------------------------------------------------------------------------

    @property
    def _attempt(self) -> int:
        return self._registration.attempt if self._registration else self._launched or 1

    def _find_deadline(self) -> float | None:
        """Return the deadline on the event loop's clock, which no jump of the wall clock moves."""
        bounds = [] if self._job.timeout is None else [self._loop.time() + self._job.timeout]
        if self._options.deadline is not None:
            now = datetime.now(self._options.deadline.tzinfo)
            bounds.append(self._loop.time() + (self._options.deadline - now).total_seconds())
        return min(bounds, default=None)

    def _seconds_left(self) -> float | None:
        return None if self._deadline is None else max(self._deadline - self._loop.time(), 0)

    def _patience(self) -> float | None:
        """How long to wait for a slot."""
        bounds = [bound for bound in (self._seconds_left(), self._options.slot_timeout) if bound is not None]
        return min(bounds, default=None)

    def _waited(self) -> float:
        """How long the step that is being taken has been taken again and again."""
        return self._loop.time() - self._step[1]

    def _patient(self, until: float) -> bool:
        """Say whether to wait for what others may write down: not when this process ends the job itself."""
        return self._intent is Intent.NONE and self._loop.time() < until

    def _bounded(self, seconds: float) -> float:
        left = self._seconds_left()
        return seconds if left is None or self._intent is not Intent.NONE else min(seconds, left)

    async def _sleep(self) -> None:
        await asyncio.sleep(self._bounded(pace.poll(self._waited())))

    def _tell(self, kind: str, message: str, **data: Any) -> None:
        """Tell an event once, however often its step is taken again."""
        if kind not in self._told:
            self._told.add(kind)
            self._notify(kind, message, **data)

    def _notify(self, kind: str, message: str, **data: Any) -> None:
        pid = data.get("pid")
        logger.info("job %s: %s%s", self._work.label, message, f" (pid {pid})" if pid else "")
        if self._options.observer is None:
            return
        try:
            self._options.observer(Event(kind, message, self._work.key.job_id, self._work.label, data))
        except Exception:
            logger.exception("the observer of job %s failed", self._work.label)


async def cancel_job(ledger: Ledger, key: Key, cause: str, reason: str) -> Literal["cancelled", "committed"]:
    """Cancel a job from outside, for good; returns how it ended.

    Raises
    ------
    StillRunning
        Its worker does not end within ``pace.CANCEL`` seconds.
    """
    loop = asyncio.get_running_loop()
    began = loop.time()
    while True:
        seen = await ledger.look(key)
        if seen.receipt is not Receipt.NONE:
            return "committed" if seen.receipt is Receipt.COMMITTED else "cancelled"
        if loop.time() - began > pace.CANCEL:
            raise StillRunning(
                f"its worker (pid {seen.holder_pid}) does not end when it is cancelled",
                worker_pid=seen.holder_pid,
                job_id=key.job_id,
                todo="Its SQL may catch query_canceled; wait for it.",
            )
        faults.point("before_cancel")
        await ledger.signal(key)
        faults.point("before_mark")
        await ledger.mark_cancelled(key, cause, reason)


def _there(value: T | None) -> T:
    assert value is not None  # the verdict asks for this step only when it is there
    return value


def _is_superseded(seen: Sighting, generation: int | None) -> bool:
    if seen.cause == "superseded":
        return True
    return seen.newest is not None and generation is not None and seen.newest > generation


def _failed_since(seen: Sighting, since: datetime) -> bool:
    return seen.outcome == "failed" and seen.ended_at is not None and seen.ended_at >= since
