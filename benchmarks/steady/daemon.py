"""A Dagster daemon under a few hundred jobs that nobody waits for: submitted elsewhere, reported by a sensor.

The daemon and its code server are processes as users run them.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from pgbg_orchestration.embedded.server import EmbeddedServer
from pgbg_orchestration.ledger import install

from .reports import Jobs, Reports, not_once
from .submitter import FAULT
from .watch import SERVER_COLUMNS, Sample, Watch, process_of

ROOT = Path(__file__).resolve().parents[2]
PROCESSES = {"daemon": "daemon", "code": "code server"}
HELD = {"mib": "MiB", "threads": "threads", "descriptors": "descriptors", "sockets": "connections"}
COLUMNS = {
    "minute": "minute",
    "waiting": "jobs at work",
    "ended": "jobs ended",
    "materializations": "materializations",
    "checks": "failed checks",
    "unreported": "ends not yet reported",
    **{f"{name}_{held}": f"{what}: {unit}" for name, what in PROCESSES.items() for held, unit in HELD.items()},
    "cursor": "cursor: KiB",
    "connections": "sessions in the server",
    **SERVER_COLUMNS,
}
PLOT = "MiB of the code server (above), and of the daemon (below)"
LINES = ("code_mib", "daemon_mib")
INSTANCE = "telemetry:\n  enabled: false\n"
WORKSPACE = """
load_from:
  - grpc_server:
      host: 127.0.0.1
      port: {port}
      location_name: steady
