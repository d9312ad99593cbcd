"""Which tests run with another Python or another set of packages, and in which form."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from scripts import environments, long

NAMES = [command[1] for command in long.STEPS.values() if command[0] == "scripts/environments.py"]
Calls = list[tuple[list[str], dict[str, str]]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Calls:
    """What is run, with its variables, in place of uv and pytest; the cache is a new folder."""
    calls: Calls = []

    def run(command: list[str], env: dict[str, str] | None = None, **_: Any) -> subprocess.CompletedProcess[str]:
        calls.append((command, env or {}))
        if command[1] == "venv":
            Path(command[-1]).mkdir(parents=True)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(environments, "find_uv", lambda: "uv")
    monkeypatch.setattr(environments, "user_cache_path", lambda *_, **__: tmp_path)
    return calls


@pytest.mark.parametrize("name", NAMES)
def test_each_step_of_make_long_is_an_environment_whose_files_are_there(name: str) -> None:
    wanted = environments.environment(name)

    files = [argument for argument in (*wanted.install, *wanted.tests) if "/" in argument]
    assert [file for file in files if not (environments.ROOT / file.partition("::")[0]).exists()] == []


def test_another_name_is_refused() -> None:
    with pytest.raises(SystemExit, match=r"^unknown: pypy-7\.3$"):
        environments.environment("pypy-7.3")


@pytest.mark.parametrize("name", NAMES)
def test_only_an_airflow_with_other_ways_runs_the_long_form(
    calls: Calls, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("PGBG_LONG", "1")

    assert environments.main(name, []) == 0

    command, variables = calls[-1]
    assert command[1:3] == ["-m", "pytest"]
    assert variables.get("PGBG_LONG") == ("1" if name in {"airflow-3.1.8", "airflow-3.2.2"} else None)


def test_it_is_made_again_only_when_what_it_is_made_from_has_changed(
    calls: Calls, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "airflow-3.3.2.txt").write_text("apache-airflow==3.3.2")
    monkeypatch.setattr(environments, "VERSIONS", tmp_path)

    def made() -> bool:
        calls.clear()
        environments.main("airflow-3.3.2", [])
        return any(command[1] == "venv" for command, _ in calls)

    assert [made(), made()] == [True, False]
    assert [command[1] for command, _ in calls] == ["pip", "-m"], "this project is installed in one that is there, too"
    (tmp_path / "airflow-3.3.2.txt").write_text("apache-airflow==3.3.3")
    assert [made(), made()] == [True, False]
