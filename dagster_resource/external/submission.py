"""Jobs that this step does not wait for, and jobs that somebody else launched."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

from dagster import AssetKey, AssetObservation

from dagster_resource.steps import contexts, identity
from dagster_resource.steps.batch import TERMINATED, Member, cancel_jobs
from dagster_resource.steps.metadata import sql_block
from pgbg_orchestration import Cause, Kind
from pgbg_orchestration.batch import can_be_found
from pgbg_orchestration.driver import Talk, to_its_end
from pgbg_orchestration.ledger.history import ENDED_BADLY, error_of, outcome_of
from pgbg_orchestration.outcome import Outcome
from pgbg_orchestration.series import dagster_job_id
from pgbg_orchestration.verdict import Receipt

if TYPE_CHECKING:
    from dagster._core.definitions.events import CoercibleToAssetKey

    from dagster_resource.steps.caller import AnyContext
    from dagster_resource.steps.sql import Sql
    from pgbg_orchestration import Job, Launcher
    from pgbg_orchestration.ledger.sighting import Sighting

POLL = (0.05, 5.0)  # seconds between two looks at somebody else's job: at first, and at most
LOOKS = 5  # more, at one that is committed, until its count and its duration are written down


def check_states(states: Collection[str]) -> None:
    """Refuse what is no state in which a job ends badly.

    Raises
    ------
    ValueError
        One of them is not.
    """
    if unknown := set(states) - set(ENDED_BADLY):
        raise ValueError(f"fail_on takes {', '.join(ENDED_BADLY)}, not {', '.join(sorted(unknown))}")


def member_of(
    context: AnyContext,
    sql: Sql,
    *,
    namespace: str,
    owner: str | None,
    asset_key: CoercibleToAssetKey | None,
    partition_key: str | None,
    name: str | None,
    key: str | None,
) -> Member:
    """Make a job that nobody waits for; the parameters are those of :meth:`PgBackgroundResource.submit`.

    Raises
    ------
    ValueError
        Nothing makes its id one of a kind.
    """
    step = identity.of_step(context, namespace) if identity.is_step(context) else None
    if step is None and key is None:
        raise ValueError("submit() outside of a step needs key=…, which makes the job's id one of a kind")
    suffix = f"/{name}" if name else ""
    if asset_key is not None:
        series = identity.external_series(namespace, AssetKey.from_coercible(asset_key), partition_key)
        tail = suffix
    else:
        # Of a step too: the end of its run means nothing for a job that nobody waits for.
        work = step.work.removeprefix(namespace) if step else ""
        series = f"{namespace}/submitted{work}{suffix}"
        tail = ""

    def job(generation: str) -> Job:
        label = series.removeprefix(f"{namespace}/")
        return sql.job(job_id=f"{dagster_job_id(series, generation)}{tail}", series=series, label=label, owner=owner)

    if step is None or key is not None:
        return Member(name=suffix, sql=sql, job=job(str(key)))
    member = Member(name=suffix, sql=sql, job=job(step.origin), anew=job(step.run_id) if step.by_hand else None)
    identity.claim(context, member.job_id)
    return member


def announce(context: AnyContext, key: AssetKey, partition: str | None, member: Member) -> None:
    """Write down in Dagster's event log that a job is submitted for an external asset, and its SQL.

    It is from there that the sensor has it: whether the database keeps SQL is its own to say (``pgbg.keep_sql``).
    Without an instance of Dagster's nobody will ask for it.
    """
    instance = getattr(contexts.of_step(context), "instance", None)
    if instance is None or identity.is_direct(context):
        return
    for job in filter(None, (member.job, member.anew)):
        metadata: dict[str, Any] = {
            "pgbg/job_id": str(job.id),
            "pgbg/label": str(job.label),
            "pgbg/sql": sql_block(member.sql.shown),
        }
        description = "A job was submitted for this asset; a sensor reports how it ends."
        instance.report_runless_asset_event(
            AssetObservation(asset_key=key, partition=partition, description=description, metadata=metadata)
        )


class Submission:
    """A job that is launched, and left as soon as its worker is at work.

    A worker that was launched and has not begun needs the session that launched it, so leaving earlier could lose it.

    Parameters
    ----------
    member:
        The job.
    connect:
        Makes a launcher for the database.
    keep_on_interrupt:
        Leave a worker at work that leaves no receipt, too.
    supervisor:
        Have a second worker launch a job of kind receipt, and write down how it ends.
    options:
        As :func:`pgbg_orchestration.arun` takes them.
    """

    def __init__(
        self,
        member: Member,
        connect: Callable[[], Launcher],
        *,
        keep_on_interrupt: bool,
        supervisor: bool = False,
        options: Mapping[str, Any],
    ) -> None:
        self._member = member
        self._supervisor = supervisor
        self._keep_on_interrupt = keep_on_interrupt
        self._connect = connect
        self._options = options
        self._chosen: Job | None = None

    async def launch(self, talk: Talk) -> str:
        """Launch the job; returns its id.

        Raises
        ------
        PgbgError
            It could not be launched, or it has failed already.
        """
        launcher = self._connect()
        try:
            self._chosen, options = await self._member.call(
                launcher, talk, keep_on_interrupt=self._keep_on_interrupt, options=self._options
            )
            if self._supervisor and self._chosen.kind is Kind.RECEIPT:
                options["supervisor"] = True
            running = asyncio.ensure_future(launcher.run(self._chosen, **options))
            try:
                await _until_at_work(launcher, self._chosen, running)
            finally:
                await _stop(running)
        finally:
            # If the step is interrupted meanwhile, its job is dealt with by withdraw().
            await to_its_end(launcher.close())
        assert self._chosen.id is not None  # a Job gives itself one
        return self._chosen.id

    async def withdraw(self, talk: Talk) -> None:
        """Cancel the job for good, whatever came of its launch."""
        if self._chosen is None or not can_be_found(self._chosen):
            return  # nothing was launched, or it has ended with its session
        async with self._connect() as launcher:
            await cancel_jobs(launcher, [self._chosen], talk, Cause.INTERRUPTED, TERMINATED)


async def _until_at_work(launcher: Launcher, job: Job, running: asyncio.Future[Outcome]) -> None:
    assert job.id is not None
    pause = POLL[0]
    while not running.done():
        await asyncio.wait({running}, timeout=pause)
        if not running.done() and _is_at_work(await launcher.look(job.id, owner=job.owner, series=job.series)):
            return
        pause = min(pause * 1.5, 1.0)
    running.result()


async def _stop(running: asyncio.Future[Outcome]) -> None:
    """Stop waiting for a job; its worker goes on."""
    running.cancel()
    await to_its_end(_end_of(running))


async def _end_of(running: asyncio.Future[Outcome]) -> None:
    await asyncio.wait({running})


def _is_at_work(seen: Sighting) -> bool:
    # A mark of an earlier try is there until this one takes it back; where it does not, the call itself ends.
    return seen.holds_this_job or seen.receipt not in (Receipt.NONE, Receipt.CANCELLED)


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
    pause, last_state, looks = POLL[0], "", LOOKS
    async with asyncio.timeout(patience):
        while True:
            entries = await launcher.ledger.jobs(job_id=job_id, limit=1)
            state = entries[0].state if entries else "not known yet"
            if state != last_state:
                last_state = state
                tell(f"job {job_id} is {state}")
            if entries and state == "committed":
                if not entries[0].is_being_written or not looks:
                    return outcome_of(entries[0])
                looks -= 1
            if state in fail_on and (error := error_of(entries[0])) is not None:
                raise error
            await asyncio.sleep(pause)
            pause = min(pause * 1.3, POLL[1])
