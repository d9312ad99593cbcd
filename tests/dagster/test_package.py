"""The package as others see it."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any

import pytest

import dagster_resource

NAMES = {
    "JobOptions",
    "PgBackgroundFailure",
    "PgBackgroundOutcome",
    "PgBackgroundResource",
    "PgBackgroundSqlComponent",
    "RetryRule",
    "RunTerminated",
    "Sql",
    "build_pg_background_job_checks",
    "build_pg_background_sensor",
    "build_pg_background_sweep_sensors",
    "partition_parameters",
    "pg_background_asset",
    "pg_background_asset_check",
}
IMPORT = """
import sys
import dagster
before = set(sys.modules)
import dagster_resource
print(sorted(name for name in set(sys.modules) - before if not name.startswith(("dagster", "pgbg_orchestration"))))
"""


def test_public_names() -> None:
    public = {
        name
        for name, value in vars(dagster_resource).items()
        if not name.startswith("_") and getattr(value, "__module__", "").startswith("dagster_resource")
    }

    assert public == NAMES


def test_importing_it_brings_no_driver() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True)

    # What a Dagster process pays for: nothing but this package and small parts of the standard library.
    brought = eval(done.stdout)
    assert [name for name in brought if name.partition(".")[0] not in sys.stdlib_module_names] == []


def test_importing_it_compiles_no_patterns_of_sql() -> None:
    probe = "import sys, dagster_resource; print('pgbg_orchestration.statements' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "False"


def test_dagsters_tools_find_the_component() -> None:
    found = {entry.name: entry.load() for entry in entry_points(group="dagster_dg_cli.registry_modules")}

    assert found["dagster_resource"].PgBackgroundSqlComponent is dagster_resource.PgBackgroundSqlComponent


def test_version_is_that_of_the_distribution() -> None:
    from importlib.metadata import version

    assert dagster_resource.__version__ == version("pg-background-orchestration")


def public_functions() -> dict[str, Callable[..., Any]]:
    """What users call: the package's functions, and the methods of its classes that are their own."""
    found: dict[str, Callable[..., Any]] = {}
    for name in NAMES:
        value = getattr(dagster_resource, name)
        if inspect.isfunction(value):
            found[name] = value
        elif inspect.isclass(value):
            own = {key: getattr(value, key) for key in vars(value) if not key.startswith("_")}
            found |= {f"{name}.{key}": one for key, one in own.items() if inspect.isroutine(one)}
    return {name: one for name, one in found.items() if one.__module__.startswith("dagster_resource.")}


@pytest.mark.parametrize("name", sorted(public_functions()))
def test_docstring_tells_of_every_parameter_and_of_what_is_returned(name: str) -> None:
    function = public_functions()[name]
    text = inspect.getdoc(function) or ""
    sections = dict(re.findall(r"^(\w+)\n-+\n(.*?)(?=^\w+\n-+\n|\Z)", text, re.MULTILINE | re.DOTALL))
    names = re.findall(r"^(\S.*):$", sections.get("Parameters", ""), re.MULTILINE)
    told = {name for line in names for name in line.split(", ")}
    parameters = {key for key in inspect.signature(function).parameters if key not in ("self", "cls")}

    assert text
    assert parameters - told == set()
    assert told - parameters == set()
    assert "Returns" in sections or inspect.signature(function).return_annotation in ("None", None)
