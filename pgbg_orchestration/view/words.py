"""How the views write times, numbers and errors: the same in the terminal and on the page."""

from __future__ import annotations

from dataclasses import dataclass, fields
from datetime import datetime

from pgbg_orchestration.ledger.history import Attempt, Durations, JobDetail, JobEntry
from pgbg_orchestration.phrases import duration

from .lines import Line, orchestrator_of
from .states import SIGNS

BLOCKERS_QUERY = "blocker's query"
"""The one fact that is somebody's SQL, with its values."""


FIRST = (
    "sqlstate", "message", "detail", "hint", "context", "cancelled_by", "reason", "owner", "launched_by", "job_id",
    "label", "series",
)  # fmt: skip
"""What is told of a job before all the rest: how it failed, and whose it is."""


def took(seconds: float | None) -> str:
    """Return a duration in words; empty for None."""
    return "" if seconds is None else duration(seconds)


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
        ("waits for", line.waits_for),
    ]
    # What somebody looks for who was woken up comes first.
    if line.blocker is not None:
        known.append(("blocked by", _in_short(line.blocker)))
    if line.worker is not None and line.worker.activity is not None and line.worker.activity.blockers:
        known.append((BLOCKERS_QUERY, line.worker.activity.blockers[0].query))
    known += [("progress", progress(line)), ("wanted by", line.by_orchestrator)]
    if line.job is not None:
        others = [field.name for field in fields(JobEntry) if field.name not in FIRST]
        known += [(name, getattr(line.job, name)) for name in (*FIRST, *others)]
    if line.worker is not None:
        known += [
            ("worker's login", line.worker.login),
            ("application_name", line.worker.application_name),
            ("worker began at", line.worker.began_at),
        ]
    told: dict[str, str] = {}
    for name, value in known:
        if value is not None and value != "" and name not in told:
            told[name] = _shown(value)
    return [(name.replace("_", " "), value) for name, value in told.items()]


def _in_short(job: JobEntry) -> str:
    """Return which job another one waits for, and whom to ask about it."""
    wanted = orchestrator_of(job.series, job.job_id)
    told = f"{job.job_id} of {job.owner}, launched by {job.launched_by or 'nobody knows whom'}"
    return f"{told}, wanted by {wanted}" if wanted else told


@dataclass(frozen=True, slots=True)
class Try:
    """An attempt of a job in words."""

    number: int
    launched_at: str
    launched_by: str
    pid: int | None
    ended_at: str
    how: str


def tries_of(job: JobEntry, detail: JobDetail | None) -> list[Try]:
    """Return each attempt of a job that is known of, the first one first; the latest is the job's own line."""
    told = [_past(attempt) for attempt in (detail.past_attempts if detail else ())]
    if job.attempt is not None:
        latest = Try(
            job.attempt,
            _moment(job.launched_at),
            job.launched_by or "",
            job.running_pid or job.worker_pid,
            _moment(job.ended_at),
            _how(job.state, job.sqlstate, job.message),
        )
        told.append(latest)
    return told


def _past(attempt: Attempt) -> Try:
    how = _how(attempt.outcome, attempt.sqlstate, attempt.message) if attempt.outcome else "nobody wrote down how"
    return Try(
        attempt.attempt,
        _moment(attempt.launched_at),
        attempt.launched_by,
        attempt.worker_pid,
        _moment(attempt.ended_at),
        how,
    )


def _how(state: str, sqlstate: str | None, message: str | None) -> str:
    why = " ".join(part for part in (sqlstate, message) if part)
    return f"{SIGNS[state]} {state}{': ' if why else ''}{why}"


def _moment(value: datetime | None) -> str:
    return "" if value is None else _shown(value)


def _shown(value: object) -> str:
    if isinstance(value, datetime):
        return value.astimezone().isoformat(sep=" ", timespec="milliseconds")
    return str(value)


def usual_of(line: Line, durations: Durations | None) -> list[tuple[str, str]]:
    """Return how jobs of the line's label went so far, and how long this one may take still.

    Parameters
    ----------
    line:
        A job.
    durations:
        Those of its label; None where none is known.
    """
    if durations is None:
        return []
    went = [f"{durations.committed} committed", f"{durations.failed} failed", f"{durations.cancelled} cancelled"]
    told = [("label so far", f"{durations.jobs:,} job{'' if durations.jobs == 1 else 's'}: {', '.join(went)}")]
    if durations.failures:
        told.append(("failed with", ", ".join(f"{code} ({count})" for code, count in durations.failures.items())))
    if durations.median is None or durations.p95 is None:
        return told
    told.append(("usually takes", f"{took(durations.median)}; 95 of 100 at most {took(durations.p95)}"))
    if line.state == "running" and line.seconds is not None:
        left, most = durations.median - line.seconds, durations.p95 - line.seconds
        if most <= 0:
            told.append(("may take still", "no telling: it has run longer than 95 of 100"))
        else:
            told.append(("may take still", f"{took(max(left, 0))} by the median, {took(most)} by the slow ones"))
    return told
