"""Which servers a test runs on at a push."""

from __future__ import annotations

from itertools import combinations

import pytest

from tests.matrix import BUILT, COMING, MAJOR, PAST, REAL, STANDIN, asked_for, at_a_push
from tests.servers.kinds import KINDS

EVERYWHERE = ["real", "embedded", "standin20", "standin19"]
HERE = dict.fromkeys(KINDS)


def without(*missing: str) -> dict[str, str | None]:
    """A machine on which these kinds cannot be had."""
    return {kind: "not here" if kind in missing else None for kind in KINDS}


@pytest.mark.parametrize(
    ("meant", "chosen"),
    [
        (EVERYWHERE, ["real", "standin19"]),
        (["real", "embedded"], ["real"]),
        (["embedded"], ["embedded"]),
        (["real", "embedded", "standin20"], ["real", "standin20"]),
        (["standin20", "standin19"], ["standin19"]),
        ([*EVERYWHERE, *MAJOR], ["real", "standin19", "standin15"]),
    ],
)
def test_one_of_each_group(meant: list[str], chosen: list[str]) -> None:
    assert sorted(at_a_push(meant, HERE)) == sorted(chosen)


@pytest.mark.parametrize(
    ("meant", "missing", "chosen"),
    [
        (EVERYWHERE, ["real"], ["embedded", "standin19"]),
        ([*EVERYWHERE, *MAJOR], ["standin15"], ["real", "standin19", "standin14"]),
        # Kept although it cannot be had: its skip says why.
        (["real"], ["real"], ["real"]),
        (["real", "embedded"], ["real", "embedded"], ["real"]),
    ],
)
def test_what_cannot_be_had_is_replaced_or_skipped(meant: list[str], missing: list[str], chosen: list[str]) -> None:
    assert sorted(at_a_push(meant, without(*missing))) == sorted(chosen)


def test_what_is_about_the_embedded_server_runs_there_too() -> None:
    assert at_a_push(EVERYWHERE, HERE, embedded_differs=True) == ["real", "embedded", "standin19"]


def test_what_breaks_things_runs_on_the_real_server_alone() -> None:
    assert at_a_push(EVERYWHERE, HERE, any_surface=True) == ["real"]
    assert at_a_push([*EVERYWHERE, *MAJOR], HERE, any_surface=True) == ["real", "standin15"]


def test_what_breaks_things_runs_on_the_stand_in_where_there_is_nothing_else() -> None:
    assert at_a_push(EVERYWHERE, without("real"), any_surface=True) == ["embedded"]
    assert at_a_push(EVERYWHERE, without("real", "embedded"), any_surface=True) == ["real", "standin19"]
    assert at_a_push(["standin20", "standin19"], HERE, any_surface=True) == ["standin19"]


def test_no_test_vanishes_for_its_servers() -> None:
    """Whatever a test is meant for, it is collected at least once."""
    kinds = [*REAL, *STANDIN, *MAJOR]
    for size in range(1, len(kinds) + 1):
        for meant in combinations(kinds, size):
            for any_surface in (False, True):
                assert at_a_push(meant, HERE, any_surface=any_surface), meant
                assert at_a_push(meant, without(*kinds), any_surface=any_surface), meant


def test_what_is_built_from_afar_is_the_long_forms() -> None:
    assert not {*BUILT} & {*at_a_push([*EVERYWHERE, *MAJOR, *BUILT], HERE)}
    for kinds in (COMING, PAST):
        assert at_a_push([*kinds], HERE) == [*kinds]


def test_who_asks_for_what_not_every_test_runs_on() -> None:
    assert asked_for("core", (), majors=False, long=False) == set()
    assert asked_for("core", (), majors=True, long=False) == {*MAJOR}
    assert asked_for("core", (), majors=False, long=True) == {*BUILT}
    assert asked_for("contract", (), majors=True, long=True) == {*MAJOR, *BUILT}
    assert asked_for("airflow", (), majors=False, long=True) == set()
    # A test of the PostgreSQL that comes names it; without this it ran nowhere, and nobody was told.
    assert asked_for("core", ["real19"], majors=False, long=False) == {"real19"}
    assert asked_for("core", ["real15"], majors=False, long=False) == {"real15"}


def test_every_kind_is_in_one_group() -> None:
    """But for a server of the developer's own, which only ``--servers`` names."""
    assert sorted([*REAL, *STANDIN, *MAJOR, *BUILT, "installed"]) == sorted(KINDS)
