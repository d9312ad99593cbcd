"""One look at everything, on a server: jobs, workers launched by hand, who blocks whom, and what may be seen."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from datetime import timedelta

import psycopg
import pytest

from pgbg_orchestration import Job, Launcher
from pgbg_orchestration.ledger.board import HIDDEN, Board, look_at_all
from pgbg_orchestration.postgres import activity
from pgbg_orchestration.view.lines import lines_of
from pgbg_orchestration.view.source import ServerSource
from pgbg_orchestration.view.states import BY_HAND, NOT_VISIBLE
from tests.core.kit import GENEROUS, Watched, effect, slow, within

pytestmark = pytest.mark.any_surface

HISTORY = (
    "insert into pgbg.job (owner, job_digest, job_id, series_digest, series, generation, label, kind, sql_digest,"
    " attempt, launched_by, launcher_pid, ended_at, outcome)"
    " select 'pgbg_app', pgbg.digest(i::text), i::text, pgbg.digest(i::text), i::text, 1, 'load ' || i, 'receipt',"
    " '', 1, 'host/1', 0, clock_timestamp() - {ago}, '{outcome}' from generate_series({numbers}) as i"
)


async def look(db: Watched, user: str | None = None, most_ended: int | None = None) -> Board:
    conninfo = db.conninfo if user is None else db.database.conninfo_as(user)
    async with await psycopg.AsyncConnection.connect(conninfo, autocommit=True) as conn:
        views = await activity.views_of(conn)
        return await look_at_all(conn, "pgbg", views, ended_within=timedelta(minutes=5), most_ended=most_ended)


async def look_until(db: Watched, wanted: Callable[[Board], bool], what: str) -> Board:
    """Look again and again until what is seen is what is wanted, and return it."""
    seen = await look(db)
    until = time.monotonic() + GENEROUS
    while not wanted(seen):
        assert time.monotonic() < until, f"not seen: {what}"
        await asyncio.sleep(0.1)
        seen = await look(db)
    return seen


def is_blocked(seen: Board) -> bool:
    """Whether some worker waits for somebody."""
    return any(worker.activity is not None and worker.activity.blockers for worker in seen.workers.values())


async def test_jobs_that_run_and_that_ended(db: Watched) -> None:
    async with Launcher(db.conninfo) as launcher:
        await within(launcher.run(Job(effect("done"), id="done", label="all done")))
        running = asyncio.create_task(launcher.run(Job(slow("runs", 60), id="runs", label="at work")))
        pid = await db.at_work("runs")

        seen = await look(db)

        assert {(job.job_id, job.state) for job in seen.jobs} == {("done", "committed"), ("runs", "running")}
        line = next(line for line in lines_of(seen) if line.label == "at work")
        assert line.pid == pid
        assert line.worker is not None
        assert line.worker.query is not None
        assert "pg_sleep" in line.worker.query
        assert seen.database == db.database.name
        assert seen.slots == db.value("select current_setting('max_worker_processes')::int")
        assert (
            await ServerSource(launcher).cancel(next(job for job in seen.jobs if job.job_id == "runs")) == "cancelled"
        )
        await asyncio.wait({running})
        assert running.exception() is not None


async def test_a_job_that_waits_for_a_lock_names_its_blocker(db: Watched) -> None:
    with psycopg.connect(db.database.conninfo_as("postgres"), application_name="somebody's psql") as other:
        other.execute("lock table effects in access exclusive mode")
        async with Launcher(db.conninfo) as launcher:
            waiting = asyncio.create_task(launcher.run(Job(effect("j"), id="j")))
            await db.at_work("j")

            seen = await look_until(db, is_blocked, "its blocker")

            [line] = lines_of(seen)
            assert line.worker is not None
            assert line.worker.activity is not None
            [blocker] = line.worker.activity.blockers
            assert blocker.pid == other.info.backend_pid
            assert "somebody's psql" in line.waits_for
            # What another login's session runs is not this login's to see.
            assert blocker.query == HIDDEN
            other.rollback()
            assert (await within(waiting)).launched


@pytest.mark.real  # a stand-in's worker without a label is a client backend like any other
async def test_a_worker_launched_by_hand(db: Watched) -> None:
    async with (
        Launcher(db.conninfo) as launcher,
        await psycopg.AsyncConnection.connect(db.conninfo, autocommit=True) as by_hand,
    ):
        extension = (await launcher.facts()).extension
        await extension.launch(by_hand, "select pg_sleep(60)", label="mine", queue_size=None)

        seen = await look_until(db, lambda seen: bool(seen.workers), "the worker")

        [line] = lines_of(seen)
        assert line.state == BY_HAND
        assert line.job is None
        assert line.worker is not None
        assert await ServerSource(launcher).cancel_worker(line.worker) is True
        await look_until(db, lambda seen: not seen.workers, "its end")


async def test_another_login_sees_that_there_is_something_and_no_more(db: Watched) -> None:
    db.role("pgbg_visitor", "login", ["pgbackground_role"])
    async with Launcher(db.conninfo) as launcher:
        running = asyncio.create_task(launcher.run(Job(slow("j", 60), id="j", label="theirs")))
        await db.at_work("j")

        seen = await look(db, "pgbg_visitor")

        assert seen.jobs == ()
        assert all(worker.query is None for worker in seen.workers.values())
        assert all(line.state == NOT_VISIBLE for line in lines_of(seen))
        assert seen.not_visible > 0
        running.cancel()
        await asyncio.wait({running})


async def test_one_query_a_look_with_two_thousand_jobs(db: Watched) -> None:
    db.sql(HISTORY.format(ago="interval '0'", outcome="failed", numbers="1, 2000"))

    assert len(lines_of(await look(db))) == 2000


async def test_of_many_that_ended_those_without_a_commit_are_kept(db: Watched) -> None:
    db.sql(HISTORY.format(ago="interval '0'", outcome="committed", numbers="1, 20"))
    db.sql("update pgbg.job set kind = 'supervised'")  # whose word is the history's
    db.sql(HISTORY.format(ago="interval '1 min'", outcome="failed", numbers="21, 25"))
    db.sql(HISTORY.format(ago="interval '1 h'", outcome="failed", numbers="26, 30"))

    seen = await look(db, most_ended=8)

    assert sorted(job.state for job in seen.jobs) == ["committed"] * 3 + ["failed"] * 5
    assert seen.ended_left_out == 17
    assert (await look(db)).ended_left_out == 0
    assert (await look(db, most_ended=0)).jobs == ()


# On the stand-in of 1.9 a worker has neither a backend_type nor a name of its own: it looks like any session.
@pytest.mark.servers("real", "embedded", "standin20")
async def test_a_job_that_was_given_up_long_ago_and_is_at_work_all_the_same(db: Watched) -> None:
    """A worker that began late: the history has an end of its job."""
    async with Launcher(db.conninfo) as launcher:
        running = asyncio.create_task(launcher.run(Job(slow("j", 60), id="j")))
        await db.at_work("j")
        db.sql("update pgbg.job set ended_at = clock_timestamp() - interval '1 h', outcome = 'lost'")

        seen = await look(db, most_ended=0)

        assert [(job.job_id, job.state) for job in seen.jobs] == [("j", "running")]
        running.cancel()
        await asyncio.wait({running})


async def test_the_list_of_jobs_is_planned_for_its_filters(db: Watched) -> None:
    """From its sixth call on, a session took one plan for any filters: seconds for some thousand jobs."""
    settings = db.value("select proconfig from pg_proc where oid = 'pgbg.find_jobs'::regproc")
    assert "plan_cache_mode=force_custom_plan" in settings
