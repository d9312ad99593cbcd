"""Every Dagster example runs, on the flights themselves."""

from __future__ import annotations

import codecs
import importlib
import shutil
from pathlib import Path
from typing import Any

import psycopg
import pytest
from dagster import AssetKey, DagsterInstance, Definitions, build_sensor_context, materialize

from demo import data
from tests.conftest import Database

EXAMPLES = Path(__file__).resolve().parents[2] / "example_dags"
RANGE = {"dagster/asset_partition_range_start": "2013-01-01", "dagster/asset_partition_range_end": "2013-12-01"}
RUN_HERE = {"dagster_flights.py", "dagster_flights_component"}

pytestmark = [pytest.mark.real, pytest.mark.filterwarnings("ignore:.*currently in (beta|preview).*")]


def test_no_example_is_left_out() -> None:
    assert {path.name for path in EXAMPLES.glob("dagster_*")} == RUN_HERE


@pytest.fixture
def flights(database: Database, monkeypatch: pytest.MonkeyPatch) -> Database:
    try:
        data.load(database.conninfo)
    except data.DataMissing as error:
        pytest.skip(str(error))
    monkeypatch.setenv("FLIGHTS_CONNINFO", database.conninfo)
    return database


def resources(definitions: Definitions) -> dict[str, Any]:
    return dict(definitions.resources or {})


def test_flights(flights: Database, instance: DagsterInstance, sql: psycopg.Connection[Any]) -> None:
    example = importlib.import_module("example_dags.dagster_flights")

    given = resources(example.defs)
    checks = [example.facts_have_an_airport, example.facts_are_plausible]
    materialize([example.warehouse], resources=given, instance=instance)
    run = materialize([example.facts, *checks], resources=given, instance=instance, tags=RANGE)
    assert len(run.asset_materializations_for_node("facts")) == 12
    assert [check.passed for check in run.get_asset_check_evaluations()] == [True, True]
    flown = sql.execute("select count(*) from nycflights13.flights").fetchone()
    assert sql.execute("select count(*) from warehouse.facts").fetchone() == flown

    again = materialize([example.facts], resources=given, instance=instance, partition_key="2013-02-01")
    month = again.asset_materializations_for_node("facts")[0].metadata["dagster/partition_row_count"].value
    assert month == 24951
    assert sql.execute("select count(*) from warehouse.facts").fetchone() == flown

    delays = materialize([example.delays], resources=given, instance=instance)
    (made,) = delays.asset_materializations_for_node("delays")
    assert {name: value.value for name, value in made.metadata.items()} == {"carriers": 16, "origins": 3, "dests": 105}

    assert example.maintenance.execute_in_process(resources=given, instance=instance).success
    vacuumed = "select vacuum_count + autovacuum_count > 0 from pg_stat_user_tables where relname = 'facts'"
    assert sql.execute(vacuumed).fetchone() == (True,)


def test_report_that_nobody_waits_for(
    flights: Database, instance: DagsterInstance, sql: psycopg.Connection[Any]
) -> None:
    example = importlib.import_module("example_dags.dagster_flights")

    given = resources(example.defs)
    materialize([example.warehouse], resources=given, instance=instance)
    assert example.order_report.execute_in_process(resources=given, instance=instance).success
    # Whoever waits for the job by its id sees its end; only then is there something for the sensor to report.
    (job_id,) = sql.execute("select job_id from pgbg.jobs where job_id like '%/external/%'").fetchone() or ("",)
    _wait(sql, job_id)
    sensor = next(one for one in example.defs.sensors or [] if one.name == "pg_background_sensor")
    with build_sensor_context(instance=instance, resources=given) as context:
        result = sensor(context)
    materialized = [event for event in result.asset_events if type(event).__name__ == "AssetMaterialization"]
    assert [event.asset_key for event in materialized] == [AssetKey("yearly_report")]


def _wait(sql: psycopg.Connection[Any], job_id: str) -> None:
    for _ in range(600):
        row = sql.execute("select state from pgbg.jobs where job_id = %s", (job_id,)).fetchone()
        if row and row[0] not in ("running", "waiting"):
            return
        sql.execute("select pg_sleep(0.05)")
    raise TimeoutError(job_id)


def test_component(flights: Database, instance: DagsterInstance, sql: psycopg.Connection[Any]) -> None:
    from dagster.components.testing import create_defs_folder_sandbox

    from dagster_resource import PgBackgroundResource, PgBackgroundSqlComponent

    given = {"pg": PgBackgroundResource(conninfo=flights.conninfo)}
    with create_defs_folder_sandbox() as sandbox:
        folder = sandbox.defs_folder_path / "flights"
        shutil.copytree(EXAMPLES / "dagster_flights_component", folder)
        file = folder / "carriers_by_month.sql"
        file.write_bytes(codecs.BOM_UTF8 + file.read_bytes())  # as some editors begin a file
        with sandbox.load_component_and_build_defs(defs_path=folder) as (component, definitions):
            assert isinstance(component, PgBackgroundSqlComponent)
            merged = Definitions.merge(definitions, Definitions(resources=given))
            graph = merged.resolve_asset_graph()
            assert {key.to_user_string() for key in graph.get_all_asset_keys()} == {
                "carriers_by_month",
                "busiest_carrier",
            }
            job = merged.resolve_implicit_global_asset_job_def()
            months, best = AssetKey("carriers_by_month"), AssetKey("busiest_carrier")
            loaded = job.execute_in_process(instance=instance, asset_selection=[months], tags=RANGE)
            assert len(loaded.asset_materializations_for_node("carriers_by_month")) == 12
            made = job.execute_in_process(instance=instance, asset_selection=[best])
    checked = [*loaded.get_asset_check_evaluations(), *made.get_asset_check_evaluations()]
    assert sorted((check.check_name, check.passed) for check in checked) == [
        ("every_carrier_has_a_name", True),
        ("there_is_one", True),
    ]
    assert sql.execute("select name from reports.busiest_carrier").fetchone() == ("United Air Lines Inc.",)
