"""Every command and snippet of the README, run as a reader would run it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from psycopg.conninfo import conninfo_to_dict

from pgbg_orchestration.embedded.server import EmbeddedServer
from pgbg_orchestration.ledger.install import install

from . import snippets

ROOT = Path(__file__).resolve().parents[2]
NAME = "pg-background-orchestration"
README = ROOT / "README.md"
SNIPPETS = snippets.of(README)
DATABASE = "flights"


@pytest.fixture(scope="module")
def server() -> Iterator[EmbeddedServer]:
    with EmbeddedServer() as server:
        yield server


@pytest.fixture
def environment(server: EmbeddedServer, tmp_path: Path) -> Iterator[dict[str, str]]:
    """What a reader has: a fresh database ``flights``, libpq's variables, and ``pgbg`` on the PATH."""
    server.create_database(DATABASE)
    given = conninfo_to_dict(server.conninfo(DATABASE))
    yield {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PGHOST": str(given["host"]),
        "PGPORT": str(given["port"]),
        "PGUSER": str(given["user"]),
        "PGDATABASE": DATABASE,
        "FLIGHTS_CONNINFO": server.conninfo(DATABASE),
        "HOME": str(tmp_path),
        "PYTHONPATH": str(ROOT),
    }
    with server.connect() as connection:
        connection.execute(f"drop database {DATABASE} with (force)")


def block(language: str, beginning: str) -> snippets.Snippet:
    """The only block of a language that has a text in it."""
    (found,) = [s for s in SNIPPETS if s.language == language and beginning in s.text]
    return found


def shell(command: str, environment: dict[str, str], *, codes: tuple[int, ...] = (0,)) -> str:
    done = subprocess.run(["sh", "-c", command], env=environment, capture_output=True, text=True)
    assert done.returncode in codes, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


def python(text: str, environment: dict[str, str]) -> str:
    done = subprocess.run([sys.executable, "-c", text], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_block_is_run_here() -> None:
    """A block that is added to the README needs a test."""
    known = [
        ("python", "from pgbg_orchestration import Job, run"),
        ("sh", "make demo"),
        ("sh", "pip install"),
        ("sh", "pgbg install --print"),
        ("sql", "grant pgbackground_role"),
        ("sh", "first steps"),
        ("sh", "pgbg server start"),
        ("python", "PgBackgroundOperator"),
        ("sh", "airflow dags test"),
        ("python", "PgBackgroundResource"),
        ("sh", "dagster asset materialize"),
    ]

    assert [block(language, beginning) for language, beginning in known] == SNIPPETS


def test_the_first_snippet_twice(server: EmbeddedServer, environment: dict[str, str]) -> None:
    install(server.conninfo(DATABASE))
    text = block("python", "import Job, run").text

    first, second = python(text, environment).split(), python(text, environment).split()

    assert (first[0], first[2]) == ("1000", "True")
    assert second[1:] == [first[1], "False"]


def test_the_two_commands_of_make() -> None:
    """``make demo`` is run whole by test_demo.py, and ``make test`` is what runs this: here, that they are these."""
    commands = block("sh", "make demo").commands
    assert commands == ["make demo", "make test"]
    dry = [
        subprocess.run([*command.split(), "-n"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for command in commands
    ]
    assert "-m demo" in dry[0]
    assert "scripts/test.py" in dry[1]


def test_what_is_installed_is_called_so() -> None:
    (command,) = block("sh", "pip install").commands
    # In a clone its name is a dot, until it is on PyPI.
    assert command.startswith('pip install ".[')
    requirement = Requirement(command.removeprefix("pip install ").strip('"').replace(".", NAME, 1))
    extras = metadata.metadata(NAME).get_all("Provides-Extra") or []

    assert requirement.extras <= set(extras)
    told = re.search(r"\(extras:(.*?)\)", README.read_text(), re.DOTALL)
    assert told is not None
    assert set(re.findall(r"`(\w+)`", told[1])) <= set(extras)


def test_quick_start(server: EmbeddedServer, environment: dict[str, str]) -> None:
    with server.connect() as connection:
        connection.execute("drop role if exists etl")
    for command in block("sh", "pgbg install --print").commands:
        shell(command, environment)
    with server.connect(DATABASE) as connection:
        connection.execute(block("sql", "grant").text.encode())

    printed = shell("set -e\n" + block("sh", "first steps").text, environment)

    assert "failing" not in printed
    assert "✓ committed  first steps\n" in printed
    with server.connect(DATABASE) as connection:
        jobs = connection.execute("select label, state, owner from pgbg.jobs").fetchall()
    assert jobs == [("first steps", "committed", "etl")]


def test_a_server_of_ones_own(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> None:
    # Root's server runs as another user, who cannot look into pytest's folders.
    import shutil
    import tempfile

    parent = Path(tempfile.mkdtemp(prefix="pgbg-readme-"))
    parent.chmod(0o755)
    own = {name: value for name, value in environment.items() if not name.startswith("PG")}
    own["PGBG_DATA_DIR"] = str(parent / "server")
    try:
        for command in block("sh", "pgbg server start").commands:
            shell(command, own)
    finally:
        shell("pgbg server stop", own, codes=(0, 8))
        shutil.rmtree(parent)


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", README.read_text())

    assert [link for link in links if not link.startswith("https://") and not (ROOT / link).exists()] == []
