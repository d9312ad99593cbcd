"""The snippets of docs/dagster.md are code that loads."""

# No `from __future__ import annotations` in the namespace of the snippets either: Dagster reads the annotations.

import inspect
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
from dagster import AssetsDefinition, AssetSpec, Definitions, OpDefinition, SensorDefinition, materialize
from dagster.components.resolved.core_models import AssetSpecKwargs
from dagster.components.testing import create_defs_folder_sandbox

from dagster_resource import (
    JobOptions,
    PgBackgroundResource,
    PgBackgroundSqlComponent,
    RetryRule,
    build_pg_background_job_checks,
    build_pg_background_sensor,
    build_pg_background_sweep_sensors,
    component,
    pg_background_asset,
    pg_background_asset_check,
)
from tests.conftest import Database
from tests.matrix import LONG

PAGE = Path(__file__).resolve().parents[2] / "docs" / "dagster.md"

pytestmark = pytest.mark.filterwarnings("ignore:.*currently in (beta|preview).*")


def snippets(language: str) -> list[str]:
    blocks = re.findall(rf"^( *)```{language}\n(.*?)^ *```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    return [re.sub(rf"^{indent}", "", text, flags=re.MULTILINE) for indent, text in blocks]


def test_python() -> None:
    names: dict[str, Any] = {"__name__": "books"}
    for number, text in enumerate(snippets("python")):
        exec(compile(text, f"docs/dagster.md, snippet {number + 1}", "exec"), names)

    assert isinstance(names["defs"], Definitions)
    assert isinstance(names["order_report"], OpDefinition)
    found = [value for value in names.values() if isinstance(value, AssetsDefinition | AssetSpec)]
    Definitions.validate_loadable(
        Definitions(
            assets=[one for one in found if one is not names["no_negative_sales"]],
            asset_checks=names["report_checks"],
            sensors=[names["report_sensor"], *names["sweep"]],
            resources={"pg": PgBackgroundResource(conninfo="")},
        )
    )
    assert isinstance(names["report_sensor"], SensorDefinition)


def test_yaml() -> None:
    (text,) = snippets("yaml")
    with create_defs_folder_sandbox() as sandbox:
        folder = sandbox.defs_folder_path / "books"
        folder.mkdir()
        (folder / "defs.yaml").write_text(text)
        (folder / "totals_by_country.sql").write_text("select 1")
        with sandbox.load_component_and_build_defs(defs_path=folder) as (component, definitions):
            assert isinstance(component, PgBackgroundSqlComponent)
            assert len(list(definitions.assets or [])) == 1
            assert len(list(definitions.asset_checks or [])) == 1


PROJECT = {
    "pyproject.toml": """
[project]
name = "books"
version = "0.1.0"

[tool.dg]
directory_type = "project"

[tool.dg.project]
root_module = "books"
""",
    "src/books/__init__.py": "",
    "src/books/defs/__init__.py": "",
    "src/books/definitions.py": """
from pathlib import Path

from dagster import definitions, load_from_defs_folder


@definitions
def defs():
    return load_from_defs_folder(path_within_project=Path(__file__).parent)
""",
}


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.servers("real")
def test_a_project_of_dgs_made_by_the_page(tmp_path: Path, database: Database) -> None:
    """Every step to the letter, in a project as ``create-dagster`` makes it."""
    for name, text in PROJECT.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    home = tmp_path / "home"
    home.mkdir()
    environment = {
        **os.environ,
        "PYTHONPATH": str(tmp_path / "src"),
        "BOOKS_CONNINFO": database.conninfo,
        "DAGSTER_HOME": str(home),
        "DAGSTER_DISABLE_TELEMETRY": "1",
    }

    def dg(*arguments: str) -> None:
        program = str(Path(sys.executable).with_name("dg"))
        done = subprocess.run(
            [program, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr

    folder = tmp_path / "src" / "books" / "defs"
    dg("scaffold", "defs", "dagster.resources", "resources.py")
    (resources,) = [text for text in snippets("python") if "def resources()" in text]
    (folder / "resources.py").write_text(resources)
    dg("scaffold", "defs", "dagster_resource.PgBackgroundSqlComponent", "totals")
    if LONG:  # what is scaffolded is sound before it is filled in, too
        dg("check", "defs")
    (text,) = snippets("yaml")
    (folder / "totals" / "defs.yaml").write_text(text)
    if LONG:  # whatever it would find, the launch stumbles over
        dg("check", "defs")
    with database.connect() as sql:
        sql.execute("create table sales (title text, country text, copies int)")
        sql.execute("insert into sales values ('Emma', 'fr', 2), ('Emma', 'de', 3), ('Middlemarch', 'fr', 1)")
        dg("launch", "--assets", "totals_by_country")
        assert sql.execute("select * from totals_by_country order by 1").fetchall() == [("de", 3), ("fr", 3)]


@pytest.mark.servers("real")
def test_what_is_scaffolded_can_be_run_again(database: Database) -> None:
    pg = PgBackgroundResource(conninfo=database.conninfo)
    for _ in range(2):
        pg.run(None, component.FIRST_SQL)
    with database.connect() as sql:
        assert sql.execute("table my_table").fetchall() == [(1,)]


NUMBERS = """
type: dagster_resource.PgBackgroundSqlComponent
attributes:
  assets:
    - key: totals
      sql: select 1
      code_version: "3"
      skippable: true
      job: {label: "2024", settings: {max_parallel_workers_per_gather: 4, enable_seqscan: "on", work_mem: 64MB}}
"""


def test_texts_of_digits_stay_texts() -> None:
    with create_defs_folder_sandbox() as sandbox:
        folder = sandbox.defs_folder_path / "books"
        folder.mkdir()
        (folder / "defs.yaml").write_text(NUMBERS)
        with sandbox.load_component_and_build_defs(defs_path=folder) as (loaded, definitions):
            assert isinstance(loaded, PgBackgroundSqlComponent)
            job = loaded.assets[0].job
            assert job is not None
            assert job.label == "2024"
            assert job.settings == {"max_parallel_workers_per_gather": 4, "enable_seqscan": "on", "work_mem": "64MB"}
            (made,) = definitions.assets or []
            assert isinstance(made, AssetsDefinition)
            (spec,) = made.specs
            assert (spec.code_version, spec.skippable) == ("3", True)


SHOWN = """
type: dagster_resource.PgBackgroundSqlComponent
attributes:
  assets:
    - key: shown
      sql: |
        do $$ begin raise notice 'half of it'; end $$;
        select n, 1.5::numeric(10, 2) as price from generate_series(1, 3) as n
      preview: 2
      notices: true
      job: {fetch: {max_rows: 3}}
"""


@pytest.mark.servers("real")
def test_rows_and_notices_of_an_asset_from_yaml(database: Database, capfd: pytest.CaptureFixture[str]) -> None:
    with create_defs_folder_sandbox() as sandbox:
        folder = sandbox.defs_folder_path / "books"
        folder.mkdir()
        (folder / "defs.yaml").write_text(SHOWN)
        with sandbox.load_component_and_build_defs(defs_path=folder) as (_, definitions):
            (made,) = definitions.assets or []
            assert isinstance(made, AssetsDefinition)
            run = materialize([made], resources={"pg": PgBackgroundResource(conninfo=database.conninfo)})
    (shown,) = run.asset_materializations_for_node("shown")
    assert shown.metadata["dagster/row_count"].value == 3
    assert "| 2 | 1.50 |" in str(shown.metadata["pgbg/preview"].value)
    assert "NOTICE: half of it" in capfd.readouterr().err


def options(function: Callable[..., Any]) -> set[str]:
    """The parameters of a function that are options of ours: no context, and not what is handed on to Dagster."""
    parameters = inspect.signature(function).parameters
    return set(parameters) - {"self", "context", "fn", "options"}


# What each table of the page tells of. The options of a job stand in a table of their own.
TABLES = {
    "The resource": set(PgBackgroundResource.model_fields),
    "Options of a job": set(JobOptions.__annotations__),
    "run": options(PgBackgroundResource.run),
    "run_many": options(PgBackgroundResource.run_many),
    "submit": options(PgBackgroundResource.submit),
    "wait_for": options(PgBackgroundResource.wait_for),
    "check": options(PgBackgroundResource.check),
    "fetch": options(PgBackgroundResource.fetch),
    "stream": options(PgBackgroundResource.stream),
    "pg_background_asset": options(pg_background_asset),
    "pg_background_asset_check": options(pg_background_asset_check),
    "build_pg_background_job_checks": options(build_pg_background_job_checks),
    "build_pg_background_sensor": options(build_pg_background_sensor),
    "build_pg_background_sweep_sensors": options(build_pg_background_sweep_sensors),
    "RetryRule": set(RetryRule.model_fields),
    "An asset": {"sql", "sql_file", "pool", "backfill_policy", "job", "preview", "notices", "checks"},
    "A check": set(component.SqlCheck.model_fields),
}


def tables() -> dict[str, set[str]]:
    """The names in the first column of each table, by what stands in the first cell of its head."""
    found: dict[str, set[str]] = {}
    for head, rows in re.findall(r"^\| (.+?) \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", PAGE.read_text(), re.MULTILINE):
        cells = [row.split("|")[1] for row in rows.splitlines()]
        found[head.strip("`*")] = {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}
    return found


@pytest.mark.parametrize("table", TABLES)
def test_every_option_is_told_and_no_other(table: str) -> None:
    assert tables()[table] == TABLES[table]


def attributes() -> dict[str, Any]:
    """The schema of the component's attributes, which Dagster's tools show and check by."""
    model = PgBackgroundSqlComponent.get_model_cls()
    assert model is not None
    return model.model_json_schema()


def test_dagsters_tools_tell_of_each_attribute_of_the_component() -> None:
    schema = attributes()
    parts = [schema, *(part for name, part in schema["$defs"].items() if name.startswith("Sql"))]
    silent = [name for part in parts for name, told in part["properties"].items() if not told.get("description")]

    assert len(parts) == 4
    assert silent == []


def test_a_wrong_attribute_is_found_before_anything_runs() -> None:
    asset: dict[str, Any] = {"key": "a", "sql": "select 1", "checks": [{"name": "c", "sql": "select 1"}]}
    mistakes: list[dict[str, Any]] = [{"sqll": "select 1"}, {"job": {"timeout": []}}, {"checks": [{"sql": "select 1"}]}]

    jsonschema.validate({"assets": [asset]}, attributes())
    for mistake in mistakes:
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({"assets": [{**asset, **mistake}]}, attributes())


def test_all_that_dagster_knows_of_an_asset_is_handed_on() -> None:
    own = TABLES["An asset"] - {"pool", "backfill_policy", "preview", "notices"}
    handled = {*component.PASSED_ON, *own, "key", "kinds", "skippable", "code_version"}

    assert set(component.SqlAsset.model().model_fields) == handled


def test_the_components_own_fields_are_those_of_the_page() -> None:
    inherited = set(AssetSpecKwargs.__annotations__)

    assert set(component.SqlAsset.__annotations__) - inherited == TABLES["An asset"]
    assert set(component.SqlJob.model_fields) == TABLES["Options of a job"] - {"parameters"}
