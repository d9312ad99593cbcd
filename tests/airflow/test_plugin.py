"""The page in Airflow: who may see it and cancel there, and that it is really behind Airflow's login."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from pytest_mock import MockerFixture
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.testclient import TestClient

from airflow_provider import plugin
from airflow_provider.link import BackgroundJobLink
from pgbg_orchestration import Job, errors, run
from pgbg_orchestration.ledger.board import Board
from pgbg_orchestration.ledger.history import JobDetail, JobEntry
from pgbg_orchestration.view.web.app import ASKED
from tests.view.test_lines import board, job

from .conftest import Lab

pytestmark = pytest.mark.airflow


class Manager:
    """Airflow's auth manager as seen from outside: it notes what it is asked, and says what it was told to say."""

    def __init__(self, *allowed: str) -> None:
        self.allowed = set(allowed)
        self.asked: list[str] = []

    def is_authorized_connection(self, *, method: str, details: Any, user: Any) -> bool:
        return self._says(f"{user}: {method} connection {details.conn_id}")

    def is_authorized_dag(self, *, method: str, access_entity: Any, details: Any, user: Any) -> bool:
        return self._says(f"{user}: {method} {access_entity.value} {details.id}")

    def _says(self, what: str) -> bool:
        self.asked.append(what)
        return what in self.allowed


def request() -> Request:
    return Request({"type": "http", "method": "GET", "path": "/", "headers": []})


@pytest.fixture
def ask(mocker: MockerFixture) -> Any:
    """Has ann ask a guard of the page."""

    def asked(manager: Manager, guard: str, *more: Any) -> list[str]:
        mocker.patch("airflow.api_fastapi.app.get_auth_manager", return_value=manager)
        mocker.patch("airflow.api_fastapi.core_api.security.get_user", return_value="ann")
        asyncio.run(getattr(plugin.ConnectionPage("warehouse"), guard)(request(), *more))
        return manager.asked

    return asked


def test_whoever_may_see_the_connection_sees_its_jobs(ask: Any) -> None:
    assert ask(Manager("ann: GET connection warehouse"), "may_see") == ["ann: GET connection warehouse"]
    with pytest.raises(HTTPException) as refused:
        ask(Manager("ann: GET connection another"), "may_see")
    assert refused.value.status_code == 403


def test_a_job_of_a_task_is_cancelled_by_whoever_may_edit_its_task_instances(ask: Any) -> None:
    of_task = job("j", series="airflow:flights/r/load/-1")

    assert ask(Manager("ann: PUT TASK_INSTANCE flights"), "may_cancel", of_task) == ["ann: PUT TASK_INSTANCE flights"]
    with pytest.raises(HTTPException):
        ask(Manager("ann: PUT connection warehouse", "ann: GET connection warehouse"), "may_cancel", of_task)


def test_any_other_job_is_cancelled_by_whoever_may_edit_the_connection(ask: Any) -> None:
    assert ask(Manager("ann: PUT connection warehouse"), "may_cancel", job("j")) == ["ann: PUT connection warehouse"]
    with pytest.raises(HTTPException):
        ask(Manager("ann: GET connection warehouse"), "may_cancel", job("j"))


@pytest.mark.parametrize(("guard", "part"), [("may_see_sql", "TASK_INSTANCE"), ("may_see_rows", "XCOM")])
def test_sql_and_rows_are_for_whoever_sees_them_in_airflow(mocker: MockerFixture, guard: str, part: str) -> None:
    """Those of a task's job; of another one, they are for whoever may edit the connection."""
    of_task = job("j", series="airflow:flights/r/load/-1")
    mocker.patch("airflow.api_fastapi.core_api.security.get_user", return_value="ann")
    may = {}
    for right in (f"GET {part} flights", "GET connection warehouse", "PUT connection warehouse"):
        mocker.patch("airflow.api_fastapi.app.get_auth_manager", return_value=Manager(f"ann: {right}"))
        asked = getattr(plugin.ConnectionPage("warehouse"), guard)
        may[right] = [asyncio.run(asked(request(), one)) for one in (of_task, job("k"))]
    assert list(may.values()) == [[True, False], [False, False], [False, True]]


class Stub:
    """A database with one job at work, of an Airflow task."""

    def __init__(self) -> None:
        self.cancelled: list[str] = []
        self.entry = job("j", series="airflow:flights/r/load/-1", running_pid=7)

    async def board(self, *, most_ended: int | None = None) -> Board:
        return board(self.entry)

    async def job(self, owner: str | None, job_id: str) -> JobEntry | None:
        return self.entry

    async def detail(self, job: JobEntry) -> JobDetail | None:
        return JobDetail("select 'the SQL'", (), {})

    async def usual(self, label: str) -> None:
        """Nothing has ended."""

    async def cancel(self, job: JobEntry) -> str:
        self.cancelled.append(job.job_id)
        return "cancelled"


