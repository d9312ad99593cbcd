"""The server under fire: the database, what is expected of it in the end, and the final count."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable, Iterable
from typing import TypeVar

import psycopg

from pgbg_orchestration.ledger.sighting import SUPERVISES
from tests.chaos.plans import Plan
from tests.chaos.report import Report
from tests.core.kit import APP, Watched

T = TypeVar("T")
AWAY = 60.0
"""Seconds that the server may be away before the harness itself gives up."""
LEFT = 20.0
"""Seconds that workers get to end once everybody has an answer."""
OWN_CRASHES = ("was terminated by signal 11", "was terminated by signal 6", "was terminated by signal 7")
PREPARED = f"""
create index on effects (job);
create table spans (series text, job text primary key, began timestamptz, ended timestamptz);
grant select, insert, update on spans to {APP};
create procedure steps(job text, n int, naps float) language plpgsql as $$
begin
    for i in 1 .. n loop
        insert into effects (job, n) values (job, i);
        commit;
        perform pg_sleep(naps);
    end loop;
end $$;
"""


class Stage:
    """A database whose effects are counted, on a server that is broken again and again."""

    def __init__(self, db: Watched) -> None:
        self.db = db
        self.wanted: dict[str, Plan] = {}  # the jobs that somebody waits for now
        self._proven: set[str] = set()  # jobs whose receipt is written with their work
        self._committing: set[str] = set()  # jobs that commit on their way: one whose worker is killed leaves a part
        self._markers: dict[str, str] = {}
        self._unknowable: set[str] = set()
        self._expected: dict[str, tuple[int, int]] = {}  # how many effects, at least and at most
        self._either: dict[str, str] = {}
        db.sql(PREPARED)

    async def steadily(self, ask: Callable[[], T]) -> T:
        """Ask the server again until it is there."""
        until = time.monotonic() + AWAY
        while True:
            try:
                return ask()
            except psycopg.OperationalError:
                if time.monotonic() > until:
                    raise
            await asyncio.sleep(0.1)

    async def effects(self, name: str) -> int:
        """How many effects of a job there are."""
        return await self.steadily(lambda: self.db.effects(name))

    # Who is there -------------------------------------------------------------------------------------------------

    def begins(self, plan: Plan) -> None:
        """Somebody wants this job from now on."""
        self.wanted[plan.name] = plan
        if plan.kind == "receipt":
            self._proven |= {plan.name, f"{plan.name}#2"}
            return
        if plan.effects > 1:
            self._committing.add(plan.name)
        digest = hashlib.sha256(f"{APP}:{plan.name}".encode()).hexdigest()
        self._markers[f"pgbg:{digest[:12]}:"] = plan.name

    def ends(self, plan: Plan) -> None:
        """Nobody waits for it any more."""
        self.wanted.pop(plan.name, None)

    def job_of(self, application_name: str) -> str | None:
        """The job of a worker, or of the supervisor above it, as far as the name that it bears tells."""
        if application_name.startswith(SUPERVISES):
            return application_name.removeprefix(SUPERVISES)
        return self._markers.get(application_name[:18])

    def lose(self, names: Iterable[str], *, sessions_only: bool = False) -> None:
        """From now on nobody may be able to tell how these jobs end, where they write no receipt of their own.

        Parameters
        ----------
        sessions_only:
            What was broken is the way to the server: a supervisor tells the end all the same.
        """
        plans = [self.wanted[name] for name in names if name in self.wanted]
        self._unknowable |= {plan.name for plan in plans if plan.kind == "session" or not sessions_only}

    def may_be_unknown(self, name: str) -> bool:
        """Whether something was broken that can leave the end of this job unknown."""
        return name in self._unknowable

    # The final count ----------------------------------------------------------------------------------------------

    def expect(self, name: str, effects: int) -> None:
        """In the end a job of this id has so many effects."""
        self._expected[name] = (effects, effects)

    def expect_at_most(self, name: str, effects: int) -> None:
        """In the end a job of this id, which was told to be unknown or to have failed half way, has no more effects."""
        self._expected[name] = (0, effects)

    def expect_either(self, name: str, job_id: str) -> None:
        """In the end this job, whose effects bear ``name``, has one and a receipt, or neither."""
        self._either[name] = job_id

    async def count(self, report: Report) -> None:
        """Compare everything that is there with everything that was told."""
        until = time.monotonic() + LEFT
        while (workers := await self.steadily(self.db.workers)) and time.monotonic() < until:
            await asyncio.sleep(0.1)
        report.orphans += [str(worker) for worker in workers]
        effects = await self.steadily(self.db.effects_by_job)
        receipts = await self.steadily(self.db.receipts)
        twice = "select job, n, count(*) from effects group by job, n having count(*) > 1"
        doubled = await self.steadily(lambda: self.db.sql(twice))
        report.doubled += [str(row) for row in doubled if row[0] not in self._committing & self._unknowable]
        for name, (least, most) in self._expected.items():
            found = effects.pop(name, 0)
            if found < least:
                report.lost.append(f"{name}: {found} effects in the end, {least} expected")
            if found > most == 0:
                report.cancels_undone.append(f"{name}: {found} effects in the end")
            if name in self._proven and (found > 0) != (name in receipts):
                report.without_receipt.append(f"{name}: {found} effects, receipt: {name in receipts}")
        for name, job_id in self._either.items():
            found = effects.pop(name, 0)
            if (found > 0) != (job_id in receipts):
                report.without_receipt.append(f"{job_id}: {found} effects, receipt: {job_id in receipts}")
        report.surprises += [f"{name}: {found} effects that nobody speaks of" for name, found in effects.items()]
        overlaps = (
            "select a.job, b.job from spans a join spans b"
            " on a.series = b.series and a.job < b.job and a.began < b.ended and b.began < a.ended"
        )
        report.overlaps += [str(row) for row in await self.steadily(lambda: self.db.sql(overlaps))]
        report.crashes += [line for line in self.db.server.log().splitlines() if any(o in line for o in OWN_CRASHES)]
