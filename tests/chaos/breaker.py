"""Whoever breaks things: one fault after the other, each of a kind and in a way that follow from seed and number."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import signal
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import psycopg

from tests.chaos.crew import Crew, Hand
from tests.chaos.report import Report
from tests.chaos.stage import Stage
from tests.kit.proxy import TO_CLIENT, TO_SERVER, Proxy

LAUNCH_CALL = b"pg_background_launch"
PAUSE = 0.03
"""Seconds between two faults, on average, while there are fewer than there are to be."""
AT_ONCE = 5
"""Faults at the same time: some of them take a second or two."""

GROUPS = ("processes", "sessions", "workers", "network", "launches", "slots", "server")


class Kind(NamedTuple):
    """A kind of fault; ``act`` returns how many things it broke."""

    group: str
    weight: float
    act: Callable[[Breaker, random.Random], Awaitable[int]]


KINDS: dict[str, Kind] = {}
"""Every kind, by the name that the report gives it."""


def kind(name: str, group: str, weight: float) -> Callable[[Act], Act]:
    """Make a method of the breaker a kind of fault."""

    def add(act: Act) -> Act:
        KINDS[name] = Kind(group, weight, act)
        return act

    return add


def network(name: str, group: str, weight: float) -> Callable[[ActOnProxy], ActOnProxy]:
    """Make a method a kind of fault on a proxy: one on which nothing else is broken, and which is mended afterwards."""

    def add(act: ActOnProxy) -> ActOnProxy:
        @kind(name, group, weight)
        async def on_proxy(breaker: Breaker, chance: random.Random) -> int:
            proxy = await breaker.free.get()
            try:
                return await act(breaker, proxy, chance)
            finally:
                proxy.resume()
                breaker.free.put_nowait(proxy)

        return act

    return add


def chosen(seed: int, number: int, mix: Mapping[str, float]) -> tuple[str, random.Random]:
    """Return the kind of fault ``number``, and what decides everything else of it."""
    chance = random.Random(f"{seed}/fault/{number}")
    weights = [kind.weight * mix.get(kind.group, 1) for kind in KINDS.values()]
    return chance.choices(list(KINDS), weights)[0], chance


class Breaker:
    """Breaks what the jobs run on.

    Parameters
    ----------
    proxies:
        The proxies that stand before some of the processes, each before one.
    seed:
        Says of each fault what it is.
    rate:
        Faults for each job.
    mix:
        How much more often (or less, or never) a group of faults is to come than by itself.
    """

    def __init__(
        self,
        stage: Stage,
        crew: Crew,
        proxies: Sequence[Proxy],
        report: Report,
        *,
        seed: int,
        rate: float,
        mix: Mapping[str, float],
    ) -> None:
        self._stage = stage
        self._db = stage.db
        self._crew = crew
        self._report = report
        self._seed = seed
        self._rate = rate
        self._mix = mix
        self._server = asyncio.Lock()
        self.free: asyncio.Queue[Proxy] = asyncio.Queue()
        for proxy in proxies:
            self.free.put_nowait(proxy)
        report.faults.update(dict.fromkeys(KINDS, 0))

    async def break_until(self, end: asyncio.Event) -> None:
        """Break things until ``end`` is set, keeping pace with the jobs."""
        turns = asyncio.Semaphore(AT_ONCE)
        async with asyncio.TaskGroup() as breaking:
            for number in itertools.count():
                name, chance = chosen(self._seed, number, self._mix)
                await asyncio.sleep(chance.expovariate(1 / PAUSE))
                await turns.acquire()
                while self._report.broken_things >= self._rate * self._report.jobs.total() and not end.is_set():
                    await asyncio.sleep(PAUSE)
                if end.is_set():
                    return
                breaking.create_task(self._break(name, chance, turns))

    async def _break(self, name: str, chance: random.Random, turns: asyncio.Semaphore) -> None:
        try:
            self._report.faults[name] += await KINDS[name].act(self, chance)
        except psycopg.OperationalError:
            return  # the server is away, or has just let this very session go
        finally:
            turns.release()

    # Processes ----------------------------------------------------------------------------------------------------

    def _busy(self, chance: random.Random) -> Hand | None:
        hands = [hand for hand in self._crew.present() if hand.jobs]
        if not hands:
            return None
        hand = chance.choice(hands)
        self._report.hit.update(hand.jobs)
        return hand

    @kind("launching process killed", "processes", 3)
    async def _kill_process(self, chance: random.Random) -> int:
        if (hand := self._busy(chance)) is None:
            return 0
        hand.shoot()
        return 1

    @kind("launching process stopped for a while", "processes", 3)
    async def _stop_process(self, chance: random.Random) -> int:
        if (hand := self._busy(chance)) is None:
            return 0
        return await asyncio.to_thread(_stop_for, hand.process.pid, chance.uniform(0.1, 2))

    # Sessions -----------------------------------------------------------------------------------------------------

    @kind("launching session terminated", "sessions", 10)
    async def _terminate_launching(self, chance: random.Random) -> int:
        return self._terminate("pgbg: launching", chance)

    @kind("bookkeeping session terminated", "sessions", 4)
    async def _terminate_bookkeeping(self, chance: random.Random) -> int:
        return self._terminate("pgbg: l%", chance)

    def _terminate(self, like: str, chance: random.Random) -> int:
        pids = [int(row[0]) for row in self._db.sessions(like)]
        if not pids:
            return 0
        # Whose it is does not show; a session job has one of its own.
        self._stage.lose(self._stage.wanted, sessions_only=True)
        self._db.terminate([chance.choice(pids)])
        return 1

    @kind("statements of ours cancelled by a stranger", "sessions", 6)
    async def _cancel_statements(self, _: random.Random) -> int:
        self._stage.lose(self._stage.wanted, sessions_only=True)
        pids = [int(pid) for pid, _, _, state, _ in self._db.sessions("pgbg: %") if state == "active"]
        self._db.sql("select pg_cancel_backend(p) from unnest(%s::int[]) p", pids)
        return len(pids)

    @kind("launching session's process stopped for a while", "sessions", 4)
    async def _stop_launching(self, chance: random.Random) -> int:
        """The handle of a worker that ends meanwhile can have a pid that is another's."""
        pids = [int(row[0]) for row in self._db.sessions("pgbg: launching")]
        if not pids:
            return 0
        return await asyncio.to_thread(_stop_for, chance.choice(pids), chance.uniform(0.05, 0.3))

    # Workers ------------------------------------------------------------------------------------------------------

    @kind("worker terminated", "workers", 14)
    async def _terminate_worker(self, chance: random.Random) -> int:
        return self._end_worker("pg_terminate_backend", chance)

    @kind("worker cancelled by a stranger", "workers", 6)
    async def _cancel_worker(self, chance: random.Random) -> int:
        return self._end_worker("pg_cancel_backend", chance)

    def _end_worker(self, function: str, chance: random.Random) -> int:
        known = self._db.sql("select job_id, running_pid from pgbg.jobs where running_pid is not null")
        workers = self._db.workers()
        if known and chance.random() < 0.7:
            name, pid = chance.choice(known)
            self._hit([name])
        elif workers:
            pid, application_name, *_ = chance.choice(workers)
            job = self._stage.job_of(application_name or "")
            self._hit([job]) if job else self._stage.lose(self._stage.wanted)
        else:
            return 0
        return int(bool(self._db.value(f"select {function}(%s)", pid)))

    @kind("worker slots used up", "slots", 3)
    async def _use_up_slots(self, _: random.Random) -> int:
        # Not through the session of the others: these workers end by themselves.
        with self._db.database.connect() as connection:
            taken = 0
            while taken < 64:
                try:
                    connection.execute("select pg_background_launch('select pg_sleep(1)')")
                except psycopg.Error:
                    break
                taken += 1
        return 1

    # The network --------------------------------------------------------------------------------------------------

    @network("connections cut (RST)", "network", 4)
    async def _cut_hard(self, proxy: Proxy, _: random.Random) -> int:
        self._hit_behind(proxy)
        return min(proxy.cut(), 1)

    @network("connections cut (FIN)", "network", 3)
    async def _cut_softly(self, proxy: Proxy, _: random.Random) -> int:
        self._hit_behind(proxy)
        return min(proxy.cut(reset=False), 1)

    @network("connections half closed", "network", 3)
    async def _half_close(self, proxy: Proxy, chance: random.Random) -> int:
        self._hit_behind(proxy)
        proxy.half_close(chance.choice([TO_SERVER, TO_CLIENT]))
        return 1

    @network("connections stalled", "network", 4)
    async def _stall(self, proxy: Proxy, chance: random.Random) -> int:
        self._hit_behind(proxy)
        proxy.stall(*chance.choice([(), (TO_SERVER,), (TO_CLIENT,)]))
        await asyncio.sleep(chance.uniform(0.1, 1.5))
        self._hit_behind(proxy)
        if chance.random() < 0.5:
            proxy.cut()
        return 1

    @network("connections delayed", "network", 4)
    async def _delay(self, proxy: Proxy, chance: random.Random) -> int:
        proxy.delay(chance.uniform(0.01, 0.1))
        await asyncio.sleep(0.5)
        return 1

    @network("new connections refused", "network", 2)
    async def _refuse(self, proxy: Proxy, chance: random.Random) -> int:
        self._hit_behind(proxy)
        proxy.refuse()
        proxy.cut()
        await asyncio.sleep(chance.uniform(0.1, 1))
        self._hit_behind(proxy)
        return 1

    @network("launch call cut on its way", "launches", 5)
    async def _cut_launch(self, proxy: Proxy, _: random.Random) -> int:
        return await self._at_launch(proxy, cut=True)

    @network("answer to a launch held back, then cut", "launches", 5)
    async def _hold_answer(self, proxy: Proxy, chance: random.Random) -> int:
        done = await self._at_launch(proxy, cut=False)
        await asyncio.sleep(chance.uniform(0, 0.5))
        self._hit_behind(proxy)
        proxy.cut()
        return done

    async def _at_launch(self, proxy: Proxy, *, cut: bool) -> int:
        """Cut the next launch call before it reaches the server, or let it through and hold its answer back."""
        when = proxy.when(TO_SERVER, LAUNCH_CALL, cut=cut, stall=() if cut else TO_CLIENT)
        try:
            for _ in range(100):
                self._hit_behind(proxy)
                if when.happened:
                    return 1
                await asyncio.sleep(0.02)
            return 0
        finally:
            proxy.disarm(when)

    # The server ---------------------------------------------------------------------------------------------------

    @kind("server restarted at once", "server", 1)
    async def _restart(self, _: random.Random) -> int:
        async with self._server:
            self._hit(self._stage.wanted)
            await asyncio.to_thread(self._db.server.restart, "immediate")
            self._hit(self._stage.wanted)
            return 1

    @kind("server crashed", "server", 1)
    async def _crash(self, _: random.Random) -> int:
        async with self._server:
            self._hit(self._stage.wanted)
            await asyncio.to_thread(self._db.server.crash)
            await asyncio.to_thread(self._db.server.start)
            self._hit(self._stage.wanted)
            return 1

    # Who is hit ---------------------------------------------------------------------------------------------------

    def _hit(self, names: Iterable[str], *, sessions_only: bool = False) -> None:
        names = list(names)
        self._report.hit.update(names)
        self._stage.lose(names, sessions_only=sessions_only)

    def _hit_behind(self, proxy: Proxy) -> None:
        way = proxy.through(self._db.conninfo)
        for hand in self._crew.present():
            if hand.way == way:
                self._hit(hand.jobs, sessions_only=True)


Act = Callable[[Breaker, random.Random], Awaitable[int]]
ActOnProxy = Callable[[Breaker, Proxy, random.Random], Awaitable[int]]


def _stop_for(pid: int, seconds: float) -> int:
    """Stop a process for a while; returns 0 where it has just ended.

    To be called in a thread: a query of the event loop's may wait for what the stopped process holds, a lock or a page
    that it reads.
    """
    try:
        os.kill(pid, signal.SIGSTOP)
        time.sleep(seconds)
        os.kill(pid, signal.SIGCONT)
    except ProcessLookupError:
        return 0
    return 1
