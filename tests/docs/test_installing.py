"""The lines of the pages that install the package, pasted in an empty environment: in a clone, and with the wheel."""

from __future__ import annotations

import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from tests.core.kit import only_long

from . import snippets

ROOT = Path(__file__).resolve().parents[2]
PAGES = {
    "README.md": "import pgbg_orchestration, psycopg",
    "docs/airflow.md": "import airflow_provider; from airflow_provider import PgBackgroundOperator",
    "docs/dagster.md": "import dagster_resource",
}
"""What can be imported once the line of a page has run."""


def _line(page: str) -> str:
    (found,) = [s.text.strip() for s in snippets.of(ROOT / page) if s.language == "sh" and "pip install" in s.text]
    return found


@pytest.mark.parametrize("page", PAGES)
def test_each_page_has_one_such_line(page: str) -> None:
    assert re.match(r'pip install "\.\[[\w,]+\]"', _line(page))


@only_long
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("what", ["clone", "wheel"])
def test_what_the_page_installs_works(page: str, what: str, tmp_path: Path) -> None:
    venv.create(tmp_path / "env", with_pip=True)
    programs = tmp_path / "env" / "bin"
    line = _line(page)
    if what == "wheel":
        subprocess.run(
            [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)],
            cwd=ROOT, check=True, capture_output=True,
        )  # fmt: skip
        (wheel,) = tmp_path.glob("*.whl")
        line = line.replace('".[', f'"{wheel}[')

    installed = subprocess.run(
        ["sh", "-ec", line], cwd=ROOT, env={"PATH": f"{programs}:/usr/bin:/bin", "HOME": str(tmp_path)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert installed.returncode == 0, installed.stdout + installed.stderr
    for command in ([str(programs / "python"), "-c", PAGES[page]], [str(programs / "pgbg"), "--version"]):
        # Elsewhere than in the clone, whose folders would be found first.
        done = subprocess.run(command, cwd=tmp_path, env={"HOME": str(tmp_path)}, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
