"""A server to measure on, how much work a run is, and what the measures share."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psycopg

from pgbg_orchestration.postgres.pg_background import Extension

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


@dataclass(frozen=True, slots=True)
class Bench:
    """A server to measure on."""

    conninfo: str
    extension: Extension
    size: Size

    async def connect(self) -> psycopg.AsyncConnection:
        """Return a session in autocommit mode."""
        return await psycopg.AsyncConnection.connect(self.conninfo, autocommit=True, prepare_threshold=None)


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


async def until(conn: psycopg.AsyncConnection, query: str, number: int) -> None:
    """Wait until a query of a count gives so many."""
    for _ in range(100_000):
        row = await (await conn.execute(query.encode())).fetchone()
        if row is not None and row[0] >= number:
            return
        await asyncio.sleep(0.05)
    raise TimeoutError(f"never as many as {number}: {query}")
