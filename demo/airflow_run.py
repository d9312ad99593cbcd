"""One run of the DAG ``flights`` in a real Airflow, watched from outside."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata

import psycopg

from pgbg_orchestration.embedded.server import EmbeddedServer

from .airflow_processes import FINISHED, AirflowProcesses
from .database import AIRFLOW, edition_of, set_edition
from .jobs import JobRow, of_series
from .state import ROOT, DemoError, State

DAG_ID = "flights"
DAG_FILE = ROOT / "example_dags" / "flights_airflow.py"
CONN_ID = "flights"
RUN_SECONDS = 300.0
POLL_SECONDS = 0.3

SETTINGS = {
    # What the demo shows is a DAG of seconds, on a machine that has other things to do.
    "AIRFLOW__SCHEDULER__SCHEDULER_IDLE_SLEEP_TIME": "0.3",
    "AIRFLOW__DAG_PROCESSOR__MIN_FILE_PROCESS_INTERVAL": "60",
    # macOS ends a process that forks after it has looked up proxies or used its frameworks.
    **({"OBJC_DISABLE_INITIALIZE_FORK_SAFETY": "YES"} if sys.platform == "darwin" else {}),
}


@dataclass
class AirflowRun:
    """What happened in one run of the DAG.

    Attributes
    ----------
    run_id, state:
        Of the DAG run.
    tasks:
        State of each task, in the order in which they began.
    tries:
        How often each was tried.
    jobs:
        What the ledger tells of each task's job; a task that never ran has none.
    failed_tries:
        Tries that failed before the last one, as they were seen.
    seconds:
        How long the run took.
    """

    run_id: str
    state: str
    tasks: dict[str, str] = field(default_factory=dict)
    tries: dict[str, int] = field(default_factory=dict)
    jobs: dict[str, JobRow] = field(default_factory=dict)
    failed_tries: dict[str, JobRow] = field(default_factory=dict)
    seconds: float = 0.0


@contextmanager
def started(state: State, server: EmbeddedServer, conninfo: str) -> Iterator[AirflowProcesses]:
    """Start an Airflow that has the demo's DAG file and no other, and the connection ``flights``; end it at the end."""
    folder = state.airflow / "dags"
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.py"):
        old.unlink()
    (folder / DAG_FILE.name).symlink_to(DAG_FILE)
    version = metadata.version("apache-airflow")
    with AirflowProcesses(
        state.airflow,
        folder,
        server.conninfo(AIRFLOW),
        connections={CONN_ID: conninfo},
        settings=SETTINGS,
        migrate=edition_of(server, AIRFLOW) != version,
    ) as airflow:
        set_edition(server, AIRFLOW, version)
        yield airflow


def run(airflow: AirflowProcesses, conninfo: str, watch: Callable[[AirflowRun], None]) -> AirflowRun:
    """Trigger the DAG and follow it to its end.

    While its check of the airlines is tried for the first time, a session of ours holds a lock on that table, as an
    ``ALTER TABLE`` of somebody's would: the check fails with 55P03, and the lock goes before the next try.

    Parameters
    ----------
    airflow:
        A started Airflow.
    conninfo:
        Of the database of the flights.
    watch:
        Called now and then with what is known so far.

    Raises
    ------
    DemoError
        The run does not end in time.
    """
    _end_interrupted_runs(airflow)
    airflow.wait_for_dag(DAG_ID)
    since = datetime.now(UTC)
    try:
        with psycopg.connect(conninfo, autocommit=True) as ledger, locked(conninfo) as unlock:
            run = AirflowRun(airflow.trigger_dag(DAG_ID, run_id=f"demo_{since:%Y%m%dT%H%M%S_%f}"), "queued")
            _follow(airflow, run, lambda: _look(airflow, ledger, run, since), unlock, watch)
    except BaseException:
        _end_interrupted_runs(airflow)
        raise
    return run


def _follow(
    airflow: AirflowProcesses,
    run: AirflowRun,
    look: Callable[[], None],
    unlock: Callable[[], None],
    watch: Callable[[AirflowRun], None],
) -> None:
    began = time.monotonic()
    while run.state not in FINISHED:
        if run.seconds > RUN_SECONDS:
            raise DemoError(
                f"the run {run.run_id} of {DAG_ID} did not end within {RUN_SECONDS:.0f} s: {run.tasks}\n"
                f"The logs are in {airflow.home}."
            )
        time.sleep(POLL_SECONDS)
        run.state = airflow.run_state(DAG_ID, run.run_id)
        look()
        run.seconds = time.monotonic() - began
        if "check_airlines" in run.failed_tries:
            unlock()
        watch(run)


@contextmanager
def locked(conninfo: str) -> Iterator[Callable[[], None]]:
    """Hold a lock on ``nycflights13.airlines`` until the function that is given is called."""
    with psycopg.connect(conninfo) as session:
        session.execute("lock table nycflights13.airlines in access exclusive mode")
        yield session.rollback


def _look(airflow: AirflowProcesses, ledger: psycopg.Connection, run: AirflowRun, since: datetime) -> None:
    for instance in airflow.call("GET", f"/dags/{DAG_ID}/dagRuns/{run.run_id}/taskInstances?order_by=start_date")[
        "task_instances"
    ]:
        run.tasks[instance["task_id"]] = instance["state"] or "waiting"
        run.tries[instance["task_id"]] = instance["try_number"]
    for job in of_series(ledger, f"airflow:{DAG_ID}/{run.run_id}/", since):
        task_id = job.series.split("/")[-2]
        run.jobs[task_id] = job
        if job.state == "failed" and job.sqlstate == "55P03":
            run.failed_tries[task_id] = job


def _end_interrupted_runs(airflow: AirflowProcesses) -> None:
    """Mark runs that no demo follows any more: the next Airflow would go on with them beside its own."""
    known = airflow.call("GET", f"/dags?dag_id_pattern={DAG_ID}&limit=100")["dags"]
    if any(dag["dag_id"] == DAG_ID for dag in known):
        for old in airflow.call("GET", f"/dags/{DAG_ID}/dagRuns?state=running&state=queued")["dag_runs"]:
            airflow.mark_run(DAG_ID, old["dag_run_id"], "failed")
