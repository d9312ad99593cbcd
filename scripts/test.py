"""Run the test suite, in two parts side by side; the arguments are pytest's.

One part is all tests that start no process of an orchestrator, ``JOBS`` at a time (4): they keep the machine busy. The
other is those that run a real Airflow, a real Dagster daemon and the demo, two at a time; they mostly wait, and those
that share one Airflow are in one process (tests/conftest.py). The first part is seen as it runs, the other at its end.
With ``REPORT=FILE``, FILE and FILE.processes are JUnit reports.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import IO

NOTHING_SELECTED = 5  # pytest's exit code
SLOWEST = "--durations=15"


def start(
    marks: str, report: str, arguments: Sequence[str], output: IO[bytes] | None = None
) -> subprocess.Popen[bytes]:
    """Start a part; it ends on Ctrl-C by itself, like this process."""
    command = [sys.executable, "-m", "pytest", "-m", marks, SLOWEST, *arguments]
    if "REPORT" in os.environ:
        command.append(f"--junitxml={os.environ['REPORT']}{report}")
    return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT if output else None)


def ended(part: subprocess.Popen[bytes]) -> int:
    """Wait for the end of a part, also after Ctrl-C: its servers are stopped at its end."""
    while True:
        try:
            return part.wait()
        except KeyboardInterrupt:
            continue


def main(arguments: Sequence[str]) -> int:
    """Run both parts and return the worse exit code of those that had something to run."""
    with tempfile.TemporaryFile() as aside:
        processes = ["-n", "2", "--dist", "loadgroup", *arguments]
        # The files are begun in the order that they have been collected in, the longest first (tests/kit/order.py).
        others = ["-n", os.environ.get("JOBS", "4"), "--dist", "loadfile", "--no-loadscope-reorder", *arguments]
        second = start("processes and not chaos", ".processes", processes, aside)
        first = start("not chaos and not processes", "", others)
        codes = [ended(first), ended(second)]
        aside.seek(0)
        sys.stdout.flush()
        sys.stdout.buffer.write(aside.read())
    return max((code for code in codes if code != NOTHING_SELECTED), default=NOTHING_SELECTED)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
