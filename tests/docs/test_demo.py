"""``make demo`` as a person runs it: whole, in processes of its own, and interrupted; in the long form twice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import psycopg
import pytest

from demo.database import AIRFLOW, FLIGHTS
from demo.state import ROOT, STATE_VARIABLE, State
from pgbg_orchestration.embedded.server import EmbeddedServer
from pgbg_orchestration.embedded.status import status
from tests.matrix import LONG

pytestmark = [
    pytest.mark.airflow,
    pytest.mark.dagster,
    pytest.mark.processes,
    pytest.mark.slow,
]

RUNS = 2 if LONG else 1
FIRST_SECONDS = 600
INTERRUPTED_SECONDS = 120
# Nobody listens there: what would be downloaded fails.
NO_NETWORK = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")


@dataclass(frozen=True)
class Ran:
    """A folder in which the demo ran, and what it printed, run by run."""

    state: State
    printed: list[str]


def demo(state: State, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "demo", *arguments],
        cwd=ROOT,
        env={**os.environ, STATE_VARIABLE: str(state.home), "COLUMNS": "120", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def leftovers(state: State) -> list[str]:
    """The command lines of processes that work in the folder of the demo."""
    found = []
    for process in psutil.process_iter():
        try:
            if str(state.home) in " ".join(process.environ().values()) and process.pid != os.getpid():
                found.append(" ".join(process.cmdline()))
        except (psutil.Error, OSError):
            continue  # another user's, or gone meanwhile
    return found


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[State]:
    state = State(tmp_path_factory.mktemp("demo"))
    yield state
    state.remove()


@pytest.fixture(scope="module")
def ran(state: State) -> Ran:
    """The demo, run once; in the long form a second time, without a network."""
    printed = []
    for environment in ({}, NO_NETWORK)[:RUNS]:
        process = demo(state, **environment)
        try:
            out, _ = process.communicate(timeout=FIRST_SECONDS)
        finally:
            process.terminate()
        assert process.returncode == 0, out
        printed.append(out)
    return Ran(state, printed)


@pytest.fixture(scope="module")
def server(ran: Ran) -> Iterator[EmbeddedServer]:
    """The demo's server, started again to look into it."""
    with EmbeddedServer(ran.state.server) as server:
        yield server


def ask(server: EmbeddedServer, dbname: str, query: str) -> list[tuple[Any, ...]]:
    with psycopg.connect(server.conninfo(dbname), autocommit=True) as connection:
        return connection.execute(query.encode()).fetchall()


@pytest.mark.timeout(2 * FIRST_SECONDS)
def test_nothing_is_left_running(ran: Ran) -> None:
    assert leftovers(ran.state) == []
    assert status(ran.state.server) is None


@pytest.mark.timeout(2 * FIRST_SECONDS)
@pytest.mark.parametrize(
    ("table", "rows"),
    [
        ("nycflights13.flights", 336_776),
        ("by_airflow.flight_facts", 336_776),
        ("by_airflow.delay_by_carrier", 16),
        ("by_airflow.delay_by_dest", 105),
        ("by_airflow.flights_set_aside", 52_606),
        ("by_dagster.flight_facts", 336_776),
        ("by_dagster.delay_by_carrier", 16),
        ("by_dagster.delay_by_dest", 105),
    ],
)
def test_tables(server: EmbeddedServer, table: str, rows: int) -> None:
    assert ask(server, FLIGHTS, f"select count(*) from {table}") == [(rows,)]


@pytest.mark.timeout(2 * FIRST_SECONDS)
def test_every_run_had_jobs_of_its_own_that_really_ran(server: EmbeddedServer) -> None:
    jobs = ask(
        server,
        FLIGHTS,
        "select split_part(series, '/', 2), split_part(series, '/', 3), state, sqlstate, attempt, worker_pid, row_count"
        " from pgbg.jobs where series like 'airflow:flights/%'",
    )
    runs = {run for run, *_ in jobs}
    assert len(runs) == RUNS
    for run in runs:
        of_run = {task: rest for name, task, *rest in jobs if name == run}
        assert {task: (state, sqlstate) for task, (state, sqlstate, *_) in of_run.items()} == {
            "facts": ("committed", None),
            "by_carrier": ("committed", None),
            "by_airport": ("committed", None),
            "index": ("committed", None),
            "check_airlines": ("committed", None),
            "check_planes": ("failed", "23503"),
            "set_aside": ("committed", None),
        }
        assert of_run["check_airlines"][2] > 1
        assert of_run["facts"][4] == 336_776
        assert len({pid for _, _, _, pid, _ in of_run.values()}) == 7  # a worker for each


@pytest.mark.timeout(2 * FIRST_SECONDS)
def test_dagster_ran_each_time(server: EmbeddedServer) -> None:
    jobs = ask(
        server,
        FLIGHTS,
        "select split_part(job_id, '#', 2), count(*) filter (where state = 'committed'),"
        " count(*) filter (where state = 'failed' and sqlstate = '23503'), count(*)"
        " from pgbg.jobs where series like 'dagster/%' group by 1",
    )
    assert [counts for _, *counts in jobs] == [[4, 1, 5]] * RUNS


@pytest.mark.timeout(2 * FIRST_SECONDS)
def test_airflow_says_so_too(server: EmbeddedServer) -> None:
    assert ask(server, AIRFLOW, "select dag_id, state from dag_run") == [("flights", "success")] * RUNS
    triggers = ask(server, AIRFLOW, "select count(*) from task_instance where dag_id = 'flights' and state = 'success'")
    assert triggers == [(6 * RUNS,)]


@pytest.mark.timeout(2 * FIRST_SECONDS)
def test_what_is_printed(ran: Ran, server: EmbeddedServer) -> None:
    for printed in ran.printed:
        assert server.extension in printed or "stand-in" in printed
        assert "336,776 flights" in printed
        assert "pgbg jobs" in printed
        assert "All as it should be" in printed
        pids = ask(server, FLIGHTS, "select worker_pid from pgbg.jobs where label = 'flights.facts'")
        assert any(str(pid) in printed for (pid,) in pids)


@pytest.mark.timeout(2 * FIRST_SECONDS + INTERRUPTED_SECONDS)
def test_ctrl_c_stops_everything(ran: Ran) -> None:
    with demo(ran.state) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if "… Airflow: four processes" in line:
                    break
            while not any("airflow" in command for command in leftovers(ran.state)):
                time.sleep(0.2)
            os.killpg(process.pid, signal.SIGINT)
            rest = process.stdout.read()
            returncode = process.wait(INTERRUPTED_SECONDS)
        finally:
            process.kill()
    assert returncode == 130, rest
    assert "Interrupted." in rest
    assert leftovers(ran.state) == []
    assert status(ran.state.server) is None


def test_a_second_demo_beside_the_first_is_refused(tmp_path: Path) -> None:
    from demo.state import DemoError, claimed

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(STATE_VARIABLE, str(tmp_path))
        with claimed(), pytest.raises(DemoError, match="another demo is running"), claimed():
            pass
