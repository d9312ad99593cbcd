"""Durations as PostgreSQL's settings spell them."""

from __future__ import annotations

import re
from functools import lru_cache

_VALUE = re.compile(r"\s*\+?(\d+(?:\.\d*)?|\.\d+)\s*(us|ms|s|min|h|d)?\s*")
_MILLISECONDS = {"us": 0.001, "ms": 1, "s": 1000, "min": 60_000, "h": 3_600_000, "d": 86_400_000}


@lru_cache(maxsize=256)
def milliseconds(value: str) -> float | None:
    """Return the milliseconds of a setting that counts in them without a unit; None for what is no duration.

    Source: PostgreSQL manual 19.1.1 "Parameter Names and Values".

    Parameters
    ----------
    value:
        For example ``300``, ``300ms``, ``1.5 min``.
    """
    match = _VALUE.fullmatch(value)
    return float(match[1]) * _MILLISECONDS[match[2] or "ms"] if match else None
