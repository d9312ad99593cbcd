"""The launching processes of a run under fire: any of them may die at any moment, and is replaced."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, Self

from pgbg_orchestration.testing import faults
from tests.chaos.report import Report
from tests.core.kit import ROOT, Child, within

BOUND = 150.0
"""Seconds after which a call counts as endless. No fault of a run lasts longer than a few."""
KILLED = {"error": "ProcessKilled", "message": "its launching process died", "data_state": "not told"}


class Hand(Child):
    """A launching process that answers every order: when it dies, with ``ProcessKilled``."""

    module = "tests.core.child"
    jobs: set[str]  # in flight
    way: str
    fate: str | None  # the point of the algorithm at which it is to die
    shot = False

    def shoot(self) -> None:
        """Kill it, wherever it is."""
        self.shot = True
        self.signal(signal.SIGKILL)

    @classmethod
    async def start(cls, conninfo: str, fault: str | None = None) -> Self:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)} | ({"PGBG_FAULT": fault} if fault else {})
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", cls.module, conninfo,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=ROOT, env=environment,
            limit=2**26,
        )  # fmt: skip
        hand = cls(process)
        await within(hand._answer("ready"))
        return hand

    async def _read(self) -> None:
        await super()._read()
        for answer in self._answers.values():
            if not answer.done():
                answer.set_result(dict(KILLED))

    @property
    def alive(self) -> bool:
        return self.process.returncode is None and not self._reading.done()

    async def ask(self, op: str, **order: Any) -> dict[str, Any]:
        """Give an order and wait for its answer, for at most ``BOUND``."""
        if not self.alive:
            return dict(KILLED)
        _, answer = self.order(op, **order)
        return await bounded(answer)


async def bounded(answer: asyncio.Future[dict[str, Any]]) -> dict[str, Any]:
    """The answer, or one that says that there was none within ``BOUND``."""
    done, _ = await asyncio.wait({answer}, timeout=BOUND)
    return answer.result() if done else {**KILLED, "error": "Endless", "message": f"no answer in {BOUND} s"}


class Crew:
    """Some launching processes, each with a way to the server of its own.

    Parameters
    ----------
    ways:
        A connection string for each process: straight to the server, or through a proxy.
    seed:
        Says which of them are to die by themselves, and at which point of the algorithm.
    report:
        Gets those deaths.
    hand:
        The class of its processes.
    """

    def __init__(self, ways: Sequence[str], seed: int, report: Report, hand: type[Hand] = Hand) -> None:
        self._hand = hand
        self._ways = ways
        self._seed = seed
        self._report = report
        self._replaced = 0
        self._places: list[asyncio.Task[Hand]] = []
        report.deaths.update(dict.fromkeys(faults.POINTS, 0))

    async def __aenter__(self) -> Self:
        self._places = [asyncio.create_task(self._hire(way, None)) for way in self._ways]
        await asyncio.gather(*self._places)
        return self

    async def __aexit__(self, *_: object) -> None:
        for place in self._places:
            hand = await place
            self._bury(hand)
            await hand.close()

    async def _hire(self, way: str, fate: str | None) -> Hand:
        while True:
            try:
                hand = await self._hand.start(way, f"{fate}:kill" if fate else None)
            except TimeoutError:
                continue  # a slow machine; the bound of a start is the kit's
            hand.jobs = set()
            hand.way = way
            hand.fate = fate
            return hand

    async def hands(self, count: int, chance: random.Random) -> list[Hand]:
        """Living processes, each another one as far as there are so many."""
        while not (present := self.present()):
            await asyncio.sleep(0.05)
        return chance.sample(present, min(count, len(present)))

    def present(self) -> list[Hand]:
        """The processes that live now; whoever died is replaced."""
        hands: list[Hand] = []
        for place, hired in enumerate(self._places):
            if not hired.done():
                continue
            if hired.result().alive:
                hands.append(hired.result())
            else:
                self._bury(hired.result())
                self._places[place] = asyncio.create_task(self._hire(self._ways[place], self._next_fate()))
        return hands

    def _bury(self, hand: Hand) -> None:
        """Count a death at a point of the algorithm, unless somebody else killed it before it got there."""
        if hand.fate and not hand.alive and not hand.shot:
            self._report.deaths[hand.fate] += 1

    def _next_fate(self) -> str | None:
        self._replaced += 1
        return fate(self._seed, self._replaced)


def fate(seed: int, number: int) -> str | None:
    """Every other new process dies by itself, at each point of the algorithm in turn, in an order of the seed's."""
    if number % 2:
        return None
    turn, at = divmod(number // 2 - 1, len(faults.POINTS))
    return random.Random(f"{seed}/fates/{turn}").sample(faults.POINTS, len(faults.POINTS))[at]
