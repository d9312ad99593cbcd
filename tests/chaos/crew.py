"""The launching processes of a run under fire: any of them may die at any moment, and is replaced."""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
from collections import Counter
from typing import Any, Self

from pgbg_orchestration import faults
from tests.core.kit import ROOT, Child, within

BOUND = 150.0
"""Seconds after which a call counts as endless. No fault of a run lasts longer than a few."""
KILLED = {"error": "ProcessKilled", "sqlstate": None, "message": "its launching process died"}


class Hand(Child):
    """A launching process that answers every order: when it dies, with ``ProcessKilled``."""

    module = "tests.core.child"
    jobs: set[str]  # in flight
    way: str

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
    return answer.result() if done else {"error": "Endless", "sqlstate": None, "message": f"no answer in {BOUND} s"}


class Crew:
    """Some launching processes, each with a way to the server of its own.

    Parameters
    ----------
    ways:
        A connection string for each process: straight to the server, or through a proxy.
    chance:
        Decides which process gets a job, and at which point of the algorithm a new one is to die.
    hand:
        The class of its processes.
    """

    def __init__(self, ways: list[str], chance: random.Random, hand: type[Hand] = Hand) -> None:
        self._hand = hand
        self._ways = ways
        self._chance = chance
        self._places: list[asyncio.Task[Hand]] = []
        self.deaths: Counter[str] = Counter()  # at a point of the algorithm
        self._fates: dict[int, str] = {}

    async def __aenter__(self) -> Self:
        self._places = [asyncio.create_task(self._hire(way, None)) for way in self._ways]
        await asyncio.gather(*self._places)
        return self

    async def __aexit__(self, *_: object) -> None:
        for place in self._places:
            hand = await place
            await hand.close()

    async def _hire(self, way: str, fate: str | None) -> Hand:
        while True:
            try:
                hand = await self._hand.start(way, f"{fate}:kill" if fate else None)
            except TimeoutError:
                continue  # a slow machine; the bound of a start is the kit's
            hand.jobs = set()
            hand.way = way
            if fate:
                self._fates[hand.process.pid] = fate
            return hand

    async def hands(self, count: int) -> list[Hand]:
        """Living processes, each another one as far as there are so many."""
        while not (present := self.present()):
            await asyncio.sleep(0.05)
        return self._chance.sample(present, min(count, len(present)))

    async def hand(self) -> Hand:
        """A living process."""
        return (await self.hands(1))[0]

    def present(self) -> list[Hand]:
        """The processes that live now; whoever died is replaced."""
        hands: list[Hand] = []
        for place, hired in enumerate(self._places):
            if not hired.done():
                continue
            if hired.result().alive:
                hands.append(hired.result())
            else:
                self._replace(place, hired.result())
        return hands

    def _replace(self, place: int, dead: Hand) -> None:
        fate = self._fates.pop(dead.process.pid, None)
        if fate:
            self.deaths[fate] += 1
        # Every third is to die by itself, at a point of the algorithm.
        next_fate = self._chance.choice(faults.POINTS) if self._chance.random() < 0.35 else None
        self._places[place] = asyncio.create_task(self._hire(self._ways[place], next_fate))
