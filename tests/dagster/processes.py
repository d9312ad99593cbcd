"""Dagster as users run it: a code server, a webserver, a daemon and a process for each run."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dagster import DagsterEventType, DagsterInstance

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 300.0  # seconds; a machine that has nothing else to do needs a tenth of it
LOOK_SECONDS = 0.4  # each look is a query of the webserver, which takes its time of the processor that the runs need
ENDED = ("SUCCESS", "FAILURE", "CANCELED")
LOCATION = "tests"

INSTANCE = """
telemetry:
  enabled: false
run_retries:
  enabled: true
  max_retries: 2
run_monitoring:
  enabled: true
  poll_interval_seconds: 1
  start_timeout_seconds: 300
  cancel_timeout_seconds: 300
sensors:
  use_threads: true
# Runs are launched at once. The queue's daemon looks every five seconds and launches one after the other.
run_coordinator:
  module: dagster._core.run_coordinator
  class: DefaultRunCoordinator
"""
WORKSPACE = """
load_from:
  - grpc_server:
      host: 127.0.0.1
      port: {port}
      location_name: {location}
"""
# How far the daemon that runs failed runs again has read.
FAILURES_READ = f"EVENT_LOG_CONSUMER_CURSOR-{DagsterEventType.RUN_FAILURE.value}"
# How often that daemon looks (by default every five seconds), and how long the webserver waits for the code server to
# start a run's process (by default a minute).
TIMES = {
    "DAGSTER_EVENT_LOG_CONSUMER_DAEMON_INTERVAL_SECONDS": "1",
    "DAGSTER_GRPC_TIMEOUT_SECONDS": str(round(PATIENCE)),
}


def until(condition: Callable[[], object], what: Callable[[], str], *, within: float = PATIENCE) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + within
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(what())
        time.sleep(LOOK_SECONDS)


class Dagster:
    """A Dagster deployment on one code location, driven through its GraphQL interface.

    Parameters
    ----------
    home:
        A directory for its storage and its logs.
    file:
        The code location.
    environment:
        Variables for it and for the processes of its runs.
    """

    def __init__(self, home: Path, file: Path, environment: Mapping[str, str]) -> None:
        self.home = home
        self._file = file
        self._environment = environment
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._ports = {name: _free_port() for name in ("code-server", "webserver")}

    # Its processes ------------------------------------------------------------------------------------------------

    def start(self) -> Dagster:
        """Start all of it and wait until the code location is loaded."""
        (self.home / "dagster.yaml").write_text(INSTANCE)
        workspace = self.home / "workspace.yaml"
        workspace.write_text(WORKSPACE.format(port=self._ports["code-server"], location=LOCATION))
        self._start(
            "code-server", "dagster", "api", "grpc", "-f", str(self._file), "-d", str(ROOT), "-h", "127.0.0.1",
            "-p", str(self._ports["code-server"]), "--location-name", LOCATION,
        )  # fmt: skip
        self._wait_for(self._listens, "code-server")
        self._start("webserver", "dagster-webserver", "-w", str(workspace), "-p", str(self._ports["webserver"]))
        self.start_daemon()
        self._wait_for(self._has_loaded, "webserver")
        return self

    def start_daemon(self) -> None:
        """Start the daemon, which retries runs, watches over them and evaluates sensors."""
        self._start("daemon", "dagster-daemon", "run", "-w", str(self.home / "workspace.yaml"))

    def kill_daemon(self) -> None:
        """SIGKILL the daemon alone."""
        daemon = self._running.pop("daemon")
        daemon.kill()
        daemon.wait(PATIENCE)

    def stop(self) -> None:
        """End it with all that it started, runs included."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            for process in self._running.values():
                try:
                    os.killpg(process.pid, number)
                except ProcessLookupError:
                    continue
            for process in self._running.values():
                try:
                    process.wait(5)
                except subprocess.TimeoutExpired:
                    continue
        self._running.clear()

    def _start(self, name: str, program: str, *arguments: str) -> None:
        with (self.home / f"{name}.log").open("ab") as log:
            self._running[name] = subprocess.Popen(
                [str(Path(sys.executable).with_name(program)), *arguments],
                cwd=self.home,
                env={
                    **os.environ,
                    **TIMES,
                    **self._environment,
                    "DAGSTER_HOME": str(self.home),
                    "PYTHONPATH": str(ROOT),
                },
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _wait_for(self, ready: Callable[[], bool], name: str) -> None:
        def check() -> bool:
            assert self._running[name].poll() is None, self.log()
            return ready()

        until(check, self.log)

    def _listens(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self._ports["code-server"]), 1).close()
        except OSError:
            return False
        return True

    def _has_loaded(self) -> bool:
        try:
            answer = self.ask("{ repositoriesOrError { ... on RepositoryConnection { nodes { name } } } }")
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False
        return bool(answer["repositoriesOrError"].get("nodes"))

    def log(self) -> str:
        """The ends of what its processes wrote."""
        logs = sorted(self.home.glob("*.log"))
        return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')[-3000:]}" for path in logs)

    # What a user does on its pages --------------------------------------------------------------------------------

    def ask(self, query: str, **variables: Any) -> dict[str, Any]:
        """Ask GraphQL; the answer's data."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self._ports['webserver']}/graphql",
            json.dumps({"query": query, "variables": variables}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=PATIENCE) as response:
            answer = json.load(response)
        assert "errors" not in answer, answer["errors"]
        return answer["data"]  # type: ignore[no-any-return]

    def launch(self, job: str, config: Mapping[str, Any] | None = None, tags: Mapping[str, str] | None = None) -> str:
        """Launch a run; its id."""
        answer = self.ask(
            "mutation($p: ExecutionParams!) { launchRun(executionParams: $p) { __typename"
            " ... on LaunchRunSuccess { run { runId } } ... on PythonError { message }"
            " ... on RunConfigValidationInvalid { errors { message } } } }",
            p={
                "selector": {**_repository(), "jobName": job},
                "runConfigData": config or {},
                "executionMetadata": {"tags": [{"key": key, "value": value} for key, value in (tags or {}).items()]},
            },
        )["launchRun"]
        assert answer["__typename"] == "LaunchRunSuccess", answer
        return str(answer["run"]["runId"])

    def backfill(self, asset: str, partitions: Sequence[str]) -> str:
        """Launch a backfill of an asset, which the daemon carries out; its id."""
        answer = self.ask(
            "mutation($p: LaunchBackfillParams!) { launchPartitionBackfill(backfillParams: $p) { __typename"
            " ... on LaunchBackfillSuccess { backfillId } ... on PythonError { message } } }",
            p={"assetSelection": [{"path": [asset]}], "partitionNames": list(partitions)},
        )["launchPartitionBackfill"]
        assert answer["__typename"] == "LaunchBackfillSuccess", answer
        return str(answer["backfillId"])

    def start_sensor(self, name: str) -> None:
        """Turn a sensor on."""
        answer = self.ask(
            "mutation($s: SensorSelector!) { startSensor(sensorSelector: $s) { __typename } }",
            s={**_repository(), "sensorName": name},
        )
        assert answer["startSensor"]["__typename"] == "Sensor", answer

    def terminate(self, run_id: str) -> None:
        """Terminate a run, as soon as Dagster lets one: not while it is STARTING."""
        deadline = time.monotonic() + PATIENCE
        while True:
            answer = self.ask(
                "mutation($r: String!) { terminateRun(runId: $r) { __typename ... on TerminateRunFailure { message }"
                " ... on PythonError { message } } }",
                r=run_id,
            )["terminateRun"]
            if answer["__typename"] == "TerminateRunSuccess":
                return
            assert "STARTING" in answer["message"], answer
            assert time.monotonic() < deadline, answer
            time.sleep(0.05)

    # What is seen on them -----------------------------------------------------------------------------------------

    def status(self, run_id: str) -> str:
        """A run's status."""
        answer = self.ask("query($r: ID!) { runOrError(runId: $r) { ... on Run { status } } }", r=run_id)
        return str(answer["runOrError"]["status"])

    def wait(self, run_id: str) -> str:
        """Wait for a run's end; its status."""
        until(lambda: self.status(run_id) in ENDED, lambda: self.story(run_id))
        return self.status(run_id)

    def story(self, run_id: str) -> str:
        """What is known of a run, for the message of a failed test."""
        return "\n".join([f"run {run_id} is {self.status(run_id)}", *self.messages(run_id), self.log()])

    def events(self, run_id: str) -> list[dict[str, Any]]:
        """A run's event log."""
        answer = self.ask(
            "query($r: ID!) { logsForRun(runId: $r) { ... on EventConnection { events { __typename"
            " ... on MessageEvent { message }"
            " ... on StepWorkerStartedEvent { metadataEntries { label ... on TextMetadataEntry { text } } }"
            " ... on ExecutionStepFailureEvent { error { message cause { message } } } } } } }",
            r=run_id,
        )
        return list(answer["logsForRun"]["events"])

    def messages(self, run_id: str) -> list[str]:
        """The messages of a run's event log."""
        return [
            f"{event['__typename']}: {event.get('message')} {(event.get('error') or {}).get('message', '')}"
            for event in self.events(run_id)
        ]

    def runs(self, tag: str | None = None, value: str | None = None) -> list[str]:
        """The ids of all runs, or of those with a tag, newest first."""
        answer = self.ask("{ runsOrError { ... on Runs { results { runId tags { key value } } } } }")
        return [
            str(run["runId"])
            for run in answer["runsOrError"]["results"]
            if tag is None or {"key": tag, "value": value} in run["tags"]
        ]

    def retry_of(self, run_id: str) -> str:
        """Wait for the run by which the daemon repeats a failed run; its id."""

        def is_retried() -> bool:
            # The daemon overlooks a failure for ever when it reads the event before the run's status is stored
            # (`should_retry` in `auto_run_reexecution.py`): let it read the events once more. It retries no run twice.
            instance.daemon_cursor_storage.set_cursor_values({FAILURES_READ: "0"})
            return bool(self.runs("dagster/parent_run_id", run_id))

        with self.instance() as instance:
            until(is_retried, lambda: f"not retried\n{self.story(run_id)}")
        (child,) = self.runs("dagster/parent_run_id", run_id)
        return child

    def instance(self) -> DagsterInstance:
        """Its storage, as its own processes see it; the caller closes it."""
        return DagsterInstance.from_config(str(self.home))

    def pid_of_run(self, run_id: str) -> int:
        """The pid of the process that executes a run, as its log has it."""
        found = [re.search(r"Executing steps .*\(pid: (\d+)\)", line) for line in self.messages(run_id)]
        (pid,) = [int(match[1]) for match in found if match]
        return pid

    def pid_of_step(self, run_id: str) -> int:
        """The pid of a run's only step with a process of its own, as the run's log has it."""
        started = [event for event in self.events(run_id) if event["__typename"] == "StepWorkerStartedEvent"]
        (pid,) = [entry["text"] for event in started for entry in event["metadataEntries"] if entry["label"] == "pid"]
        return int(pid)


def _repository() -> dict[str, str]:
    return {"repositoryLocationName": LOCATION, "repositoryName": "__repository__"}


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
