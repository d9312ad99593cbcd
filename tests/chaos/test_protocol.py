"""The protocol, searched exhaustively: nothing is wrong with it, and each way to break it is noticed.

No server takes part. The search drives the very ``judge`` that the walk of a job asks.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import pytest

from pgbg_orchestration.verdict import TURNED_AWAY, Evidence, Intent, Receipt, Report, Step, judge
from tests.chaos.protocol import Judge, Scenario
from tests.chaos.search import Model, search
from tests.chaos.supervised_protocol import Supervision

SAME = (0, 0)
"""Two launchers of one job."""
OLD_AND_NEW = (0, 1)
"""Launchers of two generations of one series."""

SOUND = [
    Scenario("one launcher, everything once but lost handles", (0,), (0,), kill_worker=1, sql_error=1, ask=1, crash=1),
    Scenario("two launchers, a launch call is lost on its way", SAME, lose_launch=1),
    Scenario("two launchers, the SQL fails, one dies", SAME, sql_error=1, crash=1),
    Scenario("two launchers, a worker is killed, one dies", SAME, kill_worker=1, crash=1),
    Scenario("two launchers and a canceller", SAME, (0,)),
    Scenario("two launchers, one is asked to end", SAME, ask=1),
    Scenario("a newer generation, a launcher dies", OLD_AND_NEW, crash=1),
    Scenario("a newer generation, a worker is killed", OLD_AND_NEW, kill_worker=1, rejections=2),
    Scenario("a newer generation, the SQL fails", OLD_AND_NEW, sql_error=1, rejections=2),
    Scenario("a newer generation that waits, a launcher dies", OLD_AND_NEW, wait_for_older=True, crash=1),
    Scenario("a newer generation, and the older is cancelled", OLD_AND_NEW, (0,)),
    Scenario("a newer generation, repeatable read, a launcher dies", OLD_AND_NEW, repeatable_read=True, crash=1),
    # A mark that is lifted while a worker is refused for it.
    Scenario("a cancel that is lifted", (0,), (0,), lifting=(0,), crash=1),
    # Workers whose handles were lost, and which may start at any later moment.
    Scenario("a lost session, and the next worker fails", (0,), lose_session=1, sql_error=1),
    Scenario("a lost session, and the next worker is killed", (0,), lose_session=1, kill_worker=1),
    Scenario("a lost session, and the next worker is cancelled", (0,), (0,), lose_session=1),
    Scenario("launches lost as often as may be", (0,), (0,), lose_session=1, lose_launch=1),
]


@pytest.mark.slow
@pytest.mark.parametrize("scenario", SOUND, ids=lambda scenario: scenario.name)
def test_nothing_is_wrong(scenario: Scenario) -> None:
    found = search(scenario)
    print(found)
    assert found.wrong is None, str(found)


LARGE = [
    Scenario("two launchers, one dies and one loses its session", SAME, crash=1, lose_session=1),
    Scenario("a cancel that is lifted, a newer generation", OLD_AND_NEW, (0,), lifting=(0,)),
    Scenario("a lost session, a newer generation", OLD_AND_NEW, lose_session=1),
    Scenario("a newer generation, one is asked to end", OLD_AND_NEW, ask=1),
    Scenario("two launchers, a launch call is lost on its way, one dies", SAME, lose_launch=1, crash=1),
    Scenario("two launchers, one is asked to end, one dies", SAME, ask=1, crash=1),
    Scenario(
        "a lost session, the next worker is killed, two launchers", SAME, lose_session=1, kill_worker=1, rejections=2
    ),
    Scenario("a lift, a newer generation, repeatable read", OLD_AND_NEW, (0,), lifting=(0,), repeatable_read=True),
]


@pytest.mark.chaos
@pytest.mark.parametrize("scenario", LARGE, ids=lambda scenario: scenario.name)
def test_nothing_is_wrong_in_large(scenario: Scenario) -> None:
    """A hundred thousand states and more each."""
    test_nothing_is_wrong(scenario)


TWINS: list[Model] = [
    Scenario("all that may go wrong", SAME, (0,), crash=1, lose_session=1, lose_launch=1, kill_worker=1, sql_error=1),
    Supervision("all that may go wrong", crash=1, kill_supervisor=1, restart=1, sql_error=1, ask=1),
]


@pytest.mark.parametrize("scenario", TWINS, ids=["of launchers", "of callers"])
def test_twins_do_the_same(scenario: Model) -> None:
    """The search takes a state for its twin: what can happen to the one is what can happen to the other."""

    def moves(state: Any) -> Counter[tuple[bool, bool, frozenset[Any]]]:
        return Counter(
            (move.fault, move.wrong is None, frozenset((move.after, scenario.twin(move.after))))
            for move in scenario.moves(state)
        )

    states = [scenario.start()]
    seen: set[Any] = set(states)
    differ = 0
    for state in states:
        twin = scenario.twin(state)
        differ += twin != state
        assert moves(twin) == moves(state)
        later = {move.after for move in scenario.moves(state)} - seen
        states.extend(later if len(states) < 3_000 else ())
        seen |= later
    assert differ > 1_000


def test_one_of_twins_is_searched() -> None:
    whole = replace(SOUND[2], jobs=(0, 0))
    assert search(whole).states < 0.6 * search(_Untwinned(whole)).states


@dataclass(frozen=True)
class _Untwinned:
    """A scenario whose states are taken for what they are."""

    scenario: Scenario

    def __getattr__(self, name: str) -> Any:
        return getattr(self.scenario, name)

    def twin(self, _state: Any) -> None:
        """Nobody's."""


