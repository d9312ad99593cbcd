"""A task's log while its job is at work: what it raises, how far it is, and who is in its way."""

from __future__ import annotations

import re

import psycopg
import pytest

from tests.core.kit import only_long

from .conftest import MODEST, Lab

pytestmark = [pytest.mark.airflow, pytest.mark.processes, pytest.mark.slow, only_long, pytest.mark.timeout(1200)]

NOTICES = 20_000
ROWS = 5_000_000
SQL = f"""
create index on {MODEST}.{{name}} ({MODEST}.slowly(n));
alter table {MODEST}.{{name}} add column more int;
do $$ begin for i in 1 .. {NOTICES} loop raise notice 'the % th', i; end loop; end $$;
"""
PREPARE = f"""
create function {MODEST}.slowly(n int) returns int immutable language plpgsql as
    $$ begin perform pg_sleep(0.07); return n; end $$;
create table {MODEST}.deferred (n int, filler text) with (fillfactor = 10);
create table {MODEST}.here (n int, filler text) with (fillfactor = 10);
insert into {MODEST}.deferred select g, repeat('x', 700) from generate_series(1, 100) as g;
insert into {MODEST}.here select * from {MODEST}.deferred;
alter table {MODEST}.deferred owner to {MODEST};
alter table {MODEST}.here owner to {MODEST};
"""


@pytest.fixture(scope="module")
def tables(lab: Lab) -> None:
    lab.admin.execute(PREPARE.encode())


@pytest.mark.usefixtures("tables")
@pytest.mark.parametrize("name", ["deferred", "here"])
def test_notices_progress_and_the_blocker(lab: Lab, name: str) -> None:
    """With ``pgbackground_role`` alone; the blocker's query is shown to whoever has ``pg_read_all_stats`` too."""
    dag_id, run = f"{name}_heard", f"heard-{name}"

    def log() -> str:
        return lab.processes.task_log(dag_id, run, "job", 1)

    with psycopg.connect(lab.conninfo, application_name="a report") as person:
        person.execute(f"lock table {MODEST}.{name} in access share mode".encode())
        lab.start(dag_id, run, SQL.format(name=name))
        lab.wait_for_worker(run)
        blocker = f"for a lock of pid {person.info.backend_pid} (user postgres, a report"
        lab.wait(lambda: blocker in log(), "the blocker's name in the task's log", 180)
    assert lab.processes.wait_for_run(dag_id, run, 600) == "success"

    # A trigger's words and its event reach the process that writes the log in two ways: the last words may come later.
    lab.wait(lambda: f"the {NOTICES} th" in log(), "the last notice in the task's log", 120)
    told = log()
    assert [int(number) for number in re.findall(r"NOTICE: the (\d+) th", told)] == [*range(1, NOTICES + 1)]
    percents = [int(number) for number in re.findall(r"CREATE INDEX, building index: scanning table: (\d+) %", told)]
    assert len(percents) >= 2
    assert percents == sorted(set(percents))
    assert "its query is not visible to this login" in told


@pytest.mark.parametrize("name", ["deferred", "here"])
def test_an_index_of_five_million_rows(lab: Lab, name: str) -> None:
    """As it is judged: its percentage moves in the task's log. The server takes as long for it as it takes."""
    dag_id, run, table = f"{name}_heard", f"index-{name}", f"{MODEST}.big_{name}"
    lab.admin.execute(f"create table {table} as select md5(g::text) as what from generate_series(1, {ROWS}) g".encode())
    lab.admin.execute(f"alter table {table} owner to {MODEST}".encode())

    lab.start(dag_id, run, f"create index on {table} (reverse(what))")
    assert lab.processes.wait_for_run(dag_id, run, 900) == "success"

    told = lab.processes.task_log(dag_id, run, "job", 1)
    lab.admin.execute(f"drop table {table}".encode())
    lines = [line for line in told.splitlines() if "CREATE INDEX" in line]
    print(*lines, sep="\n")
    percents = [int(number) for number in re.findall(r"building index: scanning table: (\d+) %", told)]
    assert len(percents) >= 2, told
    assert percents == sorted(set(percents))
