"""Run every finding and say which one does not hold any more: python findings/run.py [NAME...]."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
LIMIT = 900.0
"""Seconds that one may take; most of it is installing."""


def main(names: Sequence[str]) -> int:
    """Run them one after another and return 1 when one does not hold."""
    scripts = [HERE / f"{name}.sh" for name in names] or sorted(HERE.glob("*.sh"))
    gone = []
    for script in (script for script in scripts if script.name != "lib.sh"):
        sys.stdout.write(f"\n=== {script.stem}\n")
        sys.stdout.flush()
        try:
            held = subprocess.run(["sh", str(script)], timeout=LIMIT, check=False).returncode == 0
        except subprocess.TimeoutExpired:
            held = False
        if not held:
            gone.append(script.stem)
    names_gone = ", ".join(gone)
    sys.stdout.write(f"\nno longer so, or not to be seen here: {names_gone}\n" if gone else "\nall hold\n")
    return int(bool(gone))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
