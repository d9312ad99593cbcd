"""The package's own queries stand in files beside the modules that ask them, each under its name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import pgbg_orchestration
from pgbg_orchestration.ledger import queries
from pgbg_orchestration.statements import named

CORE = Path(str(pgbg_orchestration.__file__)).parent
FILES = ("doctor/queries.sql", "ledger/sql/queries.sql", "postgres/queries.sql", "statements/queries.sql")


def test_a_query_names_the_schema_and_leaves_its_comments_in_the_file() -> None:
    text = queries.query("signal", 'a"b').decode()
    assert '"a""b".lock_key' in text
    assert "--" not in text
    assert queries.query("signal", "other").decode() != text


def test_there_is_no_query_of_another_name() -> None:
    with pytest.raises(KeyError):
        queries.query("nothing", "pgbg")


def test_all_files_are_known() -> None:
    assert sorted(FILES) == sorted(path.relative_to(CORE).as_posix() for path in CORE.rglob("queries.sql"))


@pytest.mark.parametrize("file", FILES)
def test_every_query_is_used_and_every_used_one_is_there(file: str) -> None:
    room = file.split("/", maxsplit=1)[0]
    users = [*(CORE / room).glob("*.py"), *([CORE / "walk" / "host.py"] if room == "ledger" else [])]
    asked = {
        name
        for module in users
        for name in re.findall(
            r"(?:query\(|filled\(|QUERIES\[|patient\.one\(|_which\()\s*\"(\w+)\"", module.read_text(encoding="utf-8")
        )
    }
    assert asked == set(named.queries(f"pgbg_orchestration.{room}", *file.split("/")[1:]))
