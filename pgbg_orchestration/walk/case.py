"""One job, as one call for it drives it: its work, what is remembered, its worker, the time that is left."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from pgbg_orchestration import pace
from pgbg_orchestration.call_options import Options
from pgbg_orchestration.outcome import Cause, Event, EventKind
from pgbg_orchestration.postgres.connection import break_off
from pgbg_orchestration.postgres.describe import Readable
from pgbg_orchestration.postgres.handles import Nudge, Worker
from pgbg_orchestration.postgres.launch_message import Begun, Opening
from pgbg_orchestration.postgres.session import LaunchingSession
from pgbg_orchestration.verdict import Intent

from . import location
from .memory import Memory, Terms
from .streamed_rows import Feed
from .worker_sql import Work

logger = logging.getLogger("pgbg_orchestration")


@dataclass
class Case:
    """One job, as one call for it drives it.

    Attributes
    ----------
    terms, memory:
        What was asked for, and what is remembered: with a look, all that the evidence depends on.
    cause:
        Why the job is cancelled, once the caller has gone away.
    attempts:
        The numbers of the launches that may have started a worker.
    opening:
        The one message that registers and launches, if that was tried.
    nudge:
        Ends a wait of this call early, after a hint about the job.
    call, worker, reading:
        The launch call on its way; the last worker; the task that reads its result to the end.
    text, statement, failure:
        What was launched last; the number of the statement at work, as its worker last told it; where it failed.
    call_forgotten:
        A launch call was left without its answer. A worker of it is turned away, or leaves a receipt.
    launch_error:
        Why the last launch call failed on its way.
    slot_deadline, waited_for_slot, slots:
        Until when to wait for a worker slot, fixed at the first wait; whether the launch waits for one, or did when its
        time was up; how many slots this job has taken its turn for, where it needs several.
    session, readable, last_sign, last_notice:
        Where the result is read (a kind without a receipt, or notices that are asked for): the job's own session; how
        it is read; when the worker was last seen at work, and when it last raised something (event loop's clock).
    feed:
        Where the rows of a streamed job come out.
    worker_pid:
        The process that runs the job's SQL, as the last look showed it.
    limits:
        The timeouts in force for the SQL, in seconds by name.
    events:
        Which of the events that are told only once were told.
    has_other_sql:
        The SQL is not the one that was first registered; the caller accepts that, and was warned.
    way_out:
        Until when the end has to be decided, once this call wants it (event loop's clock).
    """

    work: Work
    options: Options
    terms: Terms
    memory: Memory = field(default_factory=Memory)
    cause: Cause = Cause.INTERRUPTED
    attempts: list[int] = field(default_factory=list)
    call: asyncio.Future[Worker] | asyncio.Future[Begun] | None = None
    opening: Opening | None = None
    worker: Worker | None = None
    reading: asyncio.Task[tuple[int | None, str | None]] | None = None
    text: str = ""
    statement: int | None = None
    failure: location.ErrorPlace = field(default_factory=location.ErrorPlace)
    call_forgotten: bool = False
    launch_error: BaseException | None = None
    slot_deadline: float | None = None
    waited_for_slot: bool = False
    slots: int = 0
    feed: Feed | None = None
    session: LaunchingSession | None = None
    readable: Readable | None = None
    last_sign: float = 0.0
    last_notice: float = 0.0
    worker_pid: int | None = None
    limits: Mapping[str, float] = field(default_factory=dict)
    way_out: float | None = None
    nudge: Nudge = field(default_factory=Nudge)
    events: set[EventKind] = field(default_factory=set)
    has_other_sql: bool = False

    @property
    def attempt(self) -> int:
        """The number of the launch that comes next, or of the last one, from 1."""
        if self.memory.registration is not None:
            return self.memory.registration.attempt
        return self.attempts[-1] if self.attempts else 1

    @property
    def is_at_work(self) -> bool:
        """Whether a worker of the job may be at work, as far as this call knows."""
        running = self.worker is not None and not self.worker.end.done()
        return running or self.memory.attached_since is not None

    # Time -----------------------------------------------------------------------------------------------------------

    def seconds_left(self) -> float | None:
        """Return the seconds until the deadline, 0 after it, None without one."""
        if self.terms.deadline is None:
            return None
        return max(self.terms.deadline - asyncio.get_running_loop().time(), 0)

    def patience(self) -> float:
        """Return how many seconds may be spent on what is not needed for the outcome, only for telling more of it."""
        if self.way_out is None:
            return pace.CALL
        return min(max(self.way_out - asyncio.get_running_loop().time(), 0), pace.CALL)

    def bounded(self, seconds: float) -> float:
        """Return ``seconds``, or what is left until the deadline."""
        left = self.seconds_left()
        return seconds if left is None or self.memory.intent is not Intent.NONE else min(seconds, left)

    # Telling --------------------------------------------------------------------------------------------------------

    def tell_once(self, kind: EventKind, message: str, **data: Any) -> None:
        """Tell an event the first time only, however often its step is taken."""
        if kind not in self.events:
            self.events.add(kind)
            self.tell(kind, message, **data)

    def tell(self, kind: EventKind, message: str, *, level: int = logging.INFO, **data: Any) -> None:
        """Tell the log and the caller's observer; an error that the observer raises is logged."""
        pid = data.get("pid")
        logger.log(level, "job %s: %s%s", self.work.label, message, f" (pid {pid})" if pid else "")
        if self.options.observer is None:
            return
        try:
            self.options.observer(Event(kind, message, self.work.key.job_id, self.work.label, data))
        except Exception:
            logger.exception("the observer of job %s failed", self.work.label)


_ALL: frozenset[Cause | None] = frozenset((None, *Cause))


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
            takes_back=_ALL if options.retry_cancelled is True else frozenset(filter(options.takes_back, _ALL)),
            of_try=options.of_try,
            deadline=deadline,
            adds_supervisor=work.adds_supervisor,
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
    """Cancel a task, now or at a time of the event loop's clock, and wait until it has ended."""
    if at is not None:
        await asyncio.wait({task}, timeout=max(at - asyncio.get_running_loop().time(), 0))
    await break_off([task])
    if not task.cancelled():
        task.exception()  # asked for here, so that asyncio does not log it where nobody else does


async def first_of(end: asyncio.Future[Any] | None, nudge: Nudge, pause: float) -> None:
    """Wait for an end, a nudge, or so many seconds, whichever is first."""
    if nudge.is_set() or (end is not None and end.done()):
        nudge.clear()
        return
    loop = asyncio.get_running_loop()
    woken = loop.create_future()

    def wake(_: object = None) -> None:
        if not woken.done():
            woken.set_result(None)

    timer = loop.call_later(pause, wake) if math.isfinite(pause) else None
    nudge.call = wake
    if end is not None:
        end.add_done_callback(wake)
    try:
        await woken
    finally:
        nudge.call = None
        if timer is not None:
            timer.cancel()
        if end is not None:
            end.remove_done_callback(wake)
    nudge.clear()
