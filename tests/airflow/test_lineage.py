"""OpenLineage facets, by OpenLineage's own provider: the tables that a job reads and writes."""

from __future__ import annotations

from typing import Any

import pytest

from airflow_provider import PgBackgroundBatchOperator, PgBackgroundOperator
from demo.airflow_processes import connection_json
from tests.conftest import Database

pytestmark = [pytest.mark.airflow, pytest.mark.servers("real", "embedded")]


@pytest.fixture(autouse=True)
def where(database: Database, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where the tables are, in OpenLineage's words: Airflow's connection leads to the test's database."""
    monkeypatch.setenv("AIRFLOW_CONN_POSTGRES_DEFAULT", connection_json(database.conninfo))
    with database.connect() as admin:
        admin.execute("create schema archive")
        admin.execute("create table archive.sales (id int, amount numeric)")
        for table in ("sales", "region", "totals"):
            admin.execute(f"create table {table} (id int, amount numeric)".encode())
    return database.name


def _tables(datasets: list[Any], database: str) -> set[str]:
    assert all(dataset.namespace.startswith("postgres://") for dataset in datasets)
    assert all(dataset.name.startswith(f"{database}.") for dataset in datasets)
    return {dataset.name.removeprefix(f"{database}.") for dataset in datasets}


@pytest.mark.parametrize("moment", ["start", "complete"])
def test_the_tables_of_all_statements(where: str, moment: str) -> None:
    operator = PgBackgroundOperator(
        task_id="t",
        sql="insert into archive.sales select s.id, s.amount from sales s join region r using (id);"
        " update totals set amount = amount + 1",
    )
    told: Any = (
        operator.get_openlineage_facets_on_start()
        if moment == "start"
        else operator.get_openlineage_facets_on_complete(None)
    )

    assert _tables(told.inputs, where) >= {"public.sales", "public.region"}
    assert _tables(told.outputs, where) == {"archive.sales", "public.totals"}
    assert "archive.sales" in told.job_facets["sql"].query


def test_the_tables_of_a_batch(where: str) -> None:
    jobs: Any = {"a": "insert into totals select * from sales", "b": {"sql": ["delete from region"]}}
    told: Any = PgBackgroundBatchOperator(task_id="t", jobs=jobs).get_openlineage_facets_on_start()

    assert "public.sales" in _tables(told.inputs, where)
    assert _tables(told.outputs, where) == {"public.totals", "public.region"}
