"""What is measured, each against a named peer on the same server in the same run."""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psycopg

from pgbg_orchestration import Job, Launcher, errors
from pgbg_orchestration.postgres.pg_background import Extension

from . import growth, imports, orchestrated, output
from .rows import Point, Row

OURS = "application_name like 'pgbg: %'"


@dataclass(frozen=True, slots=True)
class Size:
    """How much work a run is: the whole, or a smoke test of the benchmark itself."""

    rounds: int
    many: int
    at_once: int
    running: tuple[int, ...]
    seconds: float
    waiting: int
    age: float  # seconds, of the jobs that wait
    history: tuple[int, ...]  # jobs of history; the first is what the others are held against
    growth: tuple[int, ...]  # jobs that wait, their workers simulated
    queries: int  # of a second each, as tasks and in an asset
    etl_rows: int
    rows: int
    modules: int


WHOLE = Size(
    rounds=100,
    many=1_000,
    at_once=50,
    running=(1, 50),
    seconds=5,
    waiting=200,
    age=30,
    history=(1_000, 10_000, 100_000, 500_000, 1_000_000),
    growth=(10, 100, 1_000, 10_000),
    queries=200,
    etl_rows=1_000_000,
    rows=100_000,
    modules=3,
)
SMOKE = Size(
    rounds=2,
    many=6,
    at_once=3,
    running=(2,),
    seconds=0.2,
    waiting=3,
    age=0,
    history=(20, 200),
    growth=(4,),
    queries=2,
    etl_rows=100,
    rows=50,
    modules=1,
)


