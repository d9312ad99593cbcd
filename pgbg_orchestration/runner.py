"""Launch or attach: the way of one job, from its registration to its outcome.

Each turn gathers evidence (the handle's report, then the lock, then the receipt), asks :func:`verdict.judge` for the
next step, and takes it. So any process can come to a job at any point, after any fault, and go on from there.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import psycopg

from . import describing, errors, faults, markers, pace
from .connecting import ConnectionLost
from .errors import PgbgError
from .extension import ResultInfo
from .job import Job
from .launching import LaunchingSession, LaunchRefused, MayBeLaunched, SlotsUsedUp, Worker
from .ledger import BLOCKED, Key, Ledger, Registration, Sighting
from .outcome import ErrorFields, Event, Outcome
from .verdict import OUTCOMES, Evidence, Holder, Intent, Receipt, Report, Step, judge

if TYPE_CHECKING:
    from .launcher import Launcher

logger = logging.getLogger("pgbg_orchestration")

LAUNCHES = 3  # of a job whose worker is lost without a trace
REJECTIONS = 10  # of a worker that is turned away while nobody is seen to hold the lock


@dataclass(frozen=True, slots=True)
class Options:
    """How a job is to be run; :func:`pgbg_orchestration.arun` tells what each means."""

    on_cancel: Literal["cancel", "leave"] = "cancel"
    on_superseded: Literal["cancel", "wait"] = "cancel"
    retry_cancelled: bool = False
    accept_changed_sql: bool = False
    slot_timeout: float | None = None
    observer: Callable[[Event], None] | None = None
    deadline: datetime | None = None

    def __post_init__(self) -> None:
        if self.on_cancel not in ("cancel", "leave"):
            raise errors.InvalidJob(f"on_cancel must be 'cancel' or 'leave', not {self.on_cancel!r}")
        if self.on_superseded not in ("cancel", "wait"):
            raise errors.InvalidJob(f"on_superseded must be 'cancel' or 'wait', not {self.on_superseded!r}")
        if self.slot_timeout is not None and not self.slot_timeout > 0:
            raise errors.InvalidJob(f"slot_timeout must be a number of seconds above 0, not {self.slot_timeout!r}")
        if self.deadline is not None and self.deadline.tzinfo is None:
            raise errors.InvalidJob("the deadline needs a time zone")


class Run:
    """One call for one job: from its first look to its outcome."""

    def __init__(self, launcher: Launcher, job: Job, options: Options) -> None:
        self._launcher = launcher
        self._job = job
        self._options = options
        self._ledger = launcher.ledger
        self._loop = asyncio.get_running_loop()
        self._deadline = self._find_deadline()
        # What this call knows of the job besides what it sees:
        self._intent = Intent.NONE
        self._registration: Registration | None = None  # of the launch that comes next, or that is under way
        self._registered = False  # for the launch that comes next
        self._session: LaunchingSession | None = None  # of its own: the kinds without a receipt
        self._worker: Worker | None = None
        self._lost_worker = False
        self._info: ResultInfo | None = None
        self._error: ErrorFields | None = None
        self._detached = False
        self._launch_error: BaseException | None = None
        self._launches = 0
        self._rejections = 0
        self._attached_since: datetime | None = None
        self._waited_for_slot = False
        self._columns: Any = None
        self._proof = "receipt"
        self._verified: bool | None = None
        self._result: tuple[int | None, str | None] | None = None
        self._since: dict[Step, float] = {}
        self._told: set[str] = set()

    async def outcome(self) -> Outcome:
        """Follow the job until its outcome is certain."""
        self._work = await self._launcher.bind(self._job)
        if not self._work.carries_receipt:
            self._proof = "result"
        following = self._loop.create_task(self._follow())
        try:
            return await asyncio.shield(following)
        except asyncio.CancelledError:
            if following.done():
                raise
            await self._let_go(following)
            raise
        finally:
            if self._session is not None:
                await self._session.close()

    async def _let_go(self, following: asyncio.Task[Outcome]) -> None:
        """The caller went away: leave the worker, or cancel it and wait until that is decided."""
        if self._options.on_cancel == "leave":
            await _end(following)
            if self._worker is not None:
                await self._worker.detach()
            return
        await _end(following)
        self._intent = Intent.ASKED
        deciding = self._loop.create_task(self._follow())
        while not deciding.done():
            try:
                await asyncio.shield(deciding)
            except asyncio.CancelledError:
                continue  # it is bounded (pace.CANCEL): a second cancel does not make it quicker
            except PgbgError as error:
                log = logger.info if isinstance(error, errors.JobCancelled) else logger.error
                log("the job was let go: %s", error)
            else:
                logger.warning("the cancel came too late: job %s is committed", self._work.label)

    # The turn -----------------------------------------------------------------------------------------------------

    async def _follow(self) -> Outcome:
        while True:
            evidence, seen = await self._observe()
            step = judge(evidence)
            if step in OUTCOMES:
                return await self._conclude(step, seen)
            await self._take(step, seen)

    async def _observe(self) -> tuple[Evidence, Sighting | None]:
        """Gather the evidence, in the order that makes it mean something: report, lock, receipt."""
        if self._intent is Intent.NONE and self._seconds_left() == 0:
            self._intent = Intent.DEADLINE
        report = await self._read_report()
        evidence = Evidence(
            carries_receipt=self._work.carries_receipt,
            registered=self._registered,
            report=report,
            sqlstate=self._error.sqlstate if self._error else None,
            intent=self._intent,
            launches_left=LAUNCHES - self._launches,
            rejections_left=REJECTIONS - self._rejections,
            can_verify=self._work.job.verify_sql is not None,
            verified=self._verified,
        )
        if not self._work.carries_receipt:
            marked = await self._ledger.run(lambda conn: markers.find(conn, self._work.marker))
            return replace(
                evidence,
                receipt=Receipt.COMMITTED if self._result else Receipt.NONE,
                holder=Holder.THIS_JOB if marked and report is not Report.NONE else Holder.NOBODY,
                output_blocked=bool(marked) and marked.wait_event == BLOCKED and report is Report.RUNNING,
            ), None
        seen = await self._ledger.look(self._work.key)
        generation = self._generation(seen)
        holder = seen.holder(generation)
        recorded = False
        if holder is Holder.THIS_JOB and report in (Report.NONE, Report.GONE, Report.FAILED):
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
            output_blocked=seen.wait_event == BLOCKED and report is Report.RUNNING,
            lift=self._options.retry_cancelled or seen.cause == "deadline",
        ), seen

    async def _read_report(self) -> Report:
        if self._lost_worker:
            return Report.GONE
        if self._worker is None:
            return Report.NONE
        if self._detached:
            return Report.FAILED if self._error else Report.ENDED
        if not self._worker.ended.done():
            return Report.RUNNING
        self._info = self._worker.ended.result()
        faults.point("after_end")
        if self._info is not None and self._info.has_error and self._error is None:
            self._error = await self._worker.error()
        if self._info is None or (self._info.has_error and self._error is None):
            self._tell("session_lost", "the launching session is lost; following the worker by its lock and receipt")
            self._lost_worker = True
            return Report.GONE
        return Report.FAILED if self._info.has_error else Report.ENDED

    def _generation(self, seen: Sighting) -> int | None:
        if self._registration is not None:
            return self._registration.generation
        return self._work.job.generation if self._work.job.generation is not None else seen.generation

    async def _await_history(self, seen: Sighting) -> Sighting:
        """The launching side of a worker that just ended may be about to write down how."""
        until = self._loop.time() + pace.GRACE
        while seen.outcome is None and seen.receipt is Receipt.NONE and self._loop.time() < until:
            await asyncio.sleep(pace.RETRY_SOONEST)
            seen = await self._ledger.look(self._work.key)
        return seen

    # Steps --------------------------------------------------------------------------------------------------------

    async def _take(self, step: Step, seen: Sighting | None) -> None:
        since = self._since.setdefault(step, self._loop.time())
        for other in [s for s in self._since if s is not step]:
            del self._since[other]
        waited = self._loop.time() - since
        match step:
            case Step.REGISTER:
                await self._register()
            case Step.LAUNCH:
                await self._launch()
            case Step.WAIT:
                await self._wait(waited, seen)
            case Step.WAIT_FOR_SERIES:
                await self._wait_for_series(waited, seen)
            case Step.CLEAR_OLDER:
                await self._clear_older(waited, seen)
            case Step.UNBLOCK:
                await self._unblock()
            case Step.SIGNAL:
                await self._signal(waited, seen)
            case Step.MARK:
                await self._mark()
            case Step.LIFT:
                await self._ledger.lift_cancel(self._work.key)
            case Step.READ_RESULT:
                await self._read_result()
            case Step.VERIFY:
                await self._verify()

    async def _register(self) -> None:
        faults.point("before_register")
        self._registration = registration = await self._ledger.register(
            self._work.key,
            generation=self._work.job.generation,
            label=self._work.label,
            kind=self._work.kind,
            sql_digest=self._work.sql_digest,
            accept_changed_sql=self._options.accept_changed_sql,
        )
        faults.point("after_register")
        if registration.verdict == "reused":
            raise self._reused()
        # A superseded one is seen to be by the next look.
        self._registered = registration.verdict == "registered"
        if registration.sql_changed:
            logger.warning("job %s runs with other SQL than before", self._work.label)

    async def _launch(self) -> None:
        registration = self._registration if self._work.carries_receipt else None
        if registration is not None and not await self._ledger.mark_older(self._work.key, registration.generation):
            return  # a worker of an older generation began in between
        text = self._work.text(self._launcher.schema, registration)
        if not self._work.carries_receipt:
            await self._prepare_session(text)
        self._forget_worker()
        launching = self._launcher.slots.launch(lambda: self._launch_once(text), self._on_slots_used_up)
        try:
            async with asyncio.timeout(self._patience()):
                self._worker = await launching
        except TimeoutError:
            self._intent, self._lost_worker = Intent.DEADLINE, self._launches > 0
            self._waited_for_slot = True
            return
        except MayBeLaunched as error:
            self._lost_worker, self._launch_error = True, error.error
            self._tell("session_lost", "the launch call was lost on its way; a worker may be running")
        except LaunchRefused as error:
            raise await self._refused(error.error) from error.error
        else:
            pid = self._worker.handle.pid
            self._tell("launched", f"launched attempt {registration.attempt if registration else 1}", pid=pid)
        self._launches += 1
        self._registered = False
        faults.point("while_running")
        if self._worker is not None:
            # Most of what a look would tell now it tells better a little later.
            await asyncio.wait({self._worker.ended}, timeout=self._bounded(pace.LOOK_SOONEST))

    def _forget_worker(self) -> None:
        self._worker, self._lost_worker, self._info, self._error = None, False, None, None
        self._detached, self._attached_since, self._verified = False, None, None

    async def _launch_once(self, text: str) -> Worker:
        # A session may end between being chosen and being used.
        for attempt in range(LAUNCHES * 2):
            session = self._session or await self._launcher.session()
            try:
                worker = await session.launch(
                    text,
                    label=self._work.label,
                    queue_size=self._work.job.queue_size,
                    settings=self._work.settings(self._seconds_left()),
                    role=None if self._work.carries_receipt else self._work.job.role,
                )
            except ConnectionLost:
                if self._session is not None:
                    await self._session.close()
                    self._session = await self._launcher.session(exclusive=True)
                await asyncio.sleep(pace.backoff(attempt))
                continue
            worker.ended.add_done_callback(lambda _: self._launcher.slots.freed())
            return worker
        raise errors.ServerUnreachable("every launching session was lost before the launch call")

    def _on_slots_used_up(self, error: SlotsUsedUp) -> None:
        where = {"53400": "this session's table", "53100": "shared memory (/dev/shm)"}.get(
            error.sqlstate or "", "max_worker_processes"
        )
        self._tell("waiting_for_slot", f"waiting for a worker slot: {where} is used up", sqlstate=error.sqlstate)

    async def _wait(self, waited: float, seen: Sighting | None) -> None:
        if self._worker is not None and not self._worker.ended.done():
            age = self._loop.time() - self._worker.launched_at
            # The lock can be free of a worker that was launched and has not begun: look again soon.
            bound = pace.look(age)
            await self._look_at_progress(age)
            await asyncio.wait({self._worker.ended}, timeout=self._bounded(bound))
            return
        if seen is not None and self._attached_since is not None:
            self._tell("attached", "attached to the worker that already runs this job", pid=seen.holder_pid)
        await asyncio.sleep(self._bounded(pace.poll(waited)))

    async def _look_at_progress(self, age: float) -> None:
        if self._options.observer is None or age < pace.LOOK_SOONEST or self._worker is None:
            return
        progress = await self._worker.session.look_at_progress(self._worker)
        if progress is not None and progress != self._worker.progress:
            self._worker.progress = progress
            text = f"{progress.percent} % {progress.message or ''}".strip()
            self._notify("progress", text, percent=progress.percent, message=progress.message)

    async def _wait_for_series(self, waited: float, seen: Sighting | None) -> None:
        assert seen is not None
        if seen.holder(self._generation(seen)) is Holder.STRANGER and waited > pace.STRANGER:
            raise errors.SeriesHeld(
                f"the session with pid {seen.holder_pid} of the role {seen.holder_user!r} holds the advisory lock of the "
                f"series {errors.shorten(self._work.key.series)!r} and is no known worker of {self._work.key.owner!r}",
                job_id=self._work.key.job_id,
                label=self._work.label,
                todo=f"Find out what pid {seen.holder_pid} is, and end it.",
            )
        self._tell("waiting_for_series", "another job holds the series; waiting for it", pid=seen.holder_pid)
        await asyncio.sleep(self._bounded(pace.poll(waited)))

    async def _clear_older(self, waited: float, seen: Sighting | None) -> None:
        assert seen is not None
        if self._options.on_superseded == "wait":
            self._tell("waiting_for_series", "an older generation is at work; waiting for it", pid=seen.holder_pid)
            await asyncio.sleep(self._bounded(pace.poll(waited)))
            return
        self._tell("cancelling", "cancelling the worker of an older generation", pid=seen.holder_pid)
        if waited > pace.CANCEL:
            raise self._survivor(seen, "the worker of an older generation")
        await self._ledger.signal(self._work.key, job_id=seen.holder_job)
        await asyncio.sleep(pace.poll(waited))

    async def _unblock(self) -> None:
        """Nobody reads the worker's output, and it waits for that: let it go on, or end."""
        assert self._worker is not None
        if not self._work.carries_receipt:
            await self._read_result()
            return
        self._error = await self._worker.error()
        self._detached = True
        self._tell("output_blocked", "the worker's output is full and nobody reads it: it is dropped")
        await self._worker.detach()

    async def _signal(self, waited: float, seen: Sighting | None) -> None:
        faults.point("before_cancel")
        self._tell("cancelling", "cancelling the worker", pid=seen.holder_pid if seen else None)
        if waited > pace.CANCEL:
            raise self._survivor(seen, "the worker")
        if self._work.carries_receipt:
            await self._ledger.signal(self._work.key)
        else:
            await self._ledger.run(lambda conn: markers.signal(conn, self._work.marker))
        if (
            waited > pace.LOOK_SOONEST
            and self._worker is not None
            and self._work.carries_receipt
            and not self._detached
        ):
            # One that reports an error into a full queue ends only when it is detached.
            await self._unblock()
        if self._worker is not None and not self._worker.ended.done():
            await asyncio.wait({self._worker.ended}, timeout=pace.poll(waited))
        else:
            await asyncio.sleep(pace.poll(waited))

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
            raise errors.SeriesHeld(
                f"a worker with the same job id is at work (pid {marked.pid}), and a job of kind 'session' cannot be "
                "attached to",
                job_id=self._work.key.job_id,
                label=self._work.label,
                todo="Wait for it to end.",
            )
        if self._session is None or self._session.lost:
            self._session = await self._launcher.session(exclusive=True)
        try:
            self._columns = await self._session.describe(text, self._work.job.role)
        except psycopg.Error as error:
            raise errors.InvalidJob(
                f"the server refuses the statement: {error.diag.message_primary or error}",
                job_id=self._work.key.job_id,
                label=self._work.label,
                sqlstate=error.sqlstate,
            ) from error

    async def _read_result(self) -> None:
        assert self._worker is not None
        try:
            count, tag = await self._worker.session.drain(self._worker, self._columns)
        except ConnectionLost:
            self._lost_worker = True
        except psycopg.errors.DatatypeMismatch:
            self._lost_worker = True  # the result was thrown away with its end: it proves nothing
        except psycopg.Error as error:
            if error.sqlstate == "08006":
                self._lost_worker = True  # said of the worker's connection to this session
            else:
                self._detached, self._error = True, describing.error_fields(error)
        else:
            self._result = (count, tag)

    async def _verify(self) -> None:
        query = self._work.job.verify_sql
        assert query is not None
        marked = await self._ledger.run(lambda conn: markers.find(conn, self._work.marker))
        if marked is not None:
            await asyncio.sleep(pace.LOOK_SOONEST)
            return
        self._verified = await self._ledger.run(lambda conn: describing.verify(conn, query))
        self._proof = "verify_sql"

    # The end ------------------------------------------------------------------------------------------------------

    async def _conclude(self, step: Step, seen: Sighting | None) -> Outcome:
        try:
            if step is Step.COMMITTED:
                return await self._committed(seen)
            await self._failed(step, seen)
        finally:
            if self._worker is not None and not self._detached:
                await self._worker.detach()

    async def _committed(self, seen: Sighting | None) -> Outcome:
        work, info = self._work, self._info
        attempt = seen.receipt_attempt if seen else 1
        own = self._worker is not None and (seen is None or attempt == self._attempt)
        if seen is not None and seen.receipt_sql_digest not in (None, work.sql_digest):
            if not self._options.accept_changed_sql:
                raise self._reused()
            logger.warning("job %s was committed with other SQL than it has now", work.label)
        if own and info is None and not self._detached and self._worker is not None:
            # The commit is visible a little before the worker has ended and its report is there.
            await asyncio.wait({self._worker.ended}, timeout=pace.GRACE)
            info = self._info = self._worker.ended.result() if self._worker.ended.done() else None
        if own and info is not None and not self._detached:
            row_count, tag, finished = info.row_count, info.command_tag, info.finished_at
        elif self._result is not None:
            (row_count, tag), finished = self._result, None
        else:
            seen = await self._await_counts(seen)
            row_count = seen.row_count if seen else None
            tag = seen.command_tag if seen else None
            finished = seen.ended_at if seen else None
        outcome = Outcome(
            job_id=work.key.job_id,
            label=work.label,
            row_count=row_count,
            command_tag=tag or None,
            started_at=seen.receipt_started_at if seen else info.started_at if info else None,
            finished_at=finished,
            worker_pid=seen.receipt_pid if seen else self._worker.handle.pid if self._worker else None,
            attempt=attempt,
            launched=own or (seen is None and self._launches > 0),
            proof=self._proof,
        )
        if own:
            await self._record("committed", outcome.worker_pid, outcome.started_at)
        self._notify(
            "committed",
            f"committed: {tag or 'done'}, {row_count if row_count is not None else 'unknown'} rows"
            + ("" if outcome.launched else " (by an earlier or another launch)"),
            pid=outcome.worker_pid,
        )
        return outcome

    async def _await_counts(self, seen: Sighting | None) -> Sighting | None:
        """The launching side of a worker that this process was attached to writes the counts down after its commit."""
        until = self._loop.time() + pace.COUNTS
        while seen is not None and self._attached_since and seen.outcome is None and self._loop.time() < until:
            await asyncio.sleep(pace.RETRY_SOONEST)
            seen = await self._ledger.look(self._work.key)
        return seen

    async def _failed(self, step: Step, seen: Sighting | None) -> NoReturn:
        fields = self._error
        if step is Step.FAILED and seen is not None and fields is None:
            fields = seen.error  # as the launching side of another process wrote it down
        recorded = {
            Step.FAILED: "failed",
            Step.CANCELLED: "cancelled",
            Step.SUPERSEDED: "cancelled",
            Step.LOST: "lost",
            Step.UNKNOWN: "unknown",
        }[step]
        if self._worker is not None and self._work.carries_receipt:
            started = self._info.started_at if self._info else None
            await self._record(recorded, self._worker.handle.pid, started, fields)
        raise self._error_for(step, seen, fields)

    def _error_for(self, step: Step, seen: Sighting | None, fields: ErrorFields | None) -> PgbgError:
        named: dict[str, Any] = {"job_id": self._work.key.job_id, "label": self._work.label}
        match step:
            case Step.FAILED:
                fields = fields or ErrorFields()
                todo = None
                if fields.sqlstate == "57014":
                    todo = (
                        "Nobody asked this job to end: look for a statement_timeout or pg_background.worker_timeout "
                        "in force, or somebody's pg_cancel_backend."
                    )
                elif fields.sqlstate in ("2D000", "25001"):
                    todo = "SQL that commits or cannot run in a transaction block runs as kind='session'."
                return errors.WorkerError("the SQL failed in its worker", fields=fields, todo=todo, **named)
            case Step.SUPERSEDED:
                newest = seen.newest if seen else None
                return errors.Superseded(f"superseded: generation {newest} of its series is registered", **named)
            case Step.CANCELLED if self._waited_for_slot and not self._launches:
                return errors.NoWorkerSlot(
                    "no worker slot came free in time",
                    sqlstate="53000",
                    todo="Raise max_worker_processes, or run fewer jobs at once.",
                    **named,
                )
            case Step.CANCELLED if self._intent is Intent.DEADLINE:
                return errors.DeadlinePassed("its deadline passed, and its worker has ended", sqlstate="57014", **named)
            case Step.CANCELLED:
                who = f" by {seen.decided_by} ({seen.reason})" if seen and seen.decided_by else ""
                return errors.JobCancelled(
                    f"cancelled{who}",
                    sqlstate="57014",
                    todo="To run it all the same: retry_cancelled=True, or a new generation.",
                    **named,
                )
            case Step.LOST if self._launch_error is not None and self._worker is None:
                return errors.LaunchFailed(
                    f"the launch call failed: {self._launch_error}",
                    sqlstate=getattr(self._launch_error, "sqlstate", None),
                    **named,
                )
            case Step.LOST:
                return errors.WorkerLost(
                    "its worker ended without an error and without a commit: killed, cancelled while it started, or "
                    "ended by a FATAL error such as transaction_timeout",
                    todo="The server's log has the reason. Running it again is safe.",
                    **named,
                )
            case _:
                return errors.OutcomeUnknown(
                    "the launching session was lost while it ran, and this kind of job leaves no receipt",
                    todo="Look whether its work is done; verify_sql lets the job find out by itself.",
                    **named,
                )

    async def _record(
        self, outcome: str, pid: int | None, started: datetime | None, error: ErrorFields | None = None
    ) -> None:
        if not self._work.carries_receipt or self._registration is None:
            return
        faults.point("before_record")
        info = self._info
        try:
            await self._ledger.record(
                self._work.key,
                self._attempt,
                outcome,
                worker_pid=pid,
                started_at=started,
                row_count=info.row_count if info else None,
                command_tag=info.command_tag if info else None,
                error=error,
            )
        except (psycopg.Error, PgbgError) as failure:
            # The history is no proof: what happened to the job is certain without it.
            logger.warning("the history of job %s could not be written: %s", self._work.label, failure)
        faults.point("after_record")

    async def _refused(self, error: psycopg.Error) -> PgbgError:
        fields = describing.error_fields(error)
        named = {"job_id": self._work.key.job_id, "label": self._work.label}
        await self._record("failed", None, None, fields)
        text = f"the launch was refused: {error.diag.message_primary or error}"
        if isinstance(error, psycopg.errors.InsufficientPrivilege):
            facts = await self._launcher.facts()
            grant = facts.extension.grant_statement(facts.login)
            return errors.NoPrivilege(text, sqlstate=error.sqlstate, todo=f"Grant what is missing: {grant}", **named)
        return errors.InvalidJob(text, sqlstate=error.sqlstate, **named)

    # Small things -------------------------------------------------------------------------------------------------

    @property
    def _attempt(self) -> int:
        return self._registration.attempt if self._registration else 1

    def _reused(self) -> PgbgError:
        return errors.JobIdReused(
            "this id stands for other SQL already (another text, or other parameters)",
            job_id=self._work.key.job_id,
            label=self._work.label,
            todo="Give other work another id or generation, or accept the change: accept_changed_sql=True.",
        )

    def _survivor(self, seen: Sighting | None, what: str) -> PgbgError:
        pid = seen.holder_pid if seen else None
        return errors.StillRunning(
            f"{what} (pid {pid}) does not end when it is cancelled: its SQL may catch query_canceled",
            worker_pid=pid,
            job_id=self._work.key.job_id,
            label=self._work.label,
            todo="Wait for it, or have an administrator look at it; a restart of the server ends it for certain.",
        )

    def _find_deadline(self) -> float | None:
        """Return the deadline on the event loop's clock, which no jump of the wall clock moves."""
        bounds = [] if self._job.timeout is None else [self._loop.time() + self._job.timeout]
        if self._options.deadline is not None:
            now = datetime.now(self._options.deadline.tzinfo)
            bounds.append(self._loop.time() + (self._options.deadline - now).total_seconds())
        return min(bounds, default=None)

    def _seconds_left(self) -> float | None:
        return None if self._deadline is None else max(self._deadline - self._loop.time(), 0)

    def _bounded(self, seconds: float) -> float:
        left = self._seconds_left()
        return seconds if left is None or self._intent is not Intent.NONE else min(seconds, left)

    def _patience(self) -> float | None:
        """How long to wait for a slot."""
        bounds = [b for b in (self._seconds_left(), self._options.slot_timeout) if b is not None]
        return min(bounds, default=None)

    def _tell(self, kind: str, message: str, **data: Any) -> None:
        """Tell an event once, however often its step is taken again."""
        if kind not in self._told:
            self._told.add(kind)
            self._notify(kind, message, **data)

    def _notify(self, kind: str, message: str, **data: Any) -> None:
        pid = data.get("pid")
        logger.info("job %s: %s%s", self._work.label, message, f" (pid {pid})" if pid else "")
        if self._options.observer is not None:
            self._options.observer(Event(kind, message, self._work.key.job_id, self._work.label, data))


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
            raise errors.StillRunning(
                f"its worker (pid {seen.holder_pid}) does not end when it is cancelled",
                worker_pid=seen.holder_pid,
                job_id=key.job_id,
                todo="Its SQL may catch query_canceled; wait for it.",
            )
        faults.point("before_cancel")
        await ledger.signal(key)
        faults.point("before_mark")
        await ledger.mark_cancelled(key, cause, reason)


def _is_superseded(seen: Sighting, generation: int | None) -> bool:
    if seen.cause == "superseded":
        return True
    return seen.newest is not None and generation is not None and seen.newest > generation


def _failed_since(seen: Sighting, since: datetime) -> bool:
    return seen.outcome == "failed" and seen.ended_at is not None and seen.ended_at >= since


async def _end(task: asyncio.Task[Any]) -> None:
    """Cancel a task and wait for it; its launch call, if one is on its way, is shielded and ends by itself."""
    task.cancel()
    await asyncio.wait({task})
    if not task.cancelled() and task.exception() is not None:
        logger.debug("ended with %r", task.exception())
