"""``pgbg run`` in a pipe, as a new user has it: how far an index is, who is in the way, and what a procedure raises.

The login has ``pgbackground_role`` and its own table; that the doctor asks for no more, test_doctor.py says.
"""

from __future__ import annotations

import asyncio
import re
import sys

import pytest

from tests.core.kit import APP, ROOT, Watched, only_long, within

ROWS = 5_000_000


async def pgbg(db: Watched, *arguments: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "pgbg_orchestration", *arguments, "--dsn", db.conninfo,
        cwd=ROOT, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip


async def ended(process: asyncio.subprocess.Process, limit: float = 60.0) -> tuple[int | None, str, str]:
    out, err = await within(process.communicate(), limit)
    return process.returncode, out.decode(), err.decode()


@pytest.fixture
def owned(db: Watched) -> Watched:
    """The watched database with a table of the login's own."""
    db.sql("create table sales (n int, what text)")
    db.sql(f"alter table sales owner to {APP}")
    db.sql(f"grant create on schema public to {APP}")
    return db


@only_long
@pytest.mark.servers("real", "embedded", "standin19")
async def test_an_index_of_five_million_rows_shows_a_moving_percentage(owned: Watched) -> None:
    owned.sql(f"insert into sales select g, md5(g::text) from generate_series(1, {ROWS}) g")
    # As much memory as most servers give; the table is in memory, so that what takes its time is the text.
    code, out, err = await ended(
        await pgbg(
            owned, "run", "create index on sales (reverse(what))", "--set", "max_parallel_maintenance_workers=0"
        ),
        600,
    )
    print(err)

    assert code == 0, err
    assert "✓ committed" in out
    percents = [int(number) for number in re.findall(r"CREATE INDEX, building index: scanning table: (\d+) %", err)]
    assert len(percents) >= 2, err
    assert percents == sorted(set(percents))


@pytest.mark.servers("real", "embedded", "standin19")
async def test_an_alter_table_that_is_blocked_names_its_blocker(owned: Watched) -> None:
    with owned.database.connect() as person:
        person.execute("set application_name = 'a report'")
        person.execute("begin")
        person.execute("select count(*) from sales")
        process = await pgbg(owned, "run", "alter table sales add column more int")
        assert process.stderr is not None
        lines: list[str] = []
        while "waits for" not in "".join(lines):
            line = (await within(process.stderr.readline())).decode()
            assert line, lines
            lines.append(line)
        pid = person.info.backend_pid
        person.execute("rollback")
    code, _, _ = await ended(process)

    assert f"for a lock of pid {pid} (user postgres, a report" in lines[-1]
    assert "its query is not visible to this login" in lines[-1]
    assert code == 0


@pytest.mark.servers("real", "embedded")
async def test_twenty_thousand_notices_of_a_procedure_come_in_order(db: Watched) -> None:
    db.sql(
        "create procedure tells() language plpgsql as $$ begin for i in 1 .. 20000 loop raise notice 'row %', i;"
        " end loop; end $$"
    )
    code, _, err = await ended(await pgbg(db, "run", "call tells()", "--notices"), 600)

    assert code == 0, err
    assert [int(number) for number in re.findall(r"NOTICE: row (\d+)", err)] == [*range(1, 20_001)]
