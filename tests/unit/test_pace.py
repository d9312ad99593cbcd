"""The pace of polling: a share of a job's age, between two bounds, of which a caller may set the upper one."""

from __future__ import annotations

import math

import pytest

from pgbg_orchestration import errors, pace
from pgbg_orchestration.call_options import Options


@pytest.mark.parametrize(
    ("age", "poll_interval", "poll", "look"),
    [
        (0, None, 0.01, 1),
        (25, None, 1, 2),
        (3600, None, 5, 15),
        (25, 0.5, 0.5, 1),
        (0, 0.01, 0.01, 1),
        (3600, 2, 2, 2),
        (3600, 60, 60, 60),
        (25, 60, 1, 2),
    ],
)
def test_pauses_grow_with_the_age_up_to_the_interval(
    age: float, poll_interval: float | None, poll: float, look: float
) -> None:
    assert pace.poll(age, poll_interval) == pytest.approx(poll)
    assert pace.look(age, poll_interval) == pytest.approx(look)


@pytest.mark.parametrize("value", [0, -1, 0.001, math.inf, math.nan])
def test_an_interval_that_makes_no_sense_is_refused(value: float) -> None:
    with pytest.raises(errors.InvalidJob, match="poll_interval"):
        Options(poll_interval=value)


def test_a_session_polls_soon_and_then_for_a_share_of_its_time() -> None:
    left, polls = pace.POLLING_AT_ONCE, 0
    while left > 0:
        left, polls = pace.polling_left(left, since=0.01, spent=0.002), polls + 1
    assert polls > 20  # at once, as long as there is something left
    waits = -left / pace.POLLING
    assert pace.polling_left(left, since=waits, spent=0) == pytest.approx(0)
    assert pace.polling_left(left, since=3600, spent=0) == pace.POLLING_AT_ONCE  # no more than that is saved
