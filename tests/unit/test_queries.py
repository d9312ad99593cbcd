"""The ledger's queries stand in a file, each under its name."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

import pytest

from pgbg_orchestration import ledger
from pgbg_orchestration.ledger import queries


def test_a_query_names_the_schema_and_leaves_its_comments_in_the_file() -> None:
    text = queries.query("signal", 'a"b').as_string(None)
    assert '"a""b".lock_key' in text
    assert "--" not in text
    assert queries.query("signal", "other").as_string(None) != text


def test_there_is_no_query_of_another_name() -> None:
    with pytest.raises(KeyError):
        queries.query("nothing", "pgbg")


def test_every_query_is_used_and_every_used_one_is_there() -> None:
    room = Path(str(resources.files(ledger)))
    users = [*room.glob("*.py"), room.parent / "walk" / "host.py"]
    asked = {
        name
        for module in users
        for name in re.findall(r"(?:query|filled)\(\s*\"(\w+)\"", module.read_text(encoding="utf-8"))
    }
    assert asked == set(queries.names())
