"""What one call knows of its job besides what it sees: its launches, its intent, its deadline, whom it told what."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import psycopg

from pgbg_orchestration.job import Kind
from pgbg_orchestration.ledger.sighting import Registration, Sighting
from pgbg_orchestration.options import Options
from pgbg_orchestration.outcome import Cause, ErrorFields, Event, EventKind
from pgbg_orchestration.postgres import describe
from pgbg_orchestration.postgres.connection import ConnectionLost
from pgbg_orchestration.postgres.describe import Readable
from pgbg_orchestration.postgres.pg_background import ResultInfo
from pgbg_orchestration.postgres.session import LaunchingSession, MayBeLaunched, Worker
from pgbg_orchestration.testing import faults
from pgbg_orchestration.verdict import Intent, Report

from .work import Work

logger = logging.getLogger("pgbg_orchestration")

NO_SLOT_FOR_WORKER = "PB004"  # a supervisor that found no slot for its worker, and left its own


@dataclass(slots=True)
class Launch:
    """The launch that this call made last, as its handle tells of it."""

    call: asyncio.Task[Worker] | None = None
    worker: Worker | None = None
    lost: bool = False  # its handle; the worker may be at work
    info: ResultInfo | None = None
    error: ErrorFields | None = None
    detached: bool = False  # on purpose, since its output was blocked
    seen: bool = False  # its worker, at work, by its marker
    reading: asyncio.Task[tuple[int | None, str | None]] | None = None  # of the result, to its end
    result: tuple[int | None, str | None] | None = None  # row count and command tag: read to its end

    @property
    def report(self) -> Report:
        """What the handle tells, as far as it was read."""
        if self.lost:
            return Report.GONE
        if self.worker is None:
            return Report.NONE
        if self.error is not None:
            return Report.FAILED
        if self.info is not None or self.detached or self.result is not None:
            return Report.ENDED
        return Report.RUNNING

    @property
    def may_begin(self) -> bool:
        """Whether the worker of a lost handle may begin yet: it was not seen at work, nor to have ended."""
        return self.lost and self.info is None and not self.seen

    async def read(self) -> None:
        """Read the handle's report, when the worker has ended since the last time."""
        if self.reading is not None and self.reading.done():
            self._take_over_reading(self.reading)
        if self.reading is not None or self.report is not Report.RUNNING:
            return
        if self.worker is None or not self.worker.ended.done():
            return
        self.info = self.worker.ended.result()
        faults.point("after_end")
        if self.info is not None and self.info.has_error:
            self.error = await self.worker.error()
        self.lost = self.info is None or (self.info.has_error and self.error is None)

    def _take_over_reading(self, reading: asyncio.Task[tuple[int | None, str | None]]) -> None:
        self.reading = None
        try:
            self.result = reading.result()
        except (ConnectionLost, asyncio.CancelledError):
            self.lost = True
        except psycopg.Error as error:
            # 08006 is said of the worker's connection to this session. Class 42, and what lacks the context that a
            # worker's error has, is about our own call: thrown away before its end, the result proves nothing.
            if error.sqlstate == "08006" or (error.sqlstate or "").startswith("42") or not error.diag.context:
                self.lost = True
            else:
                self.error = describe.error_fields(error)

    async def stop_reading(self) -> None:
        """Break the reading of the result off; the worker goes on without its handle."""
        if self.reading is not None:
            self.reading.cancel()
            await asyncio.wait({self.reading})
            self._take_over_reading(self.reading)

    async def end_call(self, *, patient: bool) -> asyncio.Task[Worker] | None:
        """Take over what came of a launch call; returns the call when it is still on its way and nobody waits.

        Parameters
        ----------
        patient:
            Wait for the call. Without that a stalled one is left behind.
        """
        call = self.call
        if call is None:
            return None
        if patient:
            await asyncio.wait({call})
        self.call = None  # not before: cancelled in that wait, it has to be found here again
        if not call.done():
            return call
        if call.exception() is None:
            self.worker = call.result()
        self.lost = isinstance(call.exception(), MayBeLaunched)
        return None


