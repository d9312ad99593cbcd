"""Jobs under fire, and those who want them: each retries as an orchestrator would, and checks what it is told."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass
from typing import Any

from tests.chaos.crew import Crew, Hand, bounded
from tests.chaos.report import Report
from tests.chaos.stage import Stage
from tests.core.kit import effect

TRIES = 150
ENDLESS = 40
"""Seconds that a job sleeps which only a cancel is to end."""
AGAIN = {"ProcessKilled", "ServerUnreachable", "WorkerLost", "LaunchFailed", "WorkerError", "StillRunning"}
"""Errors after which a job that is wanted is run again; of others the run makes a note."""
NOTHING_COMMITTED = {"WorkerLost", "LaunchFailed", "WorkerError", "JobCancelled", "Superseded", "DeadlinePassed"}
"""Errors that say so."""


@dataclass(frozen=True)
class Plan:
    """What is to happen to one job; follows from the seed and the job's number alone."""

    name: str
    sql: str
    settings: dict[str, str] | None
    isolation: str | None
    contenders: int
    cancel_after: float | None  # seconds
    cancel_by: str  # 'cancel' from elsewhere, or 'cancel_task' of the call
    wanted_again: bool  # after its cancel
    newer_after: float | None  # seconds until a newer generation is wanted

    @classmethod
    def make(cls, seed: int, number: int, *, fatal: bool = True) -> Plan:
        chance = random.Random(f"{seed}/{number}")
        name = f"j{number}"
        sql = effect(name)
        if chance.random() < 0.1:
            sql += "; select 1 / (random() < 0.6)::int"
        if chance.random() < 0.6:
            sql += f"; select pg_sleep({chance.choice([0, 0.01, 0.05, 0.3, 1])})"
        fate = chance.random()
        cancel = fate < 0.15
        settings = None
        if cancel and chance.random() < 0.4:
            sql += f"; select pg_sleep({ENDLESS})"
        elif fate > 0.8 and chance.random() < 0.5:
            # Every other attempt ends by a FATAL error: "completed", no error, nothing done.
            sql = f"{effect(name)}; select pg_sleep(2 * (random() < 0.4)::int)"
            settings = {"transaction_timeout": "1000"} if fatal else None
        return cls(
            name=name,
            sql=sql,
            settings=settings,
            isolation=chance.choice([None, None, "repeatable read", "serializable"]),
            contenders=chance.choice([1, 1, 1, 2, 3]),
            cancel_after=chance.choice([0, 0.005, 0.02, 0.1, 0.3]) if cancel else None,
            cancel_by=chance.choice(["cancel", "cancel_task"]),
            wanted_again=chance.random() < 0.5,
            newer_after=chance.choice([0, 0.01, 0.05, 0.2]) if fate > 0.92 else None,
        )

    def job(self, generation: int | None = None) -> dict[str, Any]:
        fields = {"sql": self.sql, "isolation": self.isolation, "settings": self.settings}
        if generation is None:
            return {**fields, "id": self.name}
        job_id = f"{self.name}#{generation}"
        sql = ";".join((
            f"insert into spans values ('{self.name}', '{job_id}', clock_timestamp())",
            self.sql if generation == 1 else effect(job_id),
            f"update spans set ended = clock_timestamp() where job = '{job_id}'",
        ))  # fmt: skip
        return {**fields, "sql": sql, "series": self.name, "generation": generation}


