"""Rows of a job in a step: as they are, as a frame, in the metadata, and handed on."""

from decimal import Decimal
from typing import Any

import psycopg
import pytest
from dagster import AssetExecutionContext, DagsterInstance, MaterializeResult, RetryPolicy, asset, materialize

from dagster_resource import PgBackgroundFailure, PgBackgroundResource
from dagster_resource.steps.preview import as_markdown
from pgbg_orchestration import Rows
from pgbg_orchestration.rows import Column, NoRows

pytestmark = [pytest.mark.servers("real"), pytest.mark.filterwarnings("ignore:.*currently in (beta|preview).*")]

QUERY = """
    select n, 1.5::numeric(10, 2) as price, case n when 2 then null else 'a|b' end as text
    from generate_series(1, 3) as n
"""


def test_rows_as_psycopg_gives_them(pg: PgBackgroundResource) -> None:
    rows = pg.fetch(None, "select %s::numeric as n, null as nothing", parameters=[Decimal("12345678901234567.89")])

    assert list(rows) == [(Decimal("12345678901234567.89"), None)]
    assert [column.name for column in rows.columns] == ["n", "nothing"]


def test_rows_as_dicts(pg: PgBackgroundResource) -> None:
    assert pg.fetch(None, "select 1 as a, 'x' as b", form="dicts") == [{"a": 1, "b": "x"}]


@pytest.mark.parametrize(("form", "package"), [("pandas", "pandas"), ("arrow", "pyarrow"), ("polars", "polars")])
def test_a_frame_is_handed_on(pg: PgBackgroundResource, instance: DagsterInstance, form: Any, package: str) -> None:
    pytest.importorskip(package)

    @asset
    def numbers(context: AssetExecutionContext, pg: PgBackgroundResource) -> Any:
        return pg.fetch(context, "select n from generate_series(1, 5) as n", form=form)

    @asset
    def length(numbers: Any) -> int:
        return len(numbers)

    run = materialize([numbers, length], resources={"pg": pg}, instance=instance)
    assert run.output_for_node("length") == 5


def test_a_preview_in_the_metadata(pg: PgBackgroundResource) -> None:
    @asset
    def shown(context: AssetExecutionContext, pg: PgBackgroundResource) -> int:
        return len(pg.fetch(context, QUERY, preview=2))

    run = materialize([shown], resources={"pg": pg})
    (made,) = run.asset_materializations_for_node("shown")
    assert made.metadata["dagster/row_count"].value == 3
    schema: Any = made.metadata["dagster/column_schema"].value
    columns = [(column.name, column.type) for column in schema.columns]
    assert columns == [("n", "integer"), ("price", "numeric(10,2)"), ("text", "text")]
    lines = str(made.metadata["pgbg/preview"].value).splitlines()
    assert lines[0] == "| n | price | text |"
    assert lines[2:4] == ["| 1 | 1.50 | a&#124;b |", "| 2 | 1.50 | *NULL* |"]
    assert lines[-1] == "… 1 more rows"


def test_a_preview_in_a_materialize_result(pg: PgBackgroundResource) -> None:
    @asset
    def shown(context: AssetExecutionContext, pg: PgBackgroundResource) -> MaterializeResult[None]:
        text = "create table t as select 7 as n; select * from t, generate_series(1, 2)"
        return pg.run(context, text, fetch=True).to_materialize_result(preview=5)

    run = materialize([shown], resources={"pg": pg})
    (made,) = run.asset_materializations_for_node("shown")
    assert made.metadata["dagster/row_count"].value == 2


def test_a_retry_reads_the_same_rows_and_runs_nothing_again(
    pg: PgBackgroundResource, sql: psycopg.Connection[Any]
) -> None:
    sql.execute("create table effect (n serial)")
    seen: list[Any] = []

    @asset(retry_policy=RetryPolicy(max_retries=1))
    def tried_again(context: AssetExecutionContext, pg: PgBackgroundResource) -> None:
        seen.append(list(pg.fetch(context, "insert into effect default values returning n")))
        if len(seen) == 1:
            raise ValueError("the step dies after its job")

    assert materialize([tried_again], resources={"pg": pg}).success
    assert seen == [[(1,)], [(1,)]]
    assert sql.execute("select count(*) from effect").fetchone() == (1,)


def test_more_rows_than_the_bound_fail_before_the_commit(
    pg: PgBackgroundResource, sql: psycopg.Connection[Any]
) -> None:
    sql.execute("create table effect (n int)")
    with pytest.raises(PgBackgroundFailure) as caught:
        pg.fetch(None, "insert into effect select generate_series(1, 4) returning n", fetch={"max_rows": 3})
    assert caught.value.sqlstate == "PB005"
    assert sql.execute("select count(*) from effect").fetchone() == (0,)


def test_what_gives_no_rows(pg: PgBackgroundResource) -> None:
    with pytest.raises(NoRows):
        pg.fetch(None, "create table t (n int)")


def test_a_form_that_is_not_known(pg: PgBackgroundResource) -> None:
    with pytest.raises(ValueError, match="form must be one of rows, dicts"):
        pg.fetch(None, "select 1", form="table")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("cells", "line"),
    [
        (("a\nb",), "| a<br>b |"),
        (("x" * 101,), f"| {'x' * 100}… |"),
        (("<b>`|\\*_",), "| &#60;b&#62;&#96;&#124;&#92;&#42;&#95; |"),
        ((None,), "| *NULL* |"),
    ],
)
def test_values_cannot_break_the_table(cells: tuple[str | None, ...], line: str) -> None:
    rows = Rows((Column("c", 25, -1, "text"),), (cells,), 1, "SELECT", 1)

    assert as_markdown(rows, 1).splitlines()[2] == line
