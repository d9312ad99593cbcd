"""The protocol of supervised jobs, searched exhaustively: nothing is wrong, and each way to break it is noticed.

No server takes part. The search drives the very ``judge`` that the walk of a job asks.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from pgbg_orchestration.verdict import Evidence, Receipt, Report, Step, judge
from tests.chaos.search import search
from tests.chaos.supervised_protocol import Judge, Supervision

ALONE = Supervision("one caller, everything once", callers=1, kill_supervisor=1, sql_error=1, ask=1, crash=1)
VERIFIED = replace(ALONE, name="one caller, everything once, verify_sql", verify=True)
FAILING = Supervision("two callers, the SQL fails", sql_error=1)
KILLED = Supervision("two callers, a supervisor is killed, verify_sql", verify=True, kill_supervisor=1)

SOUND = [
    ALONE,
    VERIFIED,
    FAILING,
    Supervision("one caller, a restart, verify_sql", callers=1, verify=True, restart=1, sql_error=1),
    Supervision("one caller, two supervisors are killed, verify_sql", callers=1, verify=True, kill_supervisor=2),
]
LARGE = [
    KILLED,
    Supervision("two callers, a supervisor is killed", kill_supervisor=1),
    Supervision("two callers, the SQL fails, one dies", sql_error=1, crash=1),
    Supervision("two callers, one is asked to end", ask=1),
    Supervision("two callers, a restart", restart=1),
]


@pytest.mark.slow
@pytest.mark.parametrize("scenario", SOUND, ids=lambda scenario: scenario.name)
def test_nothing_is_wrong(scenario: Supervision) -> None:
    found = search(scenario)
    print(found)
    assert found.wrong is None, str(found)


@pytest.mark.chaos
@pytest.mark.parametrize("scenario", LARGE, ids=lambda scenario: scenario.name)
def test_nothing_is_wrong_in_large(scenario: Supervision) -> None:
    """Up to hundreds of thousands of states each."""
    test_nothing_is_wrong(scenario)


BROKEN = [
    ("what may begin is forgotten", VERIFIED),
    ("one look at a claim", FAILING),
    ("failures are not told", FAILING),
    pytest.param("verify_sql said so of another claim", KILLED, marks=pytest.mark.chaos),
]


@pytest.mark.parametrize(("broken", "scenario"), BROKEN)
def test_a_broken_protocol_is_found(broken: str, scenario: Supervision) -> None:
    assert search(scenario).wrong is None, "the scenario is wrong before anything is broken"
    found = search(replace(scenario, broken=frozenset({broken})))
    print(found)
    assert found.wrong is not None


def _claim_is_relaunched(seen: Evidence) -> Step:
    step = judge(seen)
    return Step.SETTLE if step is Step.UNKNOWN else step


def _marker_is_overlooked(seen: Evidence) -> Step:
    return judge(replace(seen, found_by_name=False))


def _ended_is_success(seen: Evidence) -> Step:
    return Step.COMMITTED if seen.report is Report.ENDED else judge(seen)


def _cancelled_while_claimed(seen: Evidence) -> Step:
    return Step.CANCELLED if seen.receipt is Receipt.LAUNCHING and judge(seen) is Step.SIGNAL else judge(seen)


VERDICTS: list[tuple[Judge, Supervision]] = [
    (_claim_is_relaunched, ALONE),
    (_marker_is_overlooked, VERIFIED),
    (_ended_is_success, ALONE),
    (_cancelled_while_claimed, ALONE),
]


@pytest.mark.parametrize(
    ("verdict", "scenario"), VERDICTS, ids=[verdict.__name__.strip("_") for verdict, _ in VERDICTS]
)
def test_a_broken_verdict_is_found(verdict: Judge, scenario: Supervision) -> None:
    assert search(scenario).wrong is None, "the scenario is wrong before anything is broken"
    found = search(replace(scenario, judge=verdict))
    print(found)
    assert found.wrong is not None
