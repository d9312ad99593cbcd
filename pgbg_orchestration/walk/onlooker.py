"""How far the jobs of one process are, told to those who follow them: one query at a time for all of them.

Of a job is told: whom it waits for; else what its own SQL reports (``pg_background_report_progress``); else how far its
command is, as the server shows it; else that it waits for a standby or a page; else which statement is at work. A line
comes when something changes, at a pace that a log can bear.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import psycopg

from pgbg_orchestration import pace, phrases
from pgbg_orchestration.errors import PgbgError
from pgbg_orchestration.ledger.ledger import Ledger
from pgbg_orchestration.outcome import EventKind
from pgbg_orchestration.postgres import activity, markers
from pgbg_orchestration.postgres.activity import Activity, Blocker
from pgbg_orchestration.postgres.handles import HandleSession, Worker
from pgbg_orchestration.postgres.pg_background import Progress

from . import location
from .case import Case

if TYPE_CHECKING:
    from collections.abc import Sequence

logger = logging.getLogger("pgbg_orchestration")
POINTS = 10  # a percentage is told again after so many points
AGAIN = 10.0  # or after so many seconds, if it moved at all
STILL = 30.0  # that a job waits is told again after so many seconds
NAMED = 3  # blockers that are named
HIDDEN = "<insufficient privilege>"  # what the server gives for another login's query
WAITS = {"SyncRep": "a synchronous standby", "BufferPin": "a page that another session holds"}


@dataclass(slots=True)
class Remark:
    """A line that may be told of a job; ``about`` is the same for lines that differ in their numbers only."""

    kind: EventKind
    about: str
    message: str
    percent: int | None = None
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Subject:
    """A job that somebody follows, and what was told of it last."""

    case: Case
    since: float
    last: Remark | None = None
    last_at: float = 0.0
    began: tuple[str, float, int] | None = None  # what its command counts, since when, and the count at that time

    def is_news(self, line: Remark, now: float) -> bool:
        """Say whether to tell a line now: the longer a job runs, the fewer lines."""
        if self.last is None:
            return True
        age, silence = now - self.since, now - self.last_at
        if silence < pace.SHARE / 2 * age:
            return False
        if line.about != self.last.about:
            return True
        if line.kind is EventKind.BLOCKED:
            return silence >= max(STILL, age / 2)
        if line.percent is None or line.percent == self.last.percent:
            return False
        return abs(line.percent - (self.last.percent or 0)) >= POINTS or silence >= max(AGAIN, pace.SHARE * age)

    def seconds_left(self, what: str, done: int, total: int, now: float) -> float | None:
        """Estimate the seconds to the end of what is being counted, by its speed since the first look at it."""
        if self.began is None or self.began[0] != what or done < self.began[2]:
            self.began = (what, now, done)
        _, since, first = self.began
        if now - since < pace.LOOK_SOONEST or done <= first:
            return None
        return (total - done) * (now - since) / (done - first)


class Onlooker:
    """Looks at the workers of all jobs that somebody follows, for as long as there are any.

    Parameters
    ----------
    ledger:
        Over whose connection.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._subjects: dict[int, Subject] = {}
        self._views: Sequence[str] | None = None
        self._looking: asyncio.Task[None] | None = None

    def add(self, case: Case) -> None:
        """Begin to tell of a job, where somebody listens."""
        if case.options.observer is None:
            return
        self._subjects[id(case)] = Subject(case, asyncio.get_running_loop().time())
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._look_while_watched())

    def leave(self, case: Case) -> None:
        """Tell no more of a job."""
        self._subjects.pop(id(case), None)

    async def close(self) -> None:
        """Stop looking."""
        self._subjects.clear()
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.wait({self._looking})

    async def _look_while_watched(self) -> None:
        loop = asyncio.get_running_loop()
        failures = 0
        while self._subjects:
            now = loop.time()
            pause = min(pace.look(now - w.since, w.case.options.poll_interval) for w in self._subjects.values())
            await asyncio.sleep(pause)
            try:
                await self._look([w for w in self._subjects.values() if w.case.is_at_work])
                failures = 0
            except (psycopg.Error, OSError, PgbgError) as error:
                # No outcome depends on it, and server and privileges may be back by the next look.
                failures += 1
                if failures == 1:
                    logger.warning("how far jobs are cannot be told now (%s)", error)
                await asyncio.sleep(pace.backoff(failures))

    async def _look(self, subjects: list[Subject]) -> None:
        if not subjects:
            return
        progress, activities = await asyncio.gather(self._progress(subjects), self._activities(subjects))
        now = asyncio.get_running_loop().time()
        for one in subjects:
            if id(one.case) not in self._subjects:
                continue  # it has ended meanwhile
            line = _line(one, progress.get(id(one.case)), activities.get(id(one.case)), now)
            if line is not None and one.is_news(line, now):
                one.last, one.last_at = line, now
                one.case.tell(line.kind, line.message, percent=line.percent, **line.data)

    async def _activities(self, subjects: list[Subject]) -> dict[int, Activity]:
        """Return what the workers are at, by the ``id`` of their cases; several may be attached to one worker."""
        by_pid: dict[int, list[int]] = defaultdict(list)
        by_name: dict[str, list[int]] = defaultdict(list)
        for one in subjects:
            if one.case.worker_pid is not None:
                by_pid[one.case.worker_pid].append(id(one.case))
            elif one.case.work.is_marked:
                by_name[one.case.work.marker].append(id(one.case))
        if not by_pid and not by_name:
            return {}
        if self._views is None:
            self._views = await self._ledger.run(activity.views_of)
        views = self._views
        activities = await self._ledger.run(lambda conn: activity.look(conn, views, [*by_pid], [*by_name]))
        return {
            case: one
            for one in activities
            for case in by_pid.get(one.pid) or by_name.get((one.name or "")[: markers.LENGTH]) or ()
        }

    async def _progress(self, subjects: list[Subject]) -> dict[int, Progress]:
        """Return what the workers reported of their progress, by the ``id`` of their cases."""
        by_session: dict[HandleSession, dict[Worker, int]] = defaultdict(dict)
        for one in subjects:
            worker = one.case.worker
            if worker is not None and not worker.end.done() and not worker.session.is_busy:
                by_session[worker.session][worker] = id(one.case)
        progress_of: dict[int, Progress] = {}
        for session, workers in by_session.items():
            for worker, progress in (await session.look_at_progress([*workers])).items():
                progress_of[workers[worker]] = progress
        return progress_of


