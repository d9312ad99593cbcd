"""The benchmark runs, and its table has its lines. Nothing is asserted about what it measures."""

from __future__ import annotations

import pytest

from benchmarks.__main__ import GROUPS, as_markdown
from benchmarks.bench import SMOKE, Bench
from benchmarks.steady import __main__ as steady
from benchmarks.steady.reports import not_once
from benchmarks.steady.watch import as_markdown as steady_table
from pgbg_orchestration.launcher import Launcher
from tests.core.kit import Watched, only_long, within

# "growth" replaces functions of 2.0 by simulated ones.
MARKS = {"airflow": only_long, "growth": pytest.mark.since(extension="2.0")}


@pytest.mark.servers("real", "embedded")
@pytest.mark.parametrize("group", [pytest.param(name, marks=MARKS.get(name, ())) for name in GROUPS])
async def test_smoke(db: Watched, group: str) -> None:
    async with Launcher(db.admin_conninfo) as launcher:
        extension = (await launcher.facts()).extension
    rows = await within(GROUPS[group](Bench(db.admin_conninfo, extension, SMOKE)), 600)
    assert rows
    assert as_markdown(rows, "a machine").count("\n| ") == len(rows)


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("through", [pytest.param("triggerer", marks=only_long), "daemon"])
def test_a_steady_load(through: str) -> None:
    """Nothing of a job is left, and through the daemon each end was reported once: it says so itself where not."""
    options = [
        *("--through", through, "--minutes", "0.1", "--waiting", "2", "--long", "1", "2"),
        *("--rate", "2", "--restart", "0", "--every", "1", "--ticks", "1"),
    ]
    form = steady.FORMS[through]
    samples = form.watch(steady.parser().parse_args(options))
    before, last = samples[-2:]
    assert before["ended"] >= before["jobs"] - before.get("orphans", 0) > 0
    assert (last["waiting"], last["workers"], last["locks"]) == (0, 0, 0)
    assert (last["receipts"], last["jobs"], last["series"]) == (0, 0, 0)
    told = steady_table(samples, form.COLUMNS, form.PLOT, form.LINES)
    assert told.count("\n| ") == len(samples)
    assert told.count("\n    line [") == len(form.LINES)


def test_an_end_that_is_not_reported_once_is_told_of() -> None:
    ends = {"a": "committed", "b": "failed", "c": "committed", "d": "lost", "e": "committed", "f": "cancelled"}
    assert not_once(ends, {"a": 1, "c": 2, "d": 1}, {"b": 1, "e": 1, "g": 1}) == [
        "c is committed: 2 materializations, 0 failed checks",
        "d is lost: 1 materializations, 0 failed checks",
        "e is committed: 0 materializations, 1 failed checks",
        "f is cancelled: 0 materializations, 0 failed checks",
        "g is no job that has ended: 0 materializations, 1 failed checks",
    ]
