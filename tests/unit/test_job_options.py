"""A job's options have one source, the fields of ``Job``; here stands where each of them has a name of its own besides.

A new field is one edit in the core, in ``job.py``. A surface that passes it on by itself needs none; one that has to
name it fails here.
"""

from __future__ import annotations

import inspect
import re
from dataclasses import fields
from pathlib import Path

import pytest

from pgbg_orchestration import Job
from pgbg_orchestration.cli.run import run
from pgbg_orchestration.job import SQL_OPTIONS
from pgbg_orchestration.rows import Fetch

FIELDS = [field.name for field in fields(Job) if field.init]
OTHERWISE = {"sql", "parameters", "id", "label", "series", "generation", "owner", "timeout"}
"""Fields that each surface has under its own name, in its own form, or makes itself."""

NOT_HERE: dict[str, set[str]] = {
    "the command line": {"fetch"},
    "Airflow": set(),
    "Dagster": set(),
    "Dagster's component": set(),
}
"""What a surface does not offer."""


def test_every_field_is_an_option_or_has_its_own_form_in_each_surface() -> None:
    assert set(FIELDS) == OTHERWISE | set(SQL_OPTIONS)
    assert {name: getattr(Job("select 1"), name) for name in SQL_OPTIONS if name not in ("settings", "kind")} == {
        name: default for name, default in SQL_OPTIONS.items() if name not in ("settings", "kind")
    }


@pytest.mark.parametrize("name", FIELDS)
def test_the_docstring_tells_each_field(name: str) -> None:
    # Python 3.13 and later store a docstring without its indentation.
    told = inspect.cleandoc(Job.__doc__ or "")
    assert re.search(rf"^(\w+, )*{name}(, \w+)*:$", told, re.MULTILINE)


def test_the_command_line() -> None:
    named = set(inspect.signature(run).parameters)
    other = {"settings": "setting"}
    assert (
        set(SQL_OPTIONS) - {name for name in SQL_OPTIONS if other.get(name, name) in named}
        == NOT_HERE["the command line"]
    )


def test_the_command_line_names_each_bound_of_kept_rows() -> None:
    """``fetch`` has forms of its own there; all statements' rows (``return_last``) it does not offer."""
    named = set(inspect.signature(run).parameters)
    assert {field.name for field in fields(Fetch)} - named == {"return_last"}


@pytest.mark.airflow
def test_airflow_names_them_in_the_operator_alone() -> None:
    from airflow_provider import PgBackgroundOperator, arguments
    from airflow_provider.triggers.job import PgBackgroundStartTrigger

    named = set(inspect.signature(PgBackgroundOperator.__init__).parameters)
    assert set(SQL_OPTIONS) - named == NOT_HERE["Airflow"]
    assert set(arguments.SQL_OPTIONS) == set(SQL_OPTIONS)
    assert set(SQL_OPTIONS) <= set(arguments.JOB_FIELDS) & set(PgBackgroundStartTrigger.arguments)


@pytest.mark.dagster
def test_dagster_names_them_in_its_options_and_its_component() -> None:
    from dagster_resource import component
    from dagster_resource.steps.sql import JobOptions

    assert set(SQL_OPTIONS) - set(JobOptions.__annotations__) == NOT_HERE["Dagster"]
    text = Path(component.__file__).read_text(encoding="utf-8")
    assert {name for name in SQL_OPTIONS if not re.search(rf"^    {name}: ", text, re.MULTILINE)} == NOT_HERE[
        "Dagster's component"
    ]
