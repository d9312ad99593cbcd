"""Texts that are run again and again, as those of most jobs are: split once."""

from __future__ import annotations

from functools import lru_cache

from .split import Statement, split

SHORT = 10_000  # characters; longer ones would stay in memory for little
TEXTS = 128


def split_again(sql: str) -> tuple[Statement, ...]:
    """Return what :func:`split` does. The text stays in memory for a while: give it none with values bound in it."""
    return _split(sql) if len(sql) <= SHORT else split(sql)


_split = lru_cache(maxsize=TEXTS)(split)
