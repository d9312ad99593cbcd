"""Jobs that this step does not wait for, and jobs that somebody else launched."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

from dagster_resource.steps.batch import TERMINATED, Member
from dagster_resource.steps.driving import Talk
from pgbg_orchestration.ledger.history import ENDED_BADLY, error_of, outcome_of
from pgbg_orchestration.outcome import Outcome

if TYPE_CHECKING:
    from pgbg_orchestration import Launcher
    from pgbg_orchestration.ledger.sighting import Sighting

BEGUN_WITHIN = 60.0  # seconds for a launched worker to be seen at work
POLL = (0.05, 5.0)  # seconds between two looks at somebody else's job: at first, and at most


def check_states(states: Collection[str]) -> None:
    """Refuse what is no state in which a job ends badly.

    Raises
    ------
    ValueError
        One of them is not.
    """
    if unknown := set(states) - set(ENDED_BADLY):
        raise ValueError(f"fail_on takes {', '.join(ENDED_BADLY)}, not {', '.join(sorted(unknown))}")


async def submit(launcher: Launcher, member: Member, *, talk: Talk, options: dict[str, Any]) -> str:
    """Launch a job and go away as soon as its worker is at work; returns the job's id.

    A worker that was launched and has not begun needs the session that launched it, so leaving earlier could lose it.

    Raises
    ------
    PgbgError
        It could not be launched, or it has failed already.
    """
    job, lift = await member.choose(launcher)
    assert job.id is not None  # a Job gives itself one
    running = asyncio.ensure_future(
        launcher.run(job, on_cancel="leave", retry_cancelled=lift, observer=talk.event, **options)
    )
    try:
        pause = POLL[0]
        while not running.done():
            await asyncio.wait({running}, timeout=pause)
            if not running.done() and _is_at_work(await launcher.look(job.id, owner=job.owner, series=job.series)):
                break
            pause = min(pause * 1.5, 1.0)
        if running.done():
            running.result()
    except asyncio.CancelledError:
        if talk.cancel_workers:
            await _stop(running)
            await launcher.cancel(job.id, owner=job.owner, series=job.series, reason=TERMINATED)
        raise
    finally:
        await _stop(running)
    return job.id


async def _stop(running: asyncio.Future[Outcome]) -> None:
    """Stop waiting for a job; its worker goes on."""
    if not running.done():
        running.cancel()
        await asyncio.wait({running})


def _is_at_work(seen: Sighting) -> bool:
    return seen.holds_this_job or seen.status is not None


async def wait_for(
    launcher: Launcher,
    job_id: str,
    *,
    patience: float | None,
    fail_on: Collection[str],
    tell: Callable[[str], None],
) -> Outcome:
    """Wait for the end of a job, whoever launched it: another run, Airflow, ``pgbg run``.

    Parameters
    ----------
    launcher:
        For the database.
    job_id:
        The job. One that is not known yet is waited for.
    patience:
        Seconds to wait at most; None: without a bound.
    fail_on:
        States that end the waiting.
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
            if state in fail_on and (error := error_of(entries[0])) is not None:
                raise error
            await asyncio.sleep(pause)
            pause = min(pause * 1.3, POLL[1])
