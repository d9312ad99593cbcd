"""The resource: run SQL in PostgreSQL's background workers from assets, ops, asset checks and sensors."""

from __future__ import annotations

import asyncio
import logging
import math
import uuid
from collections.abc import Callable, Coroutine, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar, Unpack, cast

from dagster import (
    AssetCheckResult,
    AssetCheckSeverity,
    AssetKey,
    Config,
    ConfigurableResource,
    DagsterExecutionInterruptedError,
    DagsterRunStatus,
    RetryRequested,
)
from pydantic import Field, field_validator

from pgbg_orchestration.errors import PgbgError, StillRunning
from pgbg_orchestration.outcome import Outcome
from pgbg_orchestration.retry import Action, RetryPolicy, Rule

from . import elsewhere, identity
from .batch import TERMINATED, Batch, Member
from .driving import Talk, drive
from .failures import PgBackgroundFailure, RunTerminated, raise_for
from .jobs import JobOptions, Sql, SqlLike, label_for
from .metadata import sql_block
from .outcome import PgBackgroundOutcome
from .queries import Expectation, counting_query

if TYPE_CHECKING:
    from dagster import AssetCheckExecutionContext, AssetExecutionContext, OpExecutionContext, SensorEvaluationContext
    from dagster._core.definitions.events import CoercibleToAssetKey

    StepContext = AssetExecutionContext | OpExecutionContext | AssetCheckExecutionContext

T = TypeVar("T")
logger = logging.getLogger("dagster_resource")

CANCELLED = (DagsterRunStatus.CANCELING, DagsterRunStatus.CANCELED)
ENDED = (*CANCELLED, DagsterRunStatus.FAILURE, DagsterRunStatus.SUCCESS)


class RetryRule(Config):
    """What to do about one SQLSTATE or class, as configuration; see :class:`pgbg_orchestration.retry.Rule`."""

    action: str = Field(description="'retry' or 'fail'.")
    first_delay: float = Field(default=5.0, description="Seconds before the second try.")
    factor: float = Field(default=2.0, description="By what the delay grows with each further try.")
    max_delay: float = Field(default=60.0, description="Seconds that no delay exceeds.")
    max_tries: int | None = Field(default=None, description="Tries in all; without it, the resource's max_retries.")


