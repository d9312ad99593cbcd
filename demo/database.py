"""The demo's PostgreSQL: the embedded server with its databases."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from psycopg import sql

from pgbg_orchestration.embedded.server import EmbeddedServer, ExtensionChoice
from pgbg_orchestration.ledger.install import install, plan

from .state import State

FLIGHTS = "flights"
"""For the flights, and the jobs."""
AIRFLOW = "airflow"
"""For Airflow's metadata."""


@contextmanager
def running(state: State, extension: ExtensionChoice = "auto") -> Iterator[EmbeddedServer]:
    """Start the server, or take over the one that a killed demo left, and stop it at the end."""
    server = EmbeddedServer(state.server, extension=extension)
    try:
        yield server.start()
    finally:
        if server.is_running():
            server.stop()


def prepare(server: EmbeddedServer) -> str:
    """Make the databases that are missing, with pg_background and the package's schema in the one for jobs.

    One that holds another edition of the schema, from another version of this package, is made anew.

    Returns
    -------
    str
        The connection string of the database for jobs.
    """
    edition = plan(0).checksum
    conninfo = server.conninfo(FLIGHTS)
    if edition_of(server, FLIGHTS) != edition:
        _make(server, FLIGHTS)
        server.create_extension(FLIGHTS)
        install(conninfo)
        set_edition(server, FLIGHTS, edition)
    if edition_of(server, AIRFLOW) is None:
        _make(server, AIRFLOW)
    return conninfo


def edition_of(server: EmbeddedServer, name: str) -> str | None:
    """Return what :func:`set_edition` noted; None for a database that is missing, or was never finished."""
    with server.connect() as connection:
        row = connection.execute(
            "select shobj_description(oid, 'pg_database') from pg_database where datname = %s", (name,)
        ).fetchone()
    return row[0] if row else None


def set_edition(server: EmbeddedServer, name: str, edition: str) -> None:
    """Note in the server what a database holds, after all of it is there."""
    with server.connect() as connection:
        connection.execute(sql.SQL("comment on database {} is {}").format(sql.Identifier(name), edition))


def _make(server: EmbeddedServer, name: str) -> None:
    with server.connect() as connection:
        connection.execute(sql.SQL("drop database if exists {} with (force)").format(sql.Identifier(name)))
    server.create_database(name, extension=False)
