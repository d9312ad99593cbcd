"""Fixtures of the contract suite, and the rule that nothing is skipped but by the stand-in's table of differences.

Or for the server's age: a test is about what came with a version (the marker ``since``).
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import psycopg
import pytest

from pgbg_orchestration.embedded.standin import DIFFERENCES
from pgbg_orchestration.postgres.pg_background import Extension
from tests.conftest import OLDER, Database
from tests.contract.background import Background

HERE = Path(__file__).parent
BY_TABLE = "difference of the stand-in: "
MEANT_FOR_OTHERS = "got empty parameter set"  # of servers: none that the test is meant for is among --servers
ALLOWED = (BY_TABLE, OLDER, MEANT_FOR_OTHERS, "cannot be had here")


@pytest.fixture
def extension(extension_database: Database) -> Extension:
    with extension_database.connect() as connection:
        row = connection.execute(
            "select extversion, extnamespace::regnamespace::text from pg_extension where extname = 'pg_background'"
        ).fetchone()
    assert row is not None
    return Extension(*row)


@pytest.fixture
def open_session(extension_database: Database, extension: Extension) -> Iterator[Callable[..., Background]]:
    """Opens launching sessions: open_session(user="postgres", **libpq_parameters). All are closed at the end."""
    opened: list[psycopg.Connection] = []

    def make(user: str = "postgres", **parameters: str) -> Background:
        connection = psycopg.connect(extension_database.conninfo_as(user, **parameters), autocommit=True)
        opened.append(connection)
        return Background(connection, extension)

    yield make
    for connection in opened:
        connection.close()


@pytest.fixture
def session(open_session: Callable[..., Background]) -> Background:
    """A launching session of a superuser."""
    return open_session()


@pytest.fixture
def observer(extension_database: Database) -> Iterator[psycopg.Connection]:
    """Another session, which launched nothing."""
    with extension_database.connect() as connection:
        yield connection


@pytest.fixture
def unlike(extension_database: Database) -> Callable[[str], None]:
    """unlike(name): skip the rest on a stand-in, whose table lists the difference of that name."""

    def skip(name: str) -> None:
        why = DIFFERENCES[name]
        if extension_database.server.is_standin:
            pytest.skip(f"{BY_TABLE}{name}: {why}")

    return skip


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    reason = str(report.longrepr[2]) if report.skipped and isinstance(report.longrepr, tuple) else ""
    if report.skipped and HERE in item.path.parents and not any(allowed in reason for allowed in ALLOWED):
        report.outcome = "failed"
        report.longrepr = f"skipped, and not by the table of differences: {reason or report.longrepr}"
    return report


def differences_used() -> set[str]:
    """The names that this directory's tests give to ``unlike``."""
    calls = (
        node
        for path in HERE.glob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "unlike"
    )
    return {str(argument.value) for call in calls for argument in call.args if isinstance(argument, ast.Constant)}
