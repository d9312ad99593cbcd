"""The operator: SQL in a background worker, waited for by a trigger or in the task's own process."""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from airflow.sdk import BaseOperator

from airflow_provider import parse_checks
from airflow_provider.arguments import job_arguments, job_of
from airflow_provider.compat import conf, fails_for_good, take_retry_policy
from airflow_provider.link import BackgroundJobLink
from airflow_provider.operators.end import ends_in_trigger
from airflow_provider.retry_policy import SqlStateRetryPolicy, tells_decision

from . import start

if TYPE_CHECKING:
    from airflow.sdk import Context
    from airflow.sdk.definitions.mappedoperator import OperatorPartial

    from airflow_provider.task_driver import TaskDriver
    from airflow_provider.triggers.base import JobTrigger
    from pgbg_orchestration import Fetch, Job

MARGIN = timedelta(minutes=10)
"""From a job's deadline to Airflow's own, which ends the waiting where no triggerer is left to keep the deadline."""


class PgBackgroundOperator(BaseOperator):
    """Runs SQL in a PostgreSQL background worker: at most one commit, however often the task is tried.

    Parameters
    ----------
    sql:
        The statements: one text, a ``.sql`` template file, or a list of statements of one job. They run in one
        transaction.
    parameters:
        Values for ``%s`` or ``%(name)s`` placeholders.
    label:
        What a person sees on the worker, in ``pg_stat_activity`` and in the lists of pg_background; at most 64 bytes.
        Default: the DAG's and the task's id.
    postgres_conn_id:
        Id of a ``postgres`` connection.
    database:
        Database to use in place of the connection's own.
    settings:
        Server settings for the job's transaction, such as ``{"work_mem": "256MB"}``.
    role:
        Role that the SQL runs as; the login must be a member of it.
    isolation:
        ``read committed``, ``repeatable read`` or ``serializable``.
    kind:
        ``receipt``, ``session`` or ``supervised``, as :class:`pgbg_orchestration.Job` takes them.
    timeout:
        Time for the job, from the start of the try to its outcome, in seconds or as a timedelta; then its worker is
        cancelled. ``execution_timeout`` bounds it in the same way, in deferred tasks too.
    deferrable:
        Wait in the triggerer, without a worker slot. Default: ``[operators] default_deferrable``.
    end_from_trigger:
        Let the trigger of a deferred task end it when its job is committed: it then needs no worker a second time, and
        ends at once. Default: where nothing is left to be done in a worker, so without listeners (OpenLineage),
        ``post_execute`` and a subclass's ``execute_complete``. True leaves these out. A task with outlets or
        ``on_success_callback``, and one whose XCom is taken apart, is resumed all the same: only a worker does that.
    start_from_trigger:
        Begin in the triggerer: the task needs no worker before its job is done, and none at all with
        ``end_from_trigger``. Implies ``deferrable``. Only without automatic retries, or with ``durable=False``: in a
        triggerer nothing tells a retry from a clear. Pools do not bound it, mapped tasks cannot have it.
    durable:
        Whether automatic retries share a job, so that one whose SQL did commit succeeds without running it again.
        Otherwise each try runs the SQL anew.
    cancel_on_kill:
        Cancel the worker when the task is marked, its run deleted, or its process asked to end.
    enable_log_db_messages:
        Write what the SQL raises (RAISE NOTICE, WARNING, …) to the task's log, as it is raised; with the setting
        ``client_min_messages`` of ``debug1`` RAISE DEBUG too. It costs a connection for as long as the job is at work.
        A ``CALL`` is one transaction then. Not for other supervised jobs, nor with ``redact_details``. As
        ``PostgresHook`` names it.
    on_superseded:
        What a cleared task does with a worker of the run before: ``cancel`` it, or ``wait`` for it.
    slot_timeout:
        Seconds to wait for a worker slot at most. Default: as long as the job may take.
    poll_interval:
        Seconds between two looks at the job at most, as :func:`pgbg_orchestration.arun` takes them.
    queue_size:
        Bytes of the worker's output queue.
    verify_sql:
        A query that returns true when the work is done; decides where an outcome would stay unknown.
    redact_details:
        Keep of the server's errors no text that may quote data (see docs/security.md).
    drop_invalid_index:
        Before a ``CREATE INDEX CONCURRENTLY``, drop the invalid index of that name that an earlier build left.
    endpoint:
        ``host`` or ``host:port`` of the server itself, where the connection leads to a pooler in transaction mode.
    schema:
        Name of the package's schema.
    handler:
        Called with a cursor over the rows, when the job is committed; what it returns is the task's result. Those of
        ``airflow.providers.common.sql.hooks.handlers`` and your own work as with ``SQLExecuteQueryOperator``. Of a list
        of statements, and with ``return_last=False``, it is called for each.
    output_processor:
        Called with the list of the handler's results and the list of the statements' descriptions; returns the list of
        what becomes the result.
    return_last:
        Whether a text of several statements has the result of its last one. False: a list with that of each.
    split_statements:
        True, as a text is always split: it is here for tasks that are moved over, and False is a ``TypeError``.
    show_return_value_in_logs:
        Whether the log shows what the handler returned.
    fetch:
        How many rows the job keeps beside its receipt (``{"max_rows": 50_000}``), as :class:`pgbg_orchestration.Job`
        takes it. Default: with a handler 10,000 rows and 16 MiB of each statement, else none.
    retry_policy:
        Default: :class:`~airflow_provider.retry_policy.SqlStateRetryPolicy`.

    Returns
    -------
    dict
        With a handler what it returned. Else, as XCom: ``job_id``, ``label``, ``row_count``, ``command_tag``,
        ``started_at``, ``finished_at``, ``worker_pid``, ``attempt``, ``launched`` and ``proof`` of
        :class:`pgbg_orchestration.Outcome`.

    Raises
    ------
    PgbgError
        The errors of :func:`pgbg_orchestration.arun`, each in its own type.
    """

    template_fields: Sequence[str] = (
        "sql", "parameters", "worker_label", "postgres_conn_id", "database", "settings", "role", "verify_sql",
        "endpoint",
    )  # fmt: skip
    template_ext: Sequence[str] = (".sql",)
    template_fields_renderers: ClassVar[dict[str, str]] = {
        "sql": "sql",
        "verify_sql": "sql",
        "parameters": "json",
        "settings": "json",
    }
    ui_color = "#cdd9e8"
    operator_extra_links = (BackgroundJobLink(),)

    def __init__(
        self,
        *,
        sql: str | Sequence[str],
        parameters: Sequence[Any] | Mapping[str, Any] | None = None,
        label: str | None = None,
        postgres_conn_id: str = "postgres_default",
        database: str | None = None,
        settings: Mapping[str, str] | None = None,
        role: str | None = None,
        isolation: str | None = None,
        kind: str | None = None,
        timeout: float | timedelta | None = None,
        deferrable: bool = conf.getboolean("operators", "default_deferrable", fallback=False),
        end_from_trigger: bool | None = None,
        start_from_trigger: bool = False,
        durable: bool = True,
        cancel_on_kill: bool = True,
        on_superseded: Literal["cancel", "wait"] = "cancel",
        enable_log_db_messages: bool = False,
        slot_timeout: float | None = None,
        poll_interval: float | None = None,
        queue_size: int | None = None,
        verify_sql: str | None = None,
        drop_invalid_index: bool = False,
        redact_details: bool = False,
        endpoint: str | None = None,
        schema: str = "pgbg",
        handler: Callable[[Any], Any] | None = None,
        output_processor: Callable[[list[Any], list[Any]], Any] | None = None,
        return_last: bool = True,
        split_statements: bool = True,
        show_return_value_in_logs: bool = False,
        fetch: Fetch | Mapping[str, Any] | bool | None = None,
        **kwargs: Any,
    ) -> None:
        retry_policy = take_retry_policy(kwargs)
        parse_checks.check(type(self), {**kwargs, "split_statements": split_statements})
        super().__init__(**kwargs)
        self.sql = sql
        self.parameters = parameters
        self.worker_label = label  # `label` is Airflow's own: the name of the node in the graph
        self.postgres_conn_id = postgres_conn_id
        self.database = database
        self.settings = settings
        self.role = role
        self.isolation = isolation
        self.kind = kind
        self.timeout = timeout
        self.deferrable = deferrable
        self.end_from_trigger = end_from_trigger
        self.durable = durable
        self.cancel_on_kill = cancel_on_kill
        self.on_superseded = on_superseded
        self.enable_log_db_messages = enable_log_db_messages
        self.slot_timeout = slot_timeout
        self.poll_interval = poll_interval
        self.queue_size = queue_size
        self.verify_sql = verify_sql
        self.drop_invalid_index = drop_invalid_index
        self.redact_details = redact_details
        self.endpoint = endpoint
        self.schema = schema
        self.handler = handler
        self.output_processor = output_processor
        self.return_last = return_last
        self.split_statements = split_statements
        self.show_return_value_in_logs = show_return_value_in_logs
        self.fetch = self._fetch(fetch, sql)
        self._driver: TaskDriver[dict[str, Any]] | None = None
        if getattr(self, "retry_policy", None) is None:
            self.retry_policy = retry_policy or SqlStateRetryPolicy()
        parse_checks.check(
            type(self),
            {
                "task_id": self.task_id, "sql": sql, "parameters": parameters, "settings": settings, "timeout": timeout,
                "slot_timeout": slot_timeout, "poll_interval": poll_interval, "queue_size": queue_size,
            },
        )  # fmt: skip
        if start_from_trigger:
            start.check(self, durable=durable, possible=self.can_start_from_trigger)
            self.deferrable = self.start_from_trigger = True
            self.start_trigger_args = start.trigger_args(self._start_arguments(), timeout)

    # Beginning in the triggerer --------------------------------------------------------------------------------------

    can_start_from_trigger: ClassVar[bool] = True

    @classmethod
    def partial(cls, **kwargs: Any) -> OperatorPartial:
        """Return what ``expand`` makes mapped tasks of.

        Raises
        ------
        ValueError
            They are to begin in the triggerer, or hold a number that a DAG cannot carry.
        TypeError
            A parameter is that of another operator.
        """
        parse_checks.check(cls, kwargs)
        mapped: OperatorPartial = super().partial(**kwargs)
        start.check_mapped(mapped.kwargs)
        return parse_checks.checked(mapped)

    def prepare_template(self) -> None:
        """Read parameters that are given as a text, as ``SQLExecuteQueryOperator`` does."""
        if isinstance(self.parameters, str):
            self.parameters = ast.literal_eval(self.parameters)

    def resolve_template_files(self) -> None:
        """Read template files; a triggerer that renders what was in them cannot find them itself."""
        super().resolve_template_files()
        if self.start_from_trigger:
            self.start_trigger_args = start.trigger_args(self._start_arguments(), self.timeout)

    def _start_arguments(self) -> dict[str, Any]:
        return start.arguments_of(self, self._trigger_arguments())

    # The two ways of waiting ----------------------------------------------------------------------------------------

    @fails_for_good
    def execute(self, context: Context) -> Any:
        """Run the job: defer to a trigger, or wait here."""
        from airflow_provider.identity import identify
        from airflow_provider.triggers import PgBackgroundTrigger
        from pgbg_orchestration import telemetry

        job = job_arguments(self, identify(context, durable=self.durable), self)
        checked = self._check(job)
        self.log.info("Job %s, label %r.", checked.id, checked.label)
        trigger = PgBackgroundTrigger(
            job=job, deadline=self._deadline(context), trace_parent=telemetry.parent(), **self._trigger_arguments()
        )
        return self._wait_for(context, trigger)

    @fails_for_good
    def execute_complete(self, context: Any, event: dict[str, Any] | None = None) -> Any:
        """Return what the trigger found, or what the handler makes of the rows, or raise the job's error."""
        from airflow_provider import events

        with tells_decision(self, context):
            result = events.result_of(event)
        self.log.info(
            "Job %s committed: %s, %s rows, worker pid %s%s.",
            result["job_id"],
            result["command_tag"] or "done",
            "unknown" if result["row_count"] is None else result["row_count"],
            result["worker_pid"],
            "" if result["launched"] else " (launched by an earlier try or somebody else)",
        )
        if self.handler is None:
            if self.fetch is None and result["command_tag"] == "SELECT":
                self.log.info("Its rows were not asked for: handler=fetch_all_handler returns them.")
            return result
        assert event is not None
        return self._handled({"": event})[""]

    def _handled(self, ends: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """Return what the handler makes of the rows of each job, by its name."""
        from airflow_provider.hook import PgBackgroundHook

        from . import handlers

        hook = PgBackgroundHook(self.postgres_conn_id, database=self.database, endpoint=self.endpoint)
        kept = handlers.read_rows(hook, self.schema, [end["job_id"] for end in ends.values()])
        assert self.handler is not None
        show = self.log.info if self.show_return_value_in_logs else None
        how = handlers.Handling(self.handler, self.output_processor, self.return_last, show)
        results = {
            name: handlers.run_handler(how, end, end["shape"], kept[end["job_id"]]) for name, end in ends.items()
        }
        if self.do_xcom_push:
            handlers.check_size(results)
        return results

    def _fetch(self, given: Any, sql: Any) -> Any:
        """Return how many rows the job keeps: what is said, and what a handler needs."""
        if self.handler is None or given is False:
            if self.handler is not None:
                raise ValueError(f"{type(self).__name__} {self.task_id!r}: a handler without rows (fetch=False)")
            return given
        if given is None or given is True:
            given = {}
        # Of a list each statement's are wanted; what a function of `@task` returns may be one.
        last = self.return_last and isinstance(sql, str) and bool(sql)
        return {**given, "return_last": last} if isinstance(given, Mapping) else given

    def _trigger_arguments(self) -> dict[str, Any]:
        """Return what every trigger of this operator is given besides its jobs and its deadline."""
        return {
            # A handler runs on a worker.
            "end_task": self.handler is None and ends_in_trigger(self, self.end_from_trigger),
            "do_xcom_push": bool(self.do_xcom_push),
            "postgres_conn_id": self.postgres_conn_id,
            "database": self.database,
            "endpoint": self.endpoint,
            "on_superseded": self.on_superseded,
            "enable_log_db_messages": self.enable_log_db_messages,
            "slot_timeout": self.slot_timeout,
            "poll_interval": self.poll_interval,
            "cancel_on_kill": self.cancel_on_kill,
            "schema": self.schema,
        }

    def _wait_for(self, context: Context, trigger: JobTrigger) -> Any:
        """Defer to a trigger, or do its work in this process and return the task's result."""
        if self.deferrable:
            from airflow_provider.hook import PgBackgroundHook

            PgBackgroundHook(self.postgres_conn_id, database=self.database, endpoint=self.endpoint).check()
            trigger.check_storable()
            # Airflow's own timeout runs no on_kill and loses the job's error, so it comes well after the trigger's.
            own = None if trigger.deadline is None else max(trigger.deadline - datetime.now(UTC), timedelta()) + MARGIN
            self.defer(trigger=trigger, method_name="execute_complete", kwargs=self._kept_for_resuming(), timeout=own)
        with tells_decision(self, context):
            return self.execute_complete(context, self._do_here(trigger))

    def _kept_for_resuming(self) -> dict[str, Any] | None:
        """Return arguments for ``execute_complete`` besides the event; Airflow stores them with the task."""
        return None

    def _do_here(self, trigger: JobTrigger) -> dict[str, Any]:
        from airflow_provider import events
        from airflow_provider.hook import PgBackgroundHook
        from airflow_provider.task_driver import TaskDriver
        from pgbg_orchestration.errors import PgbgError

        trigger.in_task = True
        hook = PgBackgroundHook(self.postgres_conn_id, database=self.database, endpoint=self.endpoint)
        self._driver = TaskDriver(hook.conninfo(), schema=self.schema, cancel_on_kill=self.cancel_on_kill)
        try:
            return self._driver.run(trigger.work)
        except PgbgError as error:
            events.add_advice(error)
            raise

    def on_kill(self) -> None:
        """Cancel the worker of a task that waits in its own process."""
        if self._driver is not None and self.cancel_on_kill:
            self._driver.kill()

    # Lineage ----------------------------------------------------------------------------------------------------------

    def get_openlineage_facets_on_start(self) -> Any:
        """Return the tables that the SQL reads and writes, for OpenLineage's listener."""
        from airflow_provider.lineage import facets_of

        return facets_of(
            self._statements(), self.postgres_conn_id, self.database, has_parameters=self._has_parameters()
        )

    def get_openlineage_facets_on_complete(self, _task_instance: Any) -> Any:
        """Return the same as at the start: what a worker did is not asked again."""
        return self.get_openlineage_facets_on_start()

    def _statements(self) -> list[str]:
        return [self.sql] if isinstance(self.sql, str) else list(self.sql)

    def _has_parameters(self) -> bool:
        return bool(self.parameters)

    # The job ----------------------------------------------------------------------------------------------------------

    def _check(self, arguments: dict[str, Any]) -> Job:
        """Refuse what no worker can run, before the task defers.

        Raises
        ------
        InvalidJob
            With the reason.
        """
        job: Job = job_of(arguments)
        return job

    def _deadline(self, context: Context) -> datetime | None:
        """Return the moment until which this try has time, by ``timeout`` and ``execution_timeout``."""
        now = datetime.now(UTC)
        bounds = []
        if self.timeout is not None:
            bounds.append(
                now + (self.timeout if isinstance(self.timeout, timedelta) else timedelta(seconds=self.timeout))
            )
        if self.execution_timeout is not None:
            bounds.append(context["ti"].start_date + self.execution_timeout)
        return min(bounds, default=None)
