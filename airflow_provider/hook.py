"""Users' own ``postgres`` connections, as the core takes them."""

from __future__ import annotations

import asyncio
from copy import copy
from typing import TYPE_CHECKING, Any

from airflow_provider.compat import BaseHook

if TYPE_CHECKING:
    from airflow.sdk import Connection

    from pgbg_orchestration import Job, Outcome

ENDPOINT_EXTRA = "pg_background_endpoint"


class PgBackgroundHook(BaseHook):
    """Runs jobs on the server of an existing ``postgres`` connection.

    Host, login, password, schema (the database), port and extras mean what they mean to ``PostgresHook``: extras are
    libpq options, less those that ``PostgresHook`` keeps for itself, and ``"iam": true`` asks it for a token.

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

    async def aconninfo(self) -> str:
        """Return the libpq connection string, without blocking the event loop.

        Raises
        ------
        AirflowNotFoundException, InvalidJob
            As :meth:`conninfo`.
        """
        # Not asgiref's sync_to_async, nor aget_connection: they share one thread, in which another trigger may wait.
        return await asyncio.to_thread(self.conninfo)

    def run(self, job: Job, **options: Any) -> Outcome:
        """Run a job and wait for its outcome; options and errors are those of :func:`pgbg_orchestration.run`."""
        from pgbg_orchestration import run

        return run(self.conninfo(), job, **options)

    async def arun(self, job: Job, **options: Any) -> Outcome:
        """Run a job and await its outcome; options and errors are those of :func:`pgbg_orchestration.arun`."""
        from pgbg_orchestration import arun

        return await arun(await self.aconninfo(), job, **options)

    def test_connection(self) -> tuple[bool, str]:
        """Say whether jobs can run over this connection, for ``airflow connections test`` and the UI."""
        from pgbg_orchestration import Job
        from pgbg_orchestration.errors import PgbgError

        try:
            outcome = self.run(Job("select 1", label="connection test", timeout=30))
        except PgbgError as error:
            return False, str(error)
        return True, f"a background worker (pid {outcome.worker_pid}) ran a job"


def conninfo_of(connection: Connection, *, database: str | None = None, endpoint: str | None = None) -> str:
    """Return the libpq connection string of an Airflow connection, as ``PostgresHook.get_conn`` would connect.

    Raises
    ------
    InvalidJob
        The connection is of another type, or an extra of it is no option of libpq's.
    """
    import psycopg
    from airflow.providers.postgres.hooks.postgres import PostgresHook
    from psycopg.conninfo import make_conninfo

    from pgbg_orchestration.errors import InvalidJob

    if connection.conn_type not in ("postgres", "postgresql"):
        raise InvalidJob(
            f"the connection {connection.conn_id!r} is of type {connection.conn_type!r}, and jobs need 'postgres'"
        )
    extras = dict(connection.extra_dejson)
    endpoint = endpoint or extras.pop(ENDPOINT_EXTRA, None)
    extras.pop(ENDPOINT_EXTRA, None)
    login, password, port = connection.login, connection.password, connection.port
    if extras.get("iam"):
        # A copy: the hook's own methods may write into it.
        hook = PostgresHook(postgres_conn_id=connection.conn_id, database=database)
        login, password, port = hook.get_iam_token(copy(connection))
    values: dict[str, Any] = {
        name: _text(value)
        for name, value in extras.items()
        if name not in PostgresHook.ignored_extra_options and value is not None
    }
    values |= {
        "host": connection.host,
        "port": port,
        "user": login,
        "password": password,
        "dbname": database or connection.schema,
    }
    if endpoint:
        values |= _split_endpoint(endpoint)
    try:
        return make_conninfo(**{name: value for name, value in values.items() if value not in (None, "")})
    except psycopg.ProgrammingError as error:
        # libpq's message quotes the option, never a password.
        raise InvalidJob(
            f"the connection {connection.conn_id!r} has an extra that libpq does not know: {str(error).strip()}"
        ) from error


def _text(value: object) -> str:
    return str(int(value)) if isinstance(value, bool) else str(value)


def _split_endpoint(endpoint: str) -> dict[str, str]:
    """Take ``host``, ``host:port``, ``[v6]:port`` or a socket directory apart; hostaddr would lead past the host."""
    host, colon, port = endpoint.rpartition(":")
    if not colon or not port.isdigit():
        host, port = endpoint, ""
    found = {"host": host.strip("[]"), "hostaddr": ""}
    return {**found, "port": port} if port else found
