"""What holds of the project as a whole: who imports whom, what is exported, what lies where, what may not be in it."""

from __future__ import annotations

import ast
import graphlib
import importlib.util
import ipaddress
import re
import subprocess
import sys
import tomllib
from collections.abc import Container, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from packaging.requirements import Requirement

import pgbg_orchestration
from pgbg_orchestration import errors, retry
from pgbg_orchestration.call_options import Options, RunOptions

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("pgbg_orchestration", "airflow_provider", "dagster_resource")

FOLDERS = {
    ".ci",
    "airflow_provider",
    "benchmarks",
    "dagster_resource",
    "debian_extension",
    "demo",
    "docs",
    "example_dags",
    "findings",
    "pgbg_orchestration",
    "scripts",
    "tests",
}
FILES = {
    ".editorconfig",
    ".gitignore",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "LICENSE",
    "Makefile",
    "README.md",
    "constraints.txt",
    "pyproject.toml",
}


def tracked_files() -> list[Path]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: which files belong to the project is not known")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [path for name in listed.split("\0") if name and (path := ROOT / name).exists()]


@pytest.fixture(scope="module")
def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    """Every text file of the project, by its path."""
    found = {}
    for path in tracked_files():
        content = path.read_bytes()
        if b"\0" not in content:
            found[str(path.relative_to(ROOT))] = content.decode()
    return found


def circle_of(root: Path) -> list[str] | None:
    """Return modules of the packages under ``root`` of which each imports the next, and the last the first."""
    paths = [path for package in PACKAGES for path in (root / package).rglob("*.py")]
    modules = {".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}
    imported = {name: set(_imports(name, path, modules)) - {name} for name, path in modules.items()}
    try:
        graphlib.TopologicalSorter(imported).prepare()
    except graphlib.CycleError as error:
        return [str(name) for name in error.args[1]]
    return None


def _imports(name: str, path: Path, modules: Container[str]) -> Iterator[str]:
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom):
            source = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                yield from ([inner] if inner in modules else [source] if source in modules else [])


