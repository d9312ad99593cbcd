"""The resource: run SQL in PostgreSQL's background workers from assets, ops, asset checks and sensors."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, Unpack

from dagster import AssetCheckResult, AssetCheckSeverity, AssetKey, ConfigurableResource, EnvVar, RetryRequested
from pydantic import Field, field_validator

from pgbg_orchestration.driver import Talk
from pgbg_orchestration.errors import PgbgError, StillRunning
from pgbg_orchestration.ledger.history import ENDED_BADLY
from pgbg_orchestration.outcome import Outcome
from pgbg_orchestration.retry import RetryPolicy
from pgbg_orchestration.series import DAGSTER_NAMESPACE

from .external import submission
from .steps import identity
from .steps.batch import Batch, Member
from .steps.caller import Caller
from .steps.expectation import WHOLE, Expectation, counting_query
from .steps.failures import PgBackgroundFailure, raise_for
from .steps.metadata import sql_block
from .steps.outcome import PgBackgroundOutcome
from .steps.retry_rules import RetryRule, policy_of
from .steps.row_forms import FORMS, Form
from .steps.sql import JobOptions, Sql, SqlLike, label_for

if TYPE_CHECKING:
    from dagster._core.definitions.events import CoercibleToAssetKey

    from pgbg_orchestration import Launcher

    from .steps.caller import AnyContext
    from .steps.step_stream import StepStream


class PgBackgroundResource(ConfigurableResource[Any]):
    """Runs SQL in PostgreSQL's background workers: one job, one commit, whatever dies.

    It opens no connection before the first job, and keeps none after it. One object may serve many steps at a time.

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
        default=DAGSTER_NAMESPACE, description="Keeps apart what several Dagster deployments do in one database."
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

    web_url: str | None = Field(
        default=None,
        description="Address of the page that shows the jobs (pgbg web, or the one in Airflow's UI): metadata links to "
        "each job's page there. Default: no link.",
    )

    @field_validator("cancel_on_termination", mode="before")
    @classmethod
    def _known_choice(cls, value: str) -> str:
        return _one_of("cancel_on_termination", value, ("always", "requested", "never"))

    @field_validator("on_superseded", mode="before")
    @classmethod
    def _known_wish(cls, value: str) -> str:
        return _one_of("on_superseded", value, ("wait", "cancel"))

    @field_validator("retry_rules")
    @classmethod
    def _sound_rules(cls, value: dict[str, RetryRule]) -> dict[str, RetryRule]:
        policy_of(value)  # when a job has failed it would be too late to say that a rule is wrong
        return value

    def __repr_args__(self) -> Iterable[tuple[str | None, Any]]:
        # An initialised resource holds the password in plain text.
        return [(name, "***" if name == "conninfo" else value) for name, value in super().__repr_args__()]

    def launcher(self) -> Launcher:
        """Return a launcher for the resource's database, to be used as an async context manager.

        Returns
        -------
        Launcher
            The core's; it opens its connections when they are needed.

        Raises
        ------
        InvalidJob
            libpq cannot read the connection string.
        """
        from pgbg_orchestration import Launcher

        return Launcher(self.conninfo, schema=self.pgbg_schema)

    # Jobs of a step -----------------------------------------------------------------------------------------------

    def run(
        self,
        context: AnyContext,
        sql: SqlLike,
        *,
        name: str | None = None,
        policy: RetryPolicy | None = None,
        notices: bool = False,
        **options: Unpack[JobOptions],
    ) -> PgBackgroundOutcome:
        """Launch the SQL in a worker, or attach to the worker that runs it already, and wait for its outcome.

        Parameters
        ----------
        context:
            The context of the step, hook, IO manager, sensor or schedule: it says which work this is. None elsewhere,
            for work of its own.
        sql:
            The statements, which run in one transaction; also ``(sql, parameters)``, or :class:`Sql`.
        name:
            Tells the jobs of one step apart; needed from the second one on.
        policy:
            Rules about retries, instead of the resource's.
        notices:
            Write what the SQL raises (``RAISE NOTICE``, ``WARNING``, …) to the step's log, as it is raised. It costs a
            connection of the job's own while its worker is at work; of supervised jobs only for a ``CALL``.
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
        return self.run_many(context, {name or "": Sql.of(sql, options)}, policy=policy, notices=notices)[name or ""]

    def run_many(
        self,
        context: AnyContext,
        jobs: Mapping[str, SqlLike],
        *,
        max_running: int | None = None,
        fail_fast: bool = True,
        policy: RetryPolicy | None = None,
        notices: bool = False,
        **options: Unpack[JobOptions],
    ) -> dict[str, PgBackgroundOutcome]:
        """Run several jobs side by side, each with its own commit, and wait for all of them.

        When the step is tried again, jobs that committed are not run again.

        Parameters
        ----------
        context:
            As :meth:`run`.
        jobs:
            SQL by name. The name is part of the job's id: take one that is the same on the next try.
        max_running:
            How many run at the same time at most. Default: all; those without a worker slot wait for one.
        fail_fast:
            When one fails, cancel the others; otherwise let them end first.
        policy:
            Rules about retries, instead of the resource's.
        notices:
            As :meth:`run`; each job has a connection of its own then.
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
        return self._run_all(
            context, given, max_running=max_running, fail_fast=fail_fast, policy=policy, notices=notices
        )

    # Rows ---------------------------------------------------------------------------------------------------------

    def fetch(
        self,
        context: AnyContext,
        sql: SqlLike,
        *,
        form: Form = "rows",
        preview: int = 0,
        name: str | None = None,
        policy: RetryPolicy | None = None,
        **options: Unpack[JobOptions],
    ) -> Any:
        """Run SQL in a worker as :meth:`run` does, and return the rows of its last statement.

        They are kept with the commit: a retry reads the same rows, and the SQL is not run again for them.

        Parameters
        ----------
        context:
            As :meth:`run`.
        sql:
            As :meth:`run` takes it.
        form:
            ``rows``: :class:`pgbg_orchestration.Rows`, over which one iterates, with ``columns``, ``as_dicts()`` and
            the frames; ``dicts``: a list of dicts; ``arrow``, ``polars``, ``pandas``: a table or a frame, where that
            package is installed.
        preview:
            How many rows to show in the metadata of the step's output; 0: nothing is added to it.
        name, policy:
            As :meth:`run`.
        options:
            As :meth:`run`; ``fetch`` bounds the rows: ``{"max_rows": 10_000, "max_bytes": 16 * 1024 * 1024}``.

        Returns
        -------
        Any
            The rows, in their form.

        Raises
        ------
        NoRows
            The last statement gives no rows.
        ValueError
            ``form`` is none of these, or two columns of the same name cannot be told apart in it.
        PgBackgroundFailure, RetryRequested, RunTerminated, DagsterExecutionInterruptedError
            As :meth:`run`; SQLSTATE PB005 tells that there are more rows than the bounds allow.
        """
        if form not in FORMS:
            raise ValueError(f"form must be one of {', '.join(FORMS)}, not {form!r}")
        wanted = Sql.of(sql, options)
        wanted = Sql(wanted.text, wanted.parameters, JobOptions(**{"fetch": True, **wanted.options}))
        outcome = self._run_all(context, {name or "": wanted}, policy=policy)[name or ""]
        rows = outcome.last
        if preview:
            self._caller(context).add_output_metadata(outcome.metadata(preview=preview))
        return FORMS[form](rows)

    def stream(
        self,
        context: AnyContext,
        sql: SqlLike,
        *,
        name: str | None = None,
        anew: bool = False,
        policy: RetryPolicy | None = None,
        **options: Unpack[JobOptions],
    ) -> StepStream:
        """Return the rows of the last statement as they are read, for what is too big to keep or to hold in memory.

        The job is launched with the first row that is asked for, and committed when that comes; the rows come once. A
        later try of the step that finds it committed fails with ``RowsGone``.

        Parameters
        ----------
        context, sql, name, policy, options:
            As :meth:`run`; ``policy`` decides about what is raised while the rows are read.
        anew:
            Run it anew each time, also where an earlier try committed: for SQL that only reads.

        Returns
        -------
        StepStream
            To iterate over; ``outcome`` and ``columns`` are there with the first row.

        Raises
        ------
        RunTerminated
            The run is being terminated.
        """
        from .steps.step_stream import StepStream

        caller = self._caller(context)
        caller.refuse_in_ended_run()
        step = identity.of_step(context, self.namespace)
        once = uuid.uuid4().hex[:8] if anew else None
        try:
            member = self._member(context, step, name or "", Sql.of(sql, options), once)
        except PgbgError as error:
            raise PgBackgroundFailure(error, allow_retries=False) from None
        return StepStream(
            member, self.launcher, caller, options=self._options(), interval=self.run_status_interval, step=step,
            web_url=self.web_url, fail=lambda error: self._raise_for([error], [member], caller, policy),
        )  # fmt: skip

    # Queries that are to hold ---------------------------------------------------------------------------------------

    def check(
        self,
        context: AnyContext,
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
            As :meth:`run`.
        sql:
            One query. It is asked anew each time.
        expect:
            ``no_rows``: the query finds what is wrong, so it must return no row. ``true``: it must return at least one
            row, and true in every column of every row.
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
        options = JobOptions(**{**asked.options, "settings": {**WHOLE, **(asked.options.get("settings") or {})}})
        counting = Sql(counting_query(asked, expect), asked.parameters, options)
        outcome = self._run_all(context, {name or "": counting}, policy=policy, once=once)[name or ""]
        if outcome.row_count is None:
            raise RetryRequested(max_retries=self.max_retries, seconds_to_wait=0)
        metadata = {**outcome.metadata(), "pgbg/sql": sql_block(shown), "pgbg/violations": outcome.row_count}
        metadata = {key: value for key, value in metadata.items() if not key.startswith("dagster/")}
        return AssetCheckResult(passed=outcome.row_count == 0, severity=severity, metadata=metadata)

    # Jobs that are waited for elsewhere -----------------------------------------------------------------------------

    def submit(
        self,
        context: AnyContext,
        sql: SqlLike,
        *,
        asset_key: CoercibleToAssetKey | None = None,
        partition_key: str | None = None,
        name: str | None = None,
        key: str | None = None,
        supervisor: bool = True,
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
        supervisor:
            Have a second worker stay until the job has ended, and write down how: row count, command tag and duration,
            or the error. It takes a second worker slot. Without it nobody can tell why a job of kind receipt failed.
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
        caller = self._caller(context)
        caller.refuse_in_ended_run()
        given = Sql.of(sql, options)
        try:
            member = submission.member_of(
                context, given, namespace=self.namespace, owner=self.owner, asset_key=asset_key,
                partition_key=partition_key, name=name, key=key,
            )  # fmt: skip
        except PgbgError as error:
            raise PgBackgroundFailure(error, allow_retries=False) from None

        if asset_key is not None:
            # Before the launch: the sensor that reports the job's end may come at once.
            submission.announce(context, AssetKey.from_coercible(asset_key), partition_key, member)
        submitted = submission.Submission(
            member,
            self.launcher,
            keep_on_interrupt=self.cancel_on_termination == "never",
            supervisor=supervisor,
            options=self._options(),
        )
        try:
            return caller.hand_over(submitted.launch, submitted.withdraw, interval=self.run_status_interval)
        except PgbgError as error:
            self._raise_for([error], [member], caller, None)

    def wait_for(
        self,
        context: AnyContext,
        job_id: str,
        *,
        timeout: float | None = None,
        fail_on: Collection[str] = ENDED_BADLY,
    ) -> PgBackgroundOutcome:
        """Wait for the end of a job that somebody else launched: another run, Airflow, ``pgbg run``.

        Nothing is launched here, and a termination of this run does not end the job.

        Parameters
        ----------
        context:
            As :meth:`run`.
        job_id:
            The job. One that is not known yet is waited for.
        timeout:
            Seconds to wait at most.
        fail_on:
            States of ``pgbg.jobs`` in which the step fails with the job's own error. Leave out those after which
            whoever launched the job tries it again; with none, only a commit ends the waiting.

        Returns
        -------
        PgBackgroundOutcome
            What the list of jobs knows of it; ``sql`` is empty.

        Raises
        ------
        PgBackgroundFailure
            It ended without a commit, or not in time. A retry policy of the step's own decides what comes next.
        ValueError
            ``fail_on`` names a state that no job ends in.
        """
        submission.check_states(fail_on)

        async def wait(talk: Talk) -> Outcome:
            async with self.launcher() as launcher:
                return await submission.wait_for(
                    launcher,
                    job_id,
                    patience=timeout,
                    fail_on=fail_on,
                    tell=lambda text: talk.note(logging.INFO, text),
                )

        try:
            ended = self._caller(context).drive(wait, interval=self.run_status_interval)
            return PgBackgroundOutcome.of(ended, "", None, web_url=self.web_url)
        except PgbgError as error:
            raise PgBackgroundFailure(error, web_url=self.web_url) from None
        except TimeoutError:
            late = StillRunning(f"it has not ended within {timeout:g} s", job_id=job_id, label=job_id)
            raise PgBackgroundFailure(late, web_url=self.web_url) from None

    # How it is done -----------------------------------------------------------------------------------------------

    def _run_all(
        self,
        context: AnyContext,
        jobs: Mapping[str, Sql],
        *,
        max_running: int | None = None,
        fail_fast: bool = True,
        policy: RetryPolicy | None = None,
        once: str | None = None,
        notices: bool = False,
    ) -> dict[str, PgBackgroundOutcome]:
        caller = self._caller(context)
        caller.refuse_in_ended_run()
        step = identity.of_step(context, self.namespace)
        try:
            members = [self._member(context, step, name, sql, once) for name, sql in jobs.items()]
        except PgbgError as error:
            raise PgBackgroundFailure(error, allow_retries=False) from None
        batch = Batch(
            members,
            conninfo=self.conninfo,
            schema=self.pgbg_schema,
            max_running=max_running,
            fail_fast=fail_fast,
            keep_on_interrupt=self.cancel_on_termination == "never",
            options={**self._options(), "notices": notices},
        )
        caller.drive(batch.run, interval=self.run_status_interval)
        if batch.errors:
            self._raise_for(batch.errors, members, caller, policy)
        return {
            member.name: PgBackgroundOutcome.of(
                batch.outcomes[member.name], member.sql.shown, step, web_url=self.web_url
            )
            for member in members
        }

    def _member(self, context: AnyContext, step: identity.Identity, name: str, sql: Sql, once: str | None) -> Member:
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

    def _caller(self, context: AnyContext) -> Caller:
        return Caller(context, self.cancel_on_termination)

    def _raise_for(
        self, errors: Sequence[PgbgError], members: Sequence[Member], caller: Caller, policy: RetryPolicy | None
    ) -> NoReturn:
        raise_for(
            errors,
            policy=policy or policy_of(self.retry_rules),
            retry_number=caller.retry_number,
            max_retries=self.max_retries,
            sql={job.id or "": member.sql.shown for member in members for job in (member.job, member.anew) if job},
            web_url=self.web_url,
        )


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> str:
    if value not in choices and not isinstance(value, EnvVar):  # whose value is looked at when the resource is made
        raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r}")
    return value
