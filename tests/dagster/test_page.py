"""The snippets of docs/dagster.md are code that loads."""

# No `from __future__ import annotations` in the namespace of the snippets either: Dagster reads the annotations.

import re
from pathlib import Path
from typing import Any

import pytest
from dagster import AssetsDefinition, AssetSpec, Definitions, OpDefinition, SensorDefinition
from dagster.components.testing import create_defs_folder_sandbox

from dagster_resource import PgBackgroundResource, PgBackgroundSqlComponent

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


@pytest.mark.parametrize("fields", [PgBackgroundResource])
def test_every_option_is_told(fields: type[PgBackgroundResource]) -> None:
    page = PAGE.read_text()

    assert [name for name in fields.model_fields if f"| `{name}` |" not in page] == []
