"""``pgbg history``: how long jobs take, and how they fail, by label or by series."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pgbg_orchestration.ledger.history import Durations
from pgbg_orchestration.phrases import duration

from .jobs import ready_launcher
from .screen import ago, ending, err, out, plain, print_json
from .shared_options import Dsn, Json, Schema, seconds_option

STEADY = 0.1
"""The share by which two medians may differ and still count as the same."""


class By(StrEnum):
    """What jobs are counted together."""

    LABEL = "label"
    SERIES = "series"


def history(
    by: Annotated[By, typer.Option("--by", help="What counts as the same work.")] = By.LABEL,
    label: Annotated[str | None, typer.Option("--label", metavar="PATTERN", help="Label; * and ? stand in.")] = None,
    series: Annotated[str | None, typer.Option("--series", metavar="PATTERN", help="Series; * and ? stand in.")] = None,
    since: Annotated[
        float | None, seconds_option("--since", unit=True, help="Only what was launched since then, such as 30d.")
    ] = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="At most so many lines, the latest first.")] = 50,
    dsn: Dsn = None,
    schema: Schema = "pgbg",
    json: Json = False,
) -> None:
    """Tell how long jobs took, over time, and how they failed: median, 95th percentile, trend, SQLSTATEs.

    Times are those of jobs that committed, from the beginning of their work to its end.
    """
    with ending(json):
        start = None if since is None else datetime.now(UTC) - timedelta(seconds=since)
        filters = {"by": by.value, "label": label, "series": series, "since": start}
        found = asyncio.run(_ask(dsn or "", schema, {**filters, "limit": limit + 1}))
        more, found = len(found) > limit, found[:limit]
        if json:
            print_json([{**asdict(line), "trend": line.trend} for line in found])
        elif not found:
            err.print(Text("no jobs that this login may see", "dim"))
        else:
            _print(found, by)
            if more:
                err.print(Text(f"only the latest {limit}: more with --limit", "dim"))


async def _ask(dsn: str, schema: str, filters: dict[str, Any]) -> list[Durations]:
    async with ready_launcher(dsn, schema) as launcher:
        return await launcher.ledger.durations(**filters)


def _print(lines: list[Durations], by: By) -> None:
    fits = out.is_terminal
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0), pad_edge=False, expand=fits)
    table.add_column(by.value.upper(), no_wrap=True, overflow="ellipsis", ratio=3)
    for name in ("JOBS", "COMMITTED", "MEDIAN", "P95", "TREND"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("LAST", justify="right", no_wrap=True)
    table.add_column("FAILURES", no_wrap=True, overflow="ellipsis", ratio=2)
    for line in lines:
        table.add_row(
            Text(plain(line.name)),
            f"{line.jobs:,}",
            f"{line.committed:,}",
            _time(line.median),
            _time(line.p95),
            trend(line.trend),
            ago(line.last_at),
            Text(plain(" ".join(f"{what} ×{number}" for what, number in line.failures.items())), "red"),
        )
    (out if fits else Console(width=10_000, highlight=False)).print(table, crop=False)


def _time(seconds: float | None) -> str:
    return "" if seconds is None else duration(max(seconds, 0))


def trend(factor: float | None) -> str:
    """Return a trend in words: by how much the later half took longer or shorter than the earlier one."""
    if factor is None:
        return ""
    if abs(factor - 1) <= STEADY:
        return "steady"
    return f"{factor - 1:+.0%}" if factor < 10 else f"×{factor:.0f}"
