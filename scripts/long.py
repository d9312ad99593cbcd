"""The long form of everything: python scripts/long.py [STEP...]; without a step, all of them.

What a push leaves out for its time is in here, and CONTRIBUTING.md lists it. A step that fails does not keep the next
from running; the last lines say how each ended. It takes hours.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STEPS = {
    "suite": ["scripts/test.py"],
    "chaos": ["-m", "pytest", "-m", "chaos"],
    **{
        name: ["scripts/environments.py", name]
        for name in (
            "airflow-3.1.8",
            "airflow-3.2.2",
            "airflow-3.3.0",
            "airflow-3.3.2",
            "lowest",
            "python-3.12",
            "python-3.13",
            "python-3.14",
        )
    },
    "findings": ["findings/run.py"],
}
"""What each step runs, with this Python."""


def main(names: Sequence[str]) -> int:
    """Run the steps and return 1 when one of them failed."""
    if unknown := set(names) - STEPS.keys():
        sys.exit(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(STEPS)}")
    results: dict[str, str] = {}
    failed = False
    for name in names or STEPS:
        sys.stdout.write(f"\n=== {name} ===\n")
        sys.stdout.flush()
        began = time.monotonic()
        code = subprocess.run(
            [sys.executable, *STEPS[name]], cwd=ROOT, env={**os.environ, "PGBG_LONG": "1"}, check=False
        ).returncode
        failed |= code != 0
        results[name] = f"{'passed' if code == 0 else f'FAILED (exit code {code})'}, {time.monotonic() - began:.0f} s"
    sys.stdout.writelines(f"{name}: {result}\n" for name, result in results.items())
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