# Broken on purpose --------------------------------------------------------------------------------------------------

BROKEN = [
    ("no series lock", Scenario("", OLD_AND_NEW)),
    ("no receipt", Scenario("", SAME)),
    # Each of the two is enough: the check sees a newer generation, and the mark outlives an old snapshot.
    ("no generation check and older not marked", Scenario("", OLD_AND_NEW)),
    ("no registration", Scenario("", OLD_AND_NEW)),
    ("older not marked", Scenario("", OLD_AND_NEW, repeatable_read=True)),
    ("older marked before registration", Scenario("", OLD_AND_NEW, repeatable_read=True)),
    ("receipt before lock", Scenario("", SAME, kill_worker=1)),
    ("report last", Scenario("", SAME)),
    ("lock goes before the commit", Scenario("", SAME)),
    ("mark does not wait", Scenario("", SAME, (0,))),
    ("cancel without a mark", Scenario("", (0,), (0,))),
]


@pytest.mark.parametrize(("broken", "scenario"), BROKEN, ids=[name for name, _ in BROKEN])
def test_a_broken_protocol_is_found(broken: str, scenario: Scenario) -> None:
    assert search(scenario).wrong is None, "the scenario is wrong before anything is broken"
    found = search(replace(scenario, broken=frozenset(broken.split(" and "))))
    print(found)
    assert found.wrong is not None


def _ended_is_success(seen: Evidence) -> Step:
    return Step.COMMITTED if seen.report is Report.ENDED else judge(seen)


def _error_is_the_end(seen: Evidence) -> Step:
    return Step.FAILED if seen.report is Report.FAILED else judge(seen)


def _turned_away_is_failure(seen: Evidence) -> Step:
    return Step.FAILED if seen.sqlstate == TURNED_AWAY and seen.receipt is Receipt.NONE else judge(seen)


def _lost_handle_is_lost(seen: Evidence) -> Step:
    return Step.LOST if seen.report is Report.GONE else judge(seen)


def _lost_handle_is_waited_for(seen: Evidence) -> Step:
    return Step.WAIT if seen.report is Report.GONE and seen.receipt is Receipt.NONE else judge(seen)


def _cancelled_when_asked(seen: Evidence) -> Step:
    return Step.CANCELLED if seen.intent is not Intent.NONE else judge(seen)


def _without_mark(seen: Evidence) -> Step:
    step = judge(seen)
    return (Step.SUPERSEDED if seen.intent is Intent.NONE else Step.CANCELLED) if step is Step.MARK else step


def _free_lock_is_lost(seen: Evidence) -> Step:
    return Step.LOST if judge(seen) is Step.WAIT and seen.report is Report.RUNNING else judge(seen)


def _every_mark_is_lifted(seen: Evidence) -> Step:
    return Step.LIFT if seen.receipt is Receipt.CANCELLED and not seen.superseded else judge(seen)


def _strays_are_forgotten(seen: Evidence) -> Step:
    return judge(replace(seen, stray=False))


VERDICTS: list[tuple[Judge, Scenario]] = [
    (_ended_is_success, Scenario("", (0,), kill_worker=1)),
    (_error_is_the_end, Scenario("", SAME)),
    (_turned_away_is_failure, Scenario("", SAME)),
    (_lost_handle_is_lost, Scenario("", (0,), lose_session=1)),
    (_lost_handle_is_waited_for, Scenario("", (0,), lose_launch=1)),
    (_cancelled_when_asked, Scenario("", (0,), ask=1)),
    (_without_mark, Scenario("", (0,), ask=1)),
    (_without_mark, Scenario("", OLD_AND_NEW)),
    (_free_lock_is_lost, Scenario("", SAME)),
    (_strays_are_forgotten, Scenario("", (0,), lose_session=1, sql_error=1)),
    (_every_mark_is_lifted, Scenario("", (0,), (0,))),
]


@pytest.mark.parametrize(
    ("verdict", "scenario"), VERDICTS, ids=[verdict.__name__.strip("_") for verdict, _ in VERDICTS]
)
def test_a_broken_verdict_is_found(verdict: Judge, scenario: Scenario) -> None:
    assert search(scenario).wrong is None, "the scenario is wrong before anything is broken"
    found = search(replace(scenario, judge=verdict))
    print(found)
    assert found.wrong is not None
