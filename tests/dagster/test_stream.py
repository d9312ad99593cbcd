"""Rows of a job in a step, as they come."""

from typing import Any

import psycopg
import pytest
from dagster import AssetExecutionContext, MaterializeResult, RetryPolicy, asset, materialize

from dagster_resource import PgBackgroundFailure, PgBackgroundResource

pytestmark = [pytest.mark.servers("real"), pytest.mark.filterwarnings("ignore:.*currently in (beta|preview).*")]


def test_rows_and_the_proof_of_the_commit(pg: PgBackgroundResource) -> None:
    seen: list[Any] = []

    @asset
    def streamed(context: AssetExecutionContext, pg: PgBackgroundResource) -> MaterializeResult[None]:
        rows = pg.stream(context, "select g, %s from generate_series(1, 2500) as g", parameters=["é"])
        for row in rows:
            assert rows.outcome is not None
            seen.append(row)
        assert [column.name for column in rows.columns] == ["g", "?column?"]
        assert rows.outcome is not None
        assert (rows.outcome.row_count, rows.outcome.proof) == (2500, "receipt")
        return rows.outcome.to_materialize_result()

    run = materialize([streamed], resources={"pg": pg})
    assert seen == [(n, "é") for n in range(1, 2501)]
    (made,) = run.asset_materializations_for_node("streamed")
    assert "generate_series" in str(made.metadata["pgbg/sql"].value)


@pytest.mark.parametrize("anew", [False, True])
def test_a_retry(pg: PgBackgroundResource, sql: psycopg.Connection[Any], anew: bool) -> None:
    sql.execute("create table effect (n serial)")
    seen: list[Any] = []

    @asset(retry_policy=RetryPolicy(max_retries=1))
    def tried_again(context: AssetExecutionContext, pg: PgBackgroundResource) -> None:
        for row in pg.stream(context, "insert into effect default values returning n", anew=anew):
            seen.append(row)
            if len(seen) == 1:
                raise ValueError("the step dies while it reads")

    run = materialize([tried_again], resources={"pg": pg}, raise_on_error=False)
    assert run.success is anew
    assert seen == [(1,), (2,)][: 2 if anew else 1]
    assert sql.execute("select count(*) from effect").fetchone() == (2 if anew else 1,)


def test_a_job_that_fails(pg: PgBackgroundResource) -> None:
    with pytest.raises(PgBackgroundFailure) as caught:
        list(pg.stream(None, "select 1 / (g - 5) from generate_series(1, 9) as g"))
    assert caught.value.sqlstate == "22012"
