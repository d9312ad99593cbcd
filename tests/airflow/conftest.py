"""One real Airflow, shared by all tests here: its own processes, two triggerers, metadata in PostgreSQL."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql

from pgbg_orchestration.embedded.databases import Databases
from pgbg_orchestration.embedded.extension import RealExtensionUnavailableError
from tests.conftest import Running
from tests.matrix import LONG
from tests.servers.debian import ServerUnavailableError
from tests.servers.kinds import Server

pytest.importorskip("airflow")

from airflow_provider import compat
from demo.airflow_processes import AirflowProcesses

HERE = Path(__file__).parent
MODEST = "pgbg_modest"
"""A login with ``pgbackground_role`` and a schema of its own, and nothing else: the connection ``modest``."""
USERS = {"ann": "admin", "otto": "op", "vera": "viewer"}
"""Who may do what: Ann administers this Airflow, Otto operates it, Vera may look at DAGs. A password is the name."""
SETTINGS = {
    # Its files do not change: parsed every half a minute, they take a tenth of a core.
    "AIRFLOW__DAG_PROCESSOR__MIN_FILE_PROCESS_INTERVAL": "3600",
    "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_ALL_ADMINS": "False",
    "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_USERS": ",".join(f"{name}:{role}" for name, role in USERS.items()),
    "AIRFLOW__PG_BACKGROUND__WEB_CONN_IDS": "warehouse",
    "AIRFLOW__PG_BACKGROUND__WEB_ALLOW_CANCEL": "true",
}
HASTE = {
    # For tests that kill an executor's process: otherwise its task counts as lost after five minutes.
    "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT": "40",
    "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT_DETECTION_INTERVAL": "5",
}
EXAMPLES = HERE.parents[1] / "example_dags"
BEGINNING_IN_THE_TRIGGERER = {"airflow_notifications"}  # refused where Airflow cannot: one such file is an error of all
EXAMPLE_DAGS = sorted(
    path.stem
    for path in EXAMPLES.glob("airflow_*.py")
    if compat.HERE.starts_from_triggers or path.stem not in BEGINNING_IN_THE_TRIGGERER
)


@dataclass
class Lab:
    """A running Airflow, the database in which its tasks run their jobs, and that of the connection ``warehouse``."""

    processes: AirflowProcesses
    conninfo: str
    warehouse: str
    admin: psycopg.Connection[Any]

    def rows(self, query: str, *arguments: object) -> list[tuple[Any, ...]]:
        """What a query returns."""
        return self.admin.execute(query.encode(), arguments).fetchall()

    def conflicting(self, name: str, sqlstate: str = "40001") -> str:
        """Return SQL that meets a conflict each time, until :meth:`end_conflict`; then it commits one effect.

        How often it runs is left open: a triggerer that takes over from another one runs it again in the same try.
        """
        return (
            f"insert into effect (run, pid) values ('{name}', pg_backend_pid()); do $$ begin"
            f" if not exists (select from conflict_ended where run = '{name}') then"
            f" raise exception 'could not serialize' using errcode = '{sqlstate}'; end if; end $$"
        )

    def end_conflict(self, name: str) -> None:
        """Have the SQL of :meth:`conflicting` commit from now on."""
        self.admin.execute("insert into conflict_ended values (%s)", [name])

    def wait_for_try(self, dag_id: str, run_id: str, number: int) -> None:
        """Wait until the task ``job`` of a run is in its try of this number, or in a later one."""
        self.wait(
            lambda: self.processes.task(dag_id, run_id, "job")["try_number"] >= number, f"try {number} of {run_id}", 120
        )

    def start(self, dag_id: str, run_id: str, sql: str) -> str:
        """Start a run of a probe and return its run id."""
        self.processes.wait_for_dag(dag_id)
        return self.processes.trigger_dag(dag_id, run_id=run_id, conf={"sql": sql})

    def workers(self, run_id: str) -> list[int]:
        """Process ids of the run's workers that are at work."""
        found = self.rows(
            "select running_pid from pgbg.jobs where label = %s and running_pid is not null order by 1", run_id
        )
        return [pid for (pid,) in found]

    def triggerer_of(self, run_id: str) -> str:
        """Which component launched the run's worker."""
        pid = int(self.rows("select launched_by from pgbg.jobs where label = %s", run_id)[0][0].rpartition("/")[2])
        return next(name for name in self.processes.components if pid in self.processes.pids(name))

    def effects(self, run_id: str) -> int:
        """How many times the run's work was committed."""
        return int(self.rows("select count(*) from effect where run = %s", run_id)[0][0])

    def states(self, run_id: str) -> list[str]:
        """States of the run's jobs, oldest generation first."""
        return [s for (s,) in self.rows("select state from pgbg.jobs where label = %s order by generation", run_id)]

    @contextmanager
    def slots_used_up(self, spare: int = 0) -> Iterator[Callable[[], None]]:
        """Take all of the server's worker slots but ``spare``; gives what frees them again."""
        with psycopg.connect(self.conninfo, autocommit=True) as session:
            session.execute("set pg_background.max_workers = 1000")
            taken: list[int] = []
            with suppress(psycopg.errors.InsufficientResources):
                while True:
                    row = session.execute("select (pg_background_launch('select pg_sleep(900)')).pid").fetchone()
                    assert row is not None
                    taken.append(int(row[0]))

            def free(pids: list[int]) -> None:
                self.rows("select pg_cancel_backend(pid) from unnest(%s::int[]) pid", pids)

            free(taken[:spare])
            try:
                yield lambda: free(taken[spare:])
            finally:
                free(taken)

    def wait(self, there: Callable[[], object], what: str, seconds: float = 60.0) -> None:
        """Wait until something is true."""
        until = time.monotonic() + seconds
        while not there():
            assert time.monotonic() < until, f"not after {seconds:.0f} s: {what}"
            time.sleep(0.1)

    def wait_for_states(self, run_id: str, states: list[str]) -> None:
        """Wait until the run's jobs are in these states, oldest generation first."""
        until = time.monotonic() + 180
        while (found := self.states(run_id)) != states and time.monotonic() < until:
            time.sleep(0.1)
        assert found == states

    def wait_for_worker(self, run_id: str) -> int:
        """Wait until a worker of the run is at work, and return its process id."""
        self.wait(lambda: self.workers(run_id), f"a worker of {run_id}", 90)
        return self.workers(run_id)[0]

    def wait_for_no_worker(self, run_id: str) -> None:
        """Wait until no worker of the run is left."""
        self.wait(lambda: not self.workers(run_id), f"the end of the workers of {run_id}", 180)


