"""The same work as assets of Dagster: over psycopg, with a thread for each query, and over ours."""

# Not postponed: Dagster reads the annotations of functions inside of functions.

from concurrent.futures import ThreadPoolExecutor

import psycopg
from dagster import AssetExecutionContext, AssetsDefinition, asset

from dagster_resource import PgBackgroundResource

SECOND = "select pg_sleep(1)"


def _texts(way: str, rows: int) -> tuple[str, dict[str, str], str]:
    facts = (
        f"create table {way}_facts as select n, n % 100 as carrier, n % 12 as month, n % 97 as delay"
        f" from generate_series(1, {rows}) as n"
    )
    aggregates = {
        column: f"create table {way}_by_{column} as"
        f" select {column}, avg(delay) as delay from {way}_facts group by {column}"
        for column in ("carrier", "month")
    }
    return facts, aggregates, f"create index on {way}_facts (carrier, month)"


def with_psycopg(conninfo: str, queries: int, rows: int) -> list[AssetsDefinition]:
    """Return the ETL, and the queries behind it."""
    facts, aggregates, index = _texts("dagster_psycopg", rows)

    def run(sql: str) -> None:
        with psycopg.connect(conninfo, autocommit=True) as conn:
            conn.execute(sql.encode())

    @asset
    def psycopg_etl() -> None:
        run(facts)
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(run, aggregates.values()))
        run(index)

    @asset(deps=[psycopg_etl])
    def psycopg_queries() -> None:
        with ThreadPoolExecutor(min(queries, 100)) as pool:  # a server has connections for so many
            list(pool.map(run, [SECOND] * queries))

    return [psycopg_etl, psycopg_queries]


def with_ours(queries: int, rows: int) -> list[AssetsDefinition]:
    """Return the same over ours."""
    facts, aggregates, index = _texts("dagster_ours", rows)

    @asset
    def pgbg_etl(context: AssetExecutionContext, pg: PgBackgroundResource) -> None:
        pg.run(context, facts, name="facts")
        pg.run_many(context, aggregates)
        pg.run(context, index, name="index")

    @asset(deps=[pgbg_etl])
    def pgbg_queries(context: AssetExecutionContext, pg: PgBackgroundResource) -> None:
        pg.run_many(context, {f"query_{number}": SECOND for number in range(queries)}, max_running=100)

    return [pgbg_etl, pgbg_queries]
