"""OpenLineage facets, by OpenLineage's own provider: the tables that a job reads and writes."""

from __future__ import annotations

from typing import Any

import pytest
from airflow.sdk.exceptions import TaskDeferred

from airflow_provider import PgBackgroundBatchOperator, PgBackgroundOperator
from airflow_provider.lineage import readable
from airflow_provider.operators.decorated import PgBackgroundDecoratedOperator
from airflow_provider.triggers import PgBackgroundTrigger
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
        for table in ("sales", "region", "totals", "made"):
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


NOWHERE: Any = {"ti": None}
KNOWN: list[tuple[str | list[str], set[str], set[str]]] = [
    ("create table made as select * from sales", {"public.sales"}, {"public.made"}),
    (
        "merge into totals using sales on sales.id = totals.id when matched then update set amount = sales.amount",
        {"public.sales"},
        {"public.totals"},
    ),
    (
        ("with q as (select * from sales), r as not materialized (select * from q join region using (id))"
        " insert into totals select * from r"),
        {"public.sales", "public.region"},
        {"public.totals"},
    ),
    (
        "insert into totals with sales as (select * from sales) select * from sales",
        {"public.sales"},
        {"public.totals"},
    ),
    (
        ("with recursive t (id) as (select id from region union all select id + 1 from t), d as (delete from sales"
        " returning id) update totals set amount = 1 from t, d where totals.id = t.id"),
        {"public.region"},
        {"public.sales", "public.totals"},
    ),
    (
        ("insert into totals select * from sales; vacuum analyze totals; refresh materialized view v;"
        " do $$ begin null; end $$; call p(); update region set amount = 2"),
        {"public.sales"},
        {"public.totals", "public.region"},
    ),
    (["insert into totals select * from sales where id = E'a\\';b'", "delete from region"], {"public.sales"},
     {"public.totals", "public.region"}),
    ("reindex table sales", set(), set()),
    ("select 'not closed", set(), set()),
]  # fmt: skip


@pytest.mark.parametrize(("sql", "inputs", "outputs"), KNOWN)
def test_what_is_read_and_written(where: str, sql: str | list[str], inputs: set[str], outputs: set[str]) -> None:
    told: Any = PgBackgroundOperator(task_id="t", sql=sql).get_openlineage_facets_on_start()

    assert _tables(told.inputs, where) == inputs
    assert _tables(told.outputs, where) == outputs


def test_placeholders_hide_no_table_and_no_value_is_told(where: str) -> None:
    sql = "insert into totals select * from sales where id in (%(a)s, %(b)s) and amount % 2 = 0".replace("% 2", "%% 2")
    operator = PgBackgroundOperator(task_id="t", sql=sql, parameters={"a": "secret", "b": 2})
    told: Any = operator.get_openlineage_facets_on_complete(None)

    assert (_tables(told.inputs, where), _tables(told.outputs, where)) == ({"public.sales"}, {"public.totals"})
    assert told.job_facets["sql"].query == sql
    assert "secret" not in str(told)


def test_a_statement_that_the_parser_does_not_know_is_named(where: str) -> None:
    told: Any = PgBackgroundOperator(
        task_id="t", sql="vacuum analyze totals; insert into totals select * from sales"
    ).get_openlineage_facets_on_start()

    assert [error.task for error in told.run_facets["extractionError"].errors] == ["vacuum analyze totals"]
    assert _tables(told.outputs, where) == {"public.totals"}


def _decorated(returned: Any, **more: Any) -> PgBackgroundDecoratedOperator:
    return PgBackgroundDecoratedOperator(
        task_id="t", python_callable=lambda: returned, op_args=[], op_kwargs={}, **more
    )


@pytest.mark.parametrize("returned", ["delete from sales", ("delete from sales where id = %s", [1])])
def test_a_decorated_task_tells_what_its_function_returned(
    where: str, returned: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    operator = _decorated(returned)
    started: Any = operator.get_openlineage_facets_on_start()
    assert (started.inputs, started.outputs) == ([], []), "its function was not called yet"

    monkeypatch.setattr(PgBackgroundOperator, "execute", lambda *_: None)
    operator.execute(NOWHERE)

    told: Any = operator.get_openlineage_facets_on_complete(None)
    assert _tables(told.outputs, where) == {"public.sales"}


@pytest.mark.parametrize("listened", [True, False])
@pytest.mark.parametrize("returned", ["delete from sales", ("delete from sales where id = %s", [1])])
def test_a_deferred_decorated_task_tells_it_in_another_process(
    where: str, returned: Any, monkeypatch: pytest.MonkeyPatch, listened: bool
) -> None:
    monkeypatch.setattr("airflow_provider.operators.decorated.is_listened_to", lambda: listened)
    monkeypatch.setattr(PgBackgroundOperator, "execute", _defer_to_a_trigger)
    with pytest.raises(TaskDeferred) as deferred:
        _decorated(returned, deferrable=True).execute(NOWHERE)
    kept = deferred.value.kwargs or {}
    assert bool(kept) is listened

    resumed = _decorated(pytest.fail, deferrable=True)
    event = {"status": "committed", "job_id": "j", "label": "l", "launched": True, "proof": "receipt"}
    event |= dict.fromkeys(("row_count", "command_tag", "started_at", "finished_at", "worker_pid", "attempt"))
    resumed.execute_complete({}, event, **kept)

    told: Any = resumed.get_openlineage_facets_on_complete(None)
    assert _tables(told.outputs, where) == ({"public.sales"} if listened else set())


def _defer_to_a_trigger(operator: PgBackgroundOperator, context: Any) -> Any:
    job = {"id": "j", "sql": operator.sql, "label": "l"}
    return operator._wait_for(context, PgBackgroundTrigger(job=job, deadline=None, **operator._trigger_arguments()))


def test_a_mapped_and_a_started_task_are_like_any_other(where: str) -> None:
    operator = PgBackgroundOperator(task_id="t", sql="delete from sales", start_from_trigger=True)
    told: Any = operator.get_openlineage_facets_on_complete(None)
    assert _tables(told.outputs, where) == {"public.sales"}


def test_what_the_parser_is_given() -> None:
    assert readable(["select %s; select 1"], has_parameters=True) == ["select null", "select 1"]
    assert readable(["select '%s'"], has_parameters=False) == ["select '%s'"]
