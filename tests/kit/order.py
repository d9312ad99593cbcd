"""The order in which the test processes begin the files: the longest first.

Otherwise one process is left at the end with a long file, and the others wait for it. A file's length is estimated
from what its tests ask for, so no list of measured seconds has to be kept up to date.
"""

from __future__ import annotations

from collections import defaultdict

import pytest

SLOW = 20.0
"""Seconds that a test marked ``slow`` is taken to last."""
ON_A_SERVER = 0.7
"""Seconds of a test that asks for a server."""
BY_ITSELF = 0.02
"""Seconds of any other."""


def longest_first(items: list[pytest.Item]) -> None:
    """Put the tests of the longest file first; within a file they keep their order."""
    lengths: defaultdict[str, float] = defaultdict(float)
    for item in items:
        lengths[file_of(item)] += length(item)
    items.sort(key=lambda item: (-lengths[file_of(item)], file_of(item)))


def length(item: pytest.Item) -> float:
    """Return about how many seconds a test lasts."""
    if item.get_closest_marker("slow"):
        return SLOW
    return ON_A_SERVER if "server_kind" in getattr(item, "fixturenames", ()) else BY_ITSELF


def file_of(item: pytest.Item) -> str:
    """Return the file of a test, as its id begins."""
    return item.nodeid.split("::", maxsplit=1)[0]
