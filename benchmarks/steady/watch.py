"""What the server holds while a steady load goes on, and the table and the plot of it all."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psycopg

from pgbg_orchestration.embedded.server import EmbeddedServer

Sample = dict[str, Any]
SHORT = {"commits": 8, "fails": 1, "cancelled": 1}
"""The kinds of short jobs, and how often each is begun."""
SERVER_COLUMNS = {
    "workers": "workers",
    "activity": "`pg_stat_activity`",
    "locks": "advisory locks",
    "receipts": "rows of `receipt`",
    "jobs": "of `job`",
    "series": "of `series`",
}
SEEN = """
select (select count(*) from pg_stat_activity where application_name like 'pgbg: %'),
       array(select pid from pg_stat_activity where application_name like 'pgbg: %'),
       (select count(*) from pg_stat_activity where backend_type = 'pg_background'),
       (select count(*) from pg_stat_activity where pid <> pg_backend_pid()),
       (select count(*) from pg_locks where locktype = 'advisory'),
       (select count(*) from pgbg.receipt), (select count(*) from pgbg.job), (select count(*) from pgbg.series)
"""


class Watch:
    """What the server holds, looked at now and then, and its restarts.

    Parameters
    ----------
    server, conninfo:
        The server, and the database on it.
    restart:
        Minutes between two restarts of the server; 0 for none.
    """

    def __init__(self, server: EmbeddedServer, conninfo: str, restart: float) -> None:
        self._server = server
        self._conninfo = conninfo
        self._restart = restart
        self._restarts = 0
        self._began = time.monotonic()
        self.samples: list[Sample] = []

    @property
    def minutes(self) -> float:
        """Since the beginning."""
        return (time.monotonic() - self._began) / 60

    def add(self, sample: Sample) -> Sample:
        """Complete a sample with what the server says, print it and keep it."""
        with psycopg.connect(self._conninfo, autocommit=True) as admin:
            row = admin.execute(SEEN.encode()).fetchone()
        assert row is not None
        connections, pids, workers, activity, locks, receipts, jobs, series = row
        sample = {
            **sample,
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
        return sample

    def restart_if_due(self) -> None:
        """Restart the server at once when it has run for so long."""
        if self._restart and self.minutes >= self._restart * (self._restarts + 1):
            self._restarts += 1
            self._server.restart("immediate")

    def prune(self) -> None:
        """Delete the history of all jobs that have ended."""
        with psycopg.connect(self._conninfo, autocommit=True) as admin:
            admin.execute("select * from pgbg.prune('0 seconds')")


def process_of(given: argparse.Namespace) -> list[str]:
    """Return the command of the process that is the load."""
    options = [f"--{name}={getattr(given, name)}" for name in ("through", "waiting", "rate", "every")]
    long = [str(seconds) for seconds in given.long]
    return [sys.executable, "-m", "benchmarks.steady", "--process", *options, "--long", *long]


def private_mib(pid: int) -> float:
    """Return the memory of a process that it shares with no other, in MiB; 0 where it has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


def as_markdown(samples: Sequence[Sample], columns: Mapping[str, str], plot: str, lines: Sequence[str]) -> str:
    """Return the table and the plot as the documentation has them.

    Parameters
    ----------
    samples:
        A line of the table each.
    columns:
        Its columns: what each shows of a sample, and its heading.
    plot:
        The plot's title; its unit is MiB.
    lines:
        What the plot shows of the samples.
    """
    most = max((sample[name] for sample in samples for name in lines), default=0)
    return "\n".join(
        [
            f"| {' | '.join(columns.values())} |",
            f"|{'---|' * len(columns)}",
            *(f"| {' | '.join(f'{sample[name]:,.0f}' for name in columns)} |" for sample in samples),
            "",
            "```mermaid",
            "xychart-beta",
            f'    title "{plot}"',
            f'    x-axis "minute" 1 --> {len(samples)}',
            f'    y-axis "MiB" 0 --> {(most // 50 + 1) * 50:.0f}',
            *(f"    line [{', '.join(f'{sample[name]:.0f}' for sample in samples)}]" for name in lines),
            "```",
            "",
        ]
    )
