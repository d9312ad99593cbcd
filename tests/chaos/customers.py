"""Those who want jobs under fire: each retries as an orchestrator would, and checks what it is told."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pgbg_orchestration.errors import NOT_STARTED, ROLLED_BACK
from tests.chaos.crew import Crew, Hand, bounded
from tests.chaos.plans import ENDLESS, Plan
from tests.chaos.report import Report
from tests.chaos.stage import Stage

TRIES = 150
AGAIN = {"ProcessKilled", "ServerUnreachable", "WorkerLost", "LaunchFailed", "WorkerError", "StillRunning"}
"""Errors after which a job that is wanted is run again; of others the run makes a note."""
UNKNOWN = "OutcomeUnknown"
NOTHING_COMMITTED = (ROLLED_BACK, NOT_STARTED)
"""What errors say of the data that is to be true."""


class Customer:
    """Wants one job, whose kind is ``receipt``."""

    def __init__(self, plan: Plan, crew: Crew, stage: Stage, report: Report, chance: random.Random) -> None:
        self.plan = plan
        self.crew = crew
        self.stage = stage
        self.report = report
        self.chance = chance

    async def follow(self) -> None:
        """Have the job done, cancelled or superseded, as it is planned."""
        self.report.jobs[self.plan.kind] += 1
        self.stage.begins(self.plan)
        try:
            await self.want()
        finally:
            self.stage.ends(self.plan)

    async def want(self) -> None:
        plan = self.plan
        if plan.cancel_after is not None:
            await self._cancelled(plan.cancel_after)
        elif plan.newer_after is not None:
            await self._superseded(plan.newer_after)
        else:
            await self._wanted(plan.name, plan.job())

    # What is told -------------------------------------------------------------------------------------------------

    async def call(self, hand: Hand, job: dict[str, Any], **options: Any) -> dict[str, Any]:
        """Have a process run the job, and return what it told."""
        self.report.calls += 1
        hand.jobs.add(self.plan.name)
        try:
            return self.told(await hand.ask("run", job=job, options=options))
        finally:
            hand.jobs.discard(self.plan.name)

    def told(self, answer: dict[str, Any]) -> dict[str, Any]:
        """Take note of an answer."""
        end = "Outcome" if "outcome" in answer else answer["error"]
        self.report.ends[end] += 1
        if end == "ProcessKilled":
            self.report.hit.add(self.plan.name)
        if end == "Endless":
            self.report.endless.append(f"{self.plan.name}: {answer}")
        return answer

    async def check(self, answer: dict[str, Any], *, alone: bool = True) -> int:
        """Compare what was told with the effects that are there now, and return how many there are."""
        effects = await self.stage.effects(self.plan.name)
        if "outcome" in answer:
            if effects < self.plan.effects:
                self.report.false_successes.append(f"{self.plan.name}: {effects} effects, {answer}")
        elif alone and effects and answer["data_state"] in NOTHING_COMMITTED:
            self.report.false_failures.append(f"{self.plan.name}: {effects} effects, {answer}")
        return effects

    def surprised(self, answer: dict[str, Any], expected: Sequence[str] | set[str]) -> None:
        """Take note of an error that nobody expects."""
        if "error" in answer and answer["error"] not in {*expected, "Endless"}:
            self.report.surprises.append(f"{self.plan.name}: {answer}")

    # The ways of a job --------------------------------------------------------------------------------------------

    async def _wanted(self, job_id: str, job: dict[str, Any], **options: Any) -> None:
        """Run it until somebody says that it is done."""
        expected = AGAIN | ({"JobCancelled"} if options.get("retry_cancelled") else set())
        answers: list[dict[str, Any]] = []
        for _ in range(TRIES):
            hands = await self.crew.hands(self.plan.contenders, self.chance)
            answers = await asyncio.gather(*(self.call(hand, job, **options) for hand in hands))
            for answer in answers:
                await self.check(answer, alone=self.plan.contenders == 1)
                self.surprised(answer, expected)
            if any("outcome" in answer for answer in answers):
                self.stage.expect(job_id, 1)
                return
            await asyncio.sleep(0.02)
        self.report.lost.append(f"{job_id}: {TRIES} tries, {answers}")

    async def _cancelled(self, after: float) -> None:
        job = self.plan.job()
        hand, *others = await self.crew.hands(2, self.chance)
        self.report.calls += 1
        tag, future = hand.order("run", job=job, options={})
        running = asyncio.ensure_future(bounded(future))
        await asyncio.sleep(after)
        if self.plan.cancel_by == "cancel_task" and hand.alive:
            await hand.ask("cancel_task", of=tag)
        verdict = await self.cancel(others[0] if others else hand)
        answer = self.told(await running)
        await self.check(answer)
        if verdict is None:
            return
        if "outcome" in answer and verdict == "cancelled":
            self.report.false_successes.append(f"{self.plan.name}: told as done, and cancelled for good")
        # The worker's own error may be seen a moment before the mark that says whose wish it was.
        self.surprised(answer, {"JobCancelled", "CancelledError", *AGAIN})
        if verdict == "committed" and f"pg_sleep({ENDLESS})" in self.plan.sql:
            self.report.cancels_undone.append(f"{self.plan.name}: its worker went on to its own end")
        if verdict == "cancelled" and self.plan.wanted_again:
            sql = self.plan.sql.replace(f"pg_sleep({ENDLESS})", "1")
            self.plan = replace(self.plan, contenders=1)
            await self._wanted(self.plan.name, {**job, "sql": sql}, retry_cancelled=True, accept_changed_sql=True)
        else:
            self.stage.expect(self.plan.name, int(verdict == "committed"))

    async def cancel(self, hand: Hand) -> str | None:
        """Cancel the job until somebody says how it ended; None where nobody can."""
        self.report.cancels += 1
        answer: dict[str, Any] = {}
        for _ in range(TRIES):
            answer = self.told(await hand.ask("cancel", job_id=self.plan.name))
            if "outcome" in answer:
                return str(answer["outcome"])
            if answer["error"] == UNKNOWN:
                self.unknown(answer)
                return None
            self.surprised(answer, AGAIN)
            await asyncio.sleep(0.02)
            (hand,) = await self.crew.hands(1, self.chance)
        self.report.lost.append(f"cancel of {self.plan.name}: {TRIES} tries, {answer}")
        return None

    def unknown(self, answer: dict[str, Any]) -> None:
        """Take note that nobody can tell how the job ended, which is true of some jobs only."""
        self.report.unknown[self.plan.kind] += 1
        self.stage.expect_at_most(self.plan.name, self.plan.effects)
        if not self.stage.may_be_unknown(self.plan.name):
            self.report.false_unknowns.append(f"{self.plan.name}: {answer}")

    async def _superseded(self, after: float) -> None:
        """An older generation, and a newer one that starts in the middle of it."""
        old, new = f"{self.plan.name}#1", f"{self.plan.name}#2"

        async def older() -> None:
            (hand,) = await self.crew.hands(1, self.chance)
            answer = await self.call(hand, self.plan.job(1))
            if "outcome" in answer:
                await self.check(answer)
            self.surprised(answer, {*AGAIN, "Superseded"})

        async def newer() -> None:
            await asyncio.sleep(after)
            plan = replace(self.plan, name=new, contenders=1)
            await Customer(plan, self.crew, self.stage, self.report, self.chance)._wanted(new, self.plan.job(2))

        await asyncio.gather(older(), newer())
        self.stage.expect_either(self.plan.name, old)
