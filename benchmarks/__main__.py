"""Measure on an embedded server of its own, and print tables: ``make bench`` (ARGS="--rounds 50").

Every figure is a median of rounds in which the ways take turns, so that a machine's changing speed falls on all alike;
quote the ratios and not the milliseconds.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable

import psycopg
from rich.console import Console
from rich.table import Table

from pgbg_orchestration import Job, Launcher
from pgbg_orchestration.embedded.server import EmbeddedServer
from pgbg_orchestration.ledger import install
from pgbg_orchestration.postgres.pg_background import Extension

Way = Callable[[], Awaitable[None]]
console = Console()


async def measure(ways: dict[str, Way], rounds: int) -> dict[str, float]:
    """Return the median seconds of each way."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            began = time.perf_counter()
            await way()
            if number:  # the first round warms up
                taken[name].append(time.perf_counter() - began)
    return {name: statistics.median(times) for name, times in taken.items()}


def show(title: str, medians: dict[str, float], *, jobs: int = 1) -> None:
    """Print one comparison; the first way is what the others are measured against."""
    table = Table(title=title, title_justify="left")
    for column in ("way", "ms a job", "ratio"):
        table.add_column(column, justify="left" if column == "way" else "right")
    first = next(iter(medians.values()))
    for name, seconds in medians.items():
        table.add_row(name, f"{seconds / jobs * 1000:.2f}", f"{seconds / first:.2f}")
    console.print(table)


async def raw_launch(conn: psycopg.AsyncConnection, extension: Extension, sql: str) -> None:
    """Run SQL in a worker as one would by hand: without receipt, without a look, without a retry."""
    handle = await extension.launch(conn, sql, label="bench")
    while not (await extension.wait(conn, handle, 60_000)):
        pass
    await extension.result_infos(conn, [handle])
    await extension.detach(conn, handle)


async def compare(conninfo: str, version: str, rounds: int) -> None:
    """Measure a short job, a second's job, and many at once."""
    extension = Extension(version, "public")
    async with await psycopg.AsyncConnection.connect(conninfo, autocommit=True) as conn, Launcher(conninfo) as launcher:

        async def plain(sql: str) -> None:
            await conn.execute(sql.encode())

        async def ours(sql: str, **kind: str) -> None:
            await launcher.run(Job(sql, **kind))  # type: ignore[arg-type]

        def ways(sql: str) -> dict[str, Way]:
            return {
                "psycopg, on an open connection": lambda: plain(sql),
                "pg_background by hand": lambda: raw_launch(conn, extension, sql),
                "this package, kind receipt": lambda: ours(sql),
                "this package, kind session": lambda: ours(sql, kind="session"),
                "this package, kind supervised": lambda: ours(sql, kind="supervised"),
            }

        show("A job that does nothing", await measure(ways("select 1"), rounds))
        show("A job of a second", await measure(ways("select pg_sleep(1)"), max(rounds // 10, 3)))

        async def by_hand_in_turn(number: int) -> None:
            for _ in range(number):
                await raw_launch(conn, extension, "select 1")

        async def together(number: int) -> None:
            await asyncio.gather(*(launcher.run(Job("select 1")) for _ in range(number)))

        many = 100
        both: dict[str, Way] = {
            "pg_background by hand, one after the other": lambda: by_hand_in_turn(many),
            "this package, at once": lambda: together(many),
        }
        show(f"{many} jobs that do nothing", await measure(both, max(rounds // 10, 3)), jobs=many)


def main() -> None:
    """Start a server, measure, stop it."""
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    rounds = parser.parse_args().rounds
    with EmbeddedServer() as server:
        conninfo = server.create_database("bench")
        install.install(conninfo)
        console.print(f"pg_background: {server.extension}")
        asyncio.run(compare(conninfo, server.extension.split()[-1], rounds))


if __name__ == "__main__":
    main()
