"""Kind `session`: SQL that cannot run in a transaction block, and a server where nothing may be installed."""

from __future__ import annotations

import asyncio

import pytest

from pgbg_orchestration import Job, Kind, Launcher, Outcome, arun, errors
from tests.conftest import Database
from tests.core.kit import APP, Watched, cancelled, count, effect, ended, eventually, seeded, within

# Not on the stand-ins: a worker there is a client connection like the sessions that these tests end by their name, and
# goes with them.
pytestmark = pytest.mark.servers("real", "embedded")


@pytest.fixture
def mine(db: Watched) -> Watched:
    """A table that the login owns, so that it may vacuum and index it."""
    db.sql("create table mine (i int)")
    db.sql("insert into mine select generate_series(1, 1000)")
    db.sql(f"alter table mine owner to {APP}")
    db.sql(f"grant create on schema public to {APP}")
    return db


@pytest.mark.parametrize(
    "sql",
    [
        "vacuum mine",
        "vacuum (analyze) mine -- to the end",
        "/* first */ create index concurrently mine_i on mine (i);",
        "call steps()",
    ],
)
async def test_sql_that_cannot_run_in_a_transaction(mine: Watched, sql: str) -> None:
    mine.sql(
        "create procedure steps() language plpgsql as $$ begin for n in 1..3 loop"
        " insert into public.effects values ('step', n); commit; end loop; end $$"
    )
    assert Job(sql).kind is not Kind.RECEIPT or sql.startswith("call")
    job = Job(sql, id="j", label="alone", kind="session")
    outcome = await within(arun(mine.conninfo, job))
    assert (outcome.job_id, outcome.label, outcome.launched) == ("j", "alone", True)
    assert outcome.command_tag
    if sql.startswith("call"):
        assert mine.effects("step") == 3
    if "index" in sql:
        assert mine.value("select indisvalid from pg_index where indexrelid = 'mine_i'::regclass")
    if "vacuum" in sql:
        await eventually(
            lambda: mine.value("select pg_stat_get_vacuum_count('mine'::regclass)"), "the vacuum is counted"
        )


async def test_an_error_of_a_session_job(mine: Watched) -> None:
    with pytest.raises(errors.WorkerError) as caught:
        await within(
            arun(mine.conninfo, Job("create unique index concurrently u on mine ((1))", id="j", kind="session"))
        )
    assert caught.value.sqlstate == "23505"
    assert caught.value.fields.detail


async def test_lost_session_without_verify_sql_is_unknown(db: Watched) -> None:
    """The work goes on and commits, and nobody can tell: never run again by itself."""
    job = Job("with s as (select pg_sleep(1.5)) insert into effects select 'j' from s", id="j", kind="session")
    task = asyncio.create_task(arun(db.conninfo, job))
    await eventually(lambda: [w for w in db.workers() if w[2] == "active"], "a worker at work")
    db.terminate([row[0] for row in db.sessions("pgbg:%")])
    error = await ended(task)
    assert isinstance(error, errors.OutcomeUnknown), error
    assert "not known" in str(error)
    await eventually(lambda: not db.workers(), "the worker has ended")
    assert db.effects("j") <= 1
    assert db.states().get("j", "unknown") == "unknown"


@pytest.mark.parametrize("done", [True, False])
async def test_lost_session_with_verify_sql(db: Watched, done: bool) -> None:
    """Done: a success, by verify_sql. Not done: it may be launched again, but never beside the lost worker."""
    db.sql("create table spans (began timestamptz, ended timestamptz)")
    db.sql(f"grant insert, select on spans to {APP}")
    work = (
        "with s as materialized (select clock_timestamp() as began, pg_sleep(1.5))"
        " insert into spans select began, clock_timestamp() from s"
    )
    job = Job(work, id="j", kind="session", verify_sql=f"select {done} and count(*) > 0 from spans")
    task = asyncio.create_task(arun(db.conninfo, job))
    await eventually(lambda: [w for w in db.workers() if w[2] == "active"], "a worker at work")
    db.terminate([row[0] for row in db.sessions("pgbg:%")])
    end = await ended(task)
    await eventually(lambda: not db.workers(), "the worker has ended")
    overlaps = "select count(*) from spans a join spans b on a.began < b.began and b.began < a.ended"
    assert db.value(overlaps) == 0, "launched again while the lost worker was at work"
    if done:
        assert db.value("select count(*) from spans") == 1, end
        assert isinstance(end, Outcome | errors.OutcomeUnknown), end
        if isinstance(end, Outcome):
            assert end.proof == "verify_sql" or db.server.is_standin


@pytest.mark.parametrize("settings", [{}, {"Application_Name": "mine"}], ids=["", "a name of its own"])
async def test_cancel_of_a_session_job(db: Watched, settings: dict[str, str]) -> None:
    sql = "with s as (select pg_sleep(30)) insert into effects select 'j' from s"
    job = Job(sql, id="j", kind="session", settings=settings)
    task = asyncio.create_task(arun(db.conninfo, job))
    await eventually(lambda: [w for w in db.workers() if w[2] == "active"], "a worker at work")
    await cancelled(task)
    await eventually(lambda: not db.workers(), "the worker has ended")
    assert db.effects() == 0


