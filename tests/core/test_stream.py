"""Rows that are read as they come: each once, as psycopg gives them, with the proof of the commit before the first."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import psycopg
import pytest

from pgbg_orchestration import Job, Launcher, errors
from pgbg_orchestration.outcome import EventKind
from tests.core.kit import Recorder, Watched, effect, eventually, within

pytestmark = pytest.mark.any_surface

QUERY = """select g, g::numeric / 3 as n, timestamptz '2013-01-01 00:00+00' as t, array['a', null] as a,
    null::jsonb as j, 2.5::numeric as c, '\\x00ff'::bytea as b, true as y, int4range(1, g) as r
from generate_series(1, 7) as g"""
READING = "from pg_stat_activity where application_name = 'pgbg: launching' and query like '%result%'"


async def read(db: Watched, job: Job, **options: Any) -> list[tuple[Any, ...]]:
    async with Launcher(db.conninfo) as launcher:
        return await within(_all(launcher, job, **options))


async def _all(launcher: Launcher, job: Job, **options: Any) -> list[tuple[Any, ...]]:
    return [row async for row in launcher.stream(job, **options)]


@pytest.mark.parametrize("kind", ["receipt", "session"])
async def test_rows_as_psycopg_gives_them(db: Watched, kind: str) -> None:
    with psycopg.connect(db.conninfo) as conn:
        cursor = conn.execute(QUERY)
        wanted, columns = cursor.fetchall(), [(c.name, c.type_code) for c in cursor.description or ()]
    async with Launcher(db.conninfo) as launcher, launcher.stream(Job(QUERY, id="j", kind=kind)) as stream:
        assert stream.outcome is not None
        assert [(c.name, c.type_oid) for c in stream.columns] == columns
        assert [row async for row in stream] == wanted
        outcome = stream.outcome
        assert (outcome.row_count, outcome.command_tag, outcome.launched) == (7, "SELECT", True)
        assert outcome.proof == {"receipt": "receipt", "session": "result"}[kind]
        if kind == "receipt":
            (job,) = await launcher.ledger.jobs()
            assert (job.state, job.row_count, job.command_tag) == ("committed", 7, "SELECT")


async def test_many_rows_in_order_after_the_jobs_other_statements(db: Watched) -> None:
    job = Job(f"{effect('j')}; select g, repeat('x', 100) from generate_series(1, 100000) as g", id="j")
    rows = await read(db, job)
    assert [row[0] for row in rows] == list(range(1, 100001))
    assert {row[1] for row in rows} == {"x" * 100}
    assert db.effects("j") == 1


async def test_rows_of_a_change(db: Watched) -> None:
    rows = await read(db, Job("insert into effects (job) values ('a'), ('b') returning job, n", id="j"))
    assert rows == [("a", 1), ("b", 1)]
    assert db.effects() == 2


async def test_no_rows(db: Watched) -> None:
    assert await read(db, Job("select 1 where false", id="j")) == []


async def test_a_failed_job_gives_its_error(db: Watched) -> None:
    job = Job(f"{effect('j')}; select 1 / (g - 5) from generate_series(1, 9) as g", id="j")
    with pytest.raises(errors.WorkerError) as caught:
        await read(db, job)
    assert caught.value.sqlstate == "22012"
    assert db.effects() == 0


async def test_it_is_read_once(db: Watched) -> None:
    job = Job(f"{effect('j')}; select 1", id="j")
    assert await read(db, job) == [(1,)]
    with pytest.raises(errors.RowsGone) as caught:
        await read(db, job)
    assert caught.value.data_state == errors.DONE
    assert errors.PgbgError.from_dict(caught.value.to_dict()).data_state == errors.DONE
    assert db.effects() == 1


async def test_a_stream_that_breaks_says_what_is_committed(db: Watched) -> None:
    sql = f"{effect('j')}; select g, repeat('x', 1000) from generate_series(1, 100000) as g"
    async with Launcher(db.conninfo) as launcher:
        count = 0

        async def read_on() -> None:
            nonlocal count
            async for _ in launcher.stream(Job(sql, id="j")):
                count += 1
                if count == 10:
                    assert db.sql(f"select pg_terminate_backend(pid) {READING}") == [(True,)]

        with pytest.raises(errors.RowsGone) as caught:
            await within(read_on())
        assert 10 <= count < 100000
        assert f"after {count} of them" in caught.value.message
        assert caught.value.data_state == errors.DONE
        (job,) = await launcher.ledger.jobs()
    assert (job.state, db.effects("j")) == ("committed", 1)


@pytest.mark.servers("real", "embedded")  # a stand-in's worker needs its launching session
async def test_a_session_that_is_lost_before_the_commit_takes_rows_along_and_nothing_else(db: Watched) -> None:
    seen = Recorder()
    job = Job(f"{effect('j')}; select pg_sleep(2) is null", id="j")
    async with Launcher(db.conninfo) as launcher:
        reading = asyncio.create_task(_all(launcher, job, observer=seen))
        await eventually(lambda: db.sql(f"select 1 {READING} and state = 'active'"), "the result is read")
        db.sql(f"select pg_terminate_backend(pid) {READING}")
        with pytest.raises(errors.RowsGone):
            await within(reading)
    assert db.effects("j") == 1


async def test_whoever_stops_reading_leaves_nothing_open(db: Watched) -> None:
    sql = "select g, repeat('x', 1000) from generate_series(1, 50000) as g"
    async with Launcher(db.conninfo) as launcher:
        async for row in launcher.stream(Job(sql, id="a")):
            assert row[0] == 1
            break
        gc.collect()
        await eventually(lambda: not db.sql(f"select 1 {READING}"), "the session is closed")
        async with launcher.stream(Job(sql, id="b")) as stream:
            assert stream.outcome is not None
        with pytest.raises(errors.RowsGone):
            await anext(aiter(stream))
        left = launcher.stream(Job(sql, id="c"))
        assert (await anext(aiter(left)))[0] == 1
    states = db.sql("select state from pgbg.jobs")
    assert states == [("committed",)] * 3


async def test_a_cancel_before_the_commit_cancels_the_job(db: Watched) -> None:
    async with Launcher(db.conninfo) as launcher:
        reading = asyncio.create_task(_all(launcher, Job(f"{effect('j')}; select pg_sleep(30) is null", id="j")))
        await db.at_work("j")
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await within(reading)
        (job,) = await launcher.ledger.jobs()
    assert (job.state, db.effects()) == ("cancelled", 0)


@pytest.mark.servers("real", "embedded")  # the stand-in hands on nothing that SQL raises
async def test_notices_are_told_too(db: Watched) -> None:
    seen = Recorder()
    job = Job("do $$ begin raise notice 'first'; end $$; select 1", id="j")
    assert await read(db, job, observer=seen, notices=True) == [(1,)]
    assert [event.data["text"] for event in seen.events if event.kind is EventKind.NOTICE] == ["first"]


@pytest.mark.parametrize(
    ("sql", "options"),
    [
        ("select 1", {"fetch": True}),
        ("vacuum effects", {}),
        ("insert into effects (job) values ('a')", {}),
        ("select pg_sleep(0)", {}),
        ("create temporary table made as select 1 as n; select n from made", {}),
    ],
)
async def test_what_cannot_be_streamed_is_refused_before_its_launch(
    db: Watched, sql: str, options: dict[str, Any]
) -> None:
    with pytest.raises(errors.InvalidJob) as caught:
        await read(db, Job(sql, id="j", **options))
    assert caught.value.data_state == errors.NOT_STARTED
    assert db.sql("select state from pgbg.jobs") == []
