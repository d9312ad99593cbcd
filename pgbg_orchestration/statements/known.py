"""SQL texts that come again and again, as those of most jobs do, are split once."""

from __future__ import annotations

from functools import lru_cache

from .split import Statement, split

CACHED_CHARACTERS = 10_000  # of a text; longer ones take memory, and come again less often
CACHED_TEXTS = 128


def split_again(sql: str) -> tuple[Statement, ...]:
    """Return what :func:`split` does. The text stays in memory for a while: give it none with values bound in it."""
    return _split(sql) if len(sql) <= CACHED_CHARACTERS else split(sql)


_split = lru_cache(maxsize=CACHED_TEXTS)(split)
