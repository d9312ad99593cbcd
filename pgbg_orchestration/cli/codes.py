"""The exit codes of ``pgbg``, for scripts: what each means, and which error ends with which."""

from __future__ import annotations

from enum import IntEnum

from pgbg_orchestration import errors


class ExitCode(IntEnum):
    """How a ``pgbg`` command ended. The numbers are a promise: none ever gets another meaning."""

    OK = 0
    BUG = 1
    REFUSED = 2
    FAILED = 3
    CANCELLED = 4
    DEADLINE = 5
    UNKNOWN = 6
    NO_SLOT = 7
    UNREACHABLE = 8
    NOT_READY = 9
    STILL_RUNNING = 10
    TOO_LATE = 11
    NO_SUCH_JOB = 12
    DOCTOR_FAILS = 13
    DOCTOR_WARNS = 14
    WAITED_IN_VAIN = 15
    ENDED_OTHERWISE = 16
    INTERRUPTED = 130


MEANINGS = {
    ExitCode.OK: "done; `run`: the job is committed; `wait`: all that was waited for is so",
    ExitCode.BUG: "a fault of pgbg itself, with a traceback; or libpq is missing",
    ExitCode.REFUSED: "refused: an option, the SQL, or an id of other SQL; nothing was launched",
    ExitCode.FAILED: "the job failed, or its worker was lost",
    ExitCode.CANCELLED: "the job was cancelled or superseded",
    ExitCode.DEADLINE: "the job's --timeout passed",
    ExitCode.UNKNOWN: "whether the job is committed is not known",
    ExitCode.NO_SLOT: "no worker slot came free in time; nothing was launched",
    ExitCode.UNREACHABLE: "the server cannot be reached, or does not run",
    ExitCode.NOT_READY: "the server is not ready: extension, schema, privilege, pooler, read only",
    ExitCode.STILL_RUNNING: "a worker is still at work: it does not end, or its series is held",
    ExitCode.TOO_LATE: "`cancel` came too late: the job is committed",
    ExitCode.NO_SUCH_JOB: "`cancel`, `wait`, `result`, `jobs --id`: there is no such job, or it has no rows; "
    "`run --stream`: it is committed, and its rows, or the rest of them, are lost",
    ExitCode.DOCTOR_FAILS: "`doctor` found something that keeps jobs from running",
    ExitCode.DOCTOR_WARNS: "`doctor` found warnings only",
    ExitCode.WAITED_IN_VAIN: "`wait`: the --timeout passed; the jobs go on",
    ExitCode.ENDED_OTHERWISE: "`wait --state`: a job is committed, and another state was waited for",
    ExitCode.INTERRUPTED: "interrupted; `run --leave`: the worker goes on; `run --stream`: it is committed, and "
    "rows are lost",
}

AFTERWARDS = "After 3, 4 and 5 nothing of the job is committed, but for what its SQL committed on its way."

# The first class that fits decides, so a subclass stands before its base.
_BY_ERROR: tuple[tuple[type[errors.PgbgError], ExitCode], ...] = (
    (errors.InvalidJob, ExitCode.REFUSED),
    (errors.JobIdReused, ExitCode.REFUSED),
    (errors.WorkerError, ExitCode.FAILED),
    (errors.WorkerLost, ExitCode.FAILED),
    (errors.LaunchFailed, ExitCode.FAILED),
    (errors.JobCancelled, ExitCode.CANCELLED),
    (errors.DeadlinePassed, ExitCode.DEADLINE),
    (errors.OutcomeUnknown, ExitCode.UNKNOWN),
    (errors.RowsGone, ExitCode.NO_SUCH_JOB),
    (errors.NoWorkerSlot, ExitCode.NO_SLOT),
    (errors.ServerUnreachable, ExitCode.UNREACHABLE),
    (errors.StillRunning, ExitCode.STILL_RUNNING),
    (errors.SeriesHeld, ExitCode.STILL_RUNNING),
)


def code_for(error: errors.PgbgError) -> ExitCode:
    """Return the exit code of an error; whatever a server lacks is ``NOT_READY``."""
    return next((code for kind, code in _BY_ERROR if isinstance(error, kind)), ExitCode.NOT_READY)
