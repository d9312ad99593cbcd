"""``make demo``: load real data, run a real Airflow DAG and a real Dagster job on it, and show what happened."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import get_args

import psycopg
from psycopg import sql

from pgbg_orchestration.embedded.binaries import NoPostgresError
from pgbg_orchestration.embedded.extension import RealExtensionUnavailableError
from pgbg_orchestration.embedded.server import EmbeddedServer, EmbeddedServerError, ExtensionChoice
from pgbg_orchestration.embedded.standin import StandinUnavailableError
from pgbg_orchestration.errors import PgbgError

from . import airflow_run, dagster_run, data, database, screen
from .airflow_run import AirflowRun
from .data import DataMissing
from .state import DemoError, State, claimed

FLIGHTS = 336_776
WITHOUT_PLANE = 52_606
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main() -> int:
    """Run the demo and return its exit code: 0 when all went as it should, 1 when not, 130 when interrupted."""
    options = _options()
    for number in SIGNALS:
        signal.signal(number, _interrupt)
    _leave_environment_behind()
    began = time.monotonic()
    try:
        with claimed() as state:
            if options.fresh:
                state.remove()
            try:
                show(state, stay=options.stay, extension=options.extension)
            except (PgbgError, psycopg.Error, RuntimeError, subprocess.CalledProcessError) as error:
                raise DemoError(
                    f"{error}\nThe logs are in {state.home}. `make demo ARGS=--fresh` begins from the beginning."
                ) from error
    except KeyboardInterrupt:
        screen.say("Interrupted. Everything that was started has been stopped.")
        return 130
    except (
        DemoError,
        DataMissing,
        NoPostgresError,
        EmbeddedServerError,
        StandinUnavailableError,
        RealExtensionUnavailableError,
    ) as error:
        screen.fail(str(error))
        return 1
    screen.say("")
    screen.say(f"All as it should be, in {time.monotonic() - began:.0f} s. Nothing was left running.")
    return 0


def show(state: State, *, stay: bool = False, extension: ExtensionChoice = "auto") -> None:
    """Run everything, one part after another, and print what happened.

    Parameters
    ----------
    state:
        The demo's folders.
    stay:
        Keep Airflow and the server running at the end, until somebody presses Ctrl-C.
    extension:
        Which pg_background the server gets.
    """
    screen.headline("pg-background-orchestration", "SQL in PostgreSQL's background workers")
    with ExitStack() as stack:
        with screen.step("PostgreSQL") as step:
            server = stack.enter_context(database.running(state, extension))
            conninfo = database.prepare(server)
            step.done = f"PostgreSQL {server.binaries.version} on a socket of its own, with {_extension(server)}"
        with screen.step("The flights of 2013") as step:
            counts = data.load(conninfo)
            step.done = (
                f"{data.PACKAGE}: {counts['flights']:,} flights, {counts['planes']:,} planes, "
                f"{counts['weather']:,} hours of weather"
            )
        with screen.step("Dagster") as step:
            materialized = dagster_run.run(state, conninfo)
            step.done = f"Dagster {metadata.version('dagster')}: job {dagster_run.JOB}"
        with screen.step("Airflow: four processes") as step:
            airflow = stack.enter_context(airflow_run.started(state, server, conninfo))
            step.done = f"Airflow {metadata.version('apache-airflow')}: {', '.join(airflow.components)}"
        with screen.step("Airflow: the DAG") as step:
            flown = airflow_run.run(airflow, conninfo, lambda run: step.now(_progress(run)))
            step.done = f"Airflow: DAG {airflow_run.DAG_ID}, {len(flown.tasks)} tasks"

        screen.headline(f"Airflow · {airflow_run.DAG_ID}", f"run {flown.run_id}: {flown.state}")
        screen.airflow_tasks(flown)
        screen.headline(f"Dagster · {dagster_run.JOB}", f"run {materialized.run_id}: {materialized.state}")
        screen.dagster_jobs(materialized)
        _expect(flown, _rows(conninfo))
        screen.headline("pgbg jobs")
        _print_jobs(conninfo, len(flown.jobs) + len(materialized.jobs))
        if stay:
            _stay(airflow.url, conninfo)


def _progress(run: AirflowRun) -> str:
    ended = [task for task, state in run.tasks.items() if state in ("success", "failed", "skipped")]
    under_way = [
        f"{task} {state}"
        for task, state in run.tasks.items()
        if state not in ("success", "failed", "skipped", "waiting")
    ]
    return f"Airflow: {len(ended)} of {len(run.tasks)} tasks done  {', '.join(under_way[:4])}"


def _extension(server: EmbeddedServer) -> str:
    if not server.is_standin:
        return f"pg_background ({server.extension})"
    return f"a stand-in for pg_background ({server.why_standin or 'as when it was made'})"


def _expect(run: AirflowRun, rows: dict[str, int]) -> None:
    """Say how the run ended and why that is right.

    Raises
    ------
    DemoError
        It ended otherwise.
    """
    as_it_should = {
        "the run is a success": run.state == "success",
        f"by_airflow.flight_facts has {FLIGHTS:,} rows": rows["by_airflow.flight_facts"] == FLIGHTS,
        f"by_dagster.flight_facts has {FLIGHTS:,} rows": rows["by_dagster.flight_facts"] == FLIGHTS,
        "check_airlines was tried again, and passed": run.tries.get("check_airlines", 0) > 1
        and run.tasks["check_airlines"] == "success",
        "check_planes failed with 23503": run.tasks.get("check_planes") == "failed"
        and run.jobs["check_planes"].sqlstate == "23503",
        f"by_airflow.flights_set_aside has {WITHOUT_PLANE:,} rows": rows["by_airflow.flights_set_aside"]
        == WITHOUT_PLANE,
    }
    if wrong := [what for what, is_so in as_it_should.items() if not is_so]:
        raise DemoError(f"the DAG run {run.run_id} did not go as it should; expected, and not so: {'; '.join(wrong)}")
    screen.say("")
    screen.say(
        "check_airlines met a lock that somebody held and passed at its next try. check_planes found flights of "
        "unknown planes: no retry can mend data, so it failed at once, and set_aside put those "
        f"{WITHOUT_PLANE:,} flights into by_airflow.flights_set_aside. With that the run is a success."
    )


def _rows(conninfo: str) -> dict[str, int]:
    """Count what the jobs wrote; a table that is not there has no rows."""
    counts = {}
    with psycopg.connect(conninfo) as conn:
        for table in ("by_airflow.flight_facts", "by_airflow.flights_set_aside", "by_dagster.flight_facts"):
            there = conn.execute("select to_regclass(%s)", (table,)).fetchone() != (None,)
            query = sql.SQL("select count(*) from {}").format(sql.Identifier(*table.split(".")))
            row = conn.execute(query).fetchone() if there else None
            counts[table] = int(row[0]) if row else 0
    return counts


def _print_jobs(conninfo: str, number: int) -> None:
    sys.stdout.flush()
    subprocess.run(
        [_pgbg(), "jobs", "--limit", str(number), "--dsn", conninfo],
        env={**os.environ, "COLUMNS": str(screen.console.width)} if screen.console.is_terminal else None,
        check=True,
    )


def _pgbg() -> Path:
    return Path(sys.executable).with_name("pgbg")


def _stay(url: str, conninfo: str) -> None:
    screen.headline("Look around")
    screen.say(f"Airflow (no login):  {url}")
    screen.say(f"Jobs:                {_pgbg()} jobs --dsn '{conninfo}'")
    screen.say(f"PostgreSQL:          psql '{conninfo}'")
    screen.say("Ctrl-C ends both.")
    while True:
        signal.pause()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument("--fresh", action="store_true", help="forget what earlier runs left, and begin anew")
    parser.add_argument("--stay", action="store_true", help="keep Airflow's pages and the server up until Ctrl-C")
    parser.add_argument(
        "--extension",
        choices=get_args(ExtensionChoice),
        default="auto",
        help="which pg_background to have: the real one where it can be had (auto), or one of the two; needs --fresh "
        "when earlier runs had the other one",
    )
    return parser.parse_args()


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    """End the demo; a second Ctrl-C must not stop the stopping."""
    for number in SIGNALS:
        signal.signal(number, lambda *_: None)
    raise KeyboardInterrupt


def _leave_environment_behind() -> None:
    """Keep settings of the user's own PostgreSQL and of a proxy out of what only happens on this machine."""
    for name in [name for name in os.environ if name.startswith("PG") and not name.startswith("PGBG_")]:
        del os.environ[name]
    for name in ("no_proxy", "NO_PROXY"):
        os.environ[name] = ",".join(filter(None, [os.environ.get(name), "127.0.0.1", "localhost"]))


if __name__ == "__main__":
    sys.exit(main())
