"""Jobs that this step does not wait for, and jobs that somebody else launched."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pgbg_orchestration import Job
from pgbg_orchestration.errors import JobCancelled, OutcomeUnknown, PgbgError, WorkerError, WorkerLost
from pgbg_orchestration.outcome import ErrorFields, Outcome

from .driving import Talk

if TYPE_CHECKING:
    from pgbg_orchestration import Launcher
    from pgbg_orchestration.ledger import JobEntry, Sighting

BEGUN_WITHIN = 60.0  # seconds for a launched worker to be seen at work
POLL = (0.05, 5.0)  # seconds between two looks at somebody else's job: at first, and at most


async def submit(
    launcher: Launcher, job: Job, *, talk: Talk, options: dict[str, Any], owner: str | None
) -> Outcome | None:
    """Launch a job and go away as soon as its worker is at work; returns its outcome if it has one by then.

    A worker that was launched and has not begun needs the session that launched it, so leaving earlier could lose it.

    Raises
    ------
    PgbgError
        It could not be launched, or it has failed already.
    """
    running = asyncio.ensure_future(launcher.run(job, on_cancel="leave", observer=talk.event, **options))
    try:
        pause = POLL[0]
        while not running.done():
            await asyncio.wait({running}, timeout=pause)
            if not running.done() and _is_at_work(await launcher.look(job.id or "", owner=owner, series=job.series)):
                break
            pause = min(pause * 1.5, 1.0)
        if running.done():
            return running.result()
    finally:
        if not running.done():
            running.cancel()
            await asyncio.wait({running})
    return None


def _is_at_work(seen: Sighting) -> bool:
    return seen.holds_this_job or seen.status is not None


async def wait_for(launcher: Launcher, job_id: str, *, patience: float | None, tell: Callable[[str], None]) -> Outcome:
    """Wait for the end of a job, whoever launched it: another run, Airflow, ``pgbg run``.

    Parameters
    ----------
    launcher:
        For the database.
    job_id:
        The job. One that is not known yet is waited for.
    patience:
        Seconds to wait at most; None: without a bound.
    tell:
        Called with a sentence whenever the job's state changes.

    Raises
    ------
    TimeoutError
        It has not ended in time.
    WorkerError, JobCancelled, WorkerLost, OutcomeUnknown
        It ended without a commit, or nobody can tell.
    """
    await launcher.facts()
    pause, told = POLL[0], ""
    async with asyncio.timeout(patience):
        while True:
            entries = await launcher.ledger.jobs(job_id=job_id, limit=1)
            state = entries[0].state if entries else "not known yet"
            if state != told:
                told = state
                tell(f"job {job_id} is {state}")
            if entries and state == "committed":
                return outcome_of(entries[0])
            if entries and (error := error_of(entries[0])) is not None:
                raise error
            await asyncio.sleep(pause)
            pause = min(pause * 1.3, POLL[1])


def outcome_of(entry: JobEntry) -> Outcome:
    """Return the outcome of a job that committed, from its line in the list of jobs."""
    return Outcome(
        job_id=entry.job_id,
        label=entry.label or entry.job_id,
        row_count=entry.row_count,
        command_tag=entry.command_tag,
        started_at=entry.launched_at,
        finished_at=entry.ended_at,
        attempt=entry.attempt,
        launched=False,
    )


def error_of(entry: JobEntry) -> PgbgError | None:
    """Return how a job failed, from its line in the list of jobs; None while it has not."""
    named: dict[str, Any] = {"job_id": entry.job_id, "label": entry.label}
    match entry.state:
        case "failed":
            told = ErrorFields(
                sqlstate=entry.sqlstate,
                message=entry.message,
                detail=entry.detail,
                hint=entry.hint,
                context=entry.context,
            )
            return WorkerError("the SQL failed in its worker", fields=told, **named)
        case "cancelled":
            who = f" by {entry.cancelled_by} ({entry.reason})" if entry.cancelled_by else ""
            return JobCancelled(f"cancelled{who}", sqlstate="57014", **named)
        case "lost":
            return WorkerLost(
                "its worker is gone without a commit, and nobody was there to hear why",
                todo="The server's log has the reason. Running it again is safe.",
                **named,
            )
        case "unknown":
            return OutcomeUnknown("it leaves no receipt, and nobody saw its end", **named)
        case _:
            return None
