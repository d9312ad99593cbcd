"""The first task and the first asset, of the README and step by step as docs/airflow.md and docs/dagster.md tell."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from pgbg_orchestration.embedded.server import EmbeddedServer
from pgbg_orchestration.ledger.install import install
from tests.core.kit import only_long

from . import snippets

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
LOGINS = ("airflow", "etl")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@dataclass
class Reader:
    """Somebody with a server of the name ``db``, and a shell."""

    server: EmbeddedServer
    database: str
    environment: dict[str, str]

    @property
    def socket(self) -> str:
        return str(conninfo_to_dict(self.server.conninfo())["host"])

    def shell(self, text: str) -> str:
        """Run the lines of a block in one shell, and return what they print."""
        given = conninfo_to_dict(self.server.conninfo())
        script = text.replace("host=db", f"host={given['host']} port={given['port']}")
        done = subprocess.run(["sh", "-ec", script], env=self.environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{text}\n{done.stdout}{done.stderr}"
        return done.stdout

    def sql(self, text: str) -> None:
        with self.server.connect(self.database) as connection:
            connection.execute(text.encode())

    def jobs(self) -> list[tuple[str, str]]:
        with psycopg.connect(self.server.conninfo(self.database), autocommit=True) as admin:
            return admin.execute("select label, state from pgbg.jobs order by label").fetchall()


@pytest.fixture(scope="module")
def server() -> Iterator[EmbeddedServer]:
    with EmbeddedServer() as server, server.connect() as connection:
        for login in LOGINS:
            connection.execute(f"create role {login} login")
        yield server


@pytest.fixture
def reader(server: EmbeddedServer, tmp_path: Path) -> Iterator[Reader]:
    database = "books"
    with server.connect() as connection:
        connection.execute(f"create database {database}")
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("AIRFLOW", "PG"))}
        environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        yield Reader(server, database, {**environment, "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)})
        connection.execute(f"drop database {database} with (force)")


@pytest.fixture(scope="module")
def airflow_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An Airflow with a metadata database, and an empty folder for DAG files."""
    pytest.importorskip("airflow")
    home = tmp_path_factory.mktemp("airflow")
    (home / "dags").mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AIRFLOW")}
    subprocess.run(
        [sys.executable, "-m", "airflow", "db", "migrate"],
        env={**environment, "AIRFLOW_HOME": str(home)},
        check=True,
        capture_output=True,
    )
    return home


@pytest.fixture
def airflow(reader: Reader, airflow_home: Path) -> Reader:
    """A reader with an Airflow."""
    reader.environment |= {"AIRFLOW_HOME": str(airflow_home), "AIRFLOW__CORE__LOAD_EXAMPLES": "False"}
    return reader


@pytest.fixture
def dagster(reader: Reader, tmp_path: Path) -> Reader:
    """A reader with a Dagster."""
    pytest.importorskip("dagster")
    (tmp_path / "dagster.yaml").write_text("telemetry:\n  enabled: false\n")
    reader.environment["DAGSTER_HOME"] = str(tmp_path)
    return reader


def of_the_readme(language: str, beginning: str) -> str:
    (found,) = [s.text for s in snippets.of(README) if s.language == language and beginning in s.text]
    return found


def prepare_as_the_readme_says(reader: Reader) -> None:
    """Its login, with what the README grants and nothing else."""
    install(reader.server.conninfo(reader.database), create_extension=True)
    reader.sql(of_the_readme("sql", "grant").replace("create role etl login;", ""))  # made for all tests of this file


def at(reader: Reader, text: str) -> str:
    """The README's commands, for the server that is here."""
    given = conninfo_to_dict(reader.server.conninfo())
    url = f"@{quote(str(given['host']), safe='')}:{given['port']}/{reader.database}"
    assert "@localhost/flights" in text or "host=localhost dbname=flights" in text
    return text.replace("@localhost/flights", url).replace(
        "host=localhost dbname=flights", f"host={given['host']} port={given['port']} dbname={reader.database}"
    )


@pytest.mark.airflow
def test_airflow_of_the_readme(airflow: Reader, airflow_home: Path) -> None:
    """The DAG as it stands, run by Airflow's own ``dag.test()``; real processes are for tests/airflow."""
    prepare_as_the_readme_says(airflow)
    (airflow_home / "dags" / "delays.py").write_text(of_the_readme("python", "PgBackgroundOperator"))

    airflow.shell(at(airflow, of_the_readme("sh", "airflow dags test")))

    assert airflow.jobs() == [("delays.facts", "committed"), ("delays.index", "committed")]


@only_long
@pytest.mark.dagster
def test_dagster_of_the_readme(dagster: Reader, tmp_path: Path) -> None:
    prepare_as_the_readme_says(dagster)
    (tmp_path / "facts.py").write_text(of_the_readme("python", "PgBackgroundResource"))

    dagster.shell(f"cd {tmp_path}\n{at(dagster, of_the_readme('sh', 'dagster asset materialize'))}")

    assert dagster.jobs() == [("facts", "committed")]


@only_long
@pytest.mark.airflow
def test_a_first_task(airflow: Reader, airflow_home: Path) -> None:
    page = ROOT / "docs" / "airflow.md"
    _, prepare, grants, doctor, dag, try_it = snippets.of(page, "A first task in five minutes")
    (conn,) = re.findall(r"export AIRFLOW_CONN_POSTGRES_DEFAULT=(\S+)`", page.read_text())
    airflow.environment["AIRFLOW_CONN_POSTGRES_DEFAULT"] = conn.replace("@db/", f"@{quote(airflow.socket, safe='')}/")

    airflow.shell(prepare.text)
    airflow.sql(grants.text)
    airflow.shell(doctor.text)
    (airflow_home / "dags" / "books.py").write_text(dag.text)
    told = airflow.shell(try_it.text)

    assert re.search(r"^✓ committed +close 2013-04-01 ", told, re.MULTILINE)
    assert airflow.jobs() == [("close 2013-04-01", "committed")]


@pytest.mark.dagster
def test_a_first_asset(dagster: Reader, tmp_path: Path) -> None:
    page = ROOT / "docs" / "dagster.md"
    _, prepare, grants, doctor, asset, try_it, dev = snippets.of(page, "A first asset in five minutes")

    dagster.shell(prepare.text)
    dagster.sql(grants.text)
    dagster.shell(doctor.text)
    (tmp_path / "books.py").write_text(asset.text)
    told = dagster.shell(f"cd {tmp_path}\n{try_it.text}")

    assert re.search(r"^✓ committed +bestsellers .* 2 .*CREATE TABLE AS$", told, re.MULTILINE)
    assert dev.text == "dagster dev -f books.py\n"  # the page itself: tests/dagster/test_processes.py
