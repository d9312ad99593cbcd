"""The same work as tasks of a real Airflow, and as assets of Dagster, in our way and in theirs.

An ETL (facts, two aggregates side by side, an index) and then queries of a second each, all at once.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import psycopg
from psycopg.conninfo import make_conninfo

from .bench import Bench
from .rows import Row

DAGS = Path(__file__).with_name("dags")
EVERY = 0.2  # seconds between samples
WAYS = {
    "ours_deferrable": "ours, deferrable",
    "ours_here": "ours, not deferrable",
    "operator": "SQLExecuteQueryOperator",
    "trigger": "SQLExecuteQueryTrigger",
}
CLIENTS = "select count(*) from pg_stat_activity where datname = current_database() and backend_type = 'client backend'"
RUNNING = "select count(*) from task_instance where dag_id = %s and state = 'running'"


@dataclass(slots=True)
class Watch:
    """What is used while something runs, looked at every ``EVERY`` seconds.

    Attributes
    ----------
    seconds, slots:
        How long it ran; seconds of worker slots that its tasks held.
    connections:
        The most that its database had, ours for the watch left out.
    cpu, memory:
        Of the processes that were named: seconds, and the most MiB.
    """

    seconds: float = 0.0
    slots: float = 0.0
    connections: int = 0
    cpu: float = 0.0
    memory: float = 0.0
    _stopped: threading.Event = field(default_factory=threading.Event)

    @contextmanager
    def over(self, conninfo: str, running: Callable[[], int], processes: Callable[[], list[int]]) -> Iterator[None]:
        """Watch until the block ends."""
        watching = threading.Thread(target=self._watch, args=(conninfo, running, processes))
        before, began = _cpu(processes()), time.perf_counter()
        watching.start()
        try:
            yield
        finally:
            self.seconds, self.cpu = time.perf_counter() - began, _cpu(processes()) - before
            self._stopped.set()
            watching.join()

    def _watch(self, conninfo: str, running: Callable[[], int], processes: Callable[[], list[int]]) -> None:
        last = time.perf_counter()
        with psycopg.connect(conninfo, autocommit=True) as conn:
            while not self._stopped.wait(EVERY):
                row = conn.execute(CLIENTS.encode()).fetchone()
                self.connections = max(self.connections, (row[0] if row else 1) - 1)
                self.slots += running() * (time.perf_counter() - last)
                last = time.perf_counter()
                self.memory = max(
                    self.memory, sum(psutil.Process(pid).memory_info().rss for pid in processes()) / 2**20
                )


def _cpu(pids: list[int]) -> float:
    times = [psutil.Process(pid).cpu_times() for pid in pids]
    return float(sum(one.user + one.system for one in times))


def airflow(bench: Bench) -> list[Row]:
    """Return what the work costs in each way, as tasks of one Airflow in processes of its own."""
    from demo.airflow_processes import AirflowProcesses

    metadata = make_conninfo(bench.conninfo, dbname="airflow_metadata")
    with psycopg.connect(bench.conninfo, autocommit=True) as admin:
        admin.execute("create database airflow_metadata")
    watches: dict[str, Watch] = {}
    with tempfile.TemporaryDirectory(prefix="pgbg-bench-") as home:
        settings = {"PGBG_BENCH_QUERIES": str(bench.size.queries), "PGBG_BENCH_ROWS": str(bench.size.etl_rows)}
        with (
            AirflowProcesses(
                Path(home), DAGS, metadata, connections={"postgres_default": bench.conninfo}, settings=settings
            ) as processes,
            psycopg.connect(metadata, autocommit=True) as conn,
        ):
            for way in WAYS:
                processes.wait_for_dag(way)
                watches[way] = watch = Watch()
                with watch.over(bench.conninfo, lambda way=way: _count(conn, way), lambda: processes.pids("triggerer")):  # type: ignore[misc]
                    state = processes.wait_for_run(way, processes.trigger_dag(way), 3600)
                if state != "success":
                    raise RuntimeError(f"the run of {way} ended as {state}")
    peer = watches["operator"]
    return [row for way, what in WAYS.items() for row in _told(f"Airflow, {what}", watches[way], peer, slots=True)]


def _count(conn: psycopg.Connection, way: str) -> int:
    row = conn.execute(RUNNING.encode(), (way,)).fetchone()
    return int(row[0]) if row else 0


def _told(what: str, watch: Watch, peer: Watch, *, slots: bool) -> list[Row]:
    ratio = None if watch is peer else watch.seconds / peer.seconds
    rows = [
        Row(f"{what}: wall time", f"{watch.seconds:.1f} s", None if watch is peer else f"{peer.seconds:.1f} s", ratio),
        Row(f"{what}: connections at most", str(watch.connections)),
    ]
    if not slots:
        return rows
    return [
        *rows,
        Row(f"{what}: seconds of worker slots", f"{watch.slots:.0f} s"),
        Row(f"{what}: the triggerer's CPU", f"{watch.cpu:.1f} s"),
        Row(f"{what}: the triggerer's memory at most", f"{watch.memory:.0f} MiB"),
    ]


def dagster(bench: Bench) -> list[Row]:
    """Return what the work costs as assets, against assets that use psycopg, in one process."""
    from dagster import DagsterInstance, materialize

    from dagster_resource import PgBackgroundResource

    from . import assets

    conninfo, size = bench.conninfo, bench.size
    watches: dict[str, Watch] = {}
    for way, made in (
        ("psycopg", assets.with_psycopg(conninfo, size.queries, size.etl_rows)),
        ("ours", assets.with_ours(size.queries, size.etl_rows)),
    ):
        watches[way] = watch = Watch()
        with DagsterInstance.ephemeral() as instance, watch.over(conninfo, int, lambda: [os.getpid()]):
            resources = {"pg": PgBackgroundResource(conninfo=conninfo)} if way == "ours" else {}
            quiet = {"loggers": {"console": {"config": {"log_level": "ERROR"}}}}
            if not materialize(made, instance=instance, resources=resources, run_config=quiet).success:
                raise RuntimeError(f"the assets of {way} failed")
    peer = watches["psycopg"]
    return [row for way, watch in watches.items() for row in _told(f"Dagster, {way}", watch, peer, slots=False)]
