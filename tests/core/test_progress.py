"""How far a job is and what it waits for, told without a change of its SQL."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from pgbg_orchestration import Event, Job, Launcher, arun
from pgbg_orchestration.outcome import EventKind
from pgbg_orchestration.postgres import activity, catalog
from tests.core.kit import APP, Recorder, Watched, eventually, within

pytestmark = pytest.mark.servers("real", "embedded")


def told(seen: Recorder, kind: EventKind) -> list[Event]:
    return [event for event in seen.events if event.kind is kind]


@pytest.fixture
def slow(db: Watched) -> Watched:
    """The watched database with a table of many pages, and a function that takes its time over each."""
    db.sql("create table pages (n int, filler text) with (fillfactor = 10)")
    db.sql("insert into pages select g, repeat('x', 700) from generate_series(1, 60) g")
    db.sql(
        "create function slowly(n int) returns int immutable language plpgsql as"
        " $$ begin perform pg_sleep(0.07); return n; end $$"
    )
    db.sql(f"alter table pages owner to {APP}")
    db.sql(f"grant create on schema public to {APP}")
    return db


@pytest.mark.servers("real", "embedded", "standin19")
@pytest.mark.parametrize("concurrently", ["", "concurrently"])
async def test_the_percentage_of_an_index_build_moves(slow: Watched, concurrently: str) -> None:
    seen = Recorder()
    sql = f"create index {concurrently} on pages (slowly(n))"
    await within(arun(slow.conninfo, Job(sql, id="index"), observer=seen))

    scanning = [event for event in told(seen, EventKind.PROGRESS) if "scanning table" in event.data["phase"]]
    percents = [event.data["percent"] for event in scanning if event.data["phase"].startswith("building")]
    assert len(percents) >= 2
    assert percents == sorted(set(percents))
    assert all(0 <= percent <= 100 for percent in percents)
    first = scanning[0]
    assert first.message.startswith(f"CREATE INDEX{concurrently and ' CONCURRENTLY'}, building index: scanning table: ")
    assert any("left of this phase" in event.message for event in scanning)


async def test_what_the_sql_reports_is_told_even_where_its_last_character_is_cut_in_two(db: Watched) -> None:
    function = "pg_background_report_progress" if db.server.surface == "2.0" else "pg_background_progress"
    seen = Recorder()
    sql = (
        f"do $$ begin perform {function}(40, 'x' || repeat('é', 40)); perform pg_sleep(3);"
        f" perform {function}(41, 'done'); perform pg_sleep(3); end $$"
    )
    await within(arun(db.conninfo, Job(sql, id="own"), observer=seen))

    messages = [event.message for event in told(seen, EventKind.PROGRESS)]
    assert messages[0].startswith("40 % xéééé")
    assert messages[1:] == ["41 % done"]


@pytest.mark.servers("real", "embedded", "standin19")
@pytest.mark.parametrize("redact_details", [False, True])
@pytest.mark.parametrize("visible", [True, False])
async def test_a_job_that_waits_for_a_lock_names_who_holds_it(db: Watched, visible: bool, redact_details: bool) -> None:
    if visible:
        db.sql(f"grant pg_read_all_stats to {APP}")
    seen = Recorder()
    with db.database.connect() as person:
        person.execute("set application_name = 'a report'")
        person.execute("begin")
        person.execute("lock table effects in access share mode -- by hand")
        job = Job("truncate effects", id="blocked", redact_details=redact_details)
        running = asyncio.create_task(arun(db.conninfo, job, observer=seen))
        (first, *_) = await eventually(lambda: told(seen, EventKind.BLOCKED), "the blocker's name")
        person.execute("rollback")
        pid = person.info.backend_pid
    await within(running)
    if visible:
        db.sql(f"revoke pg_read_all_stats from {APP}")

    assert first.data["blockers"] == [pid]
    assert "its worker waits for" in first.message
    assert f"pid {pid} (user postgres, a report" in first.message
    assert ("idle in transaction, in its transaction for" in first.message) is visible
    assert ("its query is not visible to this login" in first.message) is not visible
    assert ("lock table effects" in first.message) is (visible and not redact_details)


@pytest.mark.servers("real", "embedded", "standin19")
async def test_a_supervised_job_is_looked_at_in_its_own_worker(db: Watched) -> None:
    db.sql(f"alter table effects owner to {APP}")
    seen = Recorder()
    with db.database.connect() as person:
        person.execute("begin")
        person.execute("lock table effects in access share mode")
        running = asyncio.create_task(arun(db.conninfo, Job("vacuum full effects", id="vacuum"), observer=seen))
        (first, *_) = await eventually(lambda: told(seen, EventKind.BLOCKED), "the blocker's name")
        person.execute("rollback")
        pid = person.info.backend_pid
    await within(running)
    assert first.data["blockers"] == [pid]


@pytest.mark.parametrize("kind", ["session", "receipt"])
async def test_one_query_a_tick_for_all_jobs(db: Watched, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    looks: list[int] = []
    look = activity.look

    async def counted(conn: Any, views: Sequence[str], pids: Sequence[int], names: Sequence[str] = ()) -> Any:
        looks.append(len(pids) + len(names))
        return await look(conn, views, pids, names)

    monkeypatch.setattr(activity, "look", counted)
    seen = Recorder()
    async with Launcher(db.conninfo) as launcher:
        jobs = [Job("select pg_sleep(3)", id=f"j{number}", kind=kind) for number in range(5)]
        await within(asyncio.gather(*(launcher.run(job, observer=seen) for job in jobs)))
    assert max(looks) == 5
    assert len(looks) <= 5, "a look for each job"


async def test_who_listens_to_nothing_costs_no_look(db: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    async def never(*_: object) -> None:
        pytest.fail("a look at a job that nobody watches")

    monkeypatch.setattr(activity, "look", never)
    await within(arun(db.conninfo, Job("select pg_sleep(2)", id="alone")))


async def test_a_look_that_fails_is_no_fault_of_the_jobs(
    db: Watched, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(
        activity,
        "QUERIES",
        {
            **catalog.QUERIES,
            "activity": "select no_such_column {commands} where %(pids)s is null or %(names)s is null",
        },
    )
    seen = Recorder()
    outcome = await within(arun(db.conninfo, Job("select pg_sleep(4)", id="alone"), observer=seen))
    assert outcome.command_tag == "SELECT"
    assert caplog.text.count("how far jobs are cannot be told now") == 1
