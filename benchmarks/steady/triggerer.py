"""A process that waits as Airflow's triggerer does: a few hundred of its triggers in one event loop."""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import random
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from pgbg_orchestration.embedded.server import EmbeddedServer
from pgbg_orchestration.ledger import install

from .watch import SERVER_COLUMNS, SHORT, Sample, Watch, process_of

COLUMNS = {
    "minute": "minute",
    "waiting": "jobs waiting",
    "ended": "jobs ended",
    "mib": "process: MiB",
    "objects": "Python objects",
    "tasks": "tasks",
    "threads": "threads",
    "descriptors": "descriptors",
    "connections": "connections",
    "session_mib": "their own MiB in the server",
    **SERVER_COLUMNS,
}
PLOT = "MiB of the process (above), and of its sessions in the server (below)"
LINES = ("mib", "session_mib")


# The process that waits ---------------------------------------------------------------------------------------------


class Load:
    """Triggers in one event loop.

    Parameters
    ----------
    waiting:
        How many long jobs are waited for at any time.
    rate:
        Short jobs begun in a second.
    long:
        How many seconds a long job takes at least and at most.
    """

    def __init__(self, waiting: int, rate: float, long: Sequence[float]) -> None:
        self._waiting = waiting
        self._rate = rate
        self._long = long
        self._stopped = asyncio.Event()
        self._running: set[asyncio.Task[None]] = set()
        self._ends: Counter[str] = Counter()
        self._number = 0

    async def run(self, every: float) -> None:
        """Keep the load up until standard input ends, then wait for what still runs; print a sample at intervals."""
        telling = asyncio.create_task(self._tell(every))
        ending = asyncio.create_task(self._short_jobs())
        long = [asyncio.create_task(self._long_jobs()) for _ in range(self._waiting)]
        await asyncio.to_thread(sys.stdin.read)
        self._stopped.set()
        await asyncio.gather(ending, *long)
        while self._running:
            await asyncio.wait(self._running)
        telling.cancel()
        print(json.dumps(self._sample()), flush=True)
        # Airflow's triggerer goes on: what the process holds when nothing waits is looked at while it lives.
        await asyncio.sleep(every)
        print(json.dumps(self._sample()), flush=True)

    async def _long_jobs(self) -> None:
        while not self._stopped.is_set():
            await self._job("waits", f"select pg_sleep({random.uniform(*self._long)})")

    async def _short_jobs(self) -> None:
        kinds, weights = list(SHORT), list(SHORT.values())
        while not self._stopped.is_set():
            kind = random.choices(kinds, weights)[0]
            sql = {"commits": "select 1", "fails": "select 1/0", "cancelled": "select pg_sleep(600)"}[kind]
            task = asyncio.create_task(self._job(kind, sql))
            self._running.add(task)
            task.add_done_callback(self._running.discard)
            await asyncio.sleep(1 / self._rate)

    async def _job(self, kind: str, sql: str) -> None:
        from airflow_provider.triggers import PgBackgroundTrigger

        self._number += 1
        name = f"{kind}/{self._number}"
        job = {"id": name, "series": name, "generation": 1, "label": kind, "sql": sql}
        trigger = PgBackgroundTrigger(job=job)
        # As a triggerer does it: one task for each, and the trigger's own calls when somebody ends its Airflow task.
        waiter = asyncio.create_task(self._event(trigger))
        if kind == "cancelled":
            await asyncio.sleep(1)
            waiter.cancel()
            await asyncio.wait([waiter])
            async with trigger.launcher() as launcher:
                await launcher.cancel(name, series=name, reason="the task was marked failed")
            self._ends["cancelled"] += 1
        else:
            self._ends[f"{kind}: {await waiter}"] += 1

    async def _event(self, trigger: Any) -> str:
        (event,) = [event async for event in trigger.run()]
        return str(event.payload["status"])

    async def _tell(self, every: float) -> None:
        while True:
            print(json.dumps(self._sample()), flush=True)
            await asyncio.sleep(every)

    def _sample(self) -> Sample:
        gc.collect()
        status = Path("/proc/self/status").read_text(encoding="ascii")
        fields = dict(line.split(":", 1) for line in status.splitlines())
        return {
            "waiting": self._number - self._ends.total(),
            "ended": self._ends.total(),
            "mib": int(fields["VmRSS"].split()[0]) / 1024,
            "objects": len(gc.get_objects()),
            "tasks": len(asyncio.all_tasks()),
            "threads": int(fields["Threads"]),
            "descriptors": len(os.listdir("/proc/self/fd")),  # noqa: PTH208
            "ends": dict(self._ends),
        }


# Who watches it -----------------------------------------------------------------------------------------------------


def watch(given: argparse.Namespace) -> list[Sample]:
    """Start a server and the process, watch both, and return the samples."""
    from demo.airflow_processes import SETTINGS, connection_json

    with (
        tempfile.TemporaryDirectory(prefix="pgbg-steady-") as home,
        EmbeddedServer(max_worker_processes=given.waiting + 100) as server,
    ):
        conninfo = server.create_database("steady")
        install.install(conninfo)
        seen = Watch(server, conninfo, given.restart)
        environment = {
            **os.environ, **SETTINGS,
            "AIRFLOW_CONN_POSTGRES_DEFAULT": connection_json(conninfo),
            "AIRFLOW_HOME": home,
            "AIRFLOW__LOGGING__LOGGING_LEVEL": "ERROR",
        }  # fmt: skip
        with subprocess.Popen(
            process_of(given), env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            _follow(seen, process.stdin, process.stdout, given.minutes)
        if process.returncode:
            sys.exit(f"the process ended with {process.returncode}")
        print(json.dumps(seen.samples[-1]["ends"], indent=1, sort_keys=True))
        return seen.samples


def _follow(seen: Watch, stdin: IO[str], stdout: IO[str], minutes: float) -> None:
    for line in stdout:
        if not line.startswith("{"):
            continue
        sample = seen.add(json.loads(line))
        if not stdin.closed and seen.minutes >= minutes:
            stdin.close()
        elif not stdin.closed:
            seen.restart_if_due()
        elif sample["waiting"] == 0:
            seen.prune()
