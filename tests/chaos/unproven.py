"""Those who want jobs of the kinds that write no receipt of their own, whose end nobody may be able to tell.

Less is promised of them: an outcome that is told is true, a supervised job is done once at most, and "unknown" is said
only where it is: of a supervised job whose supervisor, worker or server went away, of a session's whose session did.
"""

from __future__ import annotations

import asyncio
from typing import Any

from tests.chaos.crew import bounded
from tests.chaos.customers import AGAIN, TRIES, UNKNOWN, Customer

HELD = "SeriesHeld"
"""Its worker is seen and cannot be attached to."""


class SupervisedCustomer(Customer):
    """Wants one job of kind ``supervised``."""

    async def want(self) -> None:
        if self.plan.cancel_after is not None:
            await self._ended(self.plan.cancel_after)
        else:
            await self._done()

    async def _done(self) -> None:
        """Run it until it is told to be done, to have failed half way, or to be unknown."""
        answer: dict[str, Any] = {}
        for _ in range(TRIES):
            (hand,) = await self.crew.hands(1, self.chance)
            answer = await self.call(hand, self.plan.job())
            effects = await self.check(answer)
            if "outcome" in answer:
                self.stage.expect(self.plan.name, self.plan.effects)
                return
            if answer["error"] == UNKNOWN and self.plan.verify_sql is None:
                self.unknown(answer)
                return
            if answer["error"] == "WorkerError" and effects:
                self.stage.expect_at_most(self.plan.name, self.plan.effects)  # its own commits stay
                return
            self.surprised(answer, {*AGAIN, UNKNOWN})
            await asyncio.sleep(0.02)
        self.report.lost.append(f"{self.plan.name}: {TRIES} tries, {answer}")

    async def _ended(self, after: float) -> None:
        """Run it, and cancel it in the middle."""
        hand, *others = await self.crew.hands(2, self.chance)
        self.report.calls += 1
        _, future = hand.order("run", job=self.plan.job(), options={})
        running = asyncio.ensure_future(bounded(future))
        await asyncio.sleep(after)
        verdict = await self.cancel(others[0] if others else hand)
        answer = self.told(await running)
        await self.check(answer)
        self.surprised(answer, {"JobCancelled", UNKNOWN, *AGAIN})
        if "outcome" in answer and verdict == "cancelled":
            self.report.false_successes.append(f"{self.plan.name}: told as done, and cancelled for good")
        if verdict == "committed":
            self.stage.expect(self.plan.name, self.plan.effects)
        elif verdict == "cancelled" and self.plan.effects == 1:
            self.stage.expect(self.plan.name, 0)
        else:
            self.stage.expect_at_most(self.plan.name, self.plan.effects)


class SessionCustomer(Customer):
    """Wants one job of kind ``session``, which dies with whoever launched it."""

    async def want(self) -> None:
        answer: dict[str, Any] = {}
        for _ in range(TRIES):
            (hand,) = await self.crew.hands(1, self.chance)
            answer = await self.call(hand, self.plan.job())
            await self.check(answer)
            if "outcome" in answer:
                self.stage.expect(self.plan.name, 1)
                return
            if answer["error"] == UNKNOWN:
                self.unknown(answer)
                return
            if answer["error"] in ("ProcessKilled", "ServerUnreachable", "StillRunning", HELD):
                # It may be at work, or done: a second launch is a second effect, so an orchestrator asks its user.
                self.stage.expect_at_most(self.plan.name, 1)
                return
            self.surprised(answer, AGAIN)
            await asyncio.sleep(0.02)
        self.report.lost.append(f"{self.plan.name}: {TRIES} tries, {answer}")


CUSTOMERS: dict[str, type[Customer]] = {
    "receipt": Customer,
    "supervised": SupervisedCustomer,
    "session": SessionCustomer,
}
"""Who wants a job of which kind."""
