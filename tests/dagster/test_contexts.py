"""Jobs beside the steps' own code: in IO managers and hooks; and what is no context."""

import logging
from typing import Any

import psycopg
import pytest
from dagster import (
    AssetExecutionContext,
    DagsterInstance,
    DagsterType,
    DagsterTypeLoaderContext,
    HookContext,
    In,
    InputContext,
    IOManager,
    OutputContext,
    TypeCheckContext,
    asset,
    build_init_resource_context,
    dagster_type_loader,
    failure_hook,
    job,
    materialize,
    op,
)

from dagster_resource import PgBackgroundFailure, PgBackgroundResource

pytestmark = [pytest.mark.servers("real"), pytest.mark.filterwarnings("ignore:.*currently in (beta|preview).*")]


def count(sql: psycopg.Connection[Any], query: str) -> int:
    (number,) = sql.execute(query.encode()).fetchone() or (0,)
    return int(number)


class Tables(IOManager):
    """Hands a number on in a table of the database."""

    def __init__(self, pg: PgBackgroundResource) -> None:
        self._pg = pg

    def handle_output(self, context: OutputContext, obj: int) -> None:
        self._pg.run(context, "create table handed_on as select %s::int as n", parameters=[obj])

    def load_input(self, context: InputContext) -> int:
        return self._pg.run(context, "select * from handed_on").row_count or 0


def test_called_in_an_io_manager(pg: PgBackgroundResource, sql: psycopg.Connection[Any]) -> None:
    @asset
    def made(context: AssetExecutionContext, pg: PgBackgroundResource) -> int:
        pg.run(context, "create table own as select 1")
        return 7

    @asset
    def taken(made: int) -> int:
        return made

    tables = Tables(pg)
    resources = {"pg": pg, "io_manager": tables}
    run = materialize([made], resources=resources)
    assert run.success
    assert count(sql, "select n from handed_on") == 7
    sql.execute("alter table handed_on rename to handed_before")
    sql.execute("create table handed_on as select 1 from generate_series(1, 3)")
    with pytest.raises(PgBackgroundFailure) as caught:
        materialize([made, taken], selection=[taken], resources=resources)
    assert caught.value.sqlstate == "42P07"  # what came in is handed on in the same table
    series = {name for (name,) in sql.execute("select series from pgbg.jobs").fetchall()}
    beside = {"dagster/made/output/result", "dagster/taken/input/made", "dagster/taken/output/result"}
    assert series == {"dagster/made", *beside}


def test_called_in_a_hook(pg: PgBackgroundResource, sql: psycopg.Connection[Any]) -> None:
    sql.execute("create table told (what text)")

    @failure_hook(required_resource_keys={"pg"})
    def tell(context: HookContext) -> None:
        context.resources.pg.run(context, "insert into told values (%s)", parameters=[str(context.op_exception)])

    @op
    def fails(pg: PgBackgroundResource) -> None:
        raise ValueError("no")

    @job(hooks={tell}, resource_defs={"pg": pg})
    def told() -> None:
        fails()

    for _ in range(2):
        assert not told.execute_in_process(raise_on_error=False).success
    assert sql.execute("select * from told").fetchall() == [("no",), ("no",)]


def test_what_is_no_context_is_told(pg: PgBackgroundResource) -> None:
    with pytest.raises(TypeError, match="pass None for work that belongs to none of these"):
        pg.run("fetch", "select 1")  # type: ignore[arg-type]
    with build_init_resource_context() as context, pytest.raises(TypeError, match=r"not .*InitResourceContext"):
        pg.run(context, "select 1")


def test_a_types_own_contexts_are_told_too(pg: PgBackgroundResource) -> None:
    told: list[str] = []

    def refused(context: Any) -> None:
        with pytest.raises(TypeError, match="pass None for work that belongs to none of these") as caught:
            pg.run(context, "select 1")
        told.append(str(caught.value).rpartition("not ")[2].partition(":")[0])

    def check(context: TypeCheckContext, _: object) -> bool:
        refused(context)
        return True

    @dagster_type_loader(config_schema=int)
    def load(context: DagsterTypeLoaderContext, number: int) -> int:
        refused(context)
        return number

    @op(ins={"number": In(DagsterType(type_check_fn=check, name="Number", loader=load))})
    def takes(number: int) -> None: ...

    @job
    def typed() -> None:
        takes()

    config = {"ops": {"takes": {"inputs": {"number": 1}}}}
    assert typed.execute_in_process(run_config=config).success
    assert told == ["DagsterTypeLoaderContext", "TypeCheckContext"]


def test_what_the_sql_raises_is_in_the_steps_log(pg: PgBackgroundResource, instance: DagsterInstance) -> None:
    @asset
    def loud(context: AssetExecutionContext, pg: PgBackgroundResource) -> None:
        text = "do $$ begin raise notice 'half way'; raise warning 'odd' using hint = 'look'; end $$"
        pg.run(context, text, notices=True)

    run = materialize([loud], resources={"pg": pg}, instance=instance)
    lines = [(entry.level, entry.user_message) for entry in instance.all_logs(run.run_id)]
    assert (logging.INFO, "loud: NOTICE: half way") in lines
    assert (logging.WARNING, "loud: WARNING: odd\nHINT: look") in lines