def _line(subject: Subject, reported: Progress | None, seen: Activity | None, now: float) -> Remark | None:
    redact = subject.case.work.job.redact_details
    if seen is not None and seen.blockers:
        return _blocked(seen, redact=redact)
    of = len(subject.case.work.statements)
    number = location.number_in_progress(reported.message, of) if reported is not None and of > 1 else None
    if reported is not None and number is None:
        text = f"{reported.percent} % {reported.message or ''}".strip()
        return Remark(EventKind.PROGRESS, f"reported {reported.message}", text, reported.percent)
    if seen is not None and seen.command is not None:
        return _command(subject, seen, now)
    if seen is not None and seen.wait_event in WAITS:
        text = f"waits for {WAITS[seen.wait_event]} ({seen.wait_event})"
        return Remark(EventKind.BLOCKED, text, text, data={"pid": seen.pid})
    if number is None or subject.case.reading is not None:  # read with its output, the number is told there
        return None
    text = location.progress_text(number, of)
    return Remark(EventKind.PROGRESS, text, text, data={"statement": number, "of": of})


def _command(subject: Subject, seen: Activity, now: float) -> Remark:
    command = seen.command
    assert command is not None
    about = ", ".join(part for part in (command.name, command.phase) if part)
    text = about
    data: dict[str, Any] = {"command": command.name, "phase": command.phase, "seconds_left": None}
    if command.percent is not None and command.done is not None and command.total is not None:
        text = f"{about}: {command.percent} %"
        left = subject.seconds_left(about, command.done, command.total, now)
        if left is not None:
            data["seconds_left"] = round(left)
            text += f", about {phrases.roughly(left)} left of this phase"
    return Remark(EventKind.PROGRESS, about, text, command.percent, data)


def _blocked(seen: Activity, *, redact: bool) -> Remark:
    waited = "" if seen.waited is None else f" for {phrases.roughly(seen.waited)}"
    names = [_blocker(blocker, redact=redact) for blocker in seen.blockers[:NAMED]]
    more = len(seen.blockers) - NAMED
    if more > 0:
        names.append(f"{more} more")
    about = f"waits for {sorted(blocker.pid for blocker in seen.blockers)}"
    data = {"pid": seen.pid, "blockers": [blocker.pid for blocker in seen.blockers]}
    return Remark(EventKind.BLOCKED, about, f"its worker waits{waited} for a lock of {'; '.join(names)}", data=data)


def _blocker(blocker: Blocker, *, redact: bool) -> str:
    if blocker.pid == 0:
        return "a prepared transaction (pg_prepared_xacts names it)"
    parts = [f"user {blocker.user_name}" if blocker.user_name else "", blocker.application or "", blocker.state or ""]
    if blocker.seconds is not None:
        parts.append(f"in its transaction for {phrases.roughly(blocker.seconds)}")
    if blocker.query == HIDDEN:
        parts.append("its query is not visible to this login")
    named = f"pid {blocker.pid} ({', '.join(part for part in parts if part)})"
    if blocker.query and blocker.query != HIDDEN and not redact:
        named += f": {blocker.query}"
    return named