class PgBackgroundResource(ConfigurableResource[Any]):
    """Runs SQL in PostgreSQL's background workers: one job, one commit, whatever dies.

    It opens no connection before the first job, and keeps none after it. One object may serve any number of steps at
    the same time.

    Examples
    --------
    >>> @asset  # doctest: +SKIP
    ... def delays(context: AssetExecutionContext, pg: PgBackgroundResource) -> MaterializeResult:
    ...     return pg.run(context, "refresh materialized view delays").to_materialize_result()
    """

    conninfo: str = Field(
        description="A libpq connection string or URI. Give it as EnvVar('…') when it has a password: "
        "what stands in the code is shown by Dagster's own pages."
    )
    pgbg_schema: str = Field(default="pgbg", description="Name of the package's schema (pgbg install --schema).")
    namespace: str = Field(
        default="dagster", description="Keeps apart what several Dagster deployments do in one database."
    )
    owner: str | None = Field(
        default=None, description="Role that owns the jobs' receipts; the login must be a member. Default: the login."
    )
    cancel_on_termination: str = Field(
        default="requested",
        description="When the step is interrupted, end its workers: 'always'; 'requested', only when the run is being "
        "terminated by a user, so that a retry after anything else finds them again; or 'never'.",
    )
    on_superseded: str = Field(
        default="wait",
        description="What a newer materialization of the same partition does about a worker of an older one: "
        "'wait' for it, or 'cancel' it.",
    )
    accept_changed_sql: bool = Field(
        default=True,
        description="Let a retry whose SQL has changed since the job was first run pass, with a warning.",
    )
    slot_timeout: float | None = Field(
        default=None, description="Seconds to wait for a worker slot at most. Default: as long as the job may take."
    )
    max_retries: int = Field(
        default=3, description="Retries of a step where the rule for its SQLSTATE has no number of its own."
    )
    retry_rules: dict[str, RetryRule] = Field(
        default={}, description="Rules of one's own by SQLSTATE ('55P03') or class ('53'); they win over the defaults."
    )
    run_status_interval: float = Field(
        default=5.0, description="Seconds between two looks at the run's status, for executors that send no signal."
    )

    @field_validator("cancel_on_termination")
    @classmethod
    def _known_choice(cls, value: str) -> str:
        return _one_of("cancel_on_termination", value, ("always", "requested", "never"))

    @field_validator("on_superseded")
    @classmethod
    def _known_wish(cls, value: str) -> str:
        return _one_of("on_superseded", value, ("wait", "cancel"))

    def __repr_args__(self) -> Iterable[tuple[str | None, Any]]:
        # An initialised resource holds the password in plain text.
        return [(name, "***" if name == "conninfo" else value) for name, value in super().__repr_args__()]

    # Jobs of a step -----------------------------------------------------------------------------------------------

    def run(
        self,
        context: StepContext,
        sql: SqlLike,
        *,
        name: str | None = None,
        policy: RetryPolicy | None = None,
        **options: Unpack[JobOptions],
    ) -> PgBackgroundOutcome:
        """Launch the SQL in a worker, or attach to the worker that runs it already, and wait for its outcome.

        Parameters
        ----------
        context:
            The context of the step: it says which work this is.
        sql:
            The statements, which run in one transaction; also ``(sql, parameters)``, or :class:`Sql`.
        name:
            Tells the jobs of one step apart; needed from the second one on.
        policy:
            Rules about retries, instead of the resource's.
        options:
            Further options of the job: ``parameters``, ``label``, ``timeout`` (seconds), ``role``, ``settings``, …

        Returns
        -------
        PgBackgroundOutcome
            Proof that the job is committed; ``to_materialize_result()`` makes a result of it.

        Raises
        ------
        PgBackgroundFailure
            The job did not commit, and trying it again would not help.
        RetryRequested
            It did not commit, and the step is to be tried again; its cause is the failure.
        RunTerminated
            The run is being terminated: nothing was launched, or all of it has ended.
        DagsterExecutionInterruptedError
            The step was interrupted.
        """
        return self.run_many(context, {name or "": Sql.of(sql, options)}, policy=policy)[name or ""]

    def run_many(
        self,
        context: StepContext,
        jobs: Mapping[str, SqlLike],
        *,
        max_running: int | None = None,
        fail_fast: bool = True,
        policy: RetryPolicy | None = None,
        **options: Unpack[JobOptions],
    ) -> dict[str, PgBackgroundOutcome]:
        """Run several jobs side by side, each with its own commit, and wait for all of them.

        When the step is tried again, jobs that committed are not run again.

        Parameters
        ----------
        context:
            The context of the step.
        jobs:
            SQL by name. The name is part of the job's id: take one that is the same on the next try.
        max_running:
            How many run at the same time at most. Default: as many as there are worker slots.
        fail_fast:
            When one fails, cancel the others; otherwise let them end first.
        policy:
            Rules about retries, instead of the resource's.
        options:
            Options for each job that does not bring its own.

        Returns
        -------
        dict[str, PgBackgroundOutcome]
            The outcomes, by name.

        Raises
        ------
        PgBackgroundFailure, RetryRequested, RunTerminated, DagsterExecutionInterruptedError
            As :meth:`run`.
        """
        if max_running is not None and max_running < 1:
            raise ValueError(f"max_running must be at least 1, not {max_running}")
        given = {name: Sql.of(sql, options) for name, sql in jobs.items()}
        return self._run_all(context, given, max_running=max_running, fail_fast=fail_fast, policy=policy)

    # Queries that are to hold ---------------------------------------------------------------------------------------

    def check(
        self,
        context: StepContext,
        sql: SqlLike,
        *,
        expect: Expectation = "no_rows",
        name: str | None = None,
        severity: AssetCheckSeverity = AssetCheckSeverity.ERROR,
        policy: RetryPolicy | None = None,
        **options: Unpack[JobOptions],
    ) -> AssetCheckResult:
        """Run a query in a worker and tell whether it holds; its rows never leave the server.

        Parameters
        ----------
        context:
            The context of the step.
        sql:
            One query. It is asked anew each time.
        expect:
            ``no_rows``: the query finds what is wrong, so it must return no row. ``true``: it must return at least one
            row of one column, and true in each.
        name:
            Tells the jobs of one step apart; needed from the second one on.
        severity:
            Of a check that does not hold.
        policy, options:
            As :meth:`run`.

        Returns
        -------
        AssetCheckResult
            With the number of rows that are wrong.

        Raises
        ------
        PgBackgroundFailure, RetryRequested, RunTerminated, DagsterExecutionInterruptedError
            As :meth:`run`: the query could not be answered.
        """
        asked = Sql.of(sql, options)
        shown = asked.shown
        # An answer that was lost is asked for again, and an old one is no answer: never the same job twice.
        once = uuid.uuid4().hex[:8]
        counting = Sql(counting_query(asked, expect), asked.parameters, asked.options)
        outcome = self._run_all(context, {name or "": counting}, policy=policy, once=once)[name or ""]
        if outcome.row_count is None:
            raise RetryRequested(max_retries=self.max_retries, seconds_to_wait=0)
        metadata = {**outcome.metadata(), "pgbg/sql": sql_block(shown), "pgbg/violations": outcome.row_count}
        metadata = {key: value for key, value in metadata.items() if not key.startswith("dagster/")}
        return AssetCheckResult(passed=outcome.row_count == 0, severity=severity, metadata=metadata)

    # Jobs that are waited for elsewhere -----------------------------------------------------------------------------

    def submit(
        self,
        context: StepContext | SensorEvaluationContext | None,
        sql: SqlLike,
        *,
        asset_key: CoercibleToAssetKey | None = None,
        partition_key: str | None = None,
        name: str | None = None,
        key: str | None = None,
        **options: Unpack[JobOptions],
    ) -> str:
        """Launch the SQL in a worker and go away once that is at work: fire and forget.

        Parameters
        ----------
        context:
            The context of the step, or of a sensor.
        sql:
            As :meth:`run` takes it.
        asset_key, partition_key:
            The external asset, and its partition, that a sensor of :func:`build_pg_background_sensor` is to report as
            materialized when the job has committed.
        name:
            Tells the jobs of one step apart; needed from the second one on.
        key:
            What makes this job's id one of a kind, outside of a step, where no run does: a later call with the same
            key means the same job.
        options:
            As :meth:`run`.

        Returns
        -------
        str
            The job's id: whoever has it can wait for the job (:meth:`wait_for`, ``pgbg wait``, Airflow's sensor).

        Raises
        ------
        PgBackgroundFailure, RetryRequested, RunTerminated
            It could not be launched, or it has failed already.
        """
        given = Sql.of(sql, options)
        in_step = None if context is None or identity.is_sensor(context) else cast("StepContext", context)
        step = None
        if in_step is not None:
            self._refuse_in_ended_run(in_step)
            step = identity.of_step(in_step, self.namespace)
        elif key is None:
            raise ValueError("submit() outside of a step needs key=…, which makes the job's id one of a kind")
        generation = step.origin if step and key is None else key
        suffix = f"/{name}" if name else ""
        if asset_key is not None:
            series = identity.external_series(self.namespace, AssetKey.from_coercible(asset_key), partition_key)
            job_id = f"{series}#{generation}{suffix}"
        else:
            series = (step.work if step else f"{self.namespace}/submitted") + suffix
            job_id = f"{series}#{generation}"
        if in_step is not None:
            identity.claim(in_step, job_id)
        job = given.job(job_id=job_id, series=series, label=series.removeprefix(f"{self.namespace}/"), owner=self.owner)

        async def launch(talk: Talk) -> None:
            from pgbg_orchestration import Launcher

            async with Launcher(self.conninfo, schema=self.pgbg_schema) as launcher:
                try:
                    await elsewhere.submit(launcher, job, talk=talk, options=self._options(), owner=self.owner)
                except asyncio.CancelledError:
                    if talk.cancel_workers:
                        await launcher.cancel(job_id, owner=self.owner, series=series, reason=TERMINATED)
                    raise

        try:
            self._drive(in_step, launch)
        except PgbgError as error:
            if in_step is None:
                raise
            raise_for(
                [error],
                policy=self._policy(),
                retry_number=_retry_number(in_step),
                max_retries=self.max_retries,
                sql={job_id: given.shown},
            )
        return job_id

    def wait_for(self, context: StepContext, job_id: str, *, timeout: float | None = None) -> PgBackgroundOutcome:
        """Wait for the end of a job that somebody else launched: another run, Airflow, ``pgbg run``.

        Nothing is launched here, and a termination of this run does not end the job.

        Parameters
        ----------
        context:
            The context of the step.
        job_id:
            The job. One that is not known yet is waited for.
        timeout:
            Seconds to wait at most.

        Returns
        -------
        PgBackgroundOutcome
            What the list of jobs knows of it; ``sql`` is empty.

        Raises
        ------
        PgBackgroundFailure
            It ended without a commit, or not in time. A retry policy of the step's own decides what comes next.
        """

        async def wait(talk: Talk) -> Outcome:
            from pgbg_orchestration import Launcher

            async with Launcher(self.conninfo, schema=self.pgbg_schema) as launcher:
                return await elsewhere.wait_for(
                    launcher, job_id, patience=timeout, tell=lambda text: talk.note(logging.INFO, text)
                )

        try:
            return PgBackgroundOutcome.of(self._drive(context, wait), "", None)
        except PgbgError as error:
            raise PgBackgroundFailure(error) from None
        except TimeoutError:
            late = StillRunning(f"it has not ended within {timeout:g} s", job_id=job_id, label=job_id)
            raise PgBackgroundFailure(late) from None

    # How it is done -----------------------------------------------------------------------------------------------

    def _run_all(
        self,
        context: StepContext,
        jobs: Mapping[str, Sql],
        *,
        max_running: int | None = None,
        fail_fast: bool = True,
        policy: RetryPolicy | None = None,
        once: str | None = None,
    ) -> dict[str, PgBackgroundOutcome]:
        self._refuse_in_ended_run(context)
        step = identity.of_step(context, self.namespace)
        try:
            members = [self._member(context, step, name, sql, once) for name, sql in jobs.items()]
        except PgbgError as error:
            raise PgBackgroundFailure(error, allow_retries=False) from None
        batch = Batch(
            members,
            conninfo=self.conninfo,
            schema=self.pgbg_schema,
            owner=self.owner,
            max_running=max_running,
            fail_fast=fail_fast,
            keep_on_interrupt=self.cancel_on_termination == "never",
            options=self._options(),
        )
        self._drive(context, batch.run)
        if batch.errors:
            shown = {member.job_id: member.sql.shown for member in members}
            raise_for(
                batch.errors,
                policy=policy or self._policy(),
                retry_number=_retry_number(context),
                max_retries=self.max_retries,
                sql=shown,
            )
        return {
            member.name: PgBackgroundOutcome.of(batch.outcomes[member.name], member.sql.shown, step)
            for member in members
        }

    def _member(self, context: StepContext, step: identity.Identity, name: str, sql: Sql, once: str | None) -> Member:
        """Make a job of the step's SQL, under the id that a later try will find it by, or one for ``once``."""
        identity.claim(context, step.job_id(name))
        job_id = f"{step.job_id(name)}/{once}" if once else step.job_id(name)

        def job(wanted: str) -> Any:
            return sql.job(job_id=wanted, series=step.series(name), label=label_for(step, name), owner=self.owner)

        return Member(
            name=name,
            sql=sql,
            job=job(job_id),
            anew=job(step.job_id(name, anew=True)) if step.by_hand and not once else None,
        )

    def _options(self) -> dict[str, Any]:
        return {
            "on_superseded": self.on_superseded,
            "accept_changed_sql": self.accept_changed_sql,
            "slot_timeout": self.slot_timeout,
        }

    def _drive(self, context: StepContext | None, work: Callable[[Talk], Coroutine[Any, Any, T]]) -> T:
        if context is None:  # in a sensor there is no run to look after
            return drive(
                work, log=logger.log, is_terminated=lambda: False, should_cancel=lambda: False, interval=math.inf
            )
        try:
            return drive(
                work,
                log=context.log.log,
                is_terminated=lambda: self._status(context) in CANCELLED,
                should_cancel=lambda: self._should_cancel(context),
                interval=self.run_status_interval,
            )
        except DagsterExecutionInterruptedError as interruption:
            # Dagster lets a retry policy run an interrupted step again, a terminated one too.
            if _has_retry_policy(context) and self._status(context) in CANCELLED:
                raise RunTerminated("The run is being terminated; the step's jobs have been dealt with.") from (
                    interruption
                )
            raise

    def _should_cancel(self, context: StepContext) -> bool:
        match self.cancel_on_termination:
            case "always":
                return True
            case "never":
                return False
        status = self._status(context)
        if status not in CANCELLED:
            context.log.warning(
                "The step was interrupted and nobody asked for the run to be terminated: its workers go on, and a "
                "retry of it attaches to them."
            )
        return status in CANCELLED

    def _status(self, context: StepContext) -> DagsterRunStatus | None:
        """Return the run's status as it is stored; None outside of a run, or when the storage does not answer."""
        if identity.is_direct(context):
            return None
        try:
            run = context.instance.get_run_by_id(context.run.run_id)
        except Exception as error:  # noqa: BLE001  (any storage may stand behind it)
            context.log.warning("The run's status cannot be read: %s", error)
            return None
        return run.status if run else None

    def _refuse_in_ended_run(self, context: StepContext) -> None:
        status = self._status(context)
        if status in ENDED:
            raise RunTerminated(f"The run is {status.value}: nothing is launched for it any more.")

    def _policy(self) -> RetryPolicy:
        overrides = {
            key: Rule(
                Action(rule.action),
                "a rule of the resource",
                first_delay=rule.first_delay,
                factor=rule.factor,
                max_delay=rule.max_delay,
                max_tries=rule.max_tries,
            )
            for key, rule in self.retry_rules.items()
        }
        return RetryPolicy(overrides)


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r}")
    return value


def _retry_number(context: StepContext) -> int:
    return 0 if identity.is_direct(context) else context.retry_number


def _has_retry_policy(context: StepContext) -> bool:
    if identity.is_direct(context):
        return False
    return context.get_step_execution_context().op_retry_policy is not None


__all__ = ["PgBackgroundResource", "RetryRule"]
