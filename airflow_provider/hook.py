"""Users' own ``postgres`` connections, as the core takes them."""

from __future__ import annotations

from copy import copy
from typing import TYPE_CHECKING, Any

from airflow_provider.compat import BaseHook, in_thread

if TYPE_CHECKING:
    from airflow.sdk import Connection

    from pgbg_orchestration import Job, Outcome
    from pgbg_orchestration.blocking_stream import BlockingStream

ENDPOINT_EXTRA = "pg_background_endpoint"


class PgBackgroundHook(BaseHook):
    """Runs jobs on the server of an existing ``postgres`` connection.

    Host, login, password, schema (the database), port and extras mean what they mean to ``PostgresHook``, which is
    asked what it would hand to libpq: extras are libpq options that win over the fields, ``"iam": true`` is a token.

    Parameters
    ----------
    postgres_conn_id:
        Id of the connection.
    database:
        Database to use in place of the connection's own.
    endpoint:
        ``host``, ``host:port`` or a socket directory to use in place of the connection's own, for a connection that
        leads to a pooler in transaction mode. Default: the connection's extra ``pg_background_endpoint``.
    """

    conn_name_attr = "postgres_conn_id"
    default_conn_name = "postgres_default"
    conn_type = "postgres"
    hook_name = "Postgres (background workers)"

    def __init__(
        self,
        postgres_conn_id: str = default_conn_name,
        *,
        database: str | None = None,
        endpoint: str | None = None,
    ) -> None:
        super().__init__()
        self.postgres_conn_id = postgres_conn_id
        self.database = database
        self.endpoint = endpoint

    def get_conn(self) -> Any:
        """Open a psycopg connection in autocommit mode; the caller closes it."""
        import psycopg

        return psycopg.connect(self.conninfo(), autocommit=True)

    def conninfo(self) -> str:
        """Return the libpq connection string. Blocks: it asks Airflow for the connection.

        Raises
        ------
        AirflowNotFoundException
            There is no such connection.
        InvalidJob
            The connection is of another type, or an extra of it is no option of libpq's.
        """
        return conninfo_of(self.get_connection(self.postgres_conn_id), database=self.database, endpoint=self.endpoint)

    def check(self) -> None:
        """Refuse a connection that cannot be used, without asking for a token or connecting. Blocks: it asks Airflow.

        Raises
        ------
        AirflowNotFoundException, InvalidJob
            As :meth:`conninfo`.
        """
        connection = self.get_connection(self.postgres_conn_id)
        conninfo_of(connection, database=self.database, endpoint=self.endpoint, with_token=False)

    async def aconninfo(self) -> str:
        """Return the libpq connection string, without blocking the event loop.

        Raises
        ------
        AirflowNotFoundException, InvalidJob
            As :meth:`conninfo`.
        """
        # Not aget_connection: it shares one thread with all triggers, in which another may wait.
        return await in_thread(self.conninfo)

    def run(self, job: Job, **options: Any) -> Outcome:
        """Run a job and wait for its outcome; options and errors are those of :func:`pgbg_orchestration.run`."""
        from pgbg_orchestration import run

        return run(self.conninfo(), job, **options)

    async def arun(self, job: Job, **options: Any) -> Outcome:
        """Run a job and await its outcome; options and errors are those of :func:`pgbg_orchestration.arun`."""
        from pgbg_orchestration import arun

        return await arun(await self.aconninfo(), job, **options)

    def stream(self, job: Job, *, as_text: bool = False, **options: Any) -> BlockingStream:
        """Return the rows of a job's last statement as they are read: in a ``@task``, ``for row in hook.stream(job)``.

        For what is too big to keep or to hold in memory. Options and errors are those of
        :meth:`pgbg_orchestration.Launcher.stream`.
        """
        from pgbg_orchestration import Launcher
        from pgbg_orchestration.blocking_stream import BlockingStream

        async def stream(launcher: Launcher, _talk: Any) -> Any:
            return launcher.stream(job, as_text=as_text, **options)

        conninfo = self.conninfo()  # here, and not in the stream's thread: it asks Airflow for the connection
        return BlockingStream(lambda: Launcher(conninfo), stream)

    def test_connection(self) -> tuple[bool, str]:
        """Say whether jobs can run over this connection, for ``airflow connections test`` and the UI."""
        from pgbg_orchestration import Job
        from pgbg_orchestration.errors import PgbgError

        try:
            outcome = self.run(Job("select 1", label="connection test", timeout=30))
        except PgbgError as error:
            return False, str(error)
        return True, f"a background worker (pid {outcome.worker_pid}) ran a job"


