"""``dag.test()`` and ``airflow tasks test``: one process, no scheduler, no triggerer."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent
from typing import Any

import psycopg
import pytest

from pgbg_orchestration.embedded.databases import Databases
from tests.conftest import Running
from tests.core.kit import only_long
from tests.servers.kinds import Server

pytest.importorskip("airflow")

from demo.airflow_processes import AirflowProcesses

pytestmark = [pytest.mark.airflow, pytest.mark.slow]

DAG_FILE = """
    from airflow.sdk import DAG

    from airflow_provider.operators import PgBackgroundBatchOperator
    from airflow_provider.operators import PgBackgroundOperator
    from airflow_provider.sensors import PgBackgroundSensor

    with DAG("books", schedule=None) as dag:
        deferred = PgBackgroundOperator(
            task_id="deferred", sql="insert into effect values ('deferred {{ ds }}')", deferrable=True, label="first"
        )
        here = PgBackgroundOperator(task_id="here", sql="insert into effect values ('here')", deferrable=False)
        started = PgBackgroundOperator(
            task_id="started", sql="insert into effect values ('started')", start_from_trigger=True
        )
        batch = PgBackgroundBatchOperator(
            task_id="batch", jobs={"a": "insert into effect values ('batch')", "b": "select 1"}, deferrable=True
        )
        sensor = PgBackgroundSensor(task_id="sensor", label="first", deferrable=True, timeout=60)
        deferred >> here >> started >> batch >> sensor

    if __name__ == "__main__":
        print("the run is", dag.test().state)
"""


@dataclass
class Desk:
    """An Airflow without processes, and the database of its jobs."""

    airflow: AirflowProcesses
    dag_file: Path
    admin: psycopg.Connection[Any]

    def effects(self) -> list[str]:
        """What jobs did since this was asked last."""
        found = self.admin.execute("with gone as (delete from effect returning what) select what from gone order by 1")
        return [what for (what,) in found.fetchall()]


@pytest.fixture(scope="module")
def desk(airflow_server: Server, running: Running, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    """An Airflow whose metadata database is migrated, with one DAG."""
    databases: Databases = running.databases(airflow_server)
    jobs, metadata = databases.create("schema"), databases.create("empty")
    home = tmp_path_factory.mktemp("airflow-desk")
    (home / "dags").mkdir()
    dag_file = home / "dags" / "books.py"
    dag_file.write_text(dedent(DAG_FILE))
    conninfo = airflow_server.conninfo(jobs)
    airflow = AirflowProcesses(
        home, home / "dags", airflow_server.conninfo(metadata), connections={"postgres_default": conninfo}
    )
    airflow.command("db", "migrate")
    try:
        with psycopg.connect(conninfo, autocommit=True) as admin:
            admin.execute("create table effect (what text)")
            yield Desk(airflow, dag_file, admin)
    finally:
        for name in (jobs, metadata):
            databases.drop(name)


def _run(desk: Desk, *command: str) -> str:
    """Run a command to its end, and return all that it printed."""
    done = subprocess.run(
        [sys.executable, *command],
        env=desk.airflow.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.stdout


def test_dag_test(desk: Desk) -> None:
    told = _run(desk, str(desk.dag_file))

    assert "the run is success" in told, told[-8000:]
    effects = desk.effects()
    assert effects[0] == "batch"
    assert effects[1].startswith("deferred 20")
    assert effects[2:] == ["here", "started"]


@only_long
@pytest.mark.parametrize("task_id", ["deferred", "here"])
def test_airflow_tasks_test(desk: Desk, task_id: str) -> None:
    told = _run(desk, "-m", "airflow", "tasks", "test", "books", task_id, "2013-04-01")

    effects = desk.effects()
    assert [effect.split()[0] for effect in effects] == [task_id], told[-8000:]
