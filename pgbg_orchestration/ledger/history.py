"""A job of the ``jobs`` view, and how it ended as its outcome or its error, for those who did not run it themselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from typing import Any

from pgbg_orchestration import errors
from pgbg_orchestration.call_options import WhenOrphaned
from pgbg_orchestration.errors import PgbgError
from pgbg_orchestration.outcome import Cause, ErrorFields, Outcome

STATES = ("running", "waiting", "committed", "cancelled", "failed", "lost", "unknown")
ENDED_BADLY = ("failed", "cancelled", "lost", "unknown")
"""States in which a job has ended without a commit, or nobody can tell."""


@dataclass(frozen=True, slots=True)
class JobEntry:
    """A line of the ``jobs`` view: a job's true state, and what its launching side wrote down of it."""

    owner: str
    job_id: str
    label: str | None
    series: str | None
    generation: int | None
    kind: str | None
    state: str
    attempt: int | None
    running_pid: int | None
    launched_by: str | None
    registered_at: datetime | None
    launched_at: datetime | None
    ended_at: datetime | None
    row_count: int | None
    command_tag: str | None
    sqlstate: str | None
    message: str | None
    detail: str | None
    hint: str | None
    context: str | None
    cancelled_by: str | None
    reason: str | None
    worker_pid: int | None
    started_at: datetime | None
    cause: Cause | None
    has_launcher: bool | None = None
    """Whether its launcher is still there: the session that registered its last launch, or its supervisor."""

    @property
    def is_being_written(self) -> bool:
        """Whether it is committed, and whoever launched it is there to write down its end, and has not yet."""
        return self.state == "committed" and self.ended_at is None and bool(self.has_launcher)

    @classmethod
    def of(cls, row: dict[str, Any]) -> JobEntry:
        """Read a row of the ``jobs`` view."""
        return cls(**{**row, "cause": Cause.known(row["cause"])})


@dataclass(frozen=True, slots=True)
class Orphan:
    """A job that is at work, or may begin, while the session that registered its launch is gone.

    Attributes
    ----------
    state:
        ``running`` or ``waiting``.
    launched_by:
        Host and process of the launcher that is gone.
    when_orphaned:
        What is to become of it where nobody wants it any more, as its caller said.
    """

    owner: str
    job_id: str
    label: str | None
    series: str
    state: str
    launched_by: str
    when_orphaned: WhenOrphaned


@dataclass(frozen=True, slots=True)
class Attempt:
    """An earlier attempt of a job, as the history had it when the next one was registered.

    ``outcome`` is None where nobody wrote down how it ended.
    """

    attempt: int
    launched_by: str
    launched_at: datetime
    worker_pid: int | None
    ended_at: datetime | None
    outcome: str | None
    sqlstate: str | None
    message: str | None

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Attempt:
        """Read an attempt as JSON tells it."""
        known = {field.name: row[field.name] for field in fields(cls)}
        for name in ("launched_at", "ended_at"):
            known[name] = None if known[name] is None else datetime.fromisoformat(known[name])
        return cls(**known)


@dataclass(frozen=True, slots=True)
class JobDetail:
    """What the history keeps of a job beside its line.

    Attributes
    ----------
    statement:
        The SQL as it was given, without the values of its parameters; None where it is not kept.
    past_attempts:
        The attempts before the latest one, which the job's line tells; the last 50 of them.
    kept:
        How many rows its statements kept, by the statement's number.
    """

    statement: str | None
    past_attempts: tuple[Attempt, ...]
    kept: Mapping[int, int]

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> JobDetail:
        """Read what the schema's ``job_detail`` gave."""
        return cls(
            row["statement"],
            tuple(Attempt.of(past) for past in row["past_attempts"]),
            {kept["statement"]: kept["row_count"] for kept in row["kept"]},
        )


@dataclass(frozen=True, slots=True)
class FirstRows:
    """The first rows that a statement of a job kept, in the types' output form, long values cut."""

    statement: int
    columns: tuple[str, ...]
    rows: tuple[tuple[str | None, ...], ...]

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> FirstRows:
        """Read a row of the schema's ``first_rows``."""
        return cls(row["statement"], tuple(row["columns"] or ()), tuple(tuple(cells or ()) for cells in row["cells"]))


@dataclass(frozen=True, slots=True)
class Durations:
    """How the jobs of one name (a label, or a series) went, as far as the history reaches.

    Attributes
    ----------
    name:
        The label, or the series.
    jobs, committed, cancelled, failed:
        How many there are; how many ended so. Lost and unknown ones count as failed.
    failures:
        How often they failed with which SQLSTATE, the most frequent first; ``lost`` and ``unknown`` for those without.
    median, p95, longest:
        Seconds that those took which committed; None where none did.
    earlier_median, later_median:
        The same of the earlier and of the later half of them.
    first_at, last_at:
        When the first and the last of them was launched.
    """

    name: str
    jobs: int
    committed: int
    cancelled: int
    failed: int
    failures: Mapping[str, int]
    median: float | None
    p95: float | None
    longest: float | None
    earlier_median: float | None
    later_median: float | None
    first_at: datetime | None
    last_at: datetime | None

    @property
    def trend(self) -> float | None:
        """By which factor the later half took longer than the earlier one; None for fewer than four that committed."""
        if self.committed < 4 or not self.earlier_median or self.later_median is None:
            return None
        return self.later_median / self.earlier_median


def outcome_of(entry: JobEntry) -> Outcome:
    """Return the outcome of a job that committed; only its receipt makes its state so."""
    return Outcome(
        job_id=entry.job_id,
        label=entry.label or entry.job_id,
        row_count=entry.row_count,
        command_tag=entry.command_tag,
        started_at=entry.started_at or entry.launched_at,
        finished_at=entry.ended_at,
        worker_pid=entry.worker_pid,
        attempt=entry.attempt,
        launched=False,
    )


def error_of(entry: JobEntry) -> PgbgError | None:
    """Return how a job ended without a commit; None while it has not, and of one that committed."""
    named: dict[str, Any] = {"job_id": entry.job_id, "label": entry.label}
    # Whoever waits for jobs by their label sees which one it was.
    name = "" if entry.label in (None, entry.job_id) else f" (job id {entry.job_id})"
    # Of a job that was only ever cancelled nothing is known but that: nothing of it ran.
    ended = {**named, "data_state": errors.ROLLED_BACK if entry.kind in ("receipt", None) else errors.PARTLY}
    match entry.state:
        case "failed":
            fields_of_error = ErrorFields.from_dict(asdict(entry))
            return errors.WorkerError(f"the SQL failed in its worker{name}", fields=fields_of_error, **ended)
        case "cancelled":
            who = f" by {entry.cancelled_by} ({entry.reason})" if entry.cancelled_by else ""
            return errors.JobCancelled(f"cancelled{who}{name}", cause=entry.cause, sqlstate="57014", **ended)
        case "lost":
            return errors.WorkerLost(
                f"its worker is gone without a commit, and nobody was there to hear why{name}",
                todo=errors.LOOK_INTO_LOG,
                **ended,
            )
        case "unknown":
            return errors.OutcomeUnknown(f"it leaves no receipt, and nobody saw its end{name}", **named)
        case _:
            return None
