"""How times and counts are written for people, in logs and on the terminal alike."""

from __future__ import annotations

from .outcome import Outcome

COUNTED = frozenset({"SELECT", "INSERT", "UPDATE", "DELETE", "MERGE", "COPY", "FETCH", "MOVE"})
"""First words of the command tags that come with a count of rows (PostgreSQL manual, 54.7, CommandComplete)."""


def duration(seconds: float) -> str:
    """Return a duration as people write it, such as ``12 ms``, ``3.4 s``, ``4:05 min`` or ``2:03:10 h``."""
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02} h" if hours else f"{minutes}:{rest:02} min"


def roughly(seconds: float) -> str:
    """Return a duration as a person says it: ``8 s``, ``3 min``, ``2 h 5 min``.

    For an estimate, and for a wait that goes on: :func:`duration` would pretend to know it to the tenth of a second.
    """
    whole = max(round(seconds), 0)
    if whole < 120:
        return f"{whole} s"
    minutes = round(whole / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def count(row_count: int | None, command_tag: str | None) -> str | None:
    """Return a count of rows in words; None where none is known, or the command counts none and says 0."""
    words = (command_tag or "").split()
    if row_count is None or (row_count == 0 and words and words[0] not in COUNTED):
        return None
    return f"{row_count:,} row{'' if row_count == 1 else 's'}"


def took(outcome: Outcome) -> str | None:
    """Return how long the job's worker was at it; None where that is not known."""
    if outcome.started_at is None or outcome.finished_at is None:
        return None
    return duration(max((outcome.finished_at - outcome.started_at).total_seconds(), 0))


def summary(outcome: Outcome) -> list[str]:
    """Return what a job that committed did: its command tag, its rows, how long it took; what is known of these."""
    parts = [outcome.command_tag, count(outcome.row_count, outcome.command_tag), took(outcome)]
    return [part for part in parts if part]
