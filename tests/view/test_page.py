"""The page in a real browser: what a person sees, clicks and types, and whom the browser talks to."""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import pytest
import uvicorn
from playwright.sync_api import Browser, Page, expect, sync_playwright
from psycopg.conninfo import make_conninfo

from pgbg_orchestration import Job, Launcher, errors, run
from pgbg_orchestration.view.source import ServerSource
from pgbg_orchestration.view.timeline import file_of
from pgbg_orchestration.view.web.app import build_app
from tests.core.kit import GENEROUS, Watched, effect
from tests.view.test_lines import NOW, board
from tests.view.test_lines import job as job_entry

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.servers("real"),
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (Debian's package chromium)"),
]
expect.set_options(timeout=GENEROUS * 1000)  # a busy machine is no fault of the page's
QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
]


@pytest.fixture
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield launched
        launched.close()


@pytest.fixture
def faults() -> list[str]:
    """What the browser complains about, and each request that leaves the page's own server."""
    return []


@pytest.fixture
def page(browser: Browser, faults: list[str]) -> Iterator[Page]:
    opened = browser.new_page(viewport={"width": 1280, "height": 900})
    opened.set_default_timeout(GENEROUS * 1000)
    opened.on("console", lambda message: faults.append(message.text) if message.type in ("error", "warning") else None)
    opened.on("pageerror", lambda error: faults.append(str(error)))
    opened.on("request", lambda request: None if _is_own(request.url) else faults.append(request.url))
    yield opened
    opened.close()


def _is_own(url: str) -> bool:
    return url.startswith(("http://127.0.0.1:", "data:", "file:", "blob:"))


def in_a_thread(db: Watched, job: Job) -> None:
    """Run a job: the browser's driver has an event loop in this thread."""
    with ThreadPoolExecutor() as pool:
        pool.submit(run, db.conninfo, job).result()


class Serving:
    """The page's server in a thread."""

    def __init__(self, conninfo: str) -> None:
        @asynccontextmanager
        async def source() -> AsyncIterator[ServerSource]:
            async with Launcher(conninfo) as launcher:
                yield ServerSource(launcher)

        async def anybody(*_: Any) -> None:
            """Whoever clicks may cancel."""

        async def shown(*_: Any) -> bool:
            return True

        links = {"airflow": "https://airflow.example.com"}
        app = build_app(source, may_cancel=anybody, may_see_sql=shown, may_see_rows=shown, links=links)
        self._server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning"))
        self._thread = threading.Thread(target=self._server.run)

    def __enter__(self) -> str:
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive()
        port = self._server.servers[0].sockets[0].getsockname()[1]
        return f"http://127.0.0.1:{port}/"

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join()


def test_a_day_at_the_page(db: Watched, page: Page, faults: list[str]) -> None:
    in_a_thread(db, Job(effect("a"), id="a", label="<i>facts</i>", series="airflow:flights/r/load/-1", generation=1))
    with pytest.raises(errors.WorkerError):
        in_a_thread(db, Job("select 1/0", id="bad", label="bad"))
    ends: list[BaseException] = []

    def at_work() -> None:
        try:
            in_a_thread(db, Job("select pg_sleep(300)", id="slow", label="nightly load"))
        except errors.JobCancelled as error:
            ends.append(error)

    working = threading.Thread(target=at_work)
    working.start()
    with Serving(db.conninfo) as url:
        page.goto(url)
        rows = page.locator("#lines tr")
        expect(rows).to_have_count(3)
        expect(rows.first).to_contain_text("nightly load")
        # A label is text, whatever is in it.
        expect(page.get_by_role("button", name="<i>facts</i>")).to_be_visible()
        expect(page.locator("#chart .barlayer")).to_be_attached()
        expect(page.locator("#slots-text")).to_contain_text("worker slots:")

        page.get_by_label("label or series").fill("nightly")
        expect(rows).to_have_count(1)
        page.get_by_label("label or series").fill("")
        expect(rows).to_have_count(3)
        page.get_by_role("button", name="state").press("Enter")
        expect(page.locator("th[aria-sort=ascending]")).to_have_text("state")

        page.get_by_role("button", name="<i>facts</i>").press("Enter")
        dialog = page.get_by_role("dialog")
        expect(dialog).to_contain_text("Airflow flights.load")
        link = dialog.get_by_role("link")
        assert link.get_attribute("href") == "https://airflow.example.com/dags/flights/runs/r/tasks/load"
        expect(dialog.get_by_role("button", name="Cancel this job")).to_be_hidden()
        page.keyboard.press("Escape")
        expect(dialog).to_be_hidden()

        page.once("dialog", lambda question: question.dismiss())
        page.get_by_role("button", name="nightly load").click()
        dialog.get_by_role("button", name="Cancel this job").click()
        assert db.workers()
        page.once("dialog", lambda question: question.accept())
        dialog.get_by_role("button", name="Cancel this job").click()
        expect(page.locator("#job-said")).to_have_text("Cancelled; its worker has ended.")
        dialog.get_by_role("button", name="Close").click()
        expect(rows.filter(has_text="nightly load")).to_contain_text("cancelled")
        page.goto("about:blank")
    working.join()
    assert [type(end) for end in ends] == [errors.JobCancelled]
    assert faults == []


