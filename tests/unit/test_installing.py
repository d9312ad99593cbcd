"""What an installation needs and holds: the extras beside everybody's versions, the wheel, and what is said without."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.version import Version

from airflow_provider.compat import OLDEST
from scripts.environments import find_uv
from tests.core.kit import only_long

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SETS = sorted((ROOT / "tests" / "versions").glob("airflow-*.txt"))


def _airflow_of(path: Path) -> Version:
    return Version(path.stem.removeprefix("airflow-"))


def _supported(path: Path) -> bool:
    return _airflow_of(path).release[:2] >= OLDEST


SUPPORTED = [path for path in SETS if _supported(path)]


def _requirements(*extras: str) -> list[Requirement]:
    lines = [*PROJECT["dependencies"], *(line for extra in extras for line in PROJECT["optional-dependencies"][extra])]
    return [Requirement(line) for line in lines]


def _pins(path: Path) -> dict[str, str]:
    pins = [Requirement(line) for line in path.read_text().splitlines() if not line.startswith("#")]
    environment = {key: str(value) for key, value in default_environment().items()}
    return {
        pin.name: next(iter(pin.specifier)).version
        for pin in pins
        if pin.marker is None or pin.marker.evaluate(environment)
    }


class TestBesideEverybodysVersions:
    """Users install a provider with the constraints of their Airflow: it must take what was there on that day."""

    def test_there_is_a_set_of_each_supported_airflow(self) -> None:
        newest = Version(_pins(ROOT / "constraints.txt")["apache-airflow"])
        versions = {_airflow_of(path).release[:2] for path in SETS if _supported(path)}

        assert min(versions) == OLDEST
        assert max(versions) == newest.release[:2]

    @pytest.mark.parametrize("path", SUPPORTED, ids=lambda path: path.stem)
    def test_the_versions_of_an_airflows_day_are_enough(self, path: Path) -> None:
        pins = _pins(path)

        short = [
            f"{requirement}: {pins.get(requirement.name)}"
            for requirement in _requirements("airflow", "binary")
            if not requirement.specifier.contains(pins.get(requirement.name, "0"))
        ]
        assert short == []

    @only_long
    @pytest.mark.parametrize("path", SUPPORTED, ids=lambda path: path.stem)
    def test_a_resolver_finds_a_solution_with_them(self, path: Path, resolve: Callable[..., dict[str, str]]) -> None:
        chosen = resolve("airflow,binary", "--constraint", str(path))

        assert chosen["apache-airflow"] == str(_airflow_of(path))

    @only_long
    @pytest.mark.parametrize("extra", ["airflow", "dagster", "embedded", "demo", "dev"])
    def test_the_floors_can_be_had_together(self, extra: str, resolve: Callable[..., dict[str, str]]) -> None:
        chosen = resolve(extra, "--resolution", "lowest-direct")

        floors = {requirement.name: requirement for requirement in _requirements(extra) if requirement.name in chosen}
        assert floors
        for name, requirement in floors.items():
            assert requirement.specifier.contains(chosen[name])


@pytest.fixture
def resolve() -> Callable[..., dict[str, str]]:
    """Resolve extras as uv does, and return what it chooses."""
    if (uv := find_uv()) is None:
        pytest.fail("needs uv")

    def resolved(extras: str, *arguments: str) -> dict[str, str]:
        done = subprocess.run(
            [uv, "pip", "compile", "pyproject.toml", "--quiet", "--no-config", "--no-header", "--no-annotate",
             "--strip-extras", *(word for extra in extras.split(",") for word in ("--extra", extra)), *arguments],
            cwd=ROOT, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        pins = [Requirement(line) for line in done.stdout.splitlines() if "==" in line]
        return {pin.name: next(iter(pin.specifier)).version for pin in pins}

    return resolved


def _pretend(folder: Path, distribution: str, installed: str) -> None:
    """Put into a folder what tells that a distribution of Airflow is installed there."""
    info = folder / f"{distribution}-{installed}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {installed}\n")
    (folder / "airflow").mkdir()
    (folder / "airflow" / "__init__.py").touch()


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python with nothing installed."""
    home = tmp_path_factory.mktemp("bare")
    venv.create(home, with_pip=False)
    return home / "bin" / "python"


