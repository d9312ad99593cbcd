"""One run of the Dagster job ``flights``, by the command that users type, in processes of its own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import psycopg

from .jobs import JobRow, of_series
from .state import ROOT, DemoError, State

JOB = "flights"
FILE = ROOT / "example_dags" / "flights_dagster.py"
RUN_SECONDS = 300.0
END_SECONDS = 10.0

INSTANCE = "telemetry:\n  enabled: false\n"
RUN_ID = re.compile(rf" - {JOB} - ([0-9a-f]{{8}}-[0-9a-f-]{{27}}) - ")


@dataclass(frozen=True)
class DagsterRun:
    """What happened in one run of the job: its id, its state, its jobs in the ledger and how long it took."""

    run_id: str
    state: str
    jobs: list[JobRow]
    seconds: float


def command() -> list[str]:
    """Return the command that runs the job."""
    return [sys.executable, "-m", "dagster", "job", "execute", "-f", str(FILE), "-j", JOB]


def run(state: State, conninfo: str) -> DagsterRun:
    """Run the job to its end.

    Raises
    ------
    DemoError
        It failed, or does not end in time; the message has the end of its log.
    """
    state.dagster.mkdir(parents=True, exist_ok=True)
    (state.dagster / "dagster.yaml").write_text(INSTANCE)
    log = state.dagster / "run.log"
    since, began = datetime.now(UTC), time.monotonic()
    returncode = _run_command(log, {"DAGSTER_HOME": str(state.dagster), "FLIGHTS_CONNINFO": conninfo})
    seconds = time.monotonic() - began
    told = log.read_text(errors="replace")
    found = RUN_ID.search(told)
    if returncode != 0 or found is None:
        raise DemoError(f"the Dagster job {JOB} failed ({log}):\n{told[-1500:]}")
    with psycopg.connect(conninfo, autocommit=True) as ledger:
        jobs = [job for job in of_series(ledger, "dagster/", since) if job.job_id.endswith(found[1])]
    return DagsterRun(found[1], "success", jobs, seconds)


def _run_command(log: Path, environment: dict[str, str]) -> int:
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command(),
            cwd=ROOT,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            # Ctrl-C is for the demo, which ends it below.
            start_new_session=True,
        )
        try:
            return process.wait(RUN_SECONDS)
        except subprocess.TimeoutExpired:
            raise DemoError(f"the Dagster job {JOB} did not end within {RUN_SECONDS:.0f} s: see {log}") from None
        finally:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(END_SECONDS)
            return