@pytest.mark.parametrize(
    ("rights", "codes", "sql"),
    [
        ((), (403, 403, 403), None),
        (("PUT TASK_INSTANCE flights", "GET TASK_INSTANCE flights"), (403, 403, 403), None),
        (("GET connection warehouse",), (200, 200, 403), None),
        (("GET connection warehouse", "GET TASK_INSTANCE flights"), (200, 200, 403), "select 'the SQL'"),
        (("GET connection warehouse", "PUT connection warehouse"), (200, 200, 403), None),
        (("GET connection warehouse", "PUT TASK_INSTANCE flights"), (200, 200, 200), None),
    ],
)
def test_who_reads_and_who_cancels_over_http(
    mocker: MockerFixture,
    monkeypatch: pytest.MonkeyPatch,
    rights: tuple[str, ...],
    codes: tuple[int, int, int],
    sql: str | None,
) -> None:
    """Whoever may see and not edit sees, and cancels nothing; whoever may not see cancels nothing either."""
    source = Stub()

    @asynccontextmanager
    async def opened(_: object) -> AsyncIterator[Stub]:
        yield source

    monkeypatch.setenv("AIRFLOW__PG_BACKGROUND__WEB_ALLOW_CANCEL", "true")
    mocker.patch.object(plugin.ConnectionPage, "_source", opened)
    manager = Manager(*(f"ann: {right}" for right in rights))
    mocker.patch("airflow.api_fastapi.app.get_auth_manager", return_value=manager)
    mocker.patch("airflow.api_fastapi.core_api.security.get_user", return_value="ann")
    client = TestClient(plugin.ConnectionPage("warehouse"))

    seen = client.get("/api/board")
    page = client.get("/api/job?owner=etl&id=j")
    ended = client.post("/api/cancel", json={"owner": "etl", "job_id": "j"}, headers={ASKED: "cancel"})

    assert (seen.status_code, page.status_code, ended.status_code) == codes
    assert source.cancelled == (["j"] if ended.status_code == 200 else [])
    assert page.json().get("sql") == sql
    assert ("airflow:flights" in seen.text) is (seen.status_code == 200)


def test_there_is_no_page_unless_a_connection_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert plugin.web_conn_ids() == []
    monkeypatch.setenv("AIRFLOW__PG_BACKGROUND__WEB_CONN_IDS", "warehouse, lake ,")

    assert plugin.web_conn_ids() == ["warehouse", "lake"]


def test_the_link_of_a_task_instance(monkeypatch: pytest.MonkeyPatch) -> None:
    operator = SimpleNamespace(postgres_conn_id="warehouse")
    key = SimpleNamespace(dag_id="flights", run_id="r/1", task_id="load", map_index=-1)
    link = BackgroundJobLink()

    assert link.get_link(operator, ti_key=key) == ""  # type: ignore[arg-type]
    monkeypatch.setenv("AIRFLOW__PG_BACKGROUND__WEB_CONN_IDS", "warehouse")
    found = link.get_link(operator, ti_key=key)  # type: ignore[arg-type]
    assert found == "/pg_background/warehouse/#find=airflow%3Aflights%2Fr%2F1%2Fload%2F-1"


def browser(lab: Lab, user: str | None) -> httpx.Client:
    """A browser of somebody who has logged in, or of a stranger."""
    headers = {} if user is None else {"authorization": f"Bearer {lab.processes.token(user, user)}"}
    return httpx.Client(base_url=f"{lab.processes.url}/pg_background/warehouse", headers=headers, timeout=60)


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_page_is_behind_airflows_login(lab: Lab) -> None:
    job = Job("select pg_sleep(600)", id="j", label="on the page", series="airflow:flights/r/load/-1", generation=1)
    paths = ("/", "/static/pgbg.js", "/api/board", "/api/timeline", "/api/job?owner=postgres&id=j")
    wanted = {"owner": "postgres", "job_id": "j"}
    with (
        ThreadPoolExecutor() as pool,
        browser(lab, None) as stranger,
        browser(lab, "vera") as vera,
        browser(lab, "otto") as otto,
    ):
        running = pool.submit(run, lab.warehouse, job)
        until = time.monotonic() + 60
        while not (lines := otto.get("/api/board").raise_for_status().json()["lines"]):
            assert time.monotonic() < until
        assert [(line["label"], line["wanted_by"]) for line in lines] == [("on the page", "Airflow flights.load")]
        assert lines[0]["link"].endswith("/dags/flights/runs/r/tasks/load")

        assert [stranger.get(path).status_code for path in paths] == [401] * len(paths)
        # Vera may look at DAGs, and not at connections.
        assert [vera.get(path).status_code for path in paths] == [403] * len(paths)
        for client, code in ((stranger, 401), (vera, 403)):
            assert client.post("/api/cancel", json=wanted, headers={ASKED: "cancel"}).status_code == code
        assert stranger.get("/api/board", headers={"authorization": "Bearer nonsense"}).status_code == 403

        assert otto.post("/api/cancel", json=wanted, headers={ASKED: "cancel"}).json() == {"decided": "cancelled"}
        with pytest.raises(errors.JobCancelled):
            running.result(60)
    with browser(lab, "ann") as ann:
        plugins = ann.get(f"{lab.processes.url}/api/v2/plugins").raise_for_status().json()["plugins"]
    [ours] = [one for one in plugins if one["name"] == "pg_background"]
    assert [view["href"] for view in ours["external_views"]] == ["/pg_background/warehouse/"]
