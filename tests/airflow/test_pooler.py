"""Connections that lead to a pooler: Debian's pgbouncer, in session mode, in transaction mode, and gone past."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from airflow.sdk import Connection
from psycopg.conninfo import conninfo_to_dict

from airflow_provider.hook import ENDPOINT_EXTRA, PgBackgroundHook
from airflow_provider.triggers import PgBackgroundTrigger
from pgbg_orchestration import Job, errors
from tests.conftest import Database
from tests.kit import pgbouncer

pytestmark = [
    pytest.mark.airflow,
    pytest.mark.servers("real", "embedded"),
    pytest.mark.usefixtures("no_worker_left"),
    pytest.mark.skipif(pgbouncer.program() is None, reason="pgbouncer is not installed (apt-get install pgbouncer)"),
]


@pytest.fixture(autouse=True)
def _table(database: Database) -> None:
    with database.connect() as admin:
        admin.execute("create table effect (what text)")


@pytest.fixture
def session_mode(database: Database) -> Iterator[str]:
    """A connection string through a pooler in session mode."""
    with pgbouncer.pooler(database.conninfo, "session") as conninfo:
        yield conninfo


@pytest.fixture
def transaction_mode(database: Database) -> Iterator[str]:
    """A connection string through a pooler in transaction mode."""
    with pgbouncer.pooler(database.conninfo, "transaction") as conninfo:
        yield conninfo


def _connect(monkeypatch: pytest.MonkeyPatch, conninfo: str, **extra: str) -> None:
    """Make this Airflow's ``postgres_default``."""
    given: dict[str, Any] = conninfo_to_dict(conninfo)
    connection = Connection(
        conn_id="postgres_default",
        conn_type="postgres",
        host=given["host"],
        port=int(given["port"]),
        login=given["user"],
        password=given.get("password"),
        schema=given["dbname"],
        extra=json.dumps(extra),
    )
    monkeypatch.setattr(PgBackgroundHook, "get_connection", lambda *_: connection)
    monkeypatch.setattr("airflow_provider.triggers.login._conninfos", {})
    monkeypatch.setattr("airflow_provider.triggers.task.RESUME_SECONDS", 0.0)


def _endpoint(database: Database) -> str:
    given = conninfo_to_dict(database.conninfo)
    return f"{given['host']}:{given['port']}"


async def _event(job_id: str, **options: Any) -> dict[str, Any]:
    job = {"id": job_id, "series": job_id, "generation": 1, "label": job_id, "sql": "insert into effect values ('x')"}
    (event,) = [event.payload async for event in PgBackgroundTrigger(job=job, **options).run()]
    told: dict[str, Any] = event
    return told


def _effects(database: Database) -> int:
    with database.connect() as admin:
        row = admin.execute("select count(*) from effect").fetchone()
    assert row is not None
    return int(row[0])


async def test_session_mode_works(database: Database, session_mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _connect(monkeypatch, session_mode)

    assert (await _event("one"))["status"] == "committed"
    assert _effects(database) == 1


async def test_transaction_mode_is_refused_and_nothing_is_launched(
    database: Database, transaction_mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _connect(monkeypatch, transaction_mode)

    event = await _event("one")

    assert event["error"] == "PoolerInTransactionMode"
    assert "pooler in transaction mode" in event["message"]
    with database.connect() as admin:
        assert admin.execute("select count(*) from pgbg.jobs").fetchone() == (0,)
    assert _effects(database) == 0


def test_the_connections_own_test_says_so_too(transaction_mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _connect(monkeypatch, transaction_mode)

    works, why = PgBackgroundHook().test_connection()

    assert not works
    assert "transaction mode" in why


@pytest.mark.parametrize("where", ["argument", "extra"])
async def test_jobs_go_past_the_pooler_to_the_server_itself(
    database: Database, transaction_mode: str, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    given = {"endpoint": _endpoint(database)} if where == "argument" else {}
    _connect(monkeypatch, transaction_mode, **({} if given else {ENDPOINT_EXTRA: _endpoint(database)}))

    assert (await _event("one", **given))["status"] == "committed"
    assert _effects(database) == 1


def test_a_waiting_tasks_own_session_is_refused_as_well(transaction_mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _connect(monkeypatch, transaction_mode)

    with pytest.raises(errors.PoolerInTransactionMode):
        PgBackgroundHook().run(Job("insert into effect values ('x')", id="one"))
