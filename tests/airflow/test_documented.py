"""Every option of every operator stands in docs/airflow.md and in its docstring, with the default that it has."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest

from airflow_provider.hook import PgBackgroundHook
from airflow_provider.operators import PgBackgroundBatchOperator, PgBackgroundOperator
from airflow_provider.operators.decorated import PgBackgroundDecoratedOperator
from airflow_provider.retry_policy import SqlStateRetryPolicy
from airflow_provider.sensors import PgBackgroundSensor
from airflow_provider.triggers import (
    PgBackgroundBatchTrigger,
    PgBackgroundSensorTrigger,
    PgBackgroundStartTrigger,
    PgBackgroundTrigger,
)
from airflow_provider.triggers.base import JobTrigger, ServerTrigger

pytestmark = pytest.mark.airflow

PAGE = (Path(__file__).parents[2] / "docs" / "airflow.md").read_text()
AIRFLOWS_OWN = {"execution_timeout", "retry_policy"}
OPERATORS: dict[str, Any] = {
    "The operator": PgBackgroundOperator,
    "Several jobs in one task": PgBackgroundBatchOperator,
    "The sensor": PgBackgroundSensor,
}
WITH_ARGUMENTS = [
    *OPERATORS.values(), PgBackgroundDecoratedOperator, PgBackgroundHook, SqlStateRetryPolicy, ServerTrigger,
    JobTrigger, PgBackgroundTrigger, PgBackgroundStartTrigger, PgBackgroundBatchTrigger, PgBackgroundSensorTrigger,
]  # fmt: skip


def _options(kind: type) -> dict[str, inspect.Parameter]:
    """What a class takes by itself."""
    init = inspect.unwrap(vars(kind)["__init__"])
    return {
        name: parameter
        for name, parameter in inspect.signature(init).parameters.items()
        if name != "self" and parameter.kind is not inspect.Parameter.VAR_KEYWORD
    }


def _table(heading: str) -> dict[str, tuple[str, str]]:
    """The options of a section's table: what stands behind the name, and the default."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return {
        name: (more, default)
        for name, more, default in re.findall(r"^\| `(\w+)`([^|]*)\| ([^|]*)\|", section, re.MULTILINE)
    }


@pytest.mark.parametrize("heading", OPERATORS)
def test_the_page_has_every_option_and_no_other(heading: str) -> None:
    assert set(_table(heading)) - AIRFLOWS_OWN == set(_options(OPERATORS[heading]))


@pytest.mark.parametrize("heading", OPERATORS)
def test_the_page_has_the_default_and_says_what_is_templated(heading: str) -> None:
    kind: Any = OPERATORS[heading]
    renamed = {"worker_label": "label", "job_label": "label"}
    own = _options(kind)
    templated = {name if name in own else renamed.get(name, name) for name in kind.template_fields}
    for name, (more, default) in _table(heading).items():
        if name in AIRFLOWS_OWN:
            continue
        assert ("templated" in more) == (name in templated), name
        value = _options(kind)[name].default
        if isinstance(value, bool | str) and name != "deferrable":  # that one is Airflow's setting
            assert f"`{value}`" in default, name


@pytest.mark.parametrize("kind", WITH_ARGUMENTS)
def test_the_docstring_has_every_argument(kind: type) -> None:
    text = inspect.getdoc(kind) or ""
    section = text.split("Parameters\n----------\n")[1].split("\n\n")[0]
    named = {name for line in re.findall(r"^(\w[\w, ]*):$", section, re.MULTILINE) for name in line.split(", ")}

    assert named - {"kwargs", "unknown"} - AIRFLOWS_OWN == set(_options(kind))
