"""Whoever breaks things: one fault after the other, at moments and of kinds that follow from the seed."""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import Awaitable, Callable

import psycopg

from tests.chaos.crew import Crew
from tests.chaos.report import Report
from tests.chaos.stage import Stage
from tests.kit.proxy import TO_CLIENT, TO_SERVER, Proxy

LAUNCH_CALL = b"pg_background_launch"


class Breaker:
    """Breaks what the jobs run on.

    Parameters
    ----------
    pause:
        Seconds between two faults, on average.
    """

    def __init__(
        self, stage: Stage, crew: Crew, proxy: Proxy, report: Report, chance: random.Random, pause: float
    ) -> None:
        self._stage = stage
        self._db = stage.db
        self._crew = crew
        self._proxy = proxy
        self._report = report
        self._chance = chance
        self._pause = pause
        self._kinds: dict[str, tuple[int, Callable[[], Awaitable[int]]]] = {
            "launching process killed": (6, self._kill_process),
            "launching session terminated": (10, lambda: self._terminate("pgbg: launching")),
            "bookkeeping session terminated": (4, lambda: self._terminate("pgbg: l%")),
            "worker terminated": (14, lambda: self._end_worker("pg_terminate_backend")),
            "worker cancelled by a stranger": (6, lambda: self._end_worker("pg_cancel_backend")),
            "connections cut (RST)": (4, lambda: self._cut(reset=True)),
            "connections cut (FIN)": (3, lambda: self._cut(reset=False)),
            "connections half closed": (3, self._half_close),
            "connections stalled": (4, self._stall),
            "connections delayed": (4, self._delay),
            "launch call cut on its way": (5, self._cut_launch),
            "answer to a launch held back, then cut": (5, self._hold_answer),
            "new connections refused": (2, self._refuse),
            "worker slots used up": (3, self._use_up_slots),
            "server restarted at once": (1, self._restart),
            "server crashed": (1, self._crash),
        }

    async def break_until(self, end: asyncio.Event) -> None:
        """Break things until ``end`` is set."""
        names = list(self._kinds)
        weights = [self._kinds[name][0] for name in names]
        while not end.is_set():
            await asyncio.sleep(self._chance.expovariate(1 / self._pause))
            (name,) = self._chance.choices(names, weights)
            try:
                done = await self._kinds[name][1]()
            except psycopg.OperationalError:
                continue  # the server is away, or has just let this very session go
            self._report.faults[name] += done
        self._proxy.resume()

    def _hit_all(self, *, behind_the_proxy: bool = False) -> None:
        for hand in self._crew.present():
            if not behind_the_proxy or hand.way != self._db.conninfo:
                self._report.hit.update(hand.jobs)

    # Processes ----------------------------------------------------------------------------------------------------

    async def _kill_process(self) -> int:
        hands = [hand for hand in self._crew.present() if hand.jobs]
        if not hands:
            return 0
        self._chance.choice(hands).signal(signal.SIGKILL)
        return 1

    # Sessions and workers -----------------------------------------------------------------------------------------

    async def _terminate(self, like: str) -> int:
        pids = [int(row[0]) for row in self._db.sessions(like)]
        if not pids:
            return 0
        self._db.terminate([self._chance.choice(pids)])
        return 1

    async def _end_worker(self, how: str) -> int:
        rows = self._db.sql("select job_id, running_pid from pgbg.jobs where running_pid is not null")
        starting = self._db.workers()
        if rows and self._chance.random() < 0.8:
            name, pid = self._chance.choice(rows)
            self._report.hit.add(str(name))
        elif starting:
            pid = self._chance.choice(starting)[0]
        else:
            return 0
        return int(bool(self._db.value(f"select {how}(%s)", pid)))

    async def _use_up_slots(self) -> int:
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

    async def _cut(self, *, reset: bool) -> int:
        self._hit_all(behind_the_proxy=True)
        return min(self._proxy.cut(reset=reset), 1)

    async def _half_close(self) -> int:
        self._hit_all(behind_the_proxy=True)
        self._proxy.half_close(self._chance.choice([TO_SERVER, TO_CLIENT]))
        return 1

    async def _stall(self) -> int:
        self._hit_all(behind_the_proxy=True)
        self._proxy.stall(*self._chance.choice([(), (TO_SERVER,), (TO_CLIENT,)]))
        await asyncio.sleep(self._chance.uniform(0.1, 1.5))
        if self._chance.random() < 0.5:
            self._proxy.cut()
        self._proxy.resume()
        return 1

    async def _delay(self) -> int:
        self._proxy.delay(self._chance.uniform(0.01, 0.1))
        await asyncio.sleep(0.5)
        self._proxy.resume()
        return 1

    async def _refuse(self) -> int:
        self._hit_all(behind_the_proxy=True)
        self._proxy.refuse()
        self._proxy.cut()
        await asyncio.sleep(self._chance.uniform(0.1, 1))
        self._proxy.resume()
        return 1

    async def _cut_launch(self) -> int:
        return await self._when(cut=True)

    async def _hold_answer(self) -> int:
        done = await self._when(cut=False)
        await asyncio.sleep(self._chance.uniform(0, 0.5))
        self._hit_all(behind_the_proxy=True)
        self._proxy.cut()
        self._proxy.resume()
        return done

    async def _when(self, *, cut: bool) -> int:
        when = self._proxy.when(TO_SERVER, LAUNCH_CALL, cut=cut, stall=() if cut else TO_CLIENT)
        for _ in range(40):
            if when.happened:
                return 1
            await asyncio.sleep(0.05)
        return 0

    # The server ---------------------------------------------------------------------------------------------------

    async def _restart(self) -> int:
        self._hit_all()
        await asyncio.to_thread(self._db.server.restart, "immediate")
        return 1

    async def _crash(self) -> int:
        self._hit_all()
        await asyncio.to_thread(self._db.server.crash)
        await asyncio.to_thread(self._db.server.start)
        return 1
