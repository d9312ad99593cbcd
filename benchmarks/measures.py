"""What one server is measured for: single jobs, many at once, ends, waiting, and a history."""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from collections.abc import Awaitable, Callable

import psycopg

from pgbg_orchestration import Job, Launcher, errors
from pgbg_orchestration.postgres.pg_background import Extension

from .bench import OURS, Bench, cpu_of, in_turn, percentile, until
from .rows import Point, Row


async def one_job(bench: Bench) -> list[Row]:
    """A job that does nothing, in turn with the same by hand."""
    conn = await bench.connect()
    async with conn, Launcher(bench.conninfo) as launcher:
        ways: dict[str, Callable[[], Awaitable[object]]] = {"floor": lambda: by_hand(conn, bench.extension)}
        ways["receipt, no rows"] = lambda: launcher.run(Job("do $$begin end$$"))
        for kind in ("receipt", "session", "supervised"):
            ways[kind] = lambda kind=kind: launcher.run(Job("select 1", kind=kind))  # type: ignore[misc]
        taken = await in_turn(ways, bench.size.rounds)
    floor = statistics.median(taken.pop("floor"))
    peer = f"by hand: {floor * 1000:.1f} ms"
    return [
        Row(f"one job that does nothing, kind {kind}, p50", f"{m * 1000:.1f} ms", peer, m / floor)
        for kind, times in taken.items()
        for m in [statistics.median(times)]
    ]


