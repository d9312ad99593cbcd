"""The page's server: what it tells, what it refuses, and what it lets nobody do unasked."""

from __future__ import annotations

import asyncio
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.testclient import TestClient

from pgbg_orchestration import Job, Launcher, errors, run
from pgbg_orchestration.ledger.history import JobEntry
from pgbg_orchestration.view.source import ServerSource
from pgbg_orchestration.view.timeline import file_of
from pgbg_orchestration.view.web.app import ASKED, build_app
from tests.core.kit import Watched, effect, within

pytestmark = pytest.mark.servers("real")
LOCAL = ("localhost", "127.0.0.1")


def app_for(db: Watched, **options: object) -> Starlette:
    @asynccontextmanager
    async def source() -> AsyncIterator[ServerSource]:
        async with Launcher(db.conninfo) as launcher:
            yield ServerSource(launcher)

    return build_app(source, **options)  # type: ignore[arg-type]


@pytest.fixture
def client(db: Watched) -> Iterator[TestClient]:
    """A browser at a page that may be read only."""
    with TestClient(app_for(db, hosts=LOCAL), base_url="http://localhost") as made:
        yield made


async def allow(_: Request, __: JobEntry) -> None:
    """Let anybody cancel."""


async def refuse(_: Request) -> None:
    raise HTTPException(401, "log in first")


def test_the_page_and_its_files(client: TestClient) -> None:
    page = client.get("/")

    assert page.status_code == 200
    for name in re.findall(r'(?:src|href)="(static/[^"]+)"', page.text):
        assert client.get(f"/{name}").status_code == 200
    assert client.get("/static/app.py").status_code == 404
    assert client.get("/static/..%2Fapp.py").status_code == 404


@pytest.mark.parametrize("path", ["/", "/static/pgbg.js", "/api/board", "/api/timeline", "/api/job", "/nothing"])
def test_every_answer_keeps_other_sites_out(client: TestClient, path: str) -> None:
    answer = client.get(path)

    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert "script-src 'self';" in answer.headers["content-security-policy"]
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert client.get(path, headers={"host": "rebound.example.com"}).status_code == 400


def test_what_it_tells_of_jobs(db: Watched, client: TestClient) -> None:
    job = Job(
        "insert into effects (job, n) values (%(job)s, 1)",
        id="j/1",
        label="<b>facts</b>",
        series="airflow:flights/r/load/-1",
        generation=1,
        parameters={"job": "secret value"},
    )
    run(db.conninfo, job)

    board = client.get("/api/board").json()
    timeline = client.get("/api/timeline?hours=1").json()
    found = client.get("/api/job", params={"owner": "pgbg_app", "id": "j/1"}).json()
    assert 'pgbg_recent_jobs{label_prefix="<b>facts<",state="committed"} 1.0' in client.get("/metrics").text

    assert [(line["label"], line["state"], line["rows"]) for line in board["lines"]] == [
        ("<b>facts</b>", "committed", 1)
    ]
    assert board["may_cancel"] is False
    assert [job["job_id"] for job in timeline["jobs"]] == ["j/1"]
    assert found["wanted_by"] == "Airflow flights.load"
    facts = dict(map(tuple, found["facts"]))
    assert facts["command tag"] == "INSERT"
    assert facts["label so far"] == "1 job: 1 committed, 0 failed, 0 cancelled"
    assert "secret value" not in f"{board} {timeline} {found}"
    assert client.get("/api/job", params={"owner": "pgbg_app", "id": "none"}).status_code == 404
    assert client.get("/api/job", params={"owner": "postgres", "id": "j/1"}).status_code == 404
    # A link from outside knows the id alone.
    assert client.get("/api/job", params={"owner": "", "id": "j/1"}).json()["owner"] == "pgbg_app"


async def shown(_: Request, __: JobEntry) -> bool:
    return True


