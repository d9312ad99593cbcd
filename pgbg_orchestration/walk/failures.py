"""The errors of jobs that did not commit: each says what happened, to which job, and what to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from types import MappingProxyType
from typing import TypedDict

import psycopg
from psycopg import sql

from pgbg_orchestration import errors, pace
from pgbg_orchestration.call_options import Options
from pgbg_orchestration.errors import PgbgError
from pgbg_orchestration.job import Kind
from pgbg_orchestration.ledger.readiness import ServerFacts
from pgbg_orchestration.ledger.sighting import Key, Sighting
from pgbg_orchestration.outcome import WITHHELD, Cause, ErrorFields
from pgbg_orchestration.verdict import CANCELED

from .worker_sql import Work

NO_LIMITS: Mapping[str, float] = MappingProxyType({})


class _Named(TypedDict):
    job_id: str
    label: str


class _Ended(_Named):
    data_state: str | None


def _named(work: Work) -> _Named:
    return {"job_id": work.key.job_id, "label": work.label}


def _ended(work: Work) -> _Ended:
    """Name the job, and say in what state its worker, if it was at work, may have left the data."""
    return {**_named(work), "data_state": None if work.kind is Kind.RECEIPT else errors.PARTLY}


def failed(
    work: Work,
    fields: ErrorFields,
    invalid_indexes: Sequence[str] = (),
    untold_since: datetime | None = None,
    *,
    ran_for: float | None = None,
    limits: Mapping[str, float] = NO_LIMITS,
) -> PgbgError:
    """The SQL failed.

    Parameters
    ----------
    invalid_indexes:
        Names of the invalid indexes that a build has left.
    untold_since:
        When it failed, where nobody was there to be told.
    ran_for, limits:
        The seconds that it ran, where that is known, and the timeouts that were in force, in seconds by name.
    """
    what = "the SQL failed in its worker"
    todo = None
    if untold_since is not None:
        what += f", at {untold_since.isoformat(timespec='seconds')}, when nobody was there to be told"
        todo = "Run it again to have it launched again."
    if fields.sqlstate == CANCELED:
        todo = what_ended(ran_for, limits)
    elif fields.sqlstate in ("2D000", "25001"):
        todo = (
            "SQL that commits by itself or cannot run in a transaction block runs alone, as kind='supervised', or, "
            "where its notices are to be heard, as kind='session'."
        )
    elif invalid_indexes:
        drops = " ".join(f"DROP INDEX CONCURRENTLY {name};" for name in invalid_indexes)
        todo = (
            f"An invalid index is left, which slows down writes and is never read: {drops} "
            "With drop_invalid_index=True the next try of a named index drops it first."
        )
    return errors.WorkerError(what, fields=fields, todo=todo, **_ended(work))


def what_ended(ran_for: float | None, limits: Mapping[str, float]) -> str:
    """Return what may have caused a 57014 that this call did not; the error's own message is localised."""
    others = "somebody's pg_cancel_backend or pg_terminate_backend (a worker reports both alike)"
    own = "a timeout that the SQL gives itself (PostgreSQL 19's WAIT FOR)"
    if ran_for is None:
        return (
            "Nobody asked this job to end. A statement_timeout or pg_background.worker_timeout in force ends SQL so, "
            f"{own}, and {others}."
        )
    # A timeout fires after its time and never before; two clocks may differ by a little.
    reached = [name for name, seconds in limits.items() if ran_for >= seconds * 0.98]
    if not reached:
        return f"It ran for {ran_for:.1f} s, and no timeout in force was as short. So it was {others}, or {own}."
    name = min(reached, key=lambda passed: limits[passed])  # the shortest was the one that fired
    return (
        f"It ran for {ran_for:.1f} s, and its {name} is {limits[name]:g} s. Where that is too short for this job, set "
        f"another one for it: settings={{'{name}': '…'}}."
    )


def cancelled(work: Work, sighting: Sighting | None, cause: Cause | None) -> PgbgError:
    """The job was cancelled; ``cause``: why this call did it, where there is no receipt that says so."""
    who = f" by {sighting.decided_by} ({sighting.reason})" if sighting and sighting.decided_by else ""
    return errors.JobCancelled(
        f"cancelled{who}",
        cause=sighting.cause if sighting else cause,
        sqlstate=CANCELED,
        todo="To run it all the same: retry_cancelled=True, or a new generation.",
        **_ended(work),
    )


def deadline_passed(work: Work, options: Options, *, worker: bool) -> PgbgError:
    """The deadline of this call ended the job; ``worker``: one was at work."""
    message = f"{_bounds(work, options)} passed" + (
        ", and its worker has ended" if worker else " before it was launched"
    )
    named = _ended(work) if worker else {**_named(work), "data_state": None}
    return errors.DeadlinePassed(message, sqlstate=CANCELED, **named)