@pytest.fixture(scope="session")
def airflow_server(running: Running) -> Server:
    """The server for Airflow's metadata and for the jobs: the real extension, in its own server or an embedded one."""
    reasons = []
    for kind in ("real", "embedded"):
        try:
            return running.get(kind)
        except (ServerUnavailableError, RealExtensionUnavailableError) as error:
            reasons.append(f"{kind}: {error}")
    pytest.skip("; ".join(reasons))


@pytest.fixture(scope="package")  # at rest it takes a fifth of a core, so it ends before the tests of another folder
def lab(airflow_server: Server, running: Running, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """The running Airflow. A test that stops a component starts it again."""
    databases: Databases = running.databases(airflow_server)
    jobs, warehouse, metadata = databases.create("schema"), databases.create("schema"), databases.create("empty")
    home = tmp_path_factory.mktemp("airflow")
    passwords = home / "passwords.json"
    passwords.write_text(json.dumps({name: name for name in USERS}))
    dags = home / "dags"
    dags.mkdir()
    for source in (HERE / "dags").iterdir():
        if source.suffix in (".py", ".sql"):
            (dags / source.name).symlink_to(source)
    for name in EXAMPLE_DAGS:
        (dags / f"{name}.py").symlink_to(EXAMPLES / f"{name}.py")
    (dags / "sql").symlink_to(EXAMPLES / "sql")
    conninfo = airflow_server.conninfo(jobs)
    with psycopg.connect(conninfo, autocommit=True) as admin:
        admin.execute("create table effect (run text, at timestamptz default clock_timestamp(), pid int)")
        admin.execute("create table conflict_ended (run text primary key)")
        if not admin.execute("select 1 from pg_roles where rolname = %s", (MODEST,)).fetchone():
            admin.execute(sql.SQL("create role {} login").format(sql.Identifier(MODEST)))
        # What docs/airflow.md and the doctor ask for, and what the tests' own SQL touches.
        admin.execute(sql.SQL("grant pgbackground_role to {}").format(sql.Identifier(MODEST)))
        admin.execute(sql.SQL("create schema {} authorization {}").format(*[sql.Identifier(MODEST)] * 2))
        processes = AirflowProcesses(
            home,
            dags,
            airflow_server.conninfo(metadata),
            connections={
                "postgres_default": conninfo,
                "modest": airflow_server.conninfo(jobs, MODEST),
                "warehouse": airflow_server.conninfo(warehouse),
            },
            triggerers=2,
            settings={
                **SETTINGS,
                "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_PASSWORDS_FILE": str(passwords),
                **(HASTE if LONG else {}),
            },
            login=("ann", "ann"),
        )
        try:
            with processes:
                yield Lab(processes, conninfo, airflow_server.conninfo(warehouse), admin)
        finally:
            admin.close()
            for name in (jobs, warehouse, metadata):
                databases.drop(name)
