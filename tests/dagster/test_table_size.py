"""When the count of a job is the size of a table."""

from typing import Any

import psycopg
import pytest

from dagster_resource import PgBackgroundResource

pytestmark = [pytest.mark.servers("real"), pytest.mark.filterwarnings("ignore:.*currently in (beta|preview).*")]


def count(sql: psycopg.Connection[Any], query: str) -> int:
    (number,) = sql.execute(query.encode()).fetchone() or (0,)
    return int(number)


MERGE = "merge into filled using (values (7)) as new (n) on filled.n = new.n when not matched then insert"


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("create table t as select 1 from generate_series(1, 3)", 3),
        ("select n into t from generate_series(1, 3) as n", 3),
        ("with one as (select 1 as n) select n into t from one", 1),
        ("create materialized view t as select 1 as n", 1),
        ("refresh materialized view filled_view", 2),
        ("create table t (n int); insert into t values (1), (2)", 2),
        ("truncate filled; insert into filled values (1)", 1),
        ("delete from filled; analyze filled; insert into filled values (1)", 1),
        ("create temporary table t as select 1", None),
        ("create table if not exists filled as select 1", None),
        ("insert into filled values (1)", None),
        ("delete from filled where n = 1; insert into filled values (1)", None),
        ("create table t (n int); insert into filled values (1)", None),
        ("create table t as select 1 as n; insert into t values (1)", None),
        (f"{MERGE} values (3)", None),
        (f"{MERGE} values (5); delete from filled where n = 5", None),
        ("copy filled to '/dev/null'", None),
        ("update filled set n = 1", None),
        ("select * from filled", None),
    ],
)
def test_the_size_of_a_table_is_shown_where_the_count_is_that(
    pg: PgBackgroundResource, sql: psycopg.Connection[Any], text: str, size: int | None
) -> None:
    sql.execute("create table filled as select n from generate_series(1, 2) as n")
    sql.execute("create materialized view filled_view as table filled")

    told = pg.run(None, text).metadata()

    assert told.get("dagster/row_count") == size
    if size is not None:
        (table,) = [one for one in ("t", "filled", "filled_view") if f" {one}" in text][:1]
        assert count(sql, f"select count(*) from {table}") == size
