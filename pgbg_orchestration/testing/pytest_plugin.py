"""Fixtures for the tests of projects that use this package: a PostgreSQL with pg_background, and fresh databases.

They are there as soon as the package is installed. Nothing is imported or started until a test asks for one:

    def test_my_load(pgbg_database):
        outcome = run(pgbg_database.conninfo, Job("insert into ..."))
        assert outcome.row_count == 3
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    import psycopg

    from pgbg_orchestration.embedded.server import EmbeddedServer

# Only names of the standard library and pytest above: this module is loaded by every pytest run on the machine.

_SERVER = pytest.StashKey["EmbeddedServer"]()


class PgbgDatabase:
    """A fresh database with pg_background and the package's schema, dropped after the test.

    Parameters
    ----------
    server:
        The server that it is on.
    name:
        Its name.
    """

    def __init__(self, server: EmbeddedServer, name: str) -> None:
        self.server = server
        self.name = name

    @property
    def conninfo(self) -> str:
        """The connection string of the server's superuser, for :func:`pgbg_orchestration.run` and psycopg."""
        return self.server.conninfo(self.name)

    @property
    def connection_fields(self) -> dict[str, Any]:
        """The same as ``host``, ``port``, ``login`` and ``schema`` (the database): what an Airflow Connection takes."""
        from psycopg.conninfo import conninfo_to_dict

        fields = conninfo_to_dict(self.conninfo)
        return {
            "host": fields["host"],
            "port": int(fields["port"] or 0),
            "login": fields["user"],
            "schema": fields["dbname"],
        }

    def connect(self) -> psycopg.Connection:
        """Open an autocommit connection; the caller closes it."""
        return self.server.connect(self.name)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Register ``--pgbg-extension``."""
    parser.getgroup("pg-background-orchestration").addoption(
        "--pgbg-extension",
        choices=("auto", "real", "stand-in"),
        default="auto",
        help="which pg_background the fixture pgbg_server has: the real one where it can be had (auto), "
        "the real one or an error, or the stand-in",
    )


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say which extension the tests ran on, and why it was not the real one."""
    server = config.stash.get(_SERVER, None)
    if server is not None:
        why = f" ({server.why_standin})" if server.why_standin else ""
        terminalreporter.write_line(f"pgbg_server: {server.binaries.source}, pg_background {server.extension}{why}")


@pytest.fixture(scope="session")
def pgbg_server(pytestconfig: pytest.Config) -> Iterator[EmbeddedServer]:
    """A PostgreSQL of this test session's own, with pg_background; gone at its end.

    See :class:`pgbg_orchestration.embedded.server.EmbeddedServer`. Needs the extra ``embedded``, or a PostgreSQL 18 on
    this machine.
    """
    from pgbg_orchestration.embedded.server import EmbeddedServer

    with EmbeddedServer(extension=pytestconfig.getoption("--pgbg-extension")) as server:
        pytestconfig.stash[_SERVER] = server
        yield server


@pytest.fixture(scope="session")
def _pgbg_databases(pgbg_server: EmbeddedServer) -> Any:
    from pgbg_orchestration.embedded.databases import Databases

    return Databases(pgbg_server)


@pytest.fixture
def pgbg_database(pgbg_server: EmbeddedServer, _pgbg_databases: Any) -> Iterator[PgbgDatabase]:
    """A fresh database with pg_background and the package's schema, dropped after the test with its workers."""
    name = _pgbg_databases.create("schema")
    yield PgbgDatabase(pgbg_server, name)
    _pgbg_databases.drop(name)
