"""Dagster as users run it: a webserver, a daemon, a code server and a process for each run."""

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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.kit import processes

ROOT = Path(__file__).resolve().parents[2]
STARTS_WITHIN = 300.0  # seconds; it takes 20 on a machine that has nothing else to do
ENDED = ("SUCCESS", "FAILURE", "CANCELED")

INSTANCE = """
telemetry:
  enabled: false
run_retries:
  enabled: true
  max_retries: 2
run_monitoring:
  enabled: true
  poll_interval_seconds: 2
  start_timeout_seconds: 60
  cancel_timeout_seconds: 60
sensors:
  use_threads: true
"""


class Dagster:
    """``dagster dev`` on a code location, driven through its GraphQL interface.

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
        self._process: subprocess.Popen[bytes] | None = None
        self._port = _free_port()

    def start(self) -> Dagster:
        """Start it and wait until it has loaded the code location."""
        (self.home / "dagster.yaml").write_text(INSTANCE)
        with (self.home / "dev.log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    str(Path(sys.executable).with_name("dagster")), "dev", "-f", str(self._file), "-d", str(ROOT),
                    "-p", str(self._port), "-h", "127.0.0.1",
                ],
                cwd=self.home,
                env={**os.environ, **self._environment, "DAGSTER_HOME": str(self.home), "PYTHONPATH": str(ROOT)},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )  # fmt: skip
        deadline = time.monotonic() + STARTS_WITHIN
        while time.monotonic() < deadline:
            assert self._process.poll() is None, self.log()
            try:
                answer = self.ask(
                    "{ repositoriesOrError { ... on RepositoryConnection { nodes { location { name } } } } }"
                )
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.3)
                continue
            nodes = answer["repositoriesOrError"].get("nodes")
            if nodes:
                self._location = nodes[0]["location"]["name"]
                return self
            time.sleep(0.3)
        raise TimeoutError(self.log())

    def stop(self) -> None:
        """End it with all that it started."""
        if self._process is None:
            return
        try:
            os.killpg(self._process.pid, signal.SIGTERM)
            self._process.wait(20)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            self.kill()
        self._process = None

    def kill(self) -> None:
        """SIGKILL it with all that it started, runs included."""
        assert self._process is not None
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(20)

    def log(self) -> str:
        """What it wrote."""
        return (self.home / "dev.log").read_text(errors="replace")[-5000:]

    def ask(self, query: str, **variables: Any) -> dict[str, Any]:
        """Ask GraphQL; the answer's data."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self._port}/graphql",
            json.dumps({"query": query, "variables": variables}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            answer = json.load(response)
        assert "errors" not in answer, answer["errors"]
        return answer["data"]  # type: ignore[no-any-return]

    def launch(self, job: str, config: Mapping[str, Any] | None = None, tags: Mapping[str, str] | None = None) -> str:
        """Launch a run as a click on the page does; its id."""
        answer = self.ask(
            "mutation($p: ExecutionParams!) { launchRun(executionParams: $p) { __typename"
            " ... on LaunchRunSuccess { run { runId } } ... on PythonError { message }"
            " ... on RunConfigValidationInvalid { errors { message } } } }",
            p={
                "selector": {
                    "repositoryLocationName": self._location,
                    "repositoryName": "__repository__",
                    "jobName": job,
                },
                "runConfigData": config or {},
                "executionMetadata": {"tags": [{"key": key, "value": value} for key, value in (tags or {}).items()]},
            },
        )["launchRun"]
        assert answer["__typename"] == "LaunchRunSuccess", answer
        return str(answer["run"]["runId"])

    def reexecute(self, run_id: str, strategy: str = "FROM_FAILURE") -> str:
        """Re-execute a run by hand; the new run's id."""
        answer = self.ask(
            "mutation($p: ReexecutionParams!) { launchRunReexecution(reexecutionParams: $p) { __typename"
            " ... on LaunchRunSuccess { run { runId } } ... on PythonError { message } } }",
            p={"parentRunId": run_id, "strategy": strategy},
        )["launchRunReexecution"]
        assert answer["__typename"] == "LaunchRunSuccess", answer
        return str(answer["run"]["runId"])

    def terminate(self, run_id: str) -> None:
        """Terminate a run as a click on the page does, as soon as Dagster lets one: not while it is STARTING."""
        deadline = time.monotonic() + STARTS_WITHIN
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

    def status(self, run_id: str) -> str:
        """A run's status."""
        answer = self.ask("query($r: ID!) { runOrError(runId: $r) { ... on Run { status } } }", r=run_id)
        return str(answer["runOrError"]["status"])

    def wait(self, run_id: str, *, within: float = 300.0) -> str:
        """Wait for a run's end; its status."""
        deadline = time.monotonic() + within
        while (status := self.status(run_id)) not in ENDED:
            if time.monotonic() > deadline:
                raise TimeoutError(f"run {run_id} is {status}\n{self.messages(run_id)}\n{self.log()}")
            time.sleep(0.2)
        return status

    def messages(self, run_id: str) -> list[str]:
        """The messages of a run's event log."""
        answer = self.ask(
            "query($r: ID!) { logsForRun(runId: $r) { ... on EventConnection {"
            " events { __typename ... on MessageEvent { message }"
            " ... on ExecutionStepFailureEvent { error { message cause { message } } } } } } }",
            r=run_id,
        )
        return [
            f"{event['__typename']}: {event.get('message')} {(event.get('error') or {}).get('message', '')}"
            for event in answer["logsForRun"]["events"]
        ]

    def runs(self) -> list[dict[str, Any]]:
        """All runs, newest first: runId, status, parentRunId, tags."""
        answer = self.ask("{ runsOrError { ... on Runs { results { runId status parentRunId tags { key value } } } } }")
        return list(answer["runsOrError"]["results"])

    def children(self, run_id: str) -> list[str]:
        """The ids of the runs that re-execute a run."""
        return [run["runId"] for run in self.runs() if run["parentRunId"] == run_id]

    def pid_of(self, run_id: str, what: str) -> int:
        """The pid of a process: ``run`` is the one that executes the run, ``step`` a step's own."""
        lines = self.messages(run_id)
        found = [match for line in lines if (match := re.search(r"Executing steps .*\(pid: (\d+)\)", line))]
        assert found, lines
        parent = int(found[0].group(1))
        if what == "run":
            return parent
        # Beside the step there is multiprocessing's resource tracker.
        steps = [pid for pid in processes.children(parent) if "spawn_main" in _arguments(pid)]
        assert len(steps) == 1, lines
        return steps[0]


def _arguments(pid: int) -> str:
    return subprocess.run(["ps", "-o", "args=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


__all__ = ["Dagster", "processes"]