def test_a_jobs_page_tells_its_sql_and_its_rows_to_whom_it_may(db: Watched) -> None:
    text = "insert into effects (job) values (%(job)s), ('b') returning job, null as nothing"
    job = Job(text, id="j", parameters={"job": "secret value"}, fetch=True)
    with pytest.raises(errors.WorkerError):
        run(db.conninfo, Job("select 1/0", id="j"))
    run(db.conninfo, job, accept_changed_sql=True)
    found = {}
    for name, guards in {
        "nobody": {},
        "sql": {"may_see_sql": shown},
        "rows": {"may_see_rows": shown},
    }.items():
        with TestClient(app_for(db, **guards)) as client:
            found[name] = client.get("/api/job", params={"owner": "pgbg_app", "id": "j"}).json()

    assert [page["sql"] for page in found.values()] == [None, text, None]
    assert found["nobody"]["sql_note"] == "Its SQL is not shown to you here."
    assert [page["kept"][0]["rows"] for page in found.values()] == [2, 2, 2]
    assert [page["kept"][0]["first"] for page in found.values()] == [[], [], [["secret value", None], ["b", None]]]
    assert found["rows"]["kept"][0]["columns"] == ["job", "nothing"]
    assert "secret value" not in f"{found['nobody']} {found['sql']}"
    for page in found.values():
        assert [(one["number"], one["how"].partition(":")[0]) for one in page["tries"]] == [
            (1, "✗ failed"),
            (2, "✓ committed"),
        ]


def test_what_a_worker_runs_is_never_told(db: Watched) -> None:
    """Its text has the values of parameters in it."""
    job = Job("select pg_sleep(120) where %(what)s <> ''", id="j", parameters={"what": "secret value"})

    async def while_it_runs() -> Any:
        async with Launcher(db.conninfo) as launcher:
            running = asyncio.create_task(launcher.run(job))
            await db.at_work("j")
            with TestClient(app_for(db, may_see_sql=shown)) as client:
                page = await asyncio.to_thread(client.get, "/api/job", params={"owner": "pgbg_app", "id": "j"})
            running.cancel()
            await asyncio.wait({running})
            return page.json()

    page = asyncio.run(while_it_runs())
    assert page["state"] == "running"
    assert page["sql"] == job.sql
    assert "secret value" not in str(page)


def test_sql_that_is_not_kept_is_called_so(db: Watched) -> None:
    run(db.conninfo, Job("select 1", id="j", redact_details=True))
    with TestClient(app_for(db, may_see_sql=shown)) as client:
        page = client.get("/api/job", params={"owner": "pgbg_app", "id": "j"}).json()
        assert page["sql"] is None
        assert "is not kept" in page["sql_note"]
        db.sql("revoke execute on function pgbg.job_detail from pgbackground_role")
        page = client.get("/api/job", params={"owner": "pgbg_app", "id": "j"}).json()
        assert "GRANT EXECUTE" in page["sql_note"]
        assert [one["number"] for one in page["tries"]] == [1]


@pytest.mark.parametrize("hours", ["0", "-1", "nan", "inf", "x", "1e9"])
def test_times_that_make_no_sense(client: TestClient, hours: str) -> None:
    assert client.get("/api/timeline", params={"hours": hours}).status_code == 400


def test_read_only_unless_started_otherwise(client: TestClient) -> None:
    answer = client.post("/api/cancel", json={"owner": "pgbg_app", "job_id": "j"}, headers={ASKED: "cancel"})

    assert answer.status_code == 403
    assert "read-only" in answer.json()["error"]


def test_whoever_may_not_see_gets_nothing(db: Watched) -> None:
    with TestClient(app_for(db, may_see=refuse, may_cancel=allow)) as client:
        for path in ("/", "/static/pgbg.js", "/api/board", "/api/timeline", "/metrics", "/api/job?owner=pgbg_app&id=j"):
            assert client.get(path).status_code == 401, path
        assert client.post("/api/cancel", json={}, headers={ASKED: "cancel"}).status_code == 401


