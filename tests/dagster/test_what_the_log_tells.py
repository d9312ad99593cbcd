"""A step's log while its job is at work: how far it is, who is in its way, and what it raises.

The login has ``pgbackground_role`` and a schema of its own, and nothing else.
"""

import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest
from dagster import AssetExecutionContext, DagsterInstance, asset, materialize

from dagster_resource import PgBackgroundResource
from tests.conftest import Database
from tests.core.kit import count

pytestmark = pytest.mark.servers("real", "embedded")

MODEST = "pgbg_modest_step"
SLOWLY = "$$ begin perform pg_sleep(0.07); return n; end $$"
PATIENCE = 120.0


@pytest.fixture
def modest(database: Database) -> PgBackgroundResource:
    """The resource of that login, which owns a table of many pages, each of which takes its time."""
    with database.connect() as admin:
        if not admin.execute("select 1 from pg_roles where rolname = %s", (MODEST,)).fetchone():
            admin.execute(f"create role {MODEST} login".encode())
        for line in (
            f"grant pgbackground_role to {MODEST}",
            f"create schema authorization {MODEST}",
            f"create function {MODEST}.slowly(n int) returns int immutable language plpgsql as {SLOWLY}",
            f"create table {MODEST}.pages (n int, filler text) with (fillfactor = 10)",
            f"insert into {MODEST}.pages select g, repeat('x', 700) from generate_series(1, 60) g",
            f"alter table {MODEST}.pages owner to {MODEST}",
        ):
            admin.execute(line.encode())
    return PgBackgroundResource(conninfo=database.conninfo_as(MODEST))


def log_of(instance: DagsterInstance) -> list[str]:
    """What the steps of all runs have logged."""
    return [entry.user_message for run in instance.get_runs() for entry in instance.all_logs(run.run_id)]


def wait(there: Callable[[], bool]) -> None:
    until = time.monotonic() + PATIENCE
    while not there():
        assert time.monotonic() < until, "it is not told"
        time.sleep(0.1)


def test_an_alter_table_that_is_blocked_names_its_blocker(
    modest: PgBackgroundResource, database: Database, instance: DagsterInstance
) -> None:
    @asset
    def altered(context: AssetExecutionContext, pg: PgBackgroundResource) -> None:
        pg.run(context, f"alter table {MODEST}.pages add column more int")

    def is_named(person: psycopg.Connection) -> bool:
        wanted = f"for a lock of pid {person.info.backend_pid} (user postgres, a report"
        return any(wanted in line for line in log_of(instance))

    def report() -> None:
        try:
            wait(lambda: is_named(person))
        finally:
            person.execute("rollback")

    with database.connect() as person, ThreadPoolExecutor(1) as threads:
        person.execute("set application_name = 'a report'")
        person.execute("begin")
        person.execute(f"select count(*) from {MODEST}.pages".encode())
        reporting = threads.submit(report)
        run = materialize([altered], resources={"pg": modest}, instance=instance)
        reporting.result()
        assert is_named(person)

    assert run.success
    assert any("its query is not visible to this login" in line for line in log_of(instance))


def test_the_percentage_of_an_index_build_moves(modest: PgBackgroundResource, instance: DagsterInstance) -> None:
    @asset
    def indexed(context: AssetExecutionContext, pg: PgBackgroundResource) -> None:
        pg.run(context, f"create index on {MODEST}.pages ({MODEST}.slowly(n))")

    assert materialize([indexed], resources={"pg": modest}, instance=instance).success
    told = "\n".join(log_of(instance))
    percents = [int(number) for number in re.findall(r"CREATE INDEX, building index: scanning table: (\d+) %", told)]
    assert len(percents) >= 2, told
    assert percents == sorted(set(percents))


def test_the_notices_of_a_procedure_come_in_order(
    modest: PgBackgroundResource, database: Database, instance: DagsterInstance
) -> None:
    many = count(2_000, 20_000)
    with database.connect() as admin:
        admin.execute(
            f"create procedure {MODEST}.tells() language plpgsql as"
            f" $$ begin for i in 1 .. {many} loop raise notice 'row %', i; end loop; end $$".encode()
        )

    @asset
    def told(context: AssetExecutionContext, pg: PgBackgroundResource) -> None:
        pg.run(context, f"call {MODEST}.tells()", notices=True)

    assert materialize([told], resources={"pg": modest}, instance=instance).success
    numbers = [int(number) for number in re.findall(r"NOTICE: row (\d+)", "\n".join(log_of(instance)))]
    assert numbers == [*range(1, many + 1)]
