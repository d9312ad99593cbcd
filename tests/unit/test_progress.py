"""What a row of a progress view says, and how often a line is told."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from pgbg_orchestration.outcome import EventKind
from pgbg_orchestration.phrases import roughly
from pgbg_orchestration.postgres.activity import Command, command_of
from pgbg_orchestration.walk.onlooker import Remark, Subject


@pytest.mark.parametrize(
    ("view", "counters", "name", "percent"),
    [
        ("create_index", {"command": "REINDEX", "phase": "initializing", "blocks_total": 0}, "REINDEX", None),
        (
            "create_index",
            {"phase": "building index: sorting live tuples", "blocks_done": 9, "blocks_total": 9, "tuples_total": 5},
            "CREATE INDEX",
            None,
        ),
        (
            "create_index",
            {"phase": "building index: loading tuples in tree", "tuples_done": 1, "tuples_total": 4, "blocks_total": 9},
            "CREATE INDEX",
            25,
        ),
        (
            "create_index",
            {"phase": "waiting for writers before build", "lockers_done": 1, "lockers_total": 2},
            "CREATE INDEX",
            50,
        ),
        ("vacuum", {"phase": "scanning heap", "heap_blks_scanned": 3, "heap_blks_total": 4}, "VACUUM", 75),
        ("vacuum", {"phase": "vacuuming indexes", "indexes_processed": 1, "indexes_total": 3}, "VACUUM", 33),
        ("vacuum", {"phase": "vacuuming indexes"}, "VACUUM", None),
        ("vacuum", {"phase": "vacuuming heap", "heap_blks_vacuumed": 1, "heap_blks_total": 2}, "VACUUM", 50),
        (
            "analyze",
            {"phase": "acquiring sample rows", "sample_blks_scanned": 1, "sample_blks_total": 4},
            "ANALYZE",
            25,
        ),
        (
            "cluster",
            {"command": "VACUUM FULL", "phase": "seq scanning heap", "heap_blks_scanned": 1, "heap_blks_total": 2},
            "VACUUM FULL",
            50,
        ),
        ("repack", {"phase": "rebuilding index", "heap_blks_total": 2}, "REPACK", None),
        ("copy", {"command": "COPY FROM", "bytes_processed": 5, "bytes_total": 10}, "COPY FROM", 50),
        ("copy", {"command": "COPY TO", "bytes_processed": 5, "bytes_total": 0}, "COPY TO", None),
        ("vacuum", {"phase": None}, "VACUUM", None),
    ],
)
def test_what_a_view_says(view: str, counters: dict[str, Any], name: str, percent: int | None) -> None:
    command = command_of(view, counters)
    assert (command.name, command.phase, command.percent) == (name, counters.get("phase"), percent)


def test_a_count_that_runs_over_is_all_of_it() -> None:
    assert Command("VACUUM", "scanning heap", 11, 10).percent == 100


def line(about: str, percent: int | None = None, kind: EventKind = EventKind.PROGRESS) -> Remark:
    return Remark(kind, about, about, percent)


def lines_of(seconds: int, at: Any) -> list[int]:
    """At which seconds lines are told of a job that is looked at once a second."""
    watched = Subject(SimpleNamespace(), 0.0)  # type: ignore[arg-type]
    news = []
    for now in range(seconds):
        if watched.is_news(seen := at(now), now):
            watched.last, watched.last_at = seen, now
            news.append(now)
    return news


def test_a_percentage_is_told_every_ten_points_or_ten_seconds() -> None:
    assert lines_of(20, lambda now: line("scan", now * 5)) == [0, 2, 4, 6, 8, 10, 12, 14, 16, 18]
    assert lines_of(31, lambda now: line("scan", now // 4)) == [0, 10, 20, 30]
    assert lines_of(100, lambda _: line("scan", 50)) == [0]


def test_another_phase_is_told_at_once() -> None:
    assert lines_of(6, lambda now: line("one" if now < 4 else "two", 3)) == [0, 4]


def test_who_waits_long_is_told_of_less_and_less() -> None:
    news = lines_of(3600, lambda _: line("waits", kind=EventKind.BLOCKED))
    assert news[:3] == [0, 30, 60]
    assert len(news) < 12


def test_a_log_can_bear_what_changes_all_the_time() -> None:
    assert len(lines_of(36_000, lambda now: line(str(now), now % 100))) < 500


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.2, "0 s"), (119, "119 s"), (180, "3 min"), (7500, "2 h 5 min"), (-1, "0 s")]
)
def test_durations(seconds: float, said: str) -> None:
    assert roughly(seconds) == said
