"""Every error that the package raises.

Each one says what happened, to which job, what state the data is in and what to do next. A caller who only
wants to know "did it commit?" reads :attr:`PgbgError.data_state`; a retry policy reads ``sqlstate``.

Every one can be pickled, copied, and told as plain data and back (:meth:`PgbgError.to_dict`): this is the one converter
that events, XComs, metadata and the history go through.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypedDict, Unpack

from .outcome import NO_FIELDS, Cause, ErrorFields

ROLLED_BACK = "Nothing of this job is committed."
PARTLY = "This kind of job can commit on its way: what it had committed stays, the rest is rolled back."
NOT_STARTED = "Nothing was launched."
NOT_BY_THIS_CALL = (
    "Nothing was launched by this call. What an earlier one launched goes on in the server, or is committed: "
    "run the same id again, and it is attached to or its outcome is read."
)
COMMITTED = "The job is committed."
GOES_ON = (
    "What was launched goes on in the server. A job of kind receipt still commits at most once: "
    "run the same id again, and it is attached to or its outcome is read."
)
DONE = "The job is committed, and never runs again; its rows are not to be had any more."
LOOK_INTO_LOG = "The server's log has the reason. Running it again is safe."
NOT_KNOWN = "Whether the job is committed is not known from here."


class JobDetails(TypedDict, total=False):
    """What an error may tell of its job, as keyword arguments; :class:`PgbgError` has their meaning."""

    job_id: str | None
    label: str | None
    todo: str | None
    data_state: str | None


class Details(JobDetails, total=False):
    """The same, and the code behind the error."""

    sqlstate: str | None


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

    def to_dict(self) -> dict[str, Any]:
        """Return all that the error tells, as plain data that JSON can carry; :meth:`from_dict` is the way back.

        Returns
        -------
        dict[str, Any]
            ``error`` (the class's name), ``message``, ``job_id``, ``label``, ``todo``, ``sqlstate``, ``data_state``,
            ``notes`` (what :meth:`add_note` added), and what a class has besides: ``fields``, ``cause``,
            ``worker_pid``.
        """
        return {
            "error": type(self).__name__,
            "message": self.message,
            "job_id": self.job_id,
            "label": self.label,
            "todo": self.todo,
            "sqlstate": self.sqlstate,
            "data_state": self.data_state,
            "notes": [*getattr(self, "__notes__", ())],
            **self.own_entries(),
        }

    @staticmethod
    def from_dict(given: Mapping[str, Any]) -> PgbgError:
        """Return the error that :meth:`to_dict` told of, in its own type.

        Types and entries that this version does not know come from a newer one: such a type becomes a ``PgbgError``,
        such an entry is left out. What an older version did not tell is what the class says.

        Parameters
        ----------
        given:
            What ``to_dict`` returned.
        """
        kind = globals().get(str(given.get("error")))
        if not (isinstance(kind, type) and issubclass(kind, PgbgError)):
            kind = PgbgError
        named = {name: given.get(name) for name in ("job_id", "label", "todo", "data_state")}
        error: PgbgError = kind(str(given.get("message")), **named, **kind.own_arguments(given))
        error.sqlstate = given.get("sqlstate") or error.sqlstate
        if "data_state" in error.__dict__ and error.data_state == kind.data_state:
            del error.data_state
        for note in given.get("notes") or ():
            error.add_note(str(note))
        return error

    def own_entries(self) -> dict[str, Any]:
        """Return what this class tells besides what all do, as plain data."""
        return {}

    @classmethod
    def own_arguments(cls, _given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments that such entries stand for."""
        return {}

    def __reduce__(self) -> tuple[Callable[..., PgbgError], tuple[Any, ...], dict[str, Any]]:
        # Exception's own way calls the class with the message alone, and a class that needs more cannot be made so.
        return _bare, (type(self), self.args), self.__dict__


def _bare(kind: type[PgbgError], args: tuple[Any, ...]) -> PgbgError:
    """Return an error of a class without what its constructor fills in, which its state brings."""
    return kind.__new__(kind, *args)


class InvalidJob(PgbgError, ValueError):
    """The job was refused before anything was launched: a field or a statement of it is not usable."""


class JobIdReused(PgbgError):
    """The job's id already stands for other SQL (another text or other parameters)."""


class WorkerError(PgbgError):
    """The job's SQL failed in its worker; ``fields`` has what the server said."""

    data_state = ROLLED_BACK

    def __init__(self, message: str, *, fields: ErrorFields, **named: Unpack[JobDetails]) -> None:
        super().__init__(message, sqlstate=fields.sqlstate, **named)
        self.fields = fields

    def details(self) -> list[str]:
        return self.fields.lines()

    def own_entries(self) -> dict[str, Any]:
        return {"fields": self.fields.to_dict()}

    @classmethod
    def own_arguments(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        return {"fields": ErrorFields.from_dict(given.get("fields") or {})}


class JobCancelled(PgbgError):
    """The job was cancelled, for good: a worker of it that starts later is refused. ``cause`` tells why."""

    data_state = ROLLED_BACK

    def __init__(self, message: str, *, cause: Cause | None = None, **named: Unpack[Details]) -> None:
        super().__init__(message, **named)
        self.cause = cause

    def own_entries(self) -> dict[str, Any]:
        return {"cause": self.cause}

    @classmethod
    def own_arguments(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        return {"cause": Cause.known(given.get("cause"))}


class Superseded(JobCancelled):
    """A newer generation of the same series is registered; this one never runs any more."""


class DeadlinePassed(PgbgError):
    """The job's ``timeout`` passed; its worker was cancelled and has ended."""

    data_state = ROLLED_BACK


class WorkerLost(PgbgError):
    """The worker is gone, it reported no error, and it did not commit."""

    data_state = ROLLED_BACK


class RowsGone(PgbgError):
    """A committed job's rows cannot be had: lost, read by another (``Launcher.stream``), or no text of UTF-8."""

    data_state = DONE


class OutcomeUnknown(PgbgError):
    """A job that can carry no receipt lost its launching session: nobody can tell how it ended."""

    data_state = NOT_KNOWN


class StillRunning(PgbgError):
    """The job's worker could not be made to end in time; it still runs."""

    data_state = "The job's worker is still at work and may commit."

    def __init__(self, message: str, *, worker_pid: int | None = None, **named: Unpack[Details]) -> None:
        super().__init__(message, **named)
        self.worker_pid = worker_pid

    def own_entries(self) -> dict[str, Any]:
        return {"worker_pid": self.worker_pid}

    @classmethod
    def own_arguments(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        return {"worker_pid": given.get("worker_pid")}


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
    "RowsGone",
    "SchemaMissing",
    "SchemaVersionMismatch",
    "SeriesHeld",
    "ServerUnreachable",
    "StillRunning",
    "Superseded",
    "WorkerError",
    "WorkerLost",
]