def test_the_page_of_a_job(db: Watched, page: Page, faults: list[str], tmp_path: Path) -> None:
    """Its SQL without values, its attempts, and the first of its rows; all of it is text."""
    with pytest.raises(errors.WorkerError):
        in_a_thread(db, Job("select 1/0", id="j"))
    text = "select n, '<b>' || n as \"<i>\", null as nothing from generate_series(1, %(most)s) as n"
    with ThreadPoolExecutor() as pool:
        job = Job(text, id="j", label="nightly load", parameters={"most": 1234}, fetch=True)
        pool.submit(run, db.conninfo, job, accept_changed_sql=True).result()
    with Serving(db.conninfo) as url:
        page.goto(url)
        page.get_by_role("button", name="nightly load").click()
        expect(page.locator("#sql")).to_have_text(text)
        expect(page.locator("#sql-note")).to_be_hidden()
        tries = page.locator("#tries tbody tr")
        expect(tries).to_have_count(2)
        expect(tries.first).to_contain_text("22012 division by zero")
        expect(tries.last).to_contain_text("committed")
        expect(page.locator("#kept-rows p")).to_have_text("1,234 rows of statement 1; the first 10:")
        expect(page.locator("#kept-rows th")).to_have_text(["n", "<i>", "nothing"])
        expect(page.locator("#kept-rows tbody tr")).to_have_count(10)
        expect(page.locator("#kept-rows tbody tr").first.locator("td")).to_have_text(["1", "<b>1", "NULL"])
        page.screenshot(path=tmp_path / "job.png")
        # As a link from Dagster's metadata does.
        page.goto("about:blank")
        page.goto(f"{url}#job=/j")
        expect(page.locator("#sql")).to_have_text(text)
        page.goto("about:blank")
    assert faults == []


def test_what_is_in_the_way_of_the_nightly_load(db: Watched, page: Page, faults: list[str]) -> None:
    """From the load to the job that blocks it, whose it is, and its end."""
    ends: dict[str, BaseException | None] = {}

    def at_work(job: Job) -> threading.Thread:
        def work() -> None:
            try:
                in_a_thread(db, job)
                ends[str(job.id)] = None
            except errors.JobCancelled as error:
                ends[str(job.id)] = error

        working = threading.Thread(target=work)
        working.start()
        return working

    lock = Job("lock table effects; select pg_sleep(300)", id="repair", series="airflow:upkeep/r/repair/-1")
    working = [at_work(lock)]
    with Serving(db.conninfo) as url:
        page.goto(url)
        waits = page.locator("#lines tr", has_text="repair")
        expect(waits).to_contain_text("PgSleep")
        working.append(at_work(Job(effect("load"), id="load", label="nightly load")))

        page.get_by_role("button", name="nightly load").focus()
        page.keyboard.press("Enter")
        dialog = page.get_by_role("dialog")
        # What Enter and Space do to whoever just opened it changes nothing.
        expect(dialog.get_by_role("button", name="Close")).to_be_focused()
        # It is looked at again by itself.
        expect(page.locator("#job-why")).to_contain_text("waits for lock: job repair of")
        expect(page.locator("#facts")).to_contain_text("wanted by Airflow upkeep.repair")

        dialog.get_by_role("button", name="Open repair, which is in its way").press("Enter")
        expect(page.locator("#job-label")).to_have_text("repair")
        page.once("dialog", lambda question: question.accept())
        dialog.get_by_role("button", name="Cancel this job").press("Enter")
        expect(page.locator("#job-said")).to_have_text("Cancelled; its worker has ended.")
        expect(page.locator("#job-state")).to_contain_text("cancelled")
        page.keyboard.press("Escape")
        expect(page.get_by_role("button", name="nightly load")).to_be_focused()
        expect(page.locator("#lines tr", has_text="nightly load")).to_contain_text("committed")
        expect(page.get_by_role("button", name="nightly load")).to_be_focused()
        page.goto("about:blank")
    for one in working:
        one.join()
    assert {name: type(end) for name, end in ends.items()} == {"repair": errors.JobCancelled, "load": type(None)}
    assert faults == []


def test_what_a_login_may_not_see_is_said(db: Watched, page: Page, faults: list[str]) -> None:
    db.role("pgbg_visitor", "login", ["pgbackground_role"])
    in_a_thread(db, Job(effect("a"), id="a", label="facts"))
    with Serving(db.database.conninfo_as("pgbg_visitor")) as url:
        page.goto(url)
        expect(page.locator("#table-note")).to_contain_text("no job that this login may see is at work")
        expect(page.locator("#table-note")).to_contain_text("not visible to this login")
        expect(page.locator("#chart-note")).to_have_text("no jobs that this login may see in this time")
        expect(page.locator("#chart")).to_be_hidden()
        page.goto("about:blank")
    assert faults == []


