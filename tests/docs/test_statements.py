"""The table of docs/statements.md: every line is run by psql and as a job, on the real server."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from pgbg_orchestration import Job, errors, run
from tests.conftest import Database
from tests.servers.debian import DebianTree
from tests.servers.real import BINARIES

PAGE = Path(__file__).resolve().parents[2] / "docs" / "statements.md"
LOGIN = "told_login"
WRITER = "told_writer"
SECONDS = 120


@dataclass(frozen=True)
class Line:
    """A line of the table: the SQL, and how it ends in psql and as a job: rows, then an error."""

    sql: str
    psql: tuple[str, ...]
    job: tuple[str, ...]


def lines() -> list[Line]:
    found = []
    for row in PAGE.read_text().splitlines():
        if not row.startswith("| `"):
            continue
        sql, psql, job = (cell.strip() for cell in re.split(r" \|(?= )", row)[:3])
        found.append(Line(sql.removeprefix("| ").strip("`"), _ends(psql), _ends(job)))
    return found


def _ends(cell: str) -> tuple[str, ...]:
    return tuple(word.strip("`*") for word in cell.strip("| ").split())


@pytest.fixture
def told(database: Database) -> Database:
    """A database of a login that may do what the table's SQL does."""
    with database.connect() as admin:
        for role in (LOGIN, WRITER):
            if admin.execute("select from pg_roles where rolname = %s", (role,)).fetchone() is None:
                admin.execute(f"create role {role} {'login' if role == LOGIN else ''}")
        admin.execute(f"grant pgbackground_role, {WRITER} to {LOGIN}; grant create on schema public to {LOGIN}")
        admin.execute(f"create table told (line text); grant select, insert on told to {LOGIN}, {WRITER}")
    return database


def rows(database: Database) -> tuple[str, ...]:
    with database.connect() as admin:
        return tuple(line for (line,) in admin.execute("select line from told order by ctid"))


def by_psql(database: Database, sql: str) -> tuple[str, ...]:
    tree = DebianTree()
    script = tree.root / "tmp" / f"{database.name}.sql"
    script.write_text(sql + "\n")
    try:
        conninfo = database.conninfo_as(LOGIN)
        options = ["-X", "-q", "-v", "ON_ERROR_STOP=1", "-v", "VERBOSITY=sqlstate"]
        command = tree.command(f"{BINARIES}/psql", *options, "-f", f"/tmp/{script.name}", conninfo)
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=SECONDS)
    finally:
        script.unlink()
    return (*rows(database), *re.findall(r"(?:ERROR|FATAL): +(\w{5})\b", done.stderr))


def as_job(database: Database, sql: str) -> tuple[str, ...]:
    try:
        run(database.conninfo_as(LOGIN), Job(sql, kind="receipt"))
    except errors.InvalidJob:
        return (*rows(database), "refused")
    except errors.PgbgError as error:
        return (*rows(database), error.sqlstate or type(error).__name__)
    return rows(database)


@pytest.mark.servers("real")
@pytest.mark.parametrize("line", lines(), ids=lambda line: line.sql[:50])
def test_a_line_of_the_table(told: Database, line: Line) -> None:
    in_psql = by_psql(told, line.sql)
    with told.connect() as admin:
        admin.execute("truncate told; drop table if exists filled")
    assert (in_psql, as_job(told, line.sql)) == (line.psql, line.job)
