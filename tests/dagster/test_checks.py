"""Checks: a query that holds or not, run in process on a real server."""

from typing import Any

import psycopg
import pytest
from dagster import AssetCheckEvaluation, AssetCheckExecutionContext, AssetCheckResult, asset, asset_check, materialize

from dagster_resource import PgBackgroundFailure, PgBackgroundResource, pg_background_asset_check
from tests.conftest import Database

pytestmark = [pytest.mark.servers("real"), pytest.mark.filterwarnings("ignore:.*currently in (beta|preview).*")]


def violations(check: AssetCheckResult | AssetCheckEvaluation) -> object:
    return (check.metadata or {})["pgbg/violations"].value


@pytest.mark.parametrize(
    ("query", "expect", "passed"),
    [
        ("select 1 where false;", "no_rows", True),
        ("select * from generate_series(1, 200000) -- more than a worker's output queue holds", "no_rows", False),
        ("select true", "true", True),
        ("select false", "true", False),
        ("select null::boolean", "true", False),
        ("select true where false", "true", False),
        ("values (true), (false)", "true", False),
        ("select true, false", "true", False),
        ("select true as a, false as a", "true", False),
        ("select true, null::boolean", "true", False),
        ("select true, true from generate_series(1, 3)", "true", True),
        ("select", "true", False),
        ("with pgbg_answer as (select true) table pgbg_answer", "true", True),
    ],
)
def test_query_holds_or_not(pg: PgBackgroundResource, query: str, expect: Any, passed: bool) -> None:
    @asset
    def checked() -> None: ...

    @pg_background_asset_check(asset=checked, expect=expect)
    def holds() -> str:
        return query

    run = materialize([checked, holds], resources={"pg": pg})
    assert [check.passed for check in run.get_asset_check_evaluations()] == [passed]


def test_the_number_of_rows_that_are_wrong(pg: PgBackgroundResource) -> None:
    found = pg.check(None, "select * from generate_series(1, 200000)")

    assert violations(found) == 200_000


def test_what_is_no_boolean_is_neither_true_nor_false(pg: PgBackgroundResource) -> None:
    with pytest.raises(PgBackgroundFailure, match="a column that is no boolean: total") as caught:
        pg.check(None, "select true, count(*) as total from generate_series(1, 3)", expect="true")
    assert caught.value.sqlstate == "22P02"


@pytest.mark.parametrize("expect", ["no_rows", "true"])
def test_a_role_that_may_do_nothing_but_read(database: Database, sql: psycopg.Connection[Any], expect: Any) -> None:
    sql.execute("drop role if exists dagster_reader")
    sql.execute("create role dagster_reader login in role pgbackground_role")
    try:
        sql.execute("create table t as select true as holds")
        sql.execute(f'revoke temporary on database "{sql.info.dbname}" from public'.encode())
        sql.execute("grant select on t to dagster_reader")
        pg = PgBackgroundResource(conninfo=database.conninfo_as("dagster_reader"))

        found = pg.check(None, "select * from t", expect=expect)

        assert found.passed is (expect == "true")
    finally:
        sql.execute("drop owned by dagster_reader; drop role dagster_reader")


def test_resource_in_a_check_of_ones_own(pg: PgBackgroundResource) -> None:
    @asset
    def checked() -> None: ...

    @asset_check(asset=checked)
    def holds(context: AssetCheckExecutionContext, pg: PgBackgroundResource) -> AssetCheckResult:
        return pg.check(context, "select 1 where %s", parameters=[True])

    run = materialize([checked, holds], resources={"pg": pg})
    (check,) = run.get_asset_check_evaluations()
    assert not check.passed
    assert violations(check) == 1
