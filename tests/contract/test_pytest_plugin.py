"""The fixtures that we ship work in a project of a user's, which knows nothing of our own suite."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pgbg_orchestration.embedded.binaries import NoPostgresError, find_binaries

USERS_TEST = """
from pgbg_orchestration import Job, run

seen = set()

def test_first(pgbg_database):
    with pgbg_database.connect() as connection:
        connection.execute("create table loaded (n int)")
    outcome = run(pgbg_database.conninfo, Job("insert into loaded values (1), (2)", id="load"))
    assert outcome.row_count == 2
    with pgbg_database.connect() as connection:
        assert connection.execute("select count(*) from loaded").fetchone() == (2,)
    seen.add(pgbg_database.name)

def test_second_has_a_database_of_its_own(pgbg_database, pgbg_server):
    assert pgbg_database.name not in seen
    assert pgbg_database.connection_fields["schema"] == pgbg_database.name
    with pgbg_database.connect() as connection:
        row = connection.execute("select to_regclass('loaded'), to_regnamespace('pgbg') is null").fetchone()
    assert row == (None, False)
    with pgbg_server.connect() as connection:
        assert connection.execute("select 1 from pg_database where datname = any(%s)", (list(seen),)).fetchall() == []
"""


def users_pytest(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # Named outright and nothing else loaded: the test then does not depend on how the package is installed.
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "pgbg_orchestration.testing.pytest_plugin",
        "-p",
        "no:cacheprovider",
    ]
    return subprocess.run(
        [*command, "--rootdir", str(directory), *arguments, str(directory)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )


@pytest.fixture
def users_project(tmp_path: Path) -> Path:
    try:
        find_binaries()
    except NoPostgresError as error:
        pytest.skip(str(error))
    (tmp_path / "test_load.py").write_text(USERS_TEST)
    return tmp_path


@pytest.mark.parametrize("extension", ["auto", "stand-in"])
def test_fixtures_in_a_users_project(users_project: Path, extension: str) -> None:
    result = users_pytest(users_project, f"--pgbg-extension={extension}")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "2 passed" in result.stdout
    expected = "stand-in 2.0" if extension == "stand-in" else "pg_background "
    assert "pgbg_server: " in result.stdout
    assert expected in result.stdout


def test_plugin_costs_a_run_nothing_that_does_not_use_it() -> None:
    """Every pytest run on a machine with our package loads the plugin."""
    code = (
        "import sys, pgbg_orchestration.testing.pytest_plugin; print(sorted({'psycopg', 'asyncio'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "psycopg" not in result.stdout