def _bounds(work: Work, options: Options) -> str:
    timeout, deadline, slot_timeout = work.job.timeout, options.deadline, options.slot_timeout
    bounds = [] if slot_timeout is None else [f"its slot_timeout of {slot_timeout:g} s"]
    bounds += [] if timeout is None else [f"its timeout of {timeout:g} s"]
    bounds += [] if deadline is None else [f"its deadline {deadline.isoformat(timespec='seconds')}"]
    return " or ".join(bounds)


def no_slot(work: Work, options: Options) -> PgbgError:
    """No worker slot came free in time."""
    return errors.NoWorkerSlot(
        f"no worker slot came free before {_bounds(work, options)} passed",
        sqlstate="53000",
        todo="Raise max_worker_processes, or run fewer jobs at once.",
        **_named(work),
    )


def undecided(job_id: str, label: str | None = None, *, nothing_launched: bool = False) -> PgbgError:
    """Whether the job is cancelled could not be decided in time."""
    return errors.ServerUnreachable(
        f"it was to end, and that could not be decided within {pace.CANCEL:g} s: the server does not answer, or the "
        "cancel waits for a synchronous standby that is away",
        sqlstate="08006",
        data_state=errors.NOT_BY_THIS_CALL if nothing_launched else None,
        todo="Once the server answers, `pgbg jobs` and `pgbg cancel` tell and decide how it ended.",
        job_id=job_id,
        label=label,
    )


def unread(work: Work) -> PgbgError:
    """The job is committed, and the server went away before its rows were read."""
    return errors.ServerUnreachable(
        "it is committed, and its rows could not be read in time: the server does not answer",
        sqlstate="08006",
        data_state=errors.COMMITTED,
        todo="Its rows are kept: `pgbg result` reads them once the server answers.",
        **_named(work),
    )


def superseded(work: Work, sighting: Sighting | None) -> PgbgError:
    """A newer generation of the series is registered."""
    newest = f"generation {sighting.newest}" if sighting and sighting.newest is not None else "a newer generation"
    return errors.Superseded(
        f"superseded: {newest} of its series is registered", cause=Cause.SUPERSEDED, **_ended(work)
    )


def lost(work: Work, *, output_dropped: bool) -> PgbgError:
    """The worker is gone without an error and without a commit; or its output was dropped, and its error with it."""
    if output_dropped:
        return errors.WorkerLost(
            "its worker ended without a commit after its output, which nobody reads, had filled the queue and was "
            "dropped; an error that came after that was dropped too",
            todo="The server's log has the reason; so has the next error, where the SQL gives fewer rows and messages.",
            **_ended(work),
        )
    return errors.WorkerLost(
        "its worker ended without an error and without a commit: killed, cancelled while it started, or ended by a "
        "FATAL error such as transaction_timeout",
        todo=errors.LOOK_INTO_LOG,
        **_ended(work),
    )


def launch_failed(work: Work, error: BaseException) -> PgbgError:
    """Every launch call failed on its way, and no worker of any was seen."""
    return errors.LaunchFailed(
        f"the launch call failed: {work.server_text(error)}", sqlstate=getattr(error, "sqlstate", None), **_named(work)
    )


def unknown(work: Work, *, verified: bool | None) -> PgbgError:
    """Nobody can tell how the job ended, or whether its worker will begin."""
    who = "the launching session" if work.kind is Kind.SESSION else "its supervisor"
    if verified is False:
        return errors.OutcomeUnknown(
            f"{who} was lost before anybody saw its worker, which may begin yet; "
            "verify_sql says that the work is not done",
            todo="Run it again: verify_sql is asked again. If it still says so, and you know that no worker of it is "
            "left, run the work under another id or in the next generation.",
            **_named(work),
        )
    return errors.OutcomeUnknown(
        f"{who} was lost while it ran, and this kind of job leaves no receipt",
        todo="Look whether its work is done; verify_sql lets the job find out by itself.",
        **_named(work),
    )


def cannot_drop(work: Work, error: psycopg.Error) -> PgbgError:
    """The invalid index that an earlier build left cannot be dropped."""
    return errors.InvalidJob(
        f"the invalid index of an earlier build could not be dropped: {work.server_text(error)}",
        sqlstate=error.sqlstate,
        todo="Nothing was launched. Drop it as the owner of its table.",
        **_named(work),
    )