class TestImports:
    def test_contracts_hold(self) -> None:
        done = subprocess.run(
            [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )

        assert done.returncode == 0, done.stdout + done.stderr

    @pytest.mark.parametrize(
        ("module", "source", "complaint"),
        [
            ("core", "pgbg_orchestration/{name}.py", "import airflow_provider"),
            ("airflow", "airflow_provider/{name}.py", "import dagster_resource"),
            ("orchestrator", "pgbg_orchestration/{name}.py", "from airflow.sdk import DAG"),
            ("verdict", "pgbg_orchestration/verdict.py", "import psycopg"),
            ("verdict", "pgbg_orchestration/verdict.py", "from time import time"),
            ("evidence", "pgbg_orchestration/walk/evidence.py", "from asyncio import sleep"),
            ("walk", "pgbg_orchestration/walk/evidence.py", "from pgbg_orchestration.walk import case"),
            ("rooms", "pgbg_orchestration/walk/{name}.py", "from pgbg_orchestration import launcher"),
            ("rooms", "pgbg_orchestration/ledger/{name}.py", "from pgbg_orchestration.walk import run"),
            ("rooms", "pgbg_orchestration/{name}.py", ""),  # in no room
        ],
    )
    def test_contracts_notice_a_breach(self, tmp_path: Path, module: str, source: str, complaint: str) -> None:
        """A contract that cannot fail proves nothing: break each rule in a copy and see it told."""
        for package in PACKAGES:
            for path in (ROOT / package).rglob("*.py"):  # every module is there, and imports nothing
                empty = tmp_path / path.relative_to(ROOT)
                empty.parent.mkdir(parents=True, exist_ok=True)
                empty.touch()
        (tmp_path / source.format(name=f"breach_in_{module}")).write_text(complaint + "\n")
        (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())

        done = subprocess.run(
            [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"],
            cwd=tmp_path,
            env={"PYTHONPATH": str(tmp_path), "PATH": "", "COLUMNS": "200"},
            capture_output=True,
            text=True,
            check=False,
        )

        assert done.returncode == 1, done.stdout + done.stderr
        broken = source.format(name=f"breach_in_{module}").removesuffix(".py").replace("/", ".")
        assert broken in done.stdout

    def test_the_page_names_every_file_of_the_walk_and_no_other(self) -> None:
        """At most eight are the way of a job; a file that is new, or has another name, is told of."""
        page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
        core = ROOT / "pgbg_orchestration"
        table = page.split("Eight files are the way")[1].split("Five more")[0]
        way = re.findall(r"^\| `([a-z_/]+\.py)` \|", table, re.MULTILINE)
        walk = {f"walk/{path.name}" for path in (core / "walk").glob("*.py")} - {"walk/__init__.py"}

        assert len(way) == 8
        assert all((core / name).is_file() for name in way)
        assert walk == {name for name in re.findall(r"walk/[a-z_]+\.py", page) if (core / name).is_file()}
        assert all((core / name).is_file() for name in re.findall(r"(?:walk|postgres|ledger)/[a-z_]+\.py", page))

    def test_no_circle(self) -> None:
        """Neither among functions' own imports, nor among those for types only: who knows whom points one way."""
        assert circle_of(ROOT) is None

    @pytest.mark.parametrize(
        ("other", "own"),
        [
            ("from pgbg_orchestration.one import name", "from pgbg_orchestration.other import name"),
            ("from . import one", "from typing import TYPE_CHECKING\n\nif TYPE_CHECKING:\n    from .other import name"),
            ("import pgbg_orchestration.one", "def late():\n    from pgbg_orchestration import other"),
        ],
    )
    def test_a_circle_is_noticed(self, tmp_path: Path, other: str, own: str) -> None:
        room = tmp_path / "pgbg_orchestration"
        room.mkdir()
        (room / "__init__.py").touch()
        (room / "one.py").write_text(own)
        (room / "other.py").write_text(other)

        circle = circle_of(tmp_path)

        assert circle is not None
        assert set(circle) == {"pgbg_orchestration.one", "pgbg_orchestration.other"}

    @pytest.mark.parametrize("package", PACKAGES)
    def test_types_are_shipped(self, package: str) -> None:
        assert (ROOT / package / "py.typed").is_file()


class TestExports:
    """What users import. A name that goes, or one that comes, is told in CHANGELOG.md."""

    def test_the_core(self) -> None:
        assert sorted(pgbg_orchestration.__all__) == [
            "Cause",
            "Column",
            "ErrorFields",
            "Event",
            "EventKind",
            "Fetch",
            "Job",
            "Kind",
            "Launcher",
            "NoRows",
            "Outcome",
            "Rows",
            "arun",
            "errors",
            "run",
        ]

    def test_the_options_of_a_call(self) -> None:
        """They stand twice, as keyword arguments and with their defaults and meanings: the same."""
        assert get_type_hints(RunOptions) == get_type_hints(Options)

    def test_every_name_is_there(self) -> None:
        assert [name for name in pgbg_orchestration.__all__ if getattr(pgbg_orchestration, name, None) is None] == []
        with pytest.raises(AttributeError, match="no_such_name"):
            _ = pgbg_orchestration.no_such_name

    def test_naming_a_job_costs_no_driver(self) -> None:
        """A DAG file that names a Job pays at each parse for what that imports."""
        probe = (
            "import sys; from pgbg_orchestration import Job, errors; Job('select 1'); print('psycopg' in sys.modules)"
        )
        done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=True)

        assert done.stdout.strip() == "False"

    def test_errors(self) -> None:
        assert sorted(errors.__all__) == [
            "DeadlinePassed",
            "ErrorFields",
            "ExtensionMissing",
            "ExtensionTooOld",
            "InvalidJob",
            "JobCancelled",
            "JobIdReused",
            "LaunchFailed",
            "LedgerError",
            "NO_FIELDS",
            "NoPrivilege",
            "NoWorkerSlot",
            "OutcomeUnknown",
            "PgbgError",
            "PoolerInTransactionMode",
            "ReadOnlyServer",
            "RowsGone",
            "SchemaMissing",
            "SchemaVersionMismatch",
            "SeriesHeld",
            "ServerUnreachable",
            "StillRunning",
            "Superseded",
            "WorkerError",
            "WorkerLost",
        ]

    def test_airflows_provider(self) -> None:
        pytest.importorskip("airflow")
        import airflow_provider

        assert sorted(airflow_provider.__all__) == [
            "PgBackgroundBatchOperator",
            "PgBackgroundHook",
            "PgBackgroundOperator",
            "PgBackgroundSensor",
            "PgBackgroundTrigger",
            "SqlStateRetryPolicy",
        ]
        assert [name for name in airflow_provider.__all__ if getattr(airflow_provider, name).__name__ != name] == []

    def test_retry(self) -> None:
        assert sorted(retry.__all__) == [
            "ATTACH",
            "Action",
            "DDL_MET_DDL",
            "DEFAULT",
            "Decision",
            "FAIL",
            "Origin",
            "RETRY",
            "RULES",
            "RULES_BY_ORIGIN",
            "RetryPolicy",
            "Rule",
        ]


class TestPackaging:
    def test_airflows_provider_info_bears_the_distributions_name(self, pyproject: dict[str, Any]) -> None:
        entry = pyproject["project"]["entry-points"]["apache_airflow_provider"]["provider_info"]
        module, function = entry.split(":")
        info = metadata.EntryPoint("provider_info", f"{module}:{function}", "apache_airflow_provider").load()()

        assert info["package-name"] == pyproject["project"]["name"]

    def test_every_entry_point_leads_somewhere(self, pyproject: dict[str, Any]) -> None:
        project = pyproject["project"]
        groups = {"console_scripts": project["scripts"], **project["entry-points"]}

        for group, entries in groups.items():
            for name, value in entries.items():
                assert metadata.EntryPoint(name, value, group).load() is not None

    def test_the_pytest_plugin_is_announced(self, pyproject: dict[str, Any]) -> None:
        """Announced without being there, it would break pytest for everybody who installs the package."""
        there = (ROOT / "pgbg_orchestration" / "testing" / "pytest_plugin.py").exists()
        announced = pyproject["project"]["entry-points"].get("pytest11")

        assert announced == ({"pgbg": "pgbg_orchestration.testing.pytest_plugin"} if there else None)

    def test_only_tested_pythons_are_claimed(self, pyproject: dict[str, Any]) -> None:
        claimed = [
            line.rsplit(" ", 1)[1]
            for line in pyproject["project"]["classifiers"]
            if re.fullmatch(r"Programming Language :: Python :: 3\.\d+", line)
        ]

        assert claimed == ["3.11", "3.13"]

    def test_every_requirement_is_locked(self, pyproject: dict[str, Any]) -> None:
        project = pyproject["project"]
        wanted = [Requirement(line) for line in project["dependencies"]]
        wanted += [Requirement(line) for lines in project["optional-dependencies"].values() for line in lines]
        locked = [Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines()]

        unlocked = [
            str(requirement)
            for requirement in wanted
            if requirement.name != project["name"]
            and not any(
                pin.name == requirement.name and requirement.specifier.contains(next(iter(pin.specifier)).version)
                for pin in locked
            )
        ]
        assert unlocked == [], "run `make lock`"

    def test_the_lock_holds_names_versions_and_markers_only(self) -> None:
        for line in (ROOT / "constraints.txt").read_text().splitlines():
            pin = Requirement(line)
            assert pin.url is None
            assert not pin.extras
            assert [specifier.operator for specifier in pin.specifier] == ["=="], line

    def test_dagsters_packages_are_locked_together(self) -> None:
        pins = [Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines()]
        versions = {
            str(pin.specifier)
            for pin in pins
            if pin.name in {"dagster", "dagster-pipes", "dagster-shared", "dagster-webserver", "dagster-graphql"}
        }

        assert len(versions) == 1


class TestTheTree:
    def test_everything_at_the_top_has_its_place(self) -> None:
        parts = [path.relative_to(ROOT).parts for path in tracked_files()]

        assert {first for first, *rest in parts if rest} - FOLDERS == set()
        assert {first for first, *rest in parts if not rest} - FILES == set()

    def test_no_source_file_outgrows_its_room(self, texts: dict[str, str]) -> None:
        lengths = {name: text.count("\n") for name, text in texts.items() if name.endswith(".py")}

        assert {name: length for name, length in lengths.items() if length > 600} == {}


class TestNothingOfAMachineIsInTheProject:
    """What is written here must hold on anybody's machine."""

    # Hosts that everybody can reach and that documentation may point at, and names that stand for one's own.
    HOSTS = re.compile(
        r"(?:[\w-]+\.)*(?:apache\.org|choosealicense\.com|dagster\.io|debian\.org|github\.com|keepachangelog\.com"
        r"|postgresql\.org|psycopg\.org|python\.org|pytest\.org|pypi\.org|semver\.org|astral\.sh|w3\.org"
        r"|example(?:\.(?:com|org|net|test))?|localhost|[a-z.-]+\.invalid)"
    )

    def test_no_address_of_a_private_host(self, texts: dict[str, str]) -> None:
        strange = {
            f"{name}: {host}"
            for name, text in texts.items()
            for host in re.findall(r"(?:https?|file|ftp)://(?:[^\s/@'\"]*@)?([A-Za-z0-9][A-Za-z0-9.-]*)", text)
            if not self.HOSTS.fullmatch(host) and not _is_loopback(host)
        }

        assert strange == set()

    def test_no_path_of_somebodys_own(self, texts: dict[str, str]) -> None:
        # Written in two parts, so that this file does not find itself.
        own = re.compile(r"(?<![\w.~$}])/" + r"(?:work|root|home/\w+|Users/\w+|var/tmp)/[\w.-]+")
        found = {f"{name}: {hit}" for name, text in texts.items() for hit in own.findall(text)}

        assert found == set()

    def test_no_index_or_folder_to_install_from(self, texts: dict[str, str]) -> None:
        option = re.compile(r"^\s*(?:--)?(?:extra-)?(?:index-url|find-links)\s*=?\s*\S+", re.MULTILINE)

        assert [name for name, text in texts.items() if option.search(text)] == []


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