@dataclass
class Case:
    """One job, as one call for it knows it.

    Attributes
    ----------
    registration, registered:
        The last registration, and whether the launch that comes next is registered.
    launches, relaunches, rejections, slot_misses:
        The numbers of the attempts that may have started a worker; how many of them came after one that was lost; how
        many workers were turned away in a row while nobody was seen to hold the lock; how many supervisors found no
        second slot.
    paired:
        This job counts as one that needs two slots.
    stray, gave_up:
        A handle was lost or let go, so its worker may begin at any time; the job was marked, so that it cannot.
    first_look:
        What this call saw of the job first.
    attached_since:
        Since when a worker of this job was seen that somebody else launched, on the server's clock.
    session, readable, last_marked, verified, verified_of:
        Of the kinds without a receipt: the session of its own, how the statement's result is read, when its worker was
        last seen (on the event loop's clock), what verify_sql said, and of which claim: its attempt, and whether its
        worker might begin.
    worker_pid:
        The process that runs the job's SQL, as the last look saw it.
    """

    work: Work
    options: Options
    deadline: float | None  # on the event loop's clock, which no jump of the wall clock moves
    intent: Intent = Intent.NONE
    cause: Cause = Cause.INTERRUPTED  # of the cancel, once the caller has gone away
    registration: Registration | None = None
    registered: bool = False
    launch: Launch = field(default_factory=Launch)
    launches: list[int] = field(default_factory=list)
    relaunches: int = 0
    rejections: int = 0
    slot_misses: int = 0
    slot_missing: bool = False
    paired: bool = False
    stray: bool = False
    gave_up: bool = False
    launch_error: BaseException | None = None
    first_look: Sighting | None = None
    attached_since: datetime | None = None
    session: LaunchingSession | None = None
    readable: Readable | None = None
    last_marked: float = 0.0
    verified: bool | None = None
    verified_of: tuple[int | None, bool] | None = None
    worker_pid: int | None = None
    told: set[str] = field(default_factory=set)

    @property
    def is_at_work(self) -> bool:
        """Whether a worker of the job may be at work, as far as this call knows."""
        worker = self.launch.worker
        return (worker is not None and not worker.ended.done()) or self.attached_since is not None

    @property
    def attempt(self) -> int:
        """The number of the last launch, from 1."""
        return self.registration.attempt if self.registration else max(len(self.launches), 1)

    @property
    def found_no_slot(self) -> bool:
        """Whether the last launch was a supervisor's that launched nothing, for want of a second slot."""
        error = self.launch.error
        # SQL of the user's can raise this code too, and does so in a worker of its own.
        return self.work.kind is Kind.SUPERVISED and error is not None and error.sqlstate == NO_SLOT_FOR_WORKER

    def generation(self, seen: Sighting) -> int | None:
        """Return the job's generation, as far as it is known yet."""
        if self.registration is not None:
            return self.registration.generation
        return seen.generation if self.work.job.generation is None else self.work.job.generation

    def is_superseded(self, seen: Sighting) -> bool:
        """Say whether a newer generation of the series is registered."""
        generation = self.generation(seen)
        if seen.cause is Cause.SUPERSEDED:
            return True
        return seen.newest is not None and generation is not None and seen.newest > generation

    def lifts(self, seen: Sighting) -> bool:
        """Say whether this call takes the job's cancel back: one from before it, where its caller wants that."""
        # The very one that it saw first: by comparing times, a clock that is set back would make a new one an old one.
        before = self.first_look is not None and seen.decided_at == self.first_look.decided_at
        if seen.is_provisional:
            return True
        # What this very try made final, before it was taken up elsewhere, stays so.
        own = self.options.of_try is not None and seen.of_try == self.options.of_try
        return before and not own and self.options.takes_back(seen.cause)

    # Time ---------------------------------------------------------------------------------------------------------

    def seconds_left(self) -> float | None:
        """Return the seconds until the deadline, 0 after it, None without one."""
        if self.deadline is None:
            return None
        return max(self.deadline - asyncio.get_running_loop().time(), 0)

    def bounded(self, seconds: float) -> float:
        """Return ``seconds``, or what is left until the deadline."""
        left = self.seconds_left()
        return seconds if left is None or self.intent is not Intent.NONE else min(seconds, left)

    def patience_for_slot(self) -> float | None:
        """Return for how many seconds to wait for a worker slot; None: without a bound of the user's."""
        bounds = [bound for bound in (self.seconds_left(), self.options.slot_timeout) if bound is not None]
        return min(bounds, default=None)

    def may_wait_for_history(self, until: float) -> bool:
        """Say whether to wait for what others may write down: not when this process ends the job itself."""
        return self.intent is Intent.NONE and asyncio.get_running_loop().time() < until

    # Telling ------------------------------------------------------------------------------------------------------

    def tell_once(self, kind: EventKind, message: str, **data: Any) -> None:
        """Tell an event, however often its step is taken, once."""
        if kind not in self.told:
            self.told.add(kind)
            self.tell(kind, message, **data)

    def tell(self, kind: EventKind, message: str, **data: Any) -> None:
        """Tell the log and the caller's observer, whose faults are no fault of the job's."""
        pid = data.get("pid")
        logger.info("job %s: %s%s", self.work.label, message, f" (pid {pid})" if pid else "")
        if self.options.observer is None:
            return
        try:
            self.options.observer(Event(kind, message, self.work.key.job_id, self.work.label, data))
        except Exception:
            logger.exception("the observer of job %s failed", self.work.label)


def deadline_of(timeout: float | None, deadline: datetime | None) -> float | None:
    """Return the earlier of the two on the event loop's clock: ``timeout`` seconds from now, and the moment given."""
    now = asyncio.get_running_loop().time()
    bounds = [] if timeout is None else [now + timeout]
    if deadline is not None:
        bounds.append(now + (deadline - datetime.now(deadline.tzinfo)).total_seconds())
    return min(bounds, default=None)
