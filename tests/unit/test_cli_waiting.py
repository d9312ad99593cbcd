"""What ``pgbg wait`` makes of the jobs that it sees, and how ``pgbg history`` words a trend."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from pgbg_orchestration.cli.codes import ExitCode
from pgbg_orchestration.cli.history import trend
from pgbg_orchestration.cli.wait import Wanted, judge, newest
from pgbg_orchestration.ledger.history import ENDED_BADLY, JobEntry


def entry(state: str, job_id: str = "j", **more: Any) -> JobEntry:
    known: dict[str, Any] = dict.fromkeys((field.name for field in fields(JobEntry)), None)
    return JobEntry(**{**known, "owner": "etl", "job_id": job_id, "state": state, **more})


def wanted(*states: str, fail_on: tuple[str, ...] = ENDED_BADLY, may_come: bool = False) -> Wanted:
    return Wanted("j", None, None, None, None, states or ("committed",), fail_on, may_come)


@pytest.mark.parametrize(
    ("seen", "what", "code"),
    [
        ([], wanted(), ExitCode.NO_SUCH_JOB),
        ([], wanted(may_come=True), None),
        (["committed"], wanted(), ExitCode.OK),
        (["running", "committed"], wanted(), None),
        (["waiting"], wanted(), None),
        (["failed", "running"], wanted(), ExitCode.FAILED),
        (["lost"], wanted(), ExitCode.FAILED),
        (["cancelled", "failed"], wanted(), ExitCode.FAILED),
        (["cancelled", "committed"], wanted(), ExitCode.CANCELLED),
        (["unknown", "failed"], wanted(), ExitCode.UNKNOWN),
        (["failed"], wanted(fail_on=()), None),
        (["failed", "cancelled"], wanted(fail_on=("cancelled",)), ExitCode.CANCELLED),
        (["waiting"], wanted("running"), None),
        (["running"], wanted("running"), ExitCode.OK),
        (["committed"], wanted("running"), ExitCode.OK),
        (["failed"], wanted("running"), ExitCode.FAILED),
        (["running"], wanted("waiting"), ExitCode.OK),
        (["committed"], wanted("failed"), ExitCode.ENDED_OTHERWISE),
        (["failed"], wanted("failed"), ExitCode.OK),
        (["failed", "committed"], wanted("failed", "committed"), ExitCode.OK),
    ],
)
def test_how_a_wait_ends(seen: list[str], what: Wanted, code: ExitCode | None) -> None:
    assert judge([entry(state, str(number)) for number, state in enumerate(seen)], what) is code


def test_of_a_series_the_newest_generation_counts() -> None:
    entries = [
        entry("failed", "s#1", series="s", generation=1),
        entry("committed", "s#2", series="s", generation=2),
        entry("running", "alone"),
        entry("failed", "s#3", series="s", generation=3, owner="other"),
    ]
    assert [found.job_id for found in newest(entries)] == ["s#2", "alone", "s#3"]


@pytest.mark.parametrize(
    ("factor", "told"),
    [(None, ""), (1.0, "steady"), (0.95, "steady"), (1.5, "+50%"), (0.5, "-50%"), (40.2, "×40")],
)
def test_a_trend_in_words(factor: float | None, told: str) -> None:
    assert trend(factor) == told