@dataclass(slots=True)
class Bench:
    """A server to measure on."""

    conninfo: str
    extension: Extension
    size: Size

    async def connect(self) -> psycopg.AsyncConnection:
        return await psycopg.AsyncConnection.connect(self.conninfo, autocommit=True, prepare_threshold=None)

    # One job ------------------------------------------------------------------------------------------------------

    async def one_job(self) -> list[Row]:
        """A job that does nothing, in turn with the same by hand."""
        conn = await self.connect()
        async with conn, Launcher(self.conninfo) as launcher:
            ways: dict[str, Callable[[], Awaitable[object]]] = {"floor": lambda: by_hand(conn, self.extension)}
            ways["receipt, no rows"] = lambda: launcher.run(Job("do $$begin end$$"))
            for kind in ("receipt", "session", "supervised"):
                ways[kind] = lambda kind=kind: launcher.run(Job("select 1", kind=kind))  # type: ignore[misc]
            taken = await in_turn(ways, self.size.rounds)
        floor = statistics.median(taken.pop("floor"))
        peer = f"by hand: {floor * 1000:.1f} ms"
        return [
            Row(f"one job that does nothing, kind {kind}, p50", f"{m * 1000:.1f} ms", peer, m / floor)
            for kind, times in taken.items()
            for m in [statistics.median(times)]
        ]

    # Many jobs ----------------------------------------------------------------------------------------------------

    async def many_jobs(self) -> list[Row]:
        """Jobs that do nothing, many at once, against three sessions by hand side by side."""
        number = self.size.many
        sessions = [await self.connect() for _ in range(3)]

        async def share(conn: psycopg.AsyncConnection) -> None:
            for _ in range(number // 3):
                await by_hand(conn, self.extension)

        began = time.perf_counter()
        await asyncio.gather(*(share(conn) for conn in sessions))
        floor = number // 3 * 3 / (time.perf_counter() - began)
        for conn in sessions:
            await conn.close()
        turns = asyncio.Semaphore(self.size.at_once)
        async with Launcher(self.conninfo) as launcher:

            async def one() -> None:
                async with turns:
                    await launcher.run(Job("select 1"))

            await one()
            began, cpu = time.perf_counter(), time.process_time()
            await asyncio.gather(*(one() for _ in range(number)))
            took, cpu = time.perf_counter() - began, time.process_time() - cpu
        rate = number / took
        what = f"{number} jobs that do nothing, {self.size.at_once} at once"
        return [
            Row(what, f"{rate:.0f}/s", f"by hand, three sessions: {floor:.0f}/s", rate / floor, more_is_better=True),
            Row("own CPU a job, the same", f"{cpu / number * 1000:.2f} ms"),
        ]

    # An end is told -----------------------------------------------------------------------------------------------

    async def ends(self) -> list[Row]:
        """How long it takes from a commit, or a failure, until the outcome is told."""
        rows = []
        for running in self.size.running:
            for what, end in (("commit", self._late_commit), ("failure", self._late_failure)):
                conn = await self.connect()
                late: list[float] = []
                async with conn, Launcher(self.conninfo) as launcher:
                    await conn.execute("create table if not exists ends (job text, at timestamptz)")
                    for _ in range(max(6 // running, 1)):
                        seconds = [self.size.seconds * (1 + 2 * (number % 10) / 10) for number in range(running)]
                        late += await asyncio.gather(*(end(launcher, conn, length) for length in seconds))
                value = f"p50 {percentile(late, 50) * 1000:.0f} ms, p95 {percentile(late, 95) * 1000:.0f} ms"
                lengths = f"{self.size.seconds:g} to {self.size.seconds * 3:g} s"
                rows.append(Row(f"{what} to outcome, jobs of {lengths}, {running} running", value))
        return rows

    async def _late_commit(self, launcher: Launcher, conn: psycopg.AsyncConnection, seconds: float) -> float:
        name = os.urandom(8).hex()
        sql = "select pg_sleep(%s); insert into ends values (%s, clock_timestamp())"
        await launcher.run(Job(sql, parameters=(seconds, name)))
        told = time.time()
        query = "select extract(epoch from at)::float8 from ends where job = %s"
        return told - float((await (await conn.execute(query, (name,))).fetchall())[0][0])

    async def _late_failure(self, launcher: Launcher, conn: psycopg.AsyncConnection, seconds: float) -> float:
        sql = f"do $$begin perform pg_sleep({seconds}); raise exception '%', clock_timestamp(); end$$"
        try:
            await launcher.run(Job(sql))
        except errors.WorkerError as error:
            told = time.time()
            query = "select extract(epoch from %s::timestamptz)::float8"
            return told - float((await (await conn.execute(query, (error.fields.message,))).fetchall())[0][0])
        raise AssertionError("it did not fail")

    # Waiting ------------------------------------------------------------------------------------------------------

    async def waiting(self) -> list[Row]:
        """What waiting jobs cost when nothing happens."""
        number, watched = self.size.waiting, self.size.seconds * 4
        launched: list[float] = []
        async with Launcher(self.conninfo) as launcher:
            await launcher.run(Job("select 1"))
            began, cpu = time.perf_counter(), time.process_time()
            job = f"select pg_sleep({self.size.age + watched * 2 + 10})"
            tasks = [asyncio.create_task(launcher.run(Job(job), on_cancel="leave")) for _ in range(number)]
            conn = await self.connect()
            async with conn:
                await asleep(conn, number)
                launched = [time.perf_counter() - began, time.process_time() - cpu]
                await asyncio.sleep(self.size.age)
                ours = f"select pid from pg_stat_activity where {OURS} and datname = current_database()"
                pids = [pid for (pid,) in await (await conn.execute(ours.encode())).fetchall()]
                own, theirs = time.process_time(), cpu_of(pids)
                await asyncio.sleep(watched)
                own, theirs = time.process_time() - own, cpu_of(pids) - theirs
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        conn = await self.connect()
        async with conn:
            await conn.execute(
                "select pg_cancel_backend(pid) from pg_stat_activity where backend_type = 'pg_background'"
            )
        return [
            Row(f"{number} jobs launched at once until all are at work", f"{launched[0]:.1f} s"),
            Row("own CPU for that", f"{launched[1]:.2f} s"),
            Row(f"{number} jobs waiting: connections", f"{len(pids)}"),
            Row(f"{number} jobs waiting, {self.size.age:g} s old: own CPU", f"{own / watched:.1%} of a core"),
            Row(f"{number} jobs waiting: CPU of our sessions in the server", f"{theirs / watched:.1%} of a core"),
        ]

    # Output and imports -------------------------------------------------------------------------------------------

    async def output(self) -> list[Row]:
        """What rows and notices cost."""
        return [*await output.rows(self), *await output.notices(self)]

    async def imports(self) -> list[Row]:
        """What an import of each public module costs."""
        return await asyncio.to_thread(imports.imports, min(self.size.rounds, 7), self.size.modules)

    # History ------------------------------------------------------------------------------------------------------

    async def history(self) -> list[Row]:
        """The same before and after there is a history."""
        conn = await self.connect()
        async with conn, Launcher(self.conninfo) as launcher:
            ways: dict[str, Callable[[], Awaitable[object]]] = {
                "a job that does nothing": lambda: launcher.run(Job("select 1")),
                "the newest 50 jobs": lambda: launcher.ledger.jobs(limit=50),
                "a sensor's look at one job": lambda: launcher.ledger.jobs(job_id="history 7"),
                "Launcher.look": lambda: launcher.look("history 7"),
            }
            taken: dict[int, dict[str, float]] = {}
            there = 0
            for number in self.size.history:
                await self._fill(conn, there, number)
                there = number
                rounds = await in_turn(ways, self.size.rounds)
                taken[number] = {name: statistics.median(times) for name, times in rounds.items()}
        first, *more = self.size.history
        rows = [
            Row(f"{name}, {number} jobs of history", f"{taken[number][name] * 1000:.1f} ms",
                f"with {first}: {taken[first][name] * 1000:.1f} ms", taken[number][name] / taken[first][name],
                points=(Point(f"History: {name} (ms)", number, taken[number][name] * 1000),))
            for name in ways for number in more
        ]  # fmt: skip
        sensor, look = taken[there]["a sensor's look at one job"], taken[there]["Launcher.look"]
        return [*rows, Row("the sensor's look", f"{sensor * 1000:.1f} ms", "Launcher.look", sensor / look)]

    # Orchestrated -------------------------------------------------------------------------------------------------

    async def airflow(self) -> list[Row]:
        """The same work as tasks of a real Airflow, in four ways."""
        return await asyncio.to_thread(orchestrated.airflow, self)

    async def dagster(self) -> list[Row]:
        """The same work as assets of Dagster, in two ways."""
        return await asyncio.to_thread(orchestrated.dagster, self)

    # Growth -------------------------------------------------------------------------------------------------------

    async def growth(self) -> list[Row]:
        """What more and more waiting jobs cost. The database's extension is good for nothing else afterwards."""
        return await growth.waiting(self)

    async def _fill(self, conn: psycopg.AsyncConnection, first: int, last: int) -> None:
        await conn.execute(
            "with n as (select n, 'history ' || n as id from generate_series(%s::int, %s::int) as n), r as ("
            " insert into pgbg.receipt (owner, job_digest, status, job_id, label, attempt, worker_pid, sql_digest,"
            "   xid, started_at)"
            " select session_user, pgbg.digest(id), 'committed', id, id, 1, 1, '', '3', now() from n)"
            " insert into pgbg.job (owner, job_digest, job_id, series_digest, series, generation, label, kind,"
            "   sql_digest, attempt, launched_by, launcher_pid, launched_at, ended_at, outcome)"
            " select session_user, pgbg.digest(id), id, pgbg.digest(id), id, 0, id, 'receipt', '', 1, 'bench', 1,"
            "   now() - interval '1 day', now() - interval '1 day', 'committed' from n",
            (first, last - 1),
        )
        await conn.execute("analyze")


async def by_hand(conn: psycopg.AsyncConnection, extension: Extension) -> None:
    """Run SQL in a worker without any promise: launch, wait, result_info, detach."""
    handle = await extension.launch(conn, "select 1", label="bench")
    while not await extension.wait(conn, handle, 60_000):
        pass
    await extension.result_infos(conn, [handle])
    await extension.detach(conn, handle)


async def asleep(conn: psycopg.AsyncConnection, number: int) -> None:
    """Wait until so many workers are at work on their sleep."""
    query = "select count(*) from pg_stat_activity where backend_type = 'pg_background' and wait_event = 'PgSleep'"
    await growth.until(conn, query, number)


async def in_turn(ways: dict[str, Callable[[], Awaitable[object]]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each round of each way; they take turns, since a machine's speed changes."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            began = time.perf_counter()
            await way()
            if number:  # the first round warms up
                taken[name].append(time.perf_counter() - began)
    return taken


def percentile(values: Sequence[float], percent: int) -> float:
    """Return the value below which so many percent lie."""
    ordered = sorted(values)
    return ordered[min(int(len(ordered) * percent / 100), len(ordered) - 1)]


def cpu_of(pids: Sequence[int]) -> float:
    """Return the CPU seconds that processes of this machine have used (proc(5))."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")
