"""What a success is told as."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from pgbg_orchestration import Outcome, phrases

BEGAN = datetime(2013, 1, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    ("tag", "rows", "told"),
    [
        ("INSERT", 1, "INSERT, 1 row, 2.5 s"),
        ("INSERT", 0, "INSERT, 0 rows, 2.5 s"),
        ("SELECT", 336_776, "SELECT, 336,776 rows, 2.5 s"),
        ("CREATE INDEX", 0, "CREATE INDEX, 2.5 s"),
        ("CREATE TABLE AS", 3, "CREATE TABLE AS, 3 rows, 2.5 s"),
        (None, 0, "0 rows, 2.5 s"),
        (None, None, "2.5 s"),
    ],
)
def test_summary(tag: str | None, rows: int | None, told: str) -> None:
    ended = BEGAN + timedelta(seconds=2.5)
    outcome = Outcome("id", "label", row_count=rows, command_tag=tag, started_at=BEGAN, finished_at=ended)
    assert ", ".join(phrases.summary(outcome)) == told


def test_a_time_that_is_not_known_is_not_told() -> None:
    assert phrases.summary(Outcome("id", "label", command_tag="INSERT", row_count=2, started_at=BEGAN)) == [
        "INSERT",
        "2 rows",
    ]
