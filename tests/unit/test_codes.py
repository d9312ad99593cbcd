"""What decides is a code: events and causes are enums, and the pages list them as they are."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from pgbg_orchestration import Cause, Event, EventKind
from pgbg_orchestration.call_options import Options

ROOT = Path(__file__).parents[2]
CORE = ROOT / "pgbg_orchestration"


def test_the_page_lists_every_kind_of_event_as_the_code_means_it() -> None:
    page = (ROOT / "docs/python.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `([a-z_]+)` \| (.+) \|$", page.split("| `event.kind`")[1].split("\n\n")[0], re.MULTILINE)

    assert listed == [(kind.value, kind.meaning) for kind in EventKind]


@pytest.mark.parametrize("kind", EventKind)
def test_every_kind_of_event_is_sent_somewhere(kind: EventKind) -> None:
    sent = rf"(tell(_once)?|Remark)\(\s*EventKind\.{kind.name}\b"

    assert any(re.search(sent, file.read_text(encoding="utf-8")) for file in CORE.rglob("*.py"))


def test_an_event_kind_is_its_value_and_its_meaning_is_told() -> None:
    assert Event(EventKind("launched"), "m", "j", "l").kind == "launched"
    assert all(kind.meaning for kind in EventKind)


def test_a_cancel_is_taken_back_by_its_cause() -> None:
    of_a_try = {cause for cause in Cause if cause.ended_a_try}

    assert of_a_try == {Cause.INTERRUPTED, Cause.FAILED_BESIDE, Cause.RUN_GONE}
    assert Options(retry_cancelled=True).takes_back(Cause.ASKED)
    assert not Options(retry_cancelled=of_a_try).takes_back(Cause.ASKED)
    assert Options(retry_cancelled=of_a_try).takes_back(Cause.RUN_GONE)
    assert not Options().takes_back(Cause.RUN_GONE)


WORDS = ("message", "reason")


@pytest.mark.parametrize("package", ["pgbg_orchestration", "airflow_provider", "dagster_resource"])
def test_no_branch_compares_what_is_written_for_people(package: str) -> None:
    """A person's words may read like ours: ``x.reason in …``, ``x.message == …`` and ``x.reason.startswith(…)``."""
    found = []
    for file in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            sides: list[ast.expr] = []
            if isinstance(node, ast.Compare) and not all(isinstance(op, ast.Is | ast.IsNot) for op in node.ops):
                sides = [node.left, *node.comparators]
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                sides = [node.func.value] if node.func.attr in ("startswith", "endswith", "find", "count") else []
            found += [
                f"{file.name}:{side.lineno}" for side in sides if isinstance(side, ast.Attribute) and side.attr in WORDS
            ]
    # The server has no code of its own for DDL that meets DDL: XX000, and these words in English or none.
    assert [line.partition(":")[0] for line in found] == (["retry.py"] if package == "pgbg_orchestration" else [])