def unknown_end(key: Key) -> PgbgError:
    """A supervised job is to be cancelled, and nobody can tell how it ended."""
    return errors.OutcomeUnknown(
        "its supervisor is gone, nothing of the job is at work any more, and nobody can tell how it ended",
        todo="Look whether its work is done. Run the same job with a verify_sql to have it settled.",
        job_id=key.job_id,
    )


def unverified(work: Work, error: BaseException) -> PgbgError:
    """The query that was to tell how the job ended failed."""
    todo = "Run it again: verify_sql is asked again, and nothing is launched before it answers."
    if work.kind is Kind.SESSION:
        todo = "Look whether its work is done before you run it again: that launches it anew."
    return errors.OutcomeUnknown(
        f"how it ended is not known, and its verify_sql failed: {work.server_text(error)}",
        sqlstate=getattr(error, "sqlstate", None),
        todo=todo,
        **_named(work),
    )


def reused(work: Work) -> PgbgError:
    """The id stands for other SQL."""
    return errors.JobIdReused(
        "this id stands for other SQL already (another text, or other parameters)",
        todo="Give other work another id or generation, or accept the change: accept_changed_sql=True.",
        **_named(work),
    )


def launch_refused(work: Work, error: psycopg.Error, facts: ServerFacts, *, called: bool) -> PgbgError:
    """The server refused the launch before a worker was started, or (not ``called``) one of the job's settings."""
    text = f"the launch was refused: {work.server_text(error)}"
    if isinstance(error, psycopg.errors.InsufficientPrivilege):
        login = sql.Identifier(facts.role).as_string(None)
        todo = f"Grant what is missing: {facts.extension.grant_statement(facts.role)}"
        if not called:
            todo = f"Leave the setting out, or have it allowed (PostgreSQL 15): GRANT SET ON PARAMETER … TO {login};"
        return errors.NoPrivilege(text, sqlstate=error.sqlstate, todo=todo, **_named(work))
    return errors.InvalidJob(text, sqlstate=error.sqlstate, **_named(work))


def statement_refused(work: Work, error: psycopg.Error) -> PgbgError:
    """The server does not take the statement."""
    return errors.InvalidJob(
        f"the server refuses the statement: {work.server_text(error)}", sqlstate=error.sqlstate, **_named(work)
    )


def survivor(key: Key, sighting: Sighting | None, what: str) -> PgbgError:
    """A worker does not end when it is cancelled."""
    pid = sighting.worker_pid if sighting else None
    return errors.StillRunning(
        f"{what} (pid {pid}) does not end when it is cancelled: its SQL may catch query_canceled",
        worker_pid=pid,
        todo="Wait for it, or have an administrator look at it; a restart of the server ends it for certain.",
        job_id=key.job_id,
    )


def may_not_cancel(key: Key, sighting: Sighting) -> PgbgError:
    """A worker of another login's cannot be signalled."""
    return errors.StillRunning(
        f"this login may not cancel the worker with pid {sighting.worker_pid}, which {sighting.holder_user!r} launched",
        worker_pid=sighting.worker_pid,
        sqlstate="42501",
        todo=f"Cancel it as {sighting.holder_user!r}, or grant this login pg_signal_backend.",
        job_id=key.job_id,
    )


def ledger(error: psycopg.Error, job_id: str, *, redact: bool = False) -> PgbgError:
    """The server refuses a statement of the package's own, in the middle of a job's way."""
    text = WITHHELD if redact else error.diag.message_primary or str(error)
    message = f"the server refuses what the package asks of its own tables: {text}"
    named = {"job_id": job_id, "sqlstate": error.sqlstate, "data_state": errors.GOES_ON}
    if isinstance(error, psycopg.errors.InsufficientPrivilege):
        return errors.NoPrivilege(message, todo="`pgbg doctor` names the GRANT that is missing.", **named)
    todo = "See with `pgbg doctor` whether the schema is whole; look for rows that were changed by hand."
    return errors.LedgerError(message, todo=todo, **named)


def stranger(work: Work, sighting: Sighting) -> PgbgError:
    """Somebody else's session sits on the lock of the series."""
    return errors.SeriesHeld(
        f"the session with pid {sighting.holder_pid} of the role {sighting.holder_user!r} holds the advisory lock of "
        f"the series {errors.shorten(work.key.series)!r} and is no known worker of {work.key.owner!r}",
        todo=f"Find out what pid {sighting.holder_pid} is, and end it.",
        **_named(work),
    )


def already_at_work(work: Work, pid: int) -> PgbgError:
    """A worker of the same id is at work that cannot be attached to."""
    return errors.SeriesHeld(
        f"a worker with the same job id is at work (pid {pid}), and a job of kind {work.kind.value!r} cannot be "
        "attached to",
        todo="Wait for it to end.",
        **_named(work),
    )
