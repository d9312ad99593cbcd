"""The resource: run SQL in PostgreSQL's background workers from assets, ops, asset checks and sensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Unpack

from dagster import Config, ConfigurableResource, DagsterExecutionInterruptedError, DagsterRunStatus
from pydantic import Field, field_validator

from pgbg_orchestration.errors import PgbgError
from pgbg_orchestration.retry import Action, RetryPolicy, Rule

from . import identity
from .batch import Batch, Member
from .driving import drive
from .failures import PgBackgroundFailure, RunTerminated, raise_for
from .jobs import JobOptions, Sql, SqlLike, label_for
from .outcome import PgBackgroundOutcome

if TYPE_CHECKING:
    from dagster import AssetCheckExecutionContext, AssetExecutionContext, OpExecutionContext

    StepContext = AssetExecutionContext | OpExecutionContext | AssetCheckExecutionContext

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
        self._refuse_in_ended_run(context)
        step = identity.of_step(context, self.namespace)
        given = {name: Sql.of(sql, options) for name, sql in jobs.items()}
        rules = policy or self._policy()
        retry_number = _retry_number(context)
        try:
            members = [self._member(context, step, name, sql) for name, sql in given.items()]
        except PgbgError as error:
            raise PgBackgroundFailure(error, allow_retries=False) from error
        batch = Batch(
            members,
            conninfo=self.conninfo,
            schema=self.pgbg_schema,
            owner=self.owner,
            max_running=max_running,
            fail_fast=fail_fast,
            keep_on_interrupt=self.cancel_on_termination == "never",
            options={
                "on_superseded": self.on_superseded,
                "accept_changed_sql": self.accept_changed_sql,
                "slot_timeout": self.slot_timeout,
            },
        )
        self._drive(context, batch)
        if batch.errors:
            shown = {member.job_id: member.sql.shown for member in members}
            raise_for(batch.errors, policy=rules, retry_number=retry_number, max_retries=self.max_retries, sql=shown)
        return {
            member.name: PgBackgroundOutcome.of(batch.outcomes[member.name], member.sql.shown, step)
            for member in members
        }

    # How it is done -----------------------------------------------------------------------------------------------

    def _member(self, context: StepContext, step: identity.Identity, name: str, sql: Sql) -> Member:
        """Make a job of the step's SQL, under the id that a later try will find it by."""
        job_id = step.job_id(name)
        identity.claim(context, job_id)

        def job(wanted: str) -> Any:
            return sql.job(job_id=wanted, series=step.series(name), label=label_for(step, name), owner=self.owner)

        return Member(
            name=name,
            sql=sql,
            job=job(job_id),
            anew=job(step.job_id(name, anew=True)) if step.by_hand else None,
        )

    def _drive(self, context: StepContext, batch: Batch) -> None:
        try:
            drive(
                batch.run,
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
