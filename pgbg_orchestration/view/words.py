"""How the views write times, numbers and errors: the same in the terminal and on the page."""

from __future__ import annotations

from dataclasses import fields
from datetime import datetime

from pgbg_orchestration.ledger.history import JobEntry

from .lines import Line

SIGNS = {
    "running": "▶",
    "waiting": "…",
    "committed": "✓",
    "cancelled": "⊘",
    "failed": "✗",
    "lost": "✗",
    "unknown": "?",
    "by hand": "☞",
}
"""A sign for each state, so that colour is never all that tells them apart."""


BLOCKERS_QUERY = "blocker's query"
"""The one fact that is somebody's SQL, with its values."""


def took(seconds: float | None) -> str:
    """Return a duration in words: ``3.2 s``, ``4 m 05 s``, ``2 h 07 m``, ``3 d 04 h``; empty for None."""
    if seconds is None:
        return ""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    if minutes < 60:
        return f"{minutes} m {rest:02} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {minutes:02} m"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours:02} h"


def progress(line: Line) -> str:
    """Return how far a line's command is, with a bar where its phase counts something."""
    if line.percent is None:
        return line.progress
    full = round(line.percent / 10)
    return f"{'█' * full}{'░' * (10 - full)} {line.percent} % {line.progress}"


def facts_of(line: Line) -> list[tuple[str, str]]:
    """Return all that is known of a line, as names and values; what is not known is left out."""
    known: list[tuple[str, object]] = [
        ("state", f"{SIGNS[line.state]} {line.state}"),
        ("wanted by", line.by_orchestrator),
    ]
    if line.job is not None:
        shown = {"owner", "job_id", "label", "series"}
        names = [field.name for field in fields(JobEntry)]
        known += [(name, getattr(line.job, name)) for name in sorted(names, key=lambda name: name not in shown)]
    if line.worker is not None:
        known += [
            ("worker's login", line.worker.login),
            ("application_name", line.worker.application_name),
            ("worker began at", line.worker.began_at),
        ]
    known += [("progress", progress(line)), ("waits for", line.waits_for)]
    if line.worker is not None and line.worker.activity is not None and line.worker.activity.blockers:
        known.append((BLOCKERS_QUERY, line.worker.activity.blockers[0].query))
    told: dict[str, str] = {}
    for name, value in known:
        if value is not None and value != "" and name not in told:
            told[name] = _shown(value)
    return [(name.replace("_", " "), value) for name, value in told.items()]


def _shown(value: object) -> str:
    if isinstance(value, datetime):
        return value.astimezone().isoformat(sep=" ", timespec="milliseconds")
    return str(value)
