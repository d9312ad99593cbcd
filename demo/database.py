"""The demo's PostgreSQL: the embedded server with its databases."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pgbg_orchestration.embedded.server import EmbeddedServer
from pgbg_orchestration.install import install

from .state import State

FLIGHTS = "flights"
AIRFLOW = "airflow"


@contextmanager
def running(state: State) -> Iterator[EmbeddedServer]:
    """Start the server, or take over the one that a killed demo left, and stop it at the end."""
    server = EmbeddedServer(state.server)
    try:
        yield server.start()
    finally:
        if server.is_running():
            server.stop()


def prepare(server: EmbeddedServer) -> str:
    """Make the databases that are missing, with pg_background and the package's schema in the one for jobs.

    Returns
    -------
    str
        The connection string of the database for jobs.
    """
    with server.connect() as connection:
        found = {str(name) for (name,) in connection.execute("select datname from pg_database")}
    for name in {FLIGHTS, AIRFLOW} - found:
        server.create_database(name, extension=False)
    server.create_extension(FLIGHTS)
    conninfo = server.conninfo(FLIGHTS)
    install(conninfo)
    return conninfo