"""
PATIENCE = 600.0  # seconds for what has to come, and is only slow on a machine that is busy


def watch(given: argparse.Namespace) -> list[Sample]:
    """Start a server and the processes, watch them, and return the samples."""
    from dagster import DagsterInstance

    with (
        tempfile.TemporaryDirectory(prefix="pgbg-steady-") as place,
        # Each job has a supervisor, which is a worker too.
        EmbeddedServer(max_worker_processes=2 * given.waiting + 100) as server,
    ):
        home = Path(place)
        conninfo = server.create_database("steady")
        install.install(conninfo)
        (home / "dagster.yaml").write_text(INSTANCE, encoding="ascii")
        environment = {
            **os.environ,
            "DAGSTER_HOME": str(home),
            "PYTHONPATH": str(ROOT),
            "PGBG_STEADY_CONNINFO": conninfo,
            "PGBG_STEADY_TICKS": str(given.ticks),
        }
        with (
            _code_server(home, environment) as (code_server, workspace),
            subprocess.Popen(
                process_of(given), env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            ) as load,
        ):
            assert load.stdin is not None
            assert load.stdout is not None
            if load.stdout.readline() != "begun\n":
                sys.exit("the process that submits did not begin")
            # The first orphan is at work before the daemon's first tick.
            with (
                _dagster(home, environment, "dagster-daemon", "run", "-w", str(workspace)) as daemon,
                DagsterInstance.from_config(place) as instance,
            ):
                holders = {"daemon": daemon.pid, "code": code_server.pid}
                seen = Watch(server, conninfo, given.restart)
                _follow(Following(seen, conninfo, Reports(instance), holders, load), given)
        return seen.samples


class Following:
    """All that is looked at for a sample."""

    def __init__(
        self, seen: Watch, conninfo: str, reports: Reports, holders: dict[str, int], load: subprocess.Popen[str]
    ) -> None:
        self.seen = seen
        self.conninfo = conninfo
        self.reports = reports
        self.holders = holders
        self.load = load
        self.jobs = Jobs(conninfo)

    def look(self) -> Sample:
        """Take a sample."""
        self.jobs = Jobs(self.conninfo)
        self.reports.read()
        told = {*self.reports.materializations, *self.reports.checks}
        return self.seen.add(
            {
                "waiting": self.jobs.at_work,
                "ended": len(self.jobs.ends),
                "orphans": self.jobs.orphans.total(),
                "materializations": self.reports.materializations.total(),
                "checks": self.reports.checks.total(),
                "unreported": len(self.jobs.ends.keys() - told),
                "cursor": self.reports.cursor / 1024,
                "load": os.getloadavg()[0],
                "submitter_mib": _held(self.load.pid)["mib"] if self.load.poll() is None else 0,
                **{f"{name}_{held}": x for name, pid in self.holders.items() for held, x in _held(pid).items()},
            }
        )


def _follow(following: Following, given: argparse.Namespace) -> None:
    """Take samples until the last job has ended and been reported, and two more when the history is pruned."""
    seen, load = following.seen, following.load
    assert load.stdin is not None
    assert load.stdout is not None
    while seen.minutes < given.minutes:
        time.sleep(given.every)
        following.look()
        if load.poll() is not None:
            sys.exit(f"the process that submits ended with {load.returncode}")
        if seen.minutes < given.minutes:
            seen.restart_if_due()
    load.stdin.close()
    submitted = json.loads(load.stdout.read())
    deadline = time.monotonic() + given.long[1] + PATIENCE
    while (sample := following.look())["waiting"] or sample["unreported"]:
        if time.monotonic() > deadline:
            break  # what is wrong is told below
        time.sleep(given.every)
    jobs, reports = following.jobs, following.reports
    # Before and after the history is pruned, a tick or two, for whatever they would report a second time.
    time.sleep(2 * given.ticks)
    seen.prune()
    time.sleep(2 * given.ticks)
    following.look()
    wrong = not_once(jobs.ends, reports.materializations, reports.checks)
    told = {
        "submitted": submitted,
        "ends": Counter(f"{job_id.split('/')[2].partition('|')[0]}: {state}" for job_id, state in jobs.ends.items()),
        "orphans": jobs.orphans,
        "failed ticks": Counter(reports.failed_ticks()),
        "not reported once": wrong,
    }
    print(json.dumps(told, indent=1, sort_keys=True), flush=True)
    if wrong or jobs.orphans.keys() - {"cancelled", "lost"} or any(name.startswith(FAULT) for name in submitted):
        sys.exit("ends were not reported once each, orphans are left, or jobs could not be submitted")


def _held(pid: int) -> Sample:
    process = psutil.Process(pid)
    with process.oneshot():
        return {
            "mib": process.memory_info().rss / 2**20,
            "threads": process.num_threads(),
            "descriptors": process.num_fds(),
            "sockets": len(process.net_connections(kind="all")),
        }


@contextmanager
def _code_server(home: Path, environment: dict[str, str]) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """Serve the sensors; gives the process, and the workspace's file."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    workspace = home / "workspace.yaml"
    workspace.write_text(WORKSPACE.format(port=port), encoding="ascii")
    command = ["dagster", "api", "grpc", "-m", "benchmarks.steady.location", "-d", str(ROOT), "-h", "127.0.0.1"]
    with _dagster(home, environment, *command, "-p", str(port), "--location-name", "steady") as process:
        deadline = time.monotonic() + PATIENCE
        while not _listens(port):
            if process.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"the code server did not start:\n{_log_of(home, 'dagster')}")
            time.sleep(0.2)
        yield process, workspace


def _listens(port: int) -> bool:
    with socket.socket() as caller:
        return caller.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def _dagster(
    home: Path, environment: dict[str, str], program: str, *arguments: str
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program of Dagster's until the block ends."""
    with (home / f"{program}.log").open("ab") as log:
        process = subprocess.Popen(
            [str(Path(sys.executable).with_name(program)), *arguments],
            env=environment,
            cwd=home,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        yield process
        if process.poll() is not None:
            sys.exit(f"{program} ended with {process.returncode}:\n{_log_of(home, program)}")
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            if process.poll() is None:
                os.killpg(process.pid, number)
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:
                    continue


def _log_of(home: Path, program: str) -> str:
    return (home / f"{program}.log").read_text(errors="replace")[-3000:]
