"""Every error that the package raises.

Each one says what happened, to which job, what state the data is in and what to do next. A caller who only
wants to know "did it commit?" reads :attr:`PgbgError.data_state`; a retry policy reads ``sqlstate``.
"""

from __future__ import annotations

from .outcome import NO_FIELDS, ErrorFields

ROLLED_BACK = "Nothing of this job is committed."
PARTLY = "This kind of job can commit on its way: what it had committed stays, the rest is rolled back."
NOT_STARTED = "Nothing was launched."
GOES_ON = (
    "What was launched goes on in the server. A job of kind receipt still commits at most once: "
    "run the same id again, and it is attached to or its outcome is read."
)
NOT_KNOWN = "Whether the job is committed is not known from here."


class PgbgError(Exception):
    """Base of all errors of this package.

    Parameters
    ----------
    message:
        What happened, in one sentence.
    job_id, label:
        The job that it happened to, where there is one.
    todo:
        What to do next.
    sqlstate:
        The SQLSTATE behind the error, where there is one.
    data_state:
        What is true of the job's data, where it is not what the class says.
    """

    data_state: str = NOT_STARTED
    """What is true of the job's data when this error is raised."""

    def __init__(
        self,
        message: str,
        *,
        job_id: str | None = None,
        label: str | None = None,
        todo: str | None = None,
        sqlstate: str | None = None,
        data_state: str | None = None,
    ) -> None:
        super().__init__(message)
        if data_state is not None:
            self.data_state = data_state
        self.message = message
        self.job_id = job_id
        self.label = label
        self.todo = todo
        self.sqlstate = sqlstate

    def __str__(self) -> str:
        named = f"Job {self.label or shorten(self.job_id)}: " if self.job_id else ""
        parts = [f"{named}{self.message}", *self.details(), self.data_state]
        if self.todo:
            parts.append(self.todo)
        return "\n".join(parts)

    def details(self) -> list[str]:
        """Further lines between the message and the state of the data."""
        return []


class InvalidJob(PgbgError, ValueError):
    """The job was refused before anything was launched: a field or a statement of it is not usable."""


class JobIdReused(PgbgError):
    """The job's id already stands for other SQL (another text or other parameters)."""


class WorkerError(PgbgError):
    """The job's SQL failed in its worker; ``fields`` has what the server said."""

    data_state = ROLLED_BACK

    def __init__(
        self,
        message: str,
        *,
        fields: ErrorFields,
        job_id: str | None = None,
        label: str | None = None,
        todo: str | None = None,
        data_state: str | None = None,
    ) -> None:
        super().__init__(
            message, job_id=job_id, label=label, todo=todo, sqlstate=fields.sqlstate, data_state=data_state
        )
        self.fields = fields

    def details(self) -> list[str]:
        return self.fields.lines()


class JobCancelled(PgbgError):
    """The job was cancelled, for good: a worker of it that starts later is refused."""

    data_state = ROLLED_BACK


class Superseded(JobCancelled):
    """A newer generation of the same series is registered; this one never runs any more."""


class DeadlinePassed(PgbgError):
    """The job's ``timeout`` passed; its worker was cancelled and has ended."""

    data_state = ROLLED_BACK


class WorkerLost(PgbgError):
    """The worker is gone, it reported no error, and it did not commit."""

    data_state = ROLLED_BACK


class OutcomeUnknown(PgbgError):
    """A job that can carry no receipt lost its launching session: nobody can tell how it ended."""

    data_state = NOT_KNOWN


class StillRunning(PgbgError):
    """The job's worker could not be made to end in time; it still runs."""

    data_state = "The job's worker is still at work and may commit."

    def __init__(
        self,
        message: str,
        *,
        worker_pid: int | None = None,
        job_id: str | None = None,
        label: str | None = None,
        todo: str | None = None,
        sqlstate: str | None = None,
    ) -> None:
        super().__init__(message, job_id=job_id, label=label, todo=todo, sqlstate=sqlstate)
        self.worker_pid = worker_pid


class SeriesHeld(PgbgError):
    """A session that is no worker of this owner's holds the advisory lock of the series."""


class NoWorkerSlot(PgbgError):
    """No worker slot came free in time."""


class LaunchFailed(PgbgError):
    """The launch call failed and no worker of it was seen."""

    data_state = ROLLED_BACK


class ServerUnreachable(PgbgError):
    """The server did not answer for longer than a job may wait for it."""

    data_state = GOES_ON


class LedgerError(PgbgError):
    """The package's own tables or functions in the server refuse: changed by hand, dropped, or of another version."""

    data_state = GOES_ON


class ExtensionMissing(PgbgError):
    """pg_background is not installed in this database."""


class ExtensionTooOld(PgbgError):
    """The pg_background of this database lacks what this package needs (1.9 or newer)."""


class SchemaMissing(PgbgError):
    """The package's own schema is not installed in this database."""


class SchemaVersionMismatch(PgbgError):
    """The installed schema is older or newer than this package."""


class NoPrivilege(PgbgError):
    """The login lacks a privilege."""


class PoolerInTransactionMode(PgbgError):
    """The connection goes through a pooler that hands out another server session for each transaction."""


class ReadOnlyServer(PgbgError):
    """The server is a hot standby, or the session is read only."""


def shorten(text: str | None, limit: int = 80) -> str:
    """Shorten ``text`` to ``limit`` characters for a message."""
    if text is None:
        return ""
    return text if len(text) <= limit else text[: limit - 1] + "…"


__all__ = [
    "NO_FIELDS",
    "DeadlinePassed",
    "ErrorFields",
    "ExtensionMissing",
    "ExtensionTooOld",
    "InvalidJob",
    "JobCancelled",
    "JobIdReused",
    "LaunchFailed",
    "LedgerError",
    "NoPrivilege",
    "NoWorkerSlot",
    "OutcomeUnknown",
    "PgbgError",
    "PoolerInTransactionMode",
    "ReadOnlyServer",
    "SchemaMissing",
    "SchemaVersionMismatch",
    "SeriesHeld",
    "ServerUnreachable",
    "StillRunning",
    "Superseded",
    "WorkerError",
    "WorkerLost",
]
