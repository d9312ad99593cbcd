"""``pgbg run --rows`` and ``pgbg result``: what is printed, in which form, and where."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from pgbg_orchestration.cli import app
from pgbg_orchestration.cli.codes import ExitCode
from tests.core.kit import Watched

pytestmark = pytest.mark.any_surface

SQL = "values (1, 'one', null::text, 1.50::numeric), (20, E'two\\n\"lines\", é', 'x', 12345678901234567.89)"
TABLE = """\
 column1 |    column2     | column3 |       column4
---------+----------------+---------+----------------------
       1 | one            |         |                 1.50
      20 | two␤"lines", é | x       | 12345678901234567.89
(2 rows)

"""

Pgbg = Callable[..., Result]


@pytest.fixture
def pgbg(db: Watched, monkeypatch: pytest.MonkeyPatch) -> Pgbg:
    monkeypatch.setenv("TERM", "dumb")
    return lambda command, *arguments: CliRunner().invoke(app, [command, "--dsn", db.conninfo, *arguments])


def test_as_psql_shows_them(pgbg: Pgbg) -> None:
    ran = pgbg("run", SQL, "--id", "v", "--rows")
    assert ran.exit_code == ExitCode.OK, ran.output
    assert [line.rstrip() for line in ran.stdout.splitlines()] == TABLE.splitlines()
    assert "✓ committed  v" in ran.stderr
    assert pgbg("result", "v").stdout == ran.stdout
    again = pgbg("run", SQL, "--id", "v", "--rows")
    assert again.stdout == ran.stdout
    assert "it did not run again" in again.stderr


def test_for_programs(pgbg: Pgbg, tmp_path: Path) -> None:
    assert pgbg("run", SQL, "--id", "v", "--format", "csv").exit_code == ExitCode.OK

    printed = list(csv.reader(pgbg("result", "v", "--format", "csv").stdout.splitlines(keepends=True)))
    assert printed[1:] == [["1", "one", "", "1.50"], ["20", 'two\n"lines", é', "x", "12345678901234567.89"]]
    objects: list[dict[str, Any]] = json.loads(pgbg("result", "v", "--format", "json").stdout)
    assert objects[1] == {
        "column1": 20, "column2": 'two\n"lines", é', "column3": "x", "column4": "12345678901234567.89",
    }  # fmt: skip
    assert [json.loads(line) for line in pgbg("result", "v", "--format", "ndjson").stdout.splitlines()] == objects
    (told,) = json.loads(pgbg("result", "v", "--json").stdout)
    assert (told["columns"][3], told["rows"][0]) == (
        {"name": "column4", "type": "numeric"},
        [1, "one", None, "1.50"],
    )
    file = tmp_path / "rows.csv"
    written = pgbg("run", "select 1 as a, 2 as a", "--id", "f", "--format", "csv", "-o", str(file))
    assert (written.exit_code, file.read_text()) == (ExitCode.OK, "a,a\n1,2\n")
    assert "✓ committed  f" in written.stdout
    assert json.loads(pgbg("result", "f", "--format", "json").stdout) == [{"a": 1, "a_2": 2}]


def test_the_rows_of_each_statement(db: Watched, pgbg: Pgbg) -> None:
    sql = "select 1 as a; insert into effects (job) values ('each'); values ('x'), ('y')"
    ran = pgbg("run", sql, "--id", "e", "--each", "--format", "csv")
    assert (ran.exit_code, ran.stdout.split()) == (ExitCode.OK, ["a", "1", "column1", "x", "y"]), ran.output
    assert pgbg("result", "e", "--format", "csv").stdout == ran.stdout
    told = json.loads(pgbg("result", "e", "--json").stdout)
    assert [(one["statement"], one["rows"]) for one in told] == [(1, [[1]]), (3, [["x"], ["y"]])]
    assert db.effects("each") == 1
    assert "either kept" in pgbg("run", sql, "--each", "--stream").stderr


def test_bounds_and_none(db: Watched, pgbg: Pgbg) -> None:
    over = pgbg("run", "insert into effects select 'over' from generate_series(1, 3) returning n", "--max-rows", "2")
    assert (over.exit_code, db.effects("over")) == (ExitCode.FAILED, 0)
    assert "PB005" in over.stderr
    assert pgbg("run", "select 1", "--id", "plain").exit_code == ExitCode.OK
    none = pgbg("result", "plain")
    assert none.exit_code == ExitCode.NO_SUCH_JOB
    assert "no rows are kept" in none.stderr
    late = pgbg("run", "select 1", "--id", "plain", "--rows")
    assert late.exit_code == ExitCode.OK
    assert "no rows of it are kept" in late.stderr
    assert pgbg("result", "nobody").exit_code == ExitCode.NO_SUCH_JOB
