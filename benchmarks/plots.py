"""The rows of a run as charts: one SVG for all, drawn by Rich, which the command line uses for its tables anyway."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path

from rich.bar import Bar
from rich.console import Console
from rich.table import Table

from .rows import Row

WIDTH = 48  # characters of the longest bar
_FONTS = re.compile(r"<!--.*?-->\s*|@font-face \{.*?\}\s*", re.DOTALL)
"""What Rich has every viewer fetch from another host; a picture asks nobody for anything."""


def write(path: Path, rows: Sequence[Row], machine: str) -> None:
    """Write an SVG: the ratios against their peers, and each measure that grows with a number of jobs."""
    console = Console(record=True, file=io.StringIO(), width=150)
    ratios = [row for row in rows if row.ratio is not None]
    if ratios:
        console.print(chart("Ours ÷ the peer in the same run", [(row.measure, row.ratio or 0) for row in ratios], "×"))
    for title, points in charts(rows).items():
        console.print(chart(title, points, ""))
    console.print(machine)
    path.write_text(_FONTS.sub("", console.export_svg(title="Performance")))


def charts(rows: Sequence[Row]) -> dict[str, list[tuple[str, float]]]:
    """Return the points of each chart, by its title."""
    found: dict[str, list[tuple[str, float]]] = {}
    for point in (point for row in rows for point in row.points):
        found.setdefault(point.chart, []).append((f"{point.x:,}", point.y))
    return found


def chart(title: str, points: Sequence[tuple[str, float]], unit: str) -> Table:
    """Return a bar for each point."""
    most = max((y for _, y in points), default=0) or 1
    table = Table(title=title, title_justify="left", box=None, show_header=False)
    for name, y in points:
        table.add_row(name, Bar(most, 0, y, width=WIDTH, color="cyan"), f"{y:.3g} {unit}".rstrip())
    return table