class Customer:
    """Wants one job."""

    def __init__(self, plan: Plan, crew: Crew, stage: Stage, report: Report) -> None:
        self._plan = plan
        self._crew = crew
        self._stage = stage
        self._report = report

    async def follow(self) -> None:
        self._report.jobs += 1
        if self._plan.cancel_after is not None:
            await self._cancelled()
        elif self._plan.newer_after is not None:
            await self._superseded(self._plan.newer_after)
        else:
            await self._wanted(self._plan.name, self._plan.job(), contenders=self._plan.contenders)

    # What is told -------------------------------------------------------------------------------------------------

    async def _call(self, hand: Hand, name: str, job: dict[str, Any], **options: Any) -> dict[str, Any]:
        self._report.calls += 1
        hand.jobs.add(name)
        try:
            return self._told(name, await hand.ask("run", job=job, options=options))
        finally:
            hand.jobs.discard(name)

    def _told(self, name: str, answer: dict[str, Any]) -> dict[str, Any]:
        end = "Outcome" if "outcome" in answer else answer["error"]
        self._report.ends[end] += 1
        if end == "ProcessKilled":
            self._report.hit.add(name)
        if end == "Endless":
            self._report.endless.append(f"{name}: {answer}")
        return answer

    async def _check(self, name: str, answer: dict[str, Any], *, alone: bool) -> None:
        """Compare what was told with what is there now."""
        effects = await self._stage.effects(name)
        if "outcome" in answer:
            if effects != 1:
                self._report.false_successes.append(f"{name}: {effects} effects, {answer}")
        elif alone and effects and answer["error"] in NOTHING_COMMITTED:
            self._report.false_failures.append(f"{name}: {answer}")

    # The ways of a job --------------------------------------------------------------------------------------------

    async def _wanted(self, name: str, job: dict[str, Any], *, contenders: int = 1, **options: Any) -> None:
        """Run it until somebody says that it is done."""
        expected = AGAIN | ({"JobCancelled"} if options.get("retry_cancelled") else set())
        answers: list[dict[str, Any]] = []
        for _ in range(TRIES):
            hands = await self._crew.hands(contenders)
            answers = await asyncio.gather(*(self._call(hand, name, job, **options) for hand in hands))
            for answer in answers:
                await self._check(name, answer, alone=contenders == 1)
                if "error" in answer and answer["error"] not in {*expected, "Endless"}:
                    self._report.surprises.append(f"{name}: {answer}")
            if any("outcome" in answer for answer in answers):
                self._stage.expect(name, 1)
                return
            await asyncio.sleep(0.02)
        self._report.lost.append(f"{name}: {TRIES} tries, {answers}")

    async def _cancelled(self) -> None:
        name, job = self._plan.name, self._plan.job()
        hand, *others = await self._crew.hands(2)
        self._report.calls += 1
        tag, future = hand.order("run", job=job, options={})
        running = asyncio.ensure_future(bounded(future))
        await asyncio.sleep(self._plan.cancel_after or 0)
        self._report.faults["job cancelled"] += 1
        self._report.hit.add(name)
        if self._plan.cancel_by == "cancel_task" and hand.alive:
            await hand.ask("cancel_task", of=tag)
        verdict = await self._verdict(others[0] if others else hand)
        answer = self._told(name, await running)
        await self._check(name, answer, alone=True)
        if verdict is None:
            return
        if "outcome" in answer and verdict == "cancelled":
            self._report.false_successes.append(f"{name}: told as done, and cancelled for good")
        # The worker's own error may be seen a moment before the mark that says whose wish it was.
        allowed = {"JobCancelled", "CancelledError", *AGAIN}
        if "error" in answer and answer["error"] not in allowed:
            self._report.surprises.append(f"{name}: {answer}")
        if verdict == "committed" and f"pg_sleep({ENDLESS})" in self._plan.sql:
            self._report.cancels_undone.append(f"{name}: its worker went on to its own end")
        if verdict == "cancelled" and self._plan.wanted_again:
            sql = self._plan.sql.replace(f"pg_sleep({ENDLESS})", "1")
            await self._wanted(name, {**job, "sql": sql}, retry_cancelled=True, accept_changed_sql=True)
        else:
            self._stage.expect(name, int(verdict == "committed"))

    async def _verdict(self, hand: Hand) -> str | None:
        answer: dict[str, Any] = {}
        for _ in range(TRIES):
            answer = self._told(self._plan.name, await hand.ask("cancel", job_id=self._plan.name))
            if "outcome" in answer:
                return str(answer["outcome"])
            if answer["error"] not in AGAIN:
                self._report.surprises.append(f"cancel of {self._plan.name}: {answer}")
            await asyncio.sleep(0.02)
            hand = await self._crew.hand()
        self._report.lost.append(f"cancel of {self._plan.name}: {TRIES} tries, {answer}")
        return None

    async def _superseded(self, after: float) -> None:
        """An older generation, and a newer one that starts in the middle of it."""
        old, new = f"{self._plan.name}#1", f"{self._plan.name}#2"

        async def older() -> None:
            answer = await self._call(await self._crew.hand(), self._plan.name, self._plan.job(1))
            if "outcome" in answer:
                await self._check(self._plan.name, answer, alone=True)
            elif answer["error"] not in {*AGAIN, "Superseded", "Endless"}:
                self._report.surprises.append(f"{old}: {answer}")

        async def newer() -> None:
            await asyncio.sleep(after)
            await self._wanted(new, self._plan.job(2))

        await asyncio.gather(older(), newer())
        self._stage.expect_either(self._plan.name, old)