async def test_session_jobs_cancelled_at_once(db: Watched) -> None:
    """No receipt can refuse a late starter here: the worker that was launched must end all the same."""
    chance = seeded("session jobs cancelled")
    async with Launcher(db.conninfo) as launcher:
        for number in range(count(20, 200)):
            sql = f"with s as (select pg_sleep(30)) insert into effects select 'j{number}' from s"
            task = asyncio.create_task(launcher.run(Job(sql, id=f"j{number}", kind="session")))
            await asyncio.sleep(chance.uniform(0, 0.04))
            await cancelled(task)
    await eventually(lambda: not db.workers(), "all workers have ended", 20)
    assert db.effects() == 0


async def test_deadline_of_a_session_job(db: Watched) -> None:
    job = Job(
        "with s as (select pg_sleep(30)) insert into effects select 'j' from s", id="j", kind="session", timeout=0.7
    )
    with pytest.raises(errors.DeadlinePassed):
        await within(arun(db.conninfo, job))
    await eventually(lambda: not db.workers(), "the worker has ended")
    assert db.effects() == 0


async def test_a_server_where_nothing_is_installed(extension_database: Database) -> None:
    """Kind `session` needs the extension only."""
    with extension_database.connect() as connection:
        connection.execute("create table effects (job text, n int)")
    connection.close()
    outcome = await within(arun(extension_database.conninfo, Job(effect("j"), id="j", kind="session")))
    assert outcome.launched
    with extension_database.connect() as connection:
        assert connection.execute("select job from effects").fetchall() == [("j",)]
    connection.close()


async def test_a_read_only_session_can_read(db: Watched) -> None:
    conninfo = db.database.conninfo_as(APP, options="-c default_transaction_read_only=on")
    outcome = await within(arun(conninfo, Job("select count(*) from effects", id="j", kind="session")))
    assert outcome.row_count == 1


async def test_silent_end_of_a_session_job_is_no_success(db: Watched) -> None:
    """completed, no error, nothing done: without a receipt only result() read to its end is proof."""
    job = Job(
        "with s as (select pg_sleep(2)) insert into effects select 'j' from s", id="j", kind="session",
        settings={"exit_on_error": "on", "statement_timeout": "300ms"},
    )  # fmt: skip
    end = await ended(asyncio.ensure_future(arun(db.conninfo, job)))
    assert isinstance(end, errors.WorkerError | errors.WorkerLost | errors.OutcomeUnknown), end
    assert db.effects() == 0


async def test_session_job_with_much_output(db: Watched) -> None:
    job = Job("select repeat('x', 100) from generate_series(1, 20000)", id="j", kind="session")
    outcome = await within(arun(db.conninfo, job))
    assert outcome.launched


# Warnings, more than its queue holds: its result is being read when the job is cancelled. (Its rows are not sent.)
SLOW_OUTPUT = (
    "do $$ begin for i in 1..15000 loop raise warning '%', repeat('x', 1000); perform pg_sleep(0.002); end loop; end $$"
)


async def _reading(db: Watched) -> None:
    reader = "pg_stat_activity where state = 'active' and query ~ 'pg_background_result' and pid <> pg_backend_pid()"
    await eventually(lambda: db.value(f"select count(*) from {reader}"), "the result is being read")


async def test_cancel_while_its_output_is_read(db: Watched) -> None:
    task = asyncio.create_task(arun(db.conninfo, Job(SLOW_OUTPUT, id="j", kind="session", queue_size=65536)))
    await _reading(db)
    await cancelled(task)
    assert not db.workers()


async def test_deadline_while_its_output_is_read(db: Watched) -> None:
    job = Job(SLOW_OUTPUT, id="j", kind="session", queue_size=65536, timeout=4)
    task = asyncio.create_task(arun(db.conninfo, job))
    await _reading(db)
    assert isinstance(await ended(task), errors.DeadlinePassed)
    assert not db.workers()


@pytest.mark.real  # the stand-in's workers do not outlive their launching session with much output left to send
async def test_leaving_while_its_output_is_read(db: Watched) -> None:
    task = asyncio.create_task(
        arun(db.conninfo, Job(SLOW_OUTPUT, id="j", kind="session", queue_size=65536), on_cancel="leave")
    )
    await _reading(db)
    await cancelled(task)
    assert db.workers(), "it was to go on"
    db.terminate([row[0] for row in db.workers()])


async def test_the_session_of_its_own_is_used_again(db: Watched) -> None:
    """Where it is as a new one would be: not by a job after the one whose notices were heard."""
    seen: list[list[int]] = []
    async with Launcher(db.conninfo) as launcher:
        for notices in (False, False, True, False):
            job = Job("select 1", kind="session")
            assert (await within(launcher.run(job, notices=notices))).row_count == 1
            seen.append([pid for pid, *_ in db.sessions("pgbg: launching")])
    assert [len(pids) for pids in seen] == [1, 1, 0, 1]
    assert seen[0] == seen[1] != seen[3]
