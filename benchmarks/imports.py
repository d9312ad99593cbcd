"""What an import of each public module costs, against the library that it is used beside."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

from .bench import Bench
from .rows import Row

MOST_ROUNDS = 7
PEERS = {
    "from pgbg_orchestration import Launcher": "import psycopg",
    "from airflow_provider.operators import PgBackgroundOperator": (
        "from airflow.providers.common.sql.operators.sql import SQLExecuteQueryOperator"
    ),
    "from dagster_resource import PgBackgroundResource": "import dagster",
}
"""By what a user writes, what is written for the peer. Airflow's start is most of what either of its lines takes."""


def imports(bench: Bench) -> list[Row]:
    """Return how long a fresh interpreter takes for each module, in turn with its peer; less an interpreter's start."""
    rounds = min(bench.size.rounds, MOST_ROUNDS)
    peers = dict([*PEERS.items()][: bench.size.modules])
    names = ["import sys", *peers, *peers.values()]
    taken: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + 1):
        for name in names:
            began = time.perf_counter()
            subprocess.run([sys.executable, "-c", name], check=True, capture_output=True)
            if number:  # the first round compiles
                taken[name].append(time.perf_counter() - began)
    middle = {name: statistics.median(times) for name, times in taken.items()}
    start = middle.pop("import sys")
    cost = {name: max(seconds - start, 1e-4) for name, seconds in middle.items()}
    return [
        Row(
            module,
            f"{cost[module] * 1000:.0f} ms",
            f"{peer}: {cost[peer] * 1000:.0f} ms",
            cost[module] / cost[peer],
        )
        for module, peer in peers.items()
    ]
