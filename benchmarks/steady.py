"""Steady load through one process that waits as a triggerer does: ``python -m benchmarks.steady --minutes 30``.

A few hundred of Airflow's triggers wait for long jobs in one event loop, while others end each second: most commit,
some fail, some are cancelled. The server is restarted at once now and then. Told at fixed intervals, and written as
Markdown: what the process holds, what the server holds for it, and the rows of the history. In the end all jobs end and
the history is pruned, so that whatever is left then is no job's.
"""

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
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import psycopg

from pgbg_orchestration.embedded.server import EmbeddedServer
from pgbg_orchestration.ledger import install

Sample = dict[str, Any]
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
    "session_mib": "their MiB in the server",
    "workers": "workers",
    "activity": "`pg_stat_activity`",
    "locks": "advisory locks",
    "receipts": "rows: `receipt`",
    "jobs": "`job`",
    "series": "`series`",
}
SHORT = {"commits": 8, "fails": 1, "cancelled": 1}
"""How often each kind of short job is begun."""
LONG_SECONDS = (60.0, 300.0)
SEEN = """
select (select count(*) from pg_stat_activity where application_name like 'pgbg: %'),
       array(select pid from pg_stat_activity where application_name like 'pgbg: %'),
       (select count(*) from pg_stat_activity where backend_type = 'pg_background'),
       (select count(*) from pg_stat_activity where pid <> pg_backend_pid()),
       (select count(*) from pg_locks where locktype = 'advisory'),
       (select count(*) from pgbg.receipt), (select count(*) from pgbg.job), (select count(*) from pgbg.series)
"""


# The process that waits ---------------------------------------------------------------------------------------------


class Load:
    """Triggers in one event loop.

    Parameters
    ----------
    waiting:
        How many long jobs are waited for at any time.
    rate:
        Short jobs begun in a second.
    """

    def __init__(self, waiting: int, rate: float) -> None:
        self._waiting = waiting
        self._rate = rate
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
            await self._job("waits", f"select pg_sleep({random.uniform(*LONG_SECONDS)})")

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


class Watch:
    """What the server holds for the process, and the table of it all."""

    def __init__(self, server: EmbeddedServer, conninfo: str) -> None:
        self.server = server
        self._conninfo = conninfo
        self._began = time.monotonic()
        self.samples: list[Sample] = []

    @property
    def minutes(self) -> float:
        """Since the beginning."""
        return (time.monotonic() - self._began) / 60

    def add(self, line: str) -> None:
        """Complete a sample of the process with what the server says, and print it."""
        with psycopg.connect(self._conninfo, autocommit=True) as admin:
            row = admin.execute(SEEN.encode()).fetchone()
        assert row is not None
        connections, pids, workers, activity, locks, receipts, jobs, series = row
        sample = {
            **json.loads(line),
            "minute": self.minutes,
            "connections": connections,
            "session_mib": sum(private_mib(pid) for pid in pids),
            "workers": workers,
            "activity": activity,
            "locks": locks,
            "receipts": receipts,
            "jobs": jobs,
            "series": series,
        }
        self.samples.append(sample)
        print(json.dumps(sample), flush=True)

    def prune(self) -> None:
        """Delete the history of all jobs that have ended."""
        with psycopg.connect(self._conninfo, autocommit=True) as admin:
            admin.execute("select * from pgbg.prune('0 seconds')")


def private_mib(pid: int) -> float:
    """Return the memory of a process that it shares with no other, in MiB; 0 where it has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


def as_markdown(samples: Sequence[Sample]) -> str:
    """Return the table as the documentation has it."""
    lines = [f"| {' | '.join(COLUMNS.values())} |", f"|{'---|' * len(COLUMNS)}"]
    lines += [f"| {' | '.join(f'{sample[name]:,.0f}' for name in COLUMNS)} |" for sample in samples]
    return "\n".join([*lines, ""])


def watch(given: argparse.Namespace) -> list[Sample]:
    """Start a server and the process, watch both, and return the samples."""
    from demo.airflow_processes import SETTINGS, connection_json

    with (
        tempfile.TemporaryDirectory(prefix="pgbg-steady-") as home,
        EmbeddedServer(max_worker_processes=given.waiting + 100) as server,
    ):
        conninfo = server.create_database("steady")
        install.install(conninfo)
        seen = Watch(server, conninfo)
        environment = {
            **os.environ, **SETTINGS,
            "AIRFLOW_CONN_POSTGRES_DEFAULT": connection_json(conninfo),
            "AIRFLOW_HOME": home,
            "AIRFLOW__LOGGING__LOGGING_LEVEL": "ERROR",
        }  # fmt: skip
        command = [sys.executable, "-m", "benchmarks.steady", "--process", *_options(given)]
        with subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            _follow(seen, process.stdin, process.stdout, given)
        if process.returncode:
            sys.exit(f"the process ended with {process.returncode}")
        return seen.samples


def _follow(seen: Watch, stdin: IO[str], stdout: IO[str], given: argparse.Namespace) -> None:
    restarts = 0
    for line in stdout:
        if not line.startswith("{"):
            continue
        seen.add(line)
        if not stdin.closed and seen.minutes >= given.minutes:
            stdin.close()
        elif not stdin.closed and given.restart and seen.minutes >= given.restart * (restarts + 1):
            restarts += 1
            seen.server.restart("immediate")
        elif stdin.closed and json.loads(line)["waiting"] == 0:
            seen.prune()


def _options(given: argparse.Namespace) -> list[str]:
    return [f"--{name}={getattr(given, name)}" for name in ("waiting", "rate", "every")]


def main() -> None:
    """Watch a steady load, or be it."""
    parser = argparse.ArgumentParser(prog="benchmarks.steady", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60, help="how long jobs are begun")
    parser.add_argument("--waiting", type=int, default=300, help="long jobs at any time")
    parser.add_argument("--rate", type=float, default=2, help="short jobs begun in a second")
    parser.add_argument("--restart", type=float, default=10, help="minutes between restarts of the server; 0 for none")
    parser.add_argument("--every", type=float, default=60, help="seconds between samples")
    parser.add_argument("--write", type=Path, help="a file for the table as Markdown")
    parser.add_argument("--process", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.process:
        asyncio.run(Load(given.waiting, given.rate).run(given.every))
        return
    samples = watch(given)
    print(json.dumps(samples[-1]["ends"], indent=1, sort_keys=True))
    if given.write:
        given.write.write_text(as_markdown(samples), encoding="utf-8")


if __name__ == "__main__":
    main()