async def test_cancelling(db: Watched) -> None:
    async with Launcher(db.conninfo) as launcher:
        running = asyncio.create_task(launcher.run(Job("select pg_sleep(120)", id="j")))
        await db.at_work("j")
        wanted = {"owner": "pgbg_app", "job_id": "j"}

        def ask() -> list[int]:
            with TestClient(app_for(db, may_cancel=allow)) as client:
                assert client.get("/api/board").json()["may_cancel"] is True
                codes = [
                    # A form of another site can send neither the header nor this content type.
                    client.post("/api/cancel", json=wanted).status_code,
                    client.get("/api/cancel").status_code,
                    client.post("/api/cancel", json=["j"], headers={ASKED: "cancel"}).status_code,
                    client.post(
                        "/api/cancel", json={**wanted, "job_id": "none"}, headers={ASKED: "cancel"}
                    ).status_code,
                ]
                assert db.workers()
                answer = client.post("/api/cancel", json=wanted, headers={ASKED: "cancel"})
                assert answer.json() == {"decided": "cancelled"}
                return codes

        assert await asyncio.to_thread(ask) == [403, 405, 400, 404]
        await asyncio.wait({running})
        assert type(running.exception()).__name__ == "JobCancelled"


async def refuse_to_cancel(_: Request, __: JobEntry) -> None:
    raise HTTPException(403, "not yours")


@pytest.mark.parametrize(("guard", "offered"), [(allow, True), (refuse_to_cancel, False), (None, False)])
async def test_a_button_is_offered_to_whoever_may_cancel(db: Watched, guard: Any, offered: bool) -> None:
    async with Launcher(db.conninfo) as launcher:
        running = asyncio.create_task(launcher.run(Job("select pg_sleep(120)", id="j")))
        await db.at_work("j")

        def look() -> bool:
            with TestClient(app_for(db, may_cancel=guard)) as client:
                told: bool = client.get("/api/job", params={"id": "j"}).json()["can_cancel"]
                return told

        assert await asyncio.to_thread(look) is offered
        assert db.workers(), "to ask cancels nothing"
        running.cancel()
        await asyncio.wait({running})


async def test_the_timeline_as_one_file(db: Watched) -> None:
    async with Launcher(db.conninfo) as launcher:
        await within(launcher.run(Job(effect("j"), id="j", label="</script><script>alert(1)</script>")))
        source = ServerSource(launcher)
        jobs = await source.history(since=None, label=None, limit=10)
        page = file_of(await source.board(), jobs, more=False)

    assert "alert(1)</script>" not in page
    assert re.search(r'\b(?:src|href)="(?!data:|#)', page.split("<script>")[0]) is None
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', page)
    assert policy is not None
    assert "connect-src" not in policy[1]
    assert "default-src 'none'" in policy[1]


def test_the_commands_of_the_page(db: Watched, tmp_path: Path) -> None:
    """What docs/views.md tells to type."""
    run(db.conninfo, Job(effect("j"), id="j", label="facts"))
    pgbg = [sys.executable, "-m", "pgbg_orchestration"]

    drawn = subprocess.run([*pgbg, "timeline", "--since", "7d", "--dsn", db.conninfo], capture_output=True, text=True)
    assert drawn.returncode == 0, drawn.stderr
    assert "facts" in drawn.stdout
    no_terminal = subprocess.run(
        [*pgbg, "top", "--dsn", db.conninfo], capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert no_terminal.returncode == 2
    assert "top needs a terminal" in no_terminal.stderr

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serving = subprocess.Popen([*pgbg, "web", "--port", str(port), "--dsn", db.conninfo], stderr=subprocess.PIPE)
    try:
        until = time.monotonic() + 60
        while (answer := _board(port)) is None:
            assert time.monotonic() < until
            assert serving.poll() is None, serving.communicate()[1]
            time.sleep(0.1)
        assert [line["label"] for line in answer["lines"]] == ["facts"]
        assert answer["may_cancel"] is False
    finally:
        serving.send_signal(signal.SIGINT)
        serving.communicate(timeout=60)


def _board(port: int) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = httpx.get(f"http://127.0.0.1:{port}/api/board", timeout=30).raise_for_status().json()
    except httpx.TransportError:
        return None
    return found


def test_a_server_that_is_away_is_told_at_once() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pgbg_orchestration", "web", "--dsn", "host=/nonexistent dbname=x", "--port", "0"],
        capture_output=True,
        text=True,
        timeout=120,
    )

    assert done.returncode == 8
