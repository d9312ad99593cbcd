"""The snippets of the pages that have no test file of their own: security, durability, python."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from pgbg_orchestration import Job, run
from pgbg_orchestration.doctor.examination import examine
from pgbg_orchestration.embedded.server import EmbeddedServer
from pgbg_orchestration.ledger.install import install

from . import snippets

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.fixture(scope="module")
def server() -> Iterator[EmbeddedServer]:
    with EmbeddedServer() as server:
        server.create_database("pages")
        install(server.conninfo("pages"))
        yield server


@pytest.fixture
def admin(server: EmbeddedServer) -> Iterator[psycopg.Connection]:
    with server.connect("pages") as connection:
        yield connection


@pytest.fixture(scope="module")
def roles(server: EmbeddedServer) -> None:
    """The roles that the page on security makes."""
    with server.connect("pages") as connection:
        connection.execute(snippets.of(DOCS / "security.md")[0].text.encode())


@pytest.mark.usefixtures("roles")
async def test_security(server: EmbeddedServer, admin: psycopg.Connection) -> None:
    """The login of the page runs jobs, as the role of the page, with nothing that the doctor would mind."""
    _, monitoring, python, log = snippets.of(DOCS / "security.md")
    admin.execute(monitoring.text.encode())
    admin.execute(log.text.encode())
    admin.execute("create table card (number int); grant insert on card to warehouse_writer")
    conninfo = server.conninfo("pages", "warehouse_jobs")

    found = await examine(conninfo)
    done = subprocess.run(
        [sys.executable, "-c", python.text], env={"FLIGHTS_CONNINFO": conninfo}, capture_output=True, text=True
    )

    assert {finding.status for finding in found if finding.group in ("privileges", "schema")} == {"ok"}
    assert (done.stdout, done.stderr) == ("22P02 (withheld: redact_details) None\n", "")
    with psycopg.connect(server.conninfo("pages", "warehouse_watcher"), autocommit=True) as watcher:
        assert watcher.execute("select job_id, state, owner from pgbg.jobs").fetchall() == [
            ("card-1", "failed", "warehouse_jobs")
        ]
        for forbidden in ("set role warehouse_jobs", "select pgbg.mark_cancelled('warehouse_jobs', 'j', 'asked', 'x')"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                watcher.execute(forbidden)


@pytest.mark.usefixtures("roles")
def test_every_kind_runs_as_the_role_of_the_page(server: EmbeddedServer, admin: psycopg.Connection) -> None:
    admin.execute("create table ran_as (who text default current_user); grant insert on ran_as to warehouse_writer")
    for kind in ("receipt", "supervised", "session"):
        job = Job("insert into ran_as default values", id=kind, kind=kind, role="warehouse_writer")
        run(server.conninfo("pages", "warehouse_jobs"), job)
    assert admin.execute("select who, count(*) from ran_as group by 1").fetchall() == [("warehouse_writer", 3)]


def test_durability(server: EmbeddedServer, admin: psycopg.Connection) -> None:
    """Every block holds, and every ``Job(…)`` that stands there for itself runs."""
    admin.execute("create table facts (day date); insert into facts values ('2013-01-01')")
    names: dict[str, object] = {}
    ran = []
    for snippet in snippets.of(DOCS / "durability.md"):
        assert snippet.language == "python"
        for statement in ast.parse(snippet.text).body:
            text = ast.unparse(statement)
            if isinstance(statement, ast.Expr):
                ran.append(run(server.conninfo("pages"), eval(text, names)))
            else:
                exec(text, names)
    assert [outcome.proof for outcome in ran] == ["receipt"]


def test_python(server: EmbeddedServer, admin: psycopg.Connection) -> None:
    """From the top to the end, as one program."""
    admin.execute("drop table if exists facts; create table facts (day date); create table report (n int)")
    admin.execute("create table staged as select date '2013-01-01' as day from generate_series(1, 3)")
    admin.execute("create table one_row (n int constraint only_one unique)")
    parts = snippets.of(DOCS / "python.md")
    program = "\n".join(snippet.text for snippet in parts if snippet.language == "python")
    program = f"conninfo = {server.conninfo('pages')!r}\n{program}"

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)

    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert re.fullmatch(r"3 \d+ 1 True", lines[0])
    assert lines[1] == "Nothing of this job is committed."
    assert "Receipt.COMMITTED committed" in lines
    assert "['2013-01-02', '2013-01-03']" in lines
    assert re.match(r"only_one retry [\d.]+ SQLSTATE 23505: two loads met", lines[-2])
    assert lines[-1].startswith("ResultInfo(completed=True, has_error=False, row_count=1, command_tag='SELECT'")
    assert admin.execute("select count(*) from facts").fetchone() == (5,)
    admin.execute("drop table facts, report, staged, one_row")


@pytest.mark.parametrize("page", sorted(path.name for path in DOCS.glob("*.md")))
def test_links_lead_somewhere(page: str) -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", (DOCS / page).read_text())

    assert [link for link in links if not link.startswith("https://") and not (DOCS / link).exists()] == []
