"""The benchmark runs, and its table has its lines. Nothing is asserted about what it measures."""

from __future__ import annotations

import pytest

from benchmarks.__main__ import GROUPS, as_markdown
from benchmarks.bench import SMOKE, Bench
from pgbg_orchestration.launcher import Launcher
from tests.core.kit import Watched, only_long, within


@pytest.mark.servers("real", "embedded")
@pytest.mark.parametrize(
    "group", [pytest.param(name, marks=only_long) if name == "airflow" else name for name in GROUPS]
)
async def test_smoke(db: Watched, group: str) -> None:
    async with Launcher(db.admin_conninfo) as launcher:
        extension = (await launcher.facts()).extension
    rows = await within(GROUPS[group](Bench(db.admin_conninfo, extension, SMOKE)), 600)
    assert rows
    assert as_markdown(rows, "a machine").count("\n| ") == len(rows)
