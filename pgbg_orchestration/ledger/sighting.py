"""What the ledger returns of one job: its key, what one look showed, and what came of registering a launch."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from datetime import datetime
from functools import cache
from typing import Any

from pgbg_orchestration.outcome import PLACE, Cause, ErrorFields
from pgbg_orchestration.verdict import Holder, Receipt

RECEIPTS = {
    None: Receipt.NONE,
    "launching": Receipt.LAUNCHING,
    "committed": Receipt.COMMITTED,
    "cancelled": Receipt.CANCELLED,
}


@dataclass(frozen=True, slots=True)
class Key:
    """What the ledger finds a job by."""

    owner: str
    job_id: str
    series: str | None = None  # None: the series that it was registered with

    @property
    def digests(self) -> tuple[bytes, bytes | None]:
        """SHA-256 of the job's id and of its series."""
        series = None if self.series is None else hashlib.sha256(self.series.encode()).digest()
        return hashlib.sha256(self.job_id.encode()).digest(), series

    @property
    def locks(self) -> tuple[int, int]:
        """Keys of the advisory locks of its series, which must be given, and of the job: the schema's ``lock_key``."""
        job, series = self.digests
        assert series is not None
        return self._lock("series", series), self._lock("job", job)

    def _lock(self, what: str, digest: bytes) -> int:
        hashed = hashlib.sha256(f"pgbg:{what}:{self.owner}:".encode() + digest).digest()
        return int.from_bytes(hashed[:8], "big", signed=True)


@dataclass(frozen=True, slots=True)
class AtWork:
    """What a look showed of a job at work, as far as the next look is compared with it."""

    owner: str
    job_digest: bytes
    series_digest: bytes | None
    holder_pid: int
    marked_pid: int | None
    status: str | None


SUPERVISES = "pgbg supervises: "
"""What the application_name of a supervisor begins with."""


@dataclass(frozen=True, slots=True)
class Sighting:
    """What one look saw of a job: the lock first, then the receipt, then the history."""

    looked_at: datetime
    holder_pid: int | None
    holder_user: str | None
    holder_is_owner: bool
    holder_job: str | None
    holder_generation: int | None
    holds_this_job: bool
    marked_pid: int | None
    may_begin: bool
    wait_event: str | None
    status: str | None
    receipt_attempt: int | None
    receipt_pid: int | None
    receipt_started_at: datetime | None
    cause: Cause | None
    of_try: str | None
    reason: str | None
    decided_by: str | None
    decided_at: datetime | None
    newest: int | None
    generation: int | None
    attempt: int | None
    sql_digest: bytes | None
    outcome: str | None
    ended_at: datetime | None
    reported_at: datetime | None
    row_count: int | None
    command_tag: str | None
    error: ErrorFields

    @classmethod
    def of(cls, row: dict[str, Any]) -> Sighting:
        """Read a row of the schema's ``look``."""
        error = ErrorFields(**{f.name: row[f.name] for f in fields(ErrorFields) if f.name not in PLACE})
        known = {field.name: row[field.name] for field in fields(cls) if field.name != "error"}
        return cls(**{**known, "cause": Cause.known(row["cause"]), "error": error})

    @classmethod
    def of_commit(
        cls, attempt: int, worker_pid: int, started_at: datetime, looked_at: datetime, **history: Any
    ) -> Sighting:
        """Return the sighting of a commit whose receipt alone was read, and whose end is in the history.

        ``history`` is what was read there: when it ended, row count and tag.
        """
        values = {
            "looked_at": looked_at, "status": "committed", "receipt_attempt": attempt, "receipt_pid": worker_pid,
            "receipt_started_at": started_at, "attempt": attempt, "outcome": "committed",
        }  # fmt: skip
        return cls(**{**_empty(), **values, **history})

    @property
    def receipt(self) -> Receipt:
        """What the receipt says."""
        return RECEIPTS[self.status]

    @property
    def worker_pid(self) -> int | None:
        """The process that runs the job's SQL, never a supervisor; None where the look did not show it."""
        return self.marked_pid if self.receipt is Receipt.LAUNCHING else self.holder_pid

    def at_work(self, key: Key) -> AtWork | None:
        """Return what to compare the next look with; None where this one shows no worker of the job, or an end."""
        if not self.holds_this_job or not self.holder_is_owner or self.holder_pid is None:
            return None
        if self.receipt not in (Receipt.NONE, Receipt.LAUNCHING):
            return None
        return AtWork(key.owner, *key.digests, self.holder_pid, self.marked_pid, self.status)

    @property
    def is_unsupervised(self) -> bool:
        """Whether the receipt is claimed, and neither supervisor nor worker is at work."""
        return self.receipt is Receipt.LAUNCHING and not self.holds_this_job and self.marked_pid is None

    @property
    def is_unreported(self) -> bool:
        """Whether the last launch failed, and nobody was there to be told: its supervisor wrote it down."""
        return self.outcome == "failed" and self.reported_at is None

    @property
    def is_provisional(self) -> bool:
        """Whether the job is marked by a call that nobody asked to cancel it: the next call takes the mark back."""
        return self.receipt is Receipt.CANCELLED and self.cause in (Cause.DEADLINE, Cause.GIVEN_UP)

    @property
    def is_between_locks(self) -> bool:
        """Whether a session holds the lock of the series, and not the lock of a job that is known."""
        return self.holder_pid is not None and not self.holds_this_job and self.holder_job is None

    def holder(self, generation: int | None) -> Holder:
        """Return who holds the lock of the series, from the point of view of a job of that generation."""
        if self.holder_pid is None:
            return Holder.NOBODY
        if not self.holder_is_owner:
            return Holder.STRANGER
        if self.holds_this_job:
            return Holder.THIS_JOB
        if self.holder_generation is None or generation is None:
            return Holder.STRANGER if self.holder_generation is None else Holder.SIBLING
        if self.holder_generation == generation:
            return Holder.SIBLING
        return Holder.OLDER if self.holder_generation < generation else Holder.NEWER


@cache
def _empty() -> dict[str, Any]:
    nothing: dict[str, Any] = {field.name: None for field in fields(Sighting)}
    return nothing | {"holder_is_owner": True, "holds_this_job": False, "may_begin": False, "error": ErrorFields()}


@dataclass(frozen=True, slots=True)
class Registration:
    """What came of registering a launch.

    ``verdict`` is ``registered``, or why it was not: ``reused``, ``committed``, ``cancelled``, ``launching``,
    ``superseded`` or ``untold``; of an opening ``known``, too.
    """

    verdict: str
    generation: int
    newest: int
    attempt: int
    sql_changed: bool

    @classmethod
    def read(cls, row: Mapping[str, Any]) -> Registration:
        """Read what the registration of a launch gave."""
        return cls(row["verdict"], row["generation"], row["newest"], row["attempt"], row["sql_changed"])
