"""A real Airflow as the demo and the tests use it: its own processes, PostgreSQL for its metadata, driven over REST."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Self
from urllib.parse import quote, urlencode

import httpx
import psutil  # type: ignore[import-untyped]
from psycopg.conninfo import conninfo_to_dict

COMPONENTS = ("api-server", "scheduler", "dag-processor", "triggerer")
START_SECONDS = 300.0  # 15 on a machine that has nothing else to do; 125 were seen at a load of 17
STOP_SECONDS = 20.0
LOOK_SECONDS = 0.4  # each look is a call of the web server, which takes its time of the processor that Airflow works on
FINISHED = ("success", "failed")

# A laptop's Airflow: little memory, quick to notice what happened.
SETTINGS: Mapping[str, str] = {
    "AIRFLOW__API_AUTH__JWT_SECRET": "a secret of nobody, for an Airflow that only this machine reaches",
    "AIRFLOW__API__WORKERS": "1",
    "AIRFLOW__CORE__DAGS_ARE_PAUSED_AT_CREATION": "False",
    "AIRFLOW__CORE__DEFAULT_TASK_RETRY_DELAY": "5",
    "AIRFLOW__CORE__EXECUTOR": "LocalExecutor",
    "AIRFLOW__CORE__FERNET_KEY": "cGctYmFja2dyb3VuZC1vcmNoZXN0cmF0aW9uLWRlbW8=",
    "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
    "AIRFLOW__CORE__PARALLELISM": "8",
    "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_ALL_ADMINS": "True",
    "AIRFLOW__DAG_PROCESSOR__MIN_FILE_PROCESS_INTERVAL": "30",  # a file that has changed is not kept waiting
    "AIRFLOW__DAG_PROCESSOR__PARSING_PROCESSES": "1",
    "AIRFLOW__DAG_PROCESSOR__REFRESH_INTERVAL": "5",
    # Short loops also keep Airflow from taking the end of a resumed task's first process for that of its second.
    "AIRFLOW__SCHEDULER__SCHEDULER_IDLE_SLEEP_TIME": "0.3",
    "AIRFLOW__SCHEDULER__TASK_QUEUED_TIMEOUT_CHECK_INTERVAL": "10",
    "AIRFLOW__TRIGGERER__JOB_HEARTBEAT_SEC": "2",
    # Below Airflow's 30 s, so that a killed one is soon replaced; a busy machine's that lives must not be.
    "AIRFLOW__TRIGGERER__TRIGGERER_HEALTH_CHECK_THRESHOLD": "16",
    "AIRFLOW__USAGE_DATA_COLLECTION__ENABLED": "False",
    # How long a worker may take to notice that its task has deferred; a resumed task is kept back for so long.
    "AIRFLOW__WORKERS__MIN_HEARTBEAT_INTERVAL": "1",
}


class AirflowProcesses:
    """An Airflow that runs in processes of its own; use it as a context manager.

    Parameters
    ----------
    home:
        Its home directory (``AIRFLOW_HOME``); logs go to ``home/processes/*.log``.
    dags_folder:
        Where the DAG files are.
    metadata_conninfo:
        libpq connection string of an empty or migrated database for Airflow's metadata.
    connections:
        Airflow connections by id: a libpq connection string each.
    settings:
        Further ``AIRFLOW__SECTION__KEY`` variables.
    triggerers:
        How many triggerers to start; with two, the second takes over when the first is killed.
    login:
        Name and password of an administrator, where ``settings`` say that not everybody is one.
    migrate:
        Bring the metadata database to this Airflow's version; False when it is known to be there, which saves seconds.
    """

    def __init__(
        self,
        home: Path,
        dags_folder: Path,
        metadata_conninfo: str,
        *,
        connections: Mapping[str, str] | None = None,
        settings: Mapping[str, str] | None = None,
        triggerers: int = 1,
        login: tuple[str, str] | None = None,
        migrate: bool = True,
    ) -> None:
        self.home = home
        self._login = login
        self._migrate = migrate
        self.api_port = _free_port()
        self.components = [*COMPONENTS, *(f"triggerer-{n}" for n in range(2, triggerers + 1))]
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._logs: dict[str, IO[bytes]] = {}
        self._http: httpx.Client | None = None
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("AIRFLOW")}
        self.environment = {
            **inherited,
            **SETTINGS,
            "AIRFLOW_HOME": str(home),
            "AIRFLOW__CORE__DAGS_FOLDER": str(dags_folder),
            "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": f"http://127.0.0.1:{self.api_port}/execution/",
            "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": _url(metadata_conninfo, "postgresql+psycopg2"),
            "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN_ASYNC": _url(metadata_conninfo, "postgresql+psycopg_async"),
            "AIRFLOW__LOGGING__WORKER_LOG_SERVER_PORT": str(_free_port()),
            **(settings or {}),
        }
        for conn_id, conninfo in (connections or {}).items():
            self.environment[f"AIRFLOW_CONN_{conn_id.upper()}"] = connection_json(conninfo)

    def __enter__(self) -> Self:
        try:
            return self.start()
        except BaseException:
            self.stop()
            raise

    def __exit__(self, *_: object) -> None:
        self.stop()

    # Processes --------------------------------------------------------------------------------------------------------

    @property
    def url(self) -> str:
        """The address of the UI."""
        return f"http://127.0.0.1:{self.api_port}"

    def start(self) -> Self:
        """Migrate the metadata database if wanted, start all components and wait until they are healthy.

        Raises
        ------
        RuntimeError
            A component ended, or is not healthy in time; the message has the end of its log.
        """
        (self.home / "processes").mkdir(parents=True, exist_ok=True)
        if self._migrate:
            self.command("db", "migrate")
        for component in self.components:
            self.start_component(component)
        self._wait_until(self._is_healthy, START_SECONDS, "Airflow is not healthy")
        return self

    def command(self, *arguments: str) -> str:
        """Run an ``airflow`` command to its end and return what it printed.

        Raises
        ------
        RuntimeError
            It failed; the message has its output.
        """
        done = subprocess.run(
            [sys.executable, "-m", "airflow", *arguments],
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise RuntimeError(f"airflow {' '.join(arguments)} failed:\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
        return done.stdout

    def start_component(self, component: str) -> None:
        """Start one component in a process group of its own."""
        arguments = [component.rsplit("-", 1)[0] if component.startswith("triggerer-") else component]
        if component == "api-server":
            arguments += ["--host", "127.0.0.1", "--port", str(self.api_port)]
        environment = {**self.environment, "AIRFLOW__LOGGING__TRIGGER_LOG_SERVER_PORT": str(_free_port())}
        if component not in self._logs:
            self._logs[component] = (self.home / "processes" / f"{component}.log").open("ab")
        self._processes[component] = subprocess.Popen(
            [sys.executable, "-m", "airflow", *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=self._logs[component],
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def signal(self, component: str, number: int) -> None:
        """Send a signal to a component and all processes below it (SIGSTOP, SIGCONT, SIGTERM, …)."""
        for process in self._tree(component):
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def kill(self, component: str) -> None:
        """Kill a component with SIGKILL, with all processes below it, and wait until they are gone."""
        tree = self._tree(component)
        for number in (signal.SIGSTOP, signal.SIGKILL):  # stopped first: nobody sees the others die
            for process in tree:
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(number)
        self._processes[component].wait()
        psutil.wait_procs(tree, timeout=STOP_SECONDS)

    def stop_component(self, component: str) -> None:
        """Ask a component to end, and kill what is left after a while."""
        tree = self._tree(component)
        for process in tree[:1]:
            with suppress(psutil.NoSuchProcess):
                process.terminate()
        _, left = psutil.wait_procs(tree, timeout=STOP_SECONDS)
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._processes.pop(component).wait()

    def stop(self) -> None:
        """Stop all components and end their process groups."""
        trees = [process for component in self._processes for process in self._tree(component)]
        for component in reversed(list(self._processes)):
            with suppress(ProcessLookupError):
                os.kill(self._processes[component].pid, signal.SIGTERM)
        _, left = psutil.wait_procs(trees, timeout=STOP_SECONDS)
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        for started in self._processes.values():
            with suppress(ProcessLookupError):
                os.killpg(started.pid, signal.SIGKILL)
            started.wait()
        self._processes.clear()
        for log in self._logs.values():
            log.close()
        self._logs.clear()
        if self._http is not None:
            self._http.close()
            self._http = None

    def pids(self, component: str) -> list[int]:
        """Return the process ids of a component and of all processes below it."""
        return [process.pid for process in self._tree(component)]

    def log(self, component: str) -> str:
        """Return what a component has logged so far."""
        path = self.home / "processes" / f"{component}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def _tree(self, component: str) -> list[psutil.Process]:
        try:
            top = psutil.Process(self._processes[component].pid)
            return [top, *top.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    # DAGs and runs ----------------------------------------------------------------------------------------------------

    def call(self, method: str, path: str, body: Any = None) -> Any:
        """Call Airflow's REST API below ``/api/v2`` and return the answer.

        Raises
        ------
        RuntimeError
            Airflow refused; the message has its answer.
        """
        if self._http is None:
            token = self.token(*self._login) if self._login else self._token_of_everybody()
            self._http = httpx.Client(
                base_url=f"{self.url}/api/v2", timeout=60, headers={"Authorization": f"Bearer {token}"}
            )
        answer = self._http.request(method, path, json=body)
        if answer.is_error:
            raise RuntimeError(f"{method} {path}: {answer.status_code} {answer.text}")
        return answer.json() if answer.content else None

    def token(self, name: str, password: str) -> str:
        """Log in and return the token that goes with what is asked of the web server.

        Raises
        ------
        httpx.HTTPStatusError
            Airflow refused.
        """
        answer = httpx.post(f"{self.url}/auth/token", json={"username": name, "password": password}, timeout=60)
        return str(answer.raise_for_status().json()["access_token"])

    def _token_of_everybody(self) -> str:
        return str(httpx.get(f"{self.url}/auth/token", timeout=60).raise_for_status().json()["access_token"])

    def wait_for_dag(self, dag_id: str, seconds: float = 90.0) -> None:
        """Wait until a DAG has been parsed."""

        def parsed() -> bool:
            errors = self.call("GET", "/importErrors")["import_errors"]
            if errors:
                raise RuntimeError(f"a DAG file cannot be imported:\n{errors[0]['stack_trace']}")
            found = self.call("GET", f"/dags?dag_id_pattern={quote(dag_id)}&limit=100")["dags"]
            return any(dag["dag_id"] == dag_id for dag in found)

        self._wait_until(parsed, seconds, f"the DAG {dag_id} is not there")

    def trigger_dag(self, dag_id: str, *, run_id: str | None = None, conf: Mapping[str, Any] | None = None) -> str:
        """Start a run of a DAG and return its run id."""
        body: dict[str, Any] = {"logical_date": None, "conf": dict(conf or {})}
        if run_id is not None:
            body["dag_run_id"] = run_id
        return str(self.call("POST", f"/dags/{dag_id}/dagRuns", body)["dag_run_id"])

    def run_state(self, dag_id: str, run_id: str) -> str:
        """Return the state of a run."""
        return str(self.call("GET", f"/dags/{dag_id}/dagRuns/{quote(run_id, safe='')}")["state"])

    def wait_for_run(self, dag_id: str, run_id: str, seconds: float = 240.0) -> str:
        """Wait until a run has finished and return its state."""
        self._wait_until(
            lambda: self.run_state(dag_id, run_id) in FINISHED,
            seconds,
            f"the run {run_id} of {dag_id} does not end",
            lambda: json.dumps(self.task_states(dag_id, run_id)),
        )
        return self.run_state(dag_id, run_id)

    def task(self, dag_id: str, run_id: str, task_id: str, map_index: int = -1) -> dict[str, Any]:
        """Return what Airflow knows of a task instance."""
        found: dict[str, Any] = self.call("GET", self._task_path(dag_id, run_id, task_id, map_index))
        return found

    def task_states(self, dag_id: str, run_id: str) -> dict[str, str | None]:
        """Return the state of each task instance of a run; mapped ones are called ``task[3]``."""
        path = f"/dags/{dag_id}/dagRuns/{quote(run_id, safe='')}/taskInstances"
        states: dict[str, str | None] = {}
        while True:
            page = self.call("GET", f"{path}?{urlencode({'limit': 100, 'offset': len(states)})}")
            for ti in page["task_instances"]:
                mapped = f"[{ti['map_index']}]" if ti["map_index"] >= 0 else ""
                states[f"{ti['task_id']}{mapped}"] = ti["state"]
            if len(states) >= page["total_entries"] or not page["task_instances"]:
                return states

    def wait_for_task(
        self, dag_id: str, run_id: str, task_id: str, states: Sequence[str], seconds: float = 60.0, map_index: int = -1
    ) -> str:
        """Wait until a task instance is in one of the states, and return which."""

        def state() -> str:
            return str(self.task(dag_id, run_id, task_id, map_index)["state"])

        self._wait_until(lambda: state() in states, seconds, f"{task_id} is not {' or '.join(states)}", state)
        return state()

    def mark(self, dag_id: str, run_id: str, task_id: str, state: str, map_index: int = -1) -> None:
        """Mark a task instance ``failed``, ``success`` or ``skipped``, as a user does in the UI."""
        self.call("PATCH", self._task_path(dag_id, run_id, task_id, map_index), {"new_state": state})

    def mark_run(self, dag_id: str, run_id: str, state: str) -> None:
        """Mark a whole run."""
        self.call("PATCH", f"/dags/{dag_id}/dagRuns/{quote(run_id, safe='')}", {"state": state})

    def clear(self, dag_id: str, run_id: str, task_ids: Sequence[str]) -> None:
        """Clear task instances of a run, so that they run again."""
        body = {"dry_run": False, "dag_run_id": run_id, "task_ids": list(task_ids), "only_failed": False}
        self.call("POST", f"/dags/{dag_id}/clearTaskInstances", body)

    def xcom(self, dag_id: str, run_id: str, task_id: str, map_index: int = -1) -> Any:
        """Return a task instance's return value."""
        path = f"/dags/{dag_id}/dagRuns/{quote(run_id, safe='')}/taskInstances/{task_id}/xcomEntries/return_value"
        return self.call("GET", f"{path}?{urlencode({'map_index': map_index, 'deserialize': 'true'})}")["value"]

    def task_log(self, dag_id: str, run_id: str, task_id: str, try_number: int = 1, map_index: int = -1) -> str:
        """Return the log of a try: its messages, and the errors that it tells of."""
        path = f"/dags/{dag_id}/dagRuns/{quote(run_id, safe='')}/taskInstances/{task_id}/logs/{try_number}"
        answer = self.call("GET", f"{path}?{urlencode({'map_index': map_index, 'full_content': 'true'})}")
        return "\n".join(line if isinstance(line, str) else _text_of(line) for line in answer["content"])

    def _task_path(self, dag_id: str, run_id: str, task_id: str, map_index: int) -> str:
        path = f"/dags/{dag_id}/dagRuns/{quote(run_id, safe='')}/taskInstances/{task_id}"
        return f"{path}/{map_index}" if map_index >= 0 else path

    # Waiting ----------------------------------------------------------------------------------------------------------

    def _is_healthy(self) -> bool:
        try:
            health = httpx.get(f"{self.url}/api/v2/monitor/health", timeout=10).json()
        except httpx.HTTPError:
            return False
        return all(
            health[part]["status"] == "healthy" for part in ("metadatabase", "scheduler", "triggerer", "dag_processor")
        )

    def _wait_until(
        self, there: Callable[[], bool], seconds: float, what: str, found: Callable[[], str] | None = None
    ) -> None:
        until = time.monotonic() + seconds
        while not there():
            for component, process in self._processes.items():
                if process.poll() is not None and process.returncode not in (-signal.SIGKILL, -signal.SIGTERM):
                    raise RuntimeError(f"{component} ended with {process.returncode}:\n{self.log(component)[-4000:]}")
            if time.monotonic() > until:
                raise RuntimeError(f"{what} after {seconds:.0f} s {found() if found else ''}".rstrip())
            time.sleep(LOOK_SECONDS)


def _text_of(line: Mapping[str, Any]) -> str:
    """Return a line of a task's log with the errors that it tells of, and their notes."""
    errors = line.get("error_detail") or []
    told = [f"{error.get('exc_type')}: {error.get('exc_value')}" for error in errors]
    notes = [note for error in errors for note in error.get("exc_notes") or []]
    return "\n".join(
        [str(line.get("event", line)), *told, *notes, *([str(line["reason"])] if "reason" in line else [])]
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _url(conninfo: str, scheme: str) -> str:
    """Return a SQLAlchemy URL; host and port go into the query, where a socket directory fits as well."""
    given = {name: str(value) for name, value in conninfo_to_dict(conninfo).items() if value is not None}
    login = quote(given.get("user", ""), safe="")
    if "password" in given:
        login += f":{quote(given['password'], safe='')}"
    where = urlencode([(name, given[name]) for name in ("host", "port") if name in given])
    return f"{scheme}://{login}@/{quote(given['dbname'], safe='')}?{where}"


def connection_json(conninfo: str) -> str:
    """Return an Airflow connection of type postgres as JSON; what Airflow has no field for becomes an extra."""
    given = conninfo_to_dict(conninfo)
    known = {"host": "host", "port": "port", "login": "user", "password": "password", "schema": "dbname"}
    fields = {field: given.pop(name) for field, name in known.items() if name in given}
    if "port" in fields:
        fields["port"] = int(str(fields["port"]))
    return json.dumps({"conn_type": "postgres", **fields, "extra": given})
