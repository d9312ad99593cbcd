"""The long form of everything: python scripts/long.py [STEP...]; without a step, all of them.

What a push leaves out for its time is in here, and CONTRIBUTING.md lists it. A step that fails does not keep the next
from running; the last lines say how each ended. It takes hours, so it goes on where it was interrupted: a step that has
passed on this very commit, in a tree without changes, is not run again unless it is named.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
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
PASSED = ROOT / ".long.json"
"""The commit that the last steps ran on, and how each of them passed; git ignores it."""


def commit() -> str | None:
    """Return the commit that is checked out, or None when the tree differs from it or is no repository's."""
    if (git := shutil.which("git")) is None or not (ROOT / ".git").exists():
        return None
    asked = [git, "-C", str(ROOT)]
    if subprocess.run([*asked, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout:
        return None
    return subprocess.run([*asked, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()


def passed(on: str | None) -> dict[str, str]:
    """Return the steps that have passed on that commit, and how."""
    if on is None or not PASSED.exists():
        return {}
    known = json.loads(PASSED.read_text())
    return dict(known["steps"]) if known["commit"] == on else {}


def remember(on: str | None, steps: Mapping[str, str]) -> None:
    """Write down the steps that have passed on that commit; of a tree with changes, nothing."""
    if on is not None:
        PASSED.write_text(json.dumps({"commit": on, "steps": dict(steps)}, indent=1))


def main(names: Sequence[str]) -> int:
    """Run the steps and return 1 when one of them failed."""
    if unknown := set(names) - STEPS.keys():
        sys.exit(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(STEPS)}")
    before = commit()
    known = passed(before)
    results: dict[str, str] = {}
    failed = False
    for name in names or STEPS:
        sys.stdout.write(f"\n=== {name} ===\n")
        if name in known and not names:
            results[name] = f"not run again: it {known[name]}, on this commit"
            sys.stdout.write(f"{results[name]}\n")
            continue
        sys.stdout.flush()
        began = time.monotonic()
        code = subprocess.run(
            [sys.executable, *STEPS[name]], cwd=ROOT, env={**os.environ, "PGBG_LONG": "1"}, check=False
        ).returncode
        took = f"{time.monotonic() - began:.0f} s"
        results[name] = f"passed, {took}" if code == 0 else f"FAILED (exit code {code}), {took}"
        failed |= code != 0
        known.pop(name, None)
        if code == 0 and commit() == before:
            known[name] = f"passed at {datetime.now().astimezone():%Y-%m-%d %H:%M}, {took}"
        remember(before, known)
    sys.stdout.writelines(f"{name}: {result}\n" for name, result in results.items())
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