def conninfo_of(
    connection: Connection, *, database: str | None = None, endpoint: str | None = None, with_token: bool = True
) -> str:
    """Return the libpq connection string of an Airflow connection, as ``PostgresHook.get_conn`` would connect.

    It is that method that says what is handed to libpq, so extras win over fields, and what is empty stays empty.

    Parameters
    ----------
    connection:
        The connection; it is not changed.
    database, endpoint:
        As :class:`PgBackgroundHook` takes them.
    with_token:
        Whether a connection with ``"iam": true`` is asked for its token, which may take seconds.

    Raises
    ------
    InvalidJob
        The connection is of another type, or an extra of it is no option of libpq's.
    """
    import psycopg
    from psycopg.conninfo import make_conninfo

    from pgbg_orchestration.errors import InvalidJob

    if connection.conn_type not in ("postgres", "postgresql"):
        raise InvalidJob(
            f"the connection {connection.conn_id!r} is of type {connection.conn_type!r}, and jobs need 'postgres'"
        )
    values = _arguments_of(connection, database, with_token=with_token)
    own_endpoint = values.pop(ENDPOINT_EXTRA, None)
    if endpoint := endpoint or own_endpoint:
        values.pop("hostaddr", None)  # it would lead past the host
        values |= _split_endpoint(endpoint)
    try:
        return make_conninfo(**values)
    except psycopg.ProgrammingError as error:
        # libpq's message quotes the option, never a password.
        raise InvalidJob(
            f"the connection {connection.conn_id!r} has an extra that libpq does not know: {str(error).strip()}"
        ) from error


def _arguments_of(given: Connection, database: str | None, *, with_token: bool) -> dict[str, Any]:
    """Return what ``PostgresHook.get_conn`` hands to libpq, its driver's own arguments left out."""
    import inspect

    import psycopg
    from airflow.providers.postgres.hooks.postgres import PostgresHook

    arguments: dict[str, Any] = {}

    class Asked(PostgresHook):
        @classmethod
        def get_connection(cls, conn_id: str) -> Any:
            return given  # the hook copies it before it writes a token into it

        def _create_connection(self, conn_args: dict[str, Any]) -> Any:
            arguments.update(conn_args)

        def _get_cursor_config(self, raw_cursor: str) -> tuple[str, Any]:
            return "cursor_factory", None  # which cursor its rows would come in is not ours to check

        def get_iam_token(self, conn: Any) -> tuple[str, str, int]:
            token: tuple[str, str, int] = (
                super().get_iam_token(conn) if with_token else (conn.login, conn.password, conn.port)
            )
            return token

    hook = Asked(postgres_conn_id=given.conn_id, database=database)
    if hasattr(PostgresHook, "_create_connection"):
        hook.get_conn()
    else:
        arguments.update(_arguments_before_6_8(hook, given))
    # Named in `extra`, these reach psycopg's or psycopg2's `connect` and not libpq.
    drivers = {*inspect.signature(psycopg.Connection.connect).parameters, "cursor_factory", "connection_factory"}
    return {
        name: value for name, value in arguments.items() if value is not None and name not in drivers - {"conninfo"}
    }


def _arguments_before_6_8(hook: Any, given: Connection) -> dict[str, Any]:
    """Return what ``get_conn`` hands to libpq in the Postgres provider before 6.8, which connects at once.

    Airflow 3.1 and 3.2 came with it. Its order: fields, ``options`` of the hook, then extras that are not its own.
    """
    connection = copy(given)  # a token may be written into it
    login, password, port = connection.login, connection.password, connection.port
    if connection.extra_dejson.get("iam", False):
        login, password, port = hook.get_iam_token(connection)
    return {
        "host": connection.host,
        "user": login,
        "password": password,
        "dbname": hook.database or connection.schema,
        "port": port,
        **({"options": hook.options} if hook.options else {}),
        **{
            name: value
            for name, value in connection.extra_dejson.items()
            if name not in (*hook.ignored_extra_options, "row_factory")
        },
    }


def _split_endpoint(endpoint: str) -> dict[str, str]:
    """Take ``host``, ``host:port``, ``[v6]:port`` or a socket directory apart."""
    host, colon, port = endpoint.rpartition(":")
    if not colon or not port.isdigit():
        host, port = endpoint, ""
    found = {"host": host.strip("[]")}
    return {**found, "port": port} if port else found
