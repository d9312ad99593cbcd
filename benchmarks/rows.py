"""A line of the table, and how it is held against the one that was accepted."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

NOISE = 1.25
"""How much more than the accepted ratio a measure may be before that counts as falling behind."""


class Point(NamedTuple):
    """A point of a chart: a measure at a number of jobs."""

    chart: str
    x: int
    y: float


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table.

    Attributes
    ----------
    measure:
        What was measured, with its unit.
    value:
        Ours.
    peer, ratio:
        What it is measured against, and ours divided by that: of times more than 1 is slower; None where the value is a
        share or a count by itself.
    more_is_better:
        Whether the ratio is one of rates, and not of times.
    points:
        What charts show of it.
    """

    measure: str
    value: str
    peer: str | None = None
    ratio: float | None = None
    more_is_better: bool = False
    points: tuple[Point, ...] = ()

    def is_behind(self, accepted: float) -> bool:
        """Tell whether its ratio is worse than an accepted one by more than the noise."""
        assert self.ratio is not None
        return self.ratio * NOISE < accepted if self.more_is_better else self.ratio > accepted * NOISE


def accept(path: Path, rows: Sequence[Row]) -> None:
    """Write the ratios of these rows into a file, as those that later runs are held against; others in it stay."""
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    ratios = before | {row.measure: round(row.ratio, 3) for row in rows if row.ratio is not None}
    path.write_text(json.dumps(ratios, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def behind(path: Path, rows: Sequence[Row]) -> list[str]:
    """Return what has fallen behind the accepted ratios by more than the noise, a sentence each.

    Parameters
    ----------
    path:
        What :func:`accept` wrote. A measure that it does not have is not judged.
    rows:
        The rows of this run.
    """
    accepted: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))
    return [
        f"{row.measure}: {row.ratio:.2f} ×, accepted is {accepted[row.measure]:.2f} ×"
        for row in rows
        if row.ratio is not None and row.measure in accepted and row.is_behind(accepted[row.measure])
    ]