class TestWithoutAnOrchestrator:
    """The sentence that somebody reads who installed without the extra."""

    def _error_of(self, python: Path, module: str, *beside: Path) -> str:
        done = subprocess.run(
            [str(python), "-c", f"import {module}"],
            env={"PYTHONPATH": os.pathsep.join(map(str, (ROOT, *beside)))},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 1
        return done.stderr.strip().splitlines()[-1]

    @pytest.mark.parametrize(
        ("module", "name", "extra"),
        [
            ("airflow_provider", "Apache Airflow", "airflow"),
            ("airflow_provider.operators", "Apache Airflow", "airflow"),
            ("dagster_resource", "Dagster", "dagster"),
        ],
    )
    def test_the_extra_is_named(self, bare_python: Path, module: str, name: str, extra: str) -> None:
        assert self._error_of(bare_python, module) == (
            f"ImportError: {module.partition('.')[0]} needs {name}, which is not installed here: "
            f"pip install 'pg-background-orchestration[{extra}]'"
        )

    @pytest.mark.parametrize(
        ("distribution", "installed"),
        [("apache_airflow_core", "3.0.6"), ("apache_airflow_task_sdk", "1.0.6"), ("apache_airflow", "2.11.2")],
    )
    def test_the_version_of_airflow_that_is_needed_is_named(
        self, bare_python: Path, tmp_path: Path, distribution: str, installed: str
    ) -> None:
        _pretend(tmp_path, distribution, installed)
        airflow = {"1.0.6": "3.0"}.get(installed, installed.rpartition(".")[0])

        assert self._error_of(bare_python, "airflow_provider.hook", tmp_path) == (
            "ImportError: airflow_provider of pg-background-orchestration needs Apache Airflow "
            f"{'.'.join(map(str, OLDEST))} or newer, and this is {airflow}"
        )

    def test_an_airflow_that_is_too_old_starts_all_the_same(self, bare_python: Path, tmp_path: Path) -> None:
        """It asks every provider for its info when it starts: an error there is the end of all its commands."""
        _pretend(tmp_path, "apache_airflow_core", "3.0.6")

        subprocess.run(
            [
                str(bare_python),
                "-c",
                "from airflow_provider import get_provider_info as info; info.get_provider_info()",
            ],
            env={"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"},
            check=True,
        )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the checkout."""
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def in_wheel(wheel: Path) -> set[str]:
    """The names of the files in it."""
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


class TestTheWheel:
    def test_it_holds_the_three_packages_and_nothing_beside(self, in_wheel: set[str]) -> None:
        tops = {name.partition("/")[0] for name in in_wheel}

        assert {re.sub(r"-[\d.]+(?=\.dist-info)", "", top) for top in tops} == {
            "airflow_provider",
            "dagster_resource",
            "pg_background_orchestration.dist-info",
            "pgbg_orchestration",
        }

    def test_it_brings_nothing_that_fetches_or_edits_native_code(self, wheel: Path) -> None:
        """That is in ./debian_extension, a distribution of its own: whoever only runs jobs needs none of it."""
        with zipfile.ZipFile(wheel) as archive:
            sources = {name: archive.read(name).decode() for name in archive.namelist() if name.endswith(".py")}

        telling = re.compile(r"\b(?:urllib\.request|lzma|tarfile|ELF|gpgv|glibc)\b")
        assert {name for name, source in sources.items() if telling.search(source)} == set()

    def test_types_and_sql_travel_along(self, in_wheel: set[str]) -> None:
        for package in ("airflow_provider", "dagster_resource", "pgbg_orchestration"):
            assert f"{package}/py.typed" in in_wheel
        sources = {str(path.relative_to(ROOT)) for path in ROOT.glob("pgbg_orchestration/**/*.sql")}
        assert sources
        assert sources - in_wheel == set()