def test_the_timeline_is_in_the_time_zone_of_the_browser(db: Watched, browser: Browser, page: Page) -> None:
    """Whatever the server's and the session's time zones are: bars and slots are drawn at the same moments."""
    in_a_thread(db, Job(effect("a"), id="a", label="facts"))
    at = db.value("select ended_at at time zone 'Asia/Tokyo' from pgbg.jobs")
    far = make_conninfo(db.conninfo, options="-c timezone=America/New_York")
    in_tokyo = browser.new_page(timezone_id="Asia/Tokyo")
    with Serving(far) as url:
        in_tokyo.goto(url)
        expect(in_tokyo.locator("#chart-note")).to_contain_text("times of Asia/Tokyo", timeout=GENEROUS * 1000)
        drawn = in_tokyo.evaluate(
            "[...document.querySelector('#chart').data].map((trace) => [trace.name, trace.base ?? trace.x])"
        )
        in_tokyo.goto("about:blank")
    began = {name: times[0] for name, times in drawn if times}
    assert set(began) == {"committed", "slots used by jobs"}
    assert len(set(began.values())) == 1
    assert abs(datetime.fromisoformat(began["committed"]) - at) < timedelta(minutes=5)


def test_many_at_work_leave_room_for_what_ran(page: Page, faults: list[str], tmp_path: Path) -> None:
    """The longest at work are drawn, and the busiest of the others."""
    jobs = [job_entry(f"now {n:02}", seconds=100 - n) for n in range(40)]
    for n in range(12):
        label = f"past {n:02}"
        jobs += [job_entry(f"{n}/{i}", "committed", label=label, seconds=500, ended_at=NOW) for i in range(n + 1)]
    (tmp_path / "timeline.html").write_text(file_of(board(*jobs), jobs, more=False), encoding="utf-8")

    page.goto((tmp_path / "timeline.html").as_uri())

    expect(page.locator("#chart-note")).to_contain_text("22 labels are not drawn")
    drawn = page.evaluate("document.querySelector('#chart').layout.yaxis.ticktext")
    wanted = [f"now {n:02}" for n in range(20)] + [f"past {n:02}" for n in range(2, 12)]
    assert sorted(drawn) == wanted
    assert faults == []


def test_a_narrow_window(db: Watched, page: Page, faults: list[str]) -> None:
    """Nothing sticks out sideways, so nobody scrolls that way."""
    in_a_thread(db, Job(effect("a"), id="a", label=("a_label_that_is_rather_long_" * 3)[:64]))
    page.set_viewport_size({"width": 400, "height": 800})
    with Serving(db.conninfo) as url:
        page.goto(url)
        expect(page.locator("#chart .barlayer")).to_be_attached()
        for part in ("document.documentElement", "document.querySelector('#scroll')"):
            assert page.evaluate(f"{part}.scrollWidth <= {part}.clientWidth"), part
        page.goto("about:blank")
    assert faults == []


def test_a_server_that_goes_away_is_said(db: Watched, page: Page) -> None:
    in_a_thread(db, Job(effect("a"), id="a", label="facts"))
    with Serving(db.conninfo) as url:
        page.goto(url)
        expect(page.locator("#lines tr")).to_have_count(1)
    expect(page.locator("#trouble")).to_contain_text("What is shown is old")
    expect(page.locator("#lines tr")).to_have_count(1)


@pytest.mark.parametrize(("scheme", "ground"), [("light", "rgb(255, 255, 255)"), ("dark", "rgb(18, 22, 29)")])
def test_a_file_needs_nobody(
    db: Watched, page: Page, faults: list[str], tmp_path: Path, scheme: Literal["light", "dark"], ground: str
) -> None:
    in_a_thread(db, Job(effect("a"), id="a", label="</script>facts"))

    async def drawn() -> str:
        async with Launcher(db.conninfo) as launcher:
            source = ServerSource(launcher)
            jobs = await source.history(since=None, label=None, limit=10)
            return file_of(await source.board(), jobs, more=False)

    # In a thread: this one has the browser's event loop.
    with ThreadPoolExecutor() as pool:
        text = pool.submit(lambda: asyncio.run(drawn())).result()
    (tmp_path / "timeline.html").write_text(text, encoding="utf-8")
    page.emulate_media(color_scheme=scheme)
    page.goto((tmp_path / "timeline.html").as_uri())

    expect(page.locator("#lines tr")).to_have_count(1)
    expect(page.locator("#lines tr")).to_contain_text("</script>facts")
    expect(page.locator("#chart .barlayer")).to_be_attached()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == ground
    assert faults == []