async def many_jobs(bench: Bench) -> list[Row]:
    """Jobs that do nothing, many at once, against three sessions by hand side by side."""
    number = bench.size.many
    sessions = [await bench.connect() for _ in range(3)]

    async def share(conn: psycopg.AsyncConnection) -> None:
        for _ in range(number // 3):
            await by_hand(conn, bench.extension)

    began = time.perf_counter()
    await asyncio.gather(*(share(conn) for conn in sessions))
    floor = number // 3 * 3 / (time.perf_counter() - began)
    for conn in sessions:
        await conn.close()
    turns = asyncio.Semaphore(bench.size.at_once)
    async with Launcher(bench.conninfo) as launcher:

        async def one() -> None:
            async with turns:
                await launcher.run(Job("select 1"))

        await one()
        began, cpu = time.perf_counter(), time.process_time()
        await asyncio.gather(*(one() for _ in range(number)))
        took, cpu = time.perf_counter() - began, time.process_time() - cpu
    rate = number / took
    what = f"{number} jobs that do nothing, {bench.size.at_once} at once"
    return [
        Row(what, f"{rate:.0f}/s", f"by hand, three sessions: {floor:.0f}/s", rate / floor, more_is_better=True),
        Row("own CPU a job, the same", f"{cpu / number * 1000:.2f} ms"),
    ]


async def ends(bench: Bench) -> list[Row]:
    """How long it takes from a commit, or a failure, until the outcome is told."""
    rows = []
    for running in bench.size.running:
        for what, end in (("commit", _late_commit), ("failure", _late_failure)):
            conn = await bench.connect()
            late: list[float] = []
            async with conn, Launcher(bench.conninfo) as launcher:
                await conn.execute("create table if not exists ends (job text, at timestamptz)")
                for _ in range(max(6 // running, 1)):
                    seconds = [bench.size.seconds * (1 + 2 * (number % 10) / 10) for number in range(running)]
                    late += await asyncio.gather(*(end(launcher, conn, length) for length in seconds))
            value = f"p50 {percentile(late, 50) * 1000:.0f} ms, p95 {percentile(late, 95) * 1000:.0f} ms"
            lengths = f"{bench.size.seconds:g} to {bench.size.seconds * 3:g} s"
            rows.append(Row(f"{what} to outcome, jobs of {lengths}, {running} running", value))
    return rows


async def _late_commit(launcher: Launcher, conn: psycopg.AsyncConnection, seconds: float) -> float:
    name = os.urandom(8).hex()
    sql = "select pg_sleep(%s); insert into ends values (%s, clock_timestamp())"
    await launcher.run(Job(sql, parameters=(seconds, name)))
    told = time.time()
    query = "select extract(epoch from at)::float8 from ends where job = %s"
    return told - float((await (await conn.execute(query, (name,))).fetchall())[0][0])


async def _late_failure(launcher: Launcher, conn: psycopg.AsyncConnection, seconds: float) -> float:
    sql = f"do $$begin perform pg_sleep({seconds}); raise exception '%', clock_timestamp(); end$$"
    try:
        await launcher.run(Job(sql))
    except errors.WorkerError as error:
        told = time.time()
        query = "select extract(epoch from %s::timestamptz)::float8"
        return told - float((await (await conn.execute(query, (error.fields.message,))).fetchall())[0][0])
    raise AssertionError("it did not fail")


async def waiting(bench: Bench) -> list[Row]:
    """What waiting jobs cost when nothing happens."""
    number, watched = bench.size.waiting, bench.size.seconds * 4
    launched: list[float] = []
    async with Launcher(bench.conninfo) as launcher:
        await launcher.run(Job("select 1"))
        began, cpu = time.perf_counter(), time.process_time()
        job = f"select pg_sleep({bench.size.age + watched * 2 + 10})"
        tasks = [asyncio.create_task(launcher.run(Job(job), on_cancel="leave")) for _ in range(number)]
        conn = await bench.connect()
        async with conn:
            await asleep(conn, number)
            launched = [time.perf_counter() - began, time.process_time() - cpu]
            await asyncio.sleep(bench.size.age)
            ours = f"select pid from pg_stat_activity where {OURS} and datname = current_database()"
            pids = [pid for (pid,) in await (await conn.execute(ours.encode())).fetchall()]
            own, theirs = time.process_time(), cpu_of(pids)
            await asyncio.sleep(watched)
            own, theirs = time.process_time() - own, cpu_of(pids) - theirs
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    conn = await bench.connect()
    async with conn:
        await conn.execute("select pg_cancel_backend(pid) from pg_stat_activity where backend_type = 'pg_background'")
    return [
        Row(f"{number} jobs launched at once until all are at work", f"{launched[0]:.1f} s"),
        Row("own CPU for that", f"{launched[1]:.2f} s"),
        Row(f"{number} jobs waiting: connections", f"{len(pids)}"),
        Row(f"{number} jobs waiting, {bench.size.age:g} s old: own CPU", f"{own / watched:.1%} of a core"),
        Row(f"{number} jobs waiting: CPU of our sessions in the server", f"{theirs / watched:.1%} of a core"),
    ]


async def history(bench: Bench) -> list[Row]:
    """The same before and after there is a history."""
    conn = await bench.connect()
    async with conn, Launcher(bench.conninfo) as launcher:
        ways: dict[str, Callable[[], Awaitable[object]]] = {
            "a job that does nothing": lambda: launcher.run(Job("select 1")),
            "the newest 50 jobs": lambda: launcher.ledger.jobs(limit=50),
            "a sensor's look at one job": lambda: launcher.ledger.jobs(job_id="history 7"),
            "Launcher.look": lambda: launcher.look("history 7"),
        }
        taken: dict[int, dict[str, float]] = {}
        there = 0
        for number in bench.size.history:
            await _fill(conn, there, number)
            there = number
            rounds = await in_turn(ways, bench.size.rounds)
            taken[number] = {name: statistics.median(times) for name, times in rounds.items()}
    first, *more = bench.size.history
    rows = [
        Row(f"{name}, {number} jobs of history", f"{taken[number][name] * 1000:.1f} ms",
            f"with {first}: {taken[first][name] * 1000:.1f} ms", taken[number][name] / taken[first][name],
            points=(Point(f"History: {name} (ms)", number, taken[number][name] * 1000),))
        for name in ways for number in more
    ]  # fmt: skip
    sensor, look = taken[there]["a sensor's look at one job"], taken[there]["Launcher.look"]
    return [*rows, Row("the sensor's look", f"{sensor * 1000:.1f} ms", "Launcher.look", sensor / look)]


async def _fill(conn: psycopg.AsyncConnection, first: int, last: int) -> None:
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
    await until(conn, query, number)
