"""Measure on an embedded server of its own, print a table, and write it as Markdown: ``make bench``.

``ARGS="--smoke"`` runs the whole of it with next to no work. Every ratio is against a named peer in the same run; quote
the ratios, and not the milliseconds of another machine. A run fails where a ratio falls behind the accepted one
(``accepted.json``) by more than the noise; ``ARGS="--accept"`` accepts those of this run.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from pathlib import Path

import psycopg
from rich.console import Console
from rich.table import Table

from benchmarks import growth, imports, measures, orchestrated, output, plots
from benchmarks.bench import SMOKE, WHOLE, Bench, Size
from benchmarks.rows import Row, accept, behind
from pgbg_orchestration.embedded.server import EmbeddedServer
from pgbg_orchestration.ledger import install
from pgbg_orchestration.postgres.pg_background import Extension

Measure = Callable[[Bench], Awaitable[list[Row]]]


def in_thread(measure: Callable[[Bench], list[Row]]) -> Measure:
    """Return a measure that blocks as one that does not."""
    return lambda bench: asyncio.to_thread(measure, bench)


GROUPS: Mapping[str, Measure] = {
    "one_job": measures.one_job,
    "many_jobs": measures.many_jobs,
    "ends": measures.ends,
    "waiting": measures.waiting,
    "output": output.rows_and_notices,
    "imports": in_thread(imports.imports),
    "history": measures.history,
    "dagster": in_thread(orchestrated.dagster),
    "airflow": in_thread(orchestrated.airflow),
    # Simulates the extension: the database is good for nothing else afterwards.
    "growth": growth.waiting,
}
"""What is measured, in this order, each against a named peer on the same server in the same run."""
ACCEPTED = Path(__file__).with_name("accepted.json")


async def run(conninfo: str, version: str, size: Size, only: list[str]) -> list[Row]:
    """Take the measures in turn."""
    bench = Bench(conninfo, Extension(version, "public"), size)
    return [row for name, measure in GROUPS.items() if name in only for row in await measure(bench)]


def as_markdown(rows: list[Row], machine: str) -> str:
    """Return the table as the documentation has it."""
    lines = ["| measure | ours | against | ratio |", "|---|---|---|---|"]
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.2f} ×"
        lines.append(f"| {row.measure} | {row.value} | {row.peer or ''} | {ratio} |")
    return "\n".join([*lines, "", machine, ""])


def main() -> None:
    """Start a server, measure, stop it."""
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="next to no work: that the benchmark itself runs")
    parser.add_argument("--only", choices=GROUPS, action="append", help="only this group of measures")
    parser.add_argument("--queries", type=int, help="how many queries of a second as tasks and in an asset, not 200")
    parser.add_argument("--write", type=Path, help="a file for the table as Markdown")
    parser.add_argument("--plot", type=Path, help="a file for the charts as SVG")
    parser.add_argument("--accept", action="store_true", help="have later runs held against the ratios of this one")
    given = parser.parse_args()
    size = SMOKE if given.smoke else WHOLE
    size = size if given.queries is None else replace(size, queries=given.queries)
    with EmbeddedServer(max_worker_processes=size.waiting + 60) as server:
        conninfo = server.create_database("bench")
        install.install(conninfo)
        rows = asyncio.run(run(conninfo, server.extension.split()[-1], size, given.only or list(GROUPS)))
        with psycopg.connect(conninfo) as conn:
            version = conn.execute("show server_version").fetchone()
        machine = (
            f"{os.cpu_count()} cores, {platform.system()} {platform.machine()}, Python {platform.python_version()}, "
            f"psycopg {psycopg.__version__}, PostgreSQL {version[0] if version else '?'}, {server.extension}."
        )
    table = Table(title=machine, title_justify="left")
    for column in ("measure", "ours", "against", "ratio"):
        table.add_column(column)
    for row in rows:
        table.add_row(row.measure, row.value, row.peer or "", "" if row.ratio is None else f"{row.ratio:.2f}")
    Console().print(table)
    if given.write:
        given.write.write_text(as_markdown(rows, machine), encoding="utf-8")
    if given.plot:
        plots.write(given.plot, rows, machine)
    if given.smoke:
        return
    if given.accept:
        accept(ACCEPTED, rows)
    elif fallen := behind(ACCEPTED, rows):
        raise SystemExit("\n".join(["fallen behind what was accepted (benchmarks/accepted.json):", *fallen]))


if __name__ == "__main__":
    main()
