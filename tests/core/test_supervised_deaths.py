"""Supervised jobs that are hit in the middle: whatever is told of them is what happened."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Callable, Iterator

import psycopg
import pytest

from pgbg_orchestration import Job, Launcher, Outcome, arun, errors
from tests.conftest import Database
from tests.core.kit import APP, Recorder, Watched, count, ended, eventually, launching_process, within
from tests.core.test_supervised import PROCEDURE, call
from tests.servers.kinds import Server

pytestmark = pytest.mark.any_surface

WORKS = {
    "vacuum": "vacuum (analyze) own",
    "index": "create unique index concurrently ux on own (n)",
    "call": "call middle('j')",
}
# Commits five times, fails at the sixth, and has its middle before the third.
MIDDLE = """
create procedure middle(job text) language plpgsql as $$
begin
    for i in 1 .. 10 loop
        if i = 3 then
            lock table own in share update exclusive mode;
        elsif i = 6 then
            raise exception 'step % fails', i using errcode = '22012';
        end if;
        insert into effects (job, n) values (job, i);
        commit;
    end loop;
end $$
"""
FAILURES = {"index": "23505", "call": "22012"}
EFFECTS = {"vacuum": 0, "index": 0, "call": 5}


def prepare(db: Watched) -> Watched:
    """A procedure that commits at each step, and a table with duplicates that the login owns."""
    db.sql(PROCEDURE)
    db.sql(MIDDLE)
    db.sql("create table own (n int)")
    db.sql("insert into own select 1 from generate_series(1, 100)")
    db.sql(f"alter table own owner to {APP}")
    db.sql(f"grant create on schema public to {APP}")
    return db


@pytest.fixture
def prepared(db: Watched) -> Watched:
    return prepare(db)


@contextlib.contextmanager
def held(db: Watched) -> Iterator[Callable[[], None]]:
    """Keep the works waiting in their middle, until what is yielded is called."""
    with contextlib.closing(db.database.connect()) as holder:
        holder.execute("begin")
        holder.execute("lock table own in row exclusive mode")
        holder.execute("savepoint s")
        holder.execute("lock table own in share update exclusive mode")

        def let_go() -> None:
            with contextlib.suppress(psycopg.OperationalError):  # the server may be gone
                holder.execute("rollback")

        yield let_go


async def in_the_middle(db: Watched) -> int:
    """Wait until the job's supervisor has a worker at work that waits in its middle; returns the worker's pid."""

    def look() -> int | None:
        rows = db.sql(
            "select a.pid from pg_stat_activity a join pgbg.receipt r on starts_with(a.application_name,"
            " pgbg.marker(r.owner, r.job_id)) where r.status = 'launching' and a.datname = current_database()"
            " and a.wait_event_type = 'Lock'"
            " and not exists (select from pg_locks l where l.pid = a.pid and l.locktype = 'advisory')"
        )
        return int(rows[0][0]) if rows else None

    pid = await eventually(look, "a supervised worker in its middle")
    assert pid is not None
    return pid


def assert_told(db: Watched, work: str, end: object) -> None:
    """The end is the one that happened."""
    if work in FAILURES:
        assert isinstance(end, errors.WorkerError), end
        assert end.sqlstate == FAILURES[work]
    else:
        assert isinstance(end, Outcome), end
        assert end.command_tag == "VACUUM"
    assert db.effects() == EFFECTS[work]
    assert db.states() == {"j": "failed" if work in FAILURES else "committed"}


@pytest.mark.parametrize("work", WORKS)
@pytest.mark.parametrize("point", ["after_launch", "while_running"])
async def test_launching_process_killed(prepared: Watched, work: str, point: str) -> None:
    """The supervisor goes on alone and tells the end to whoever comes."""
    job = {"sql": WORKS[work], "id": "j"}
    with held(prepared) as release:
        async with launching_process(prepared.conninfo, f"{point}:kill") as child:
            child.run(job)
            await child.killed()
        await in_the_middle(prepared)
        seen = Recorder()
        second = asyncio.create_task(arun(prepared.conninfo, Job(WORKS[work], id="j"), observer=seen))
        await eventually(lambda: "attached" in seen.kinds(), "the second process has attached")
        release()
        end = await ended(second)
    assert_told(prepared, work, end)
    if isinstance(end, Outcome):
        assert end.launched is False


@pytest.mark.majors
async def test_failure_that_nobody_was_there_for_is_told_to_the_next_call(prepared: Watched) -> None:
    """And not run again behind everybody's back; the call after that launches it again."""
    job = call(10, fails_at=6, naps=0, id="j")
    async with launching_process(prepared.conninfo, "after_launch:kill") as child:
        child.run({"sql": job.sql, "id": "j"})
        await child.killed()
    await eventually(lambda: prepared.states().get("j") == "failed", "its worker has failed")
    seen = Recorder()
    told = await ended(asyncio.create_task(arun(prepared.conninfo, job, observer=seen)))
    assert isinstance(told, errors.WorkerError), told
    assert (told.sqlstate, told.fields.detail) == ("22012", "as it was told to")
    assert "nobody was there" in str(told)
    assert seen.kinds() == ["found_failed"]
    assert prepared.effects() == 5
    again = await ended(asyncio.create_task(arun(prepared.conninfo, job)))
    assert isinstance(again, errors.WorkerError), again
    assert "nobody was there" not in str(again)
    assert prepared.effects() == 10


@pytest.mark.parametrize("work", WORKS)
async def test_launching_process_killed_before_the_launch(prepared: Watched, work: str) -> None:
    job = {"sql": WORKS[work], "id": "j"}
    async with launching_process(prepared.conninfo, "before_launch:kill") as child:
        child.run(job)
        await child.killed()
    assert_told(prepared, work, await ended(asyncio.create_task(arun(prepared.conninfo, Job(WORKS[work], id="j")))))


@pytest.mark.parametrize("kind", ["supervised", "session"])
async def test_session_lost_while_the_statement_is_looked_up(prepared: Watched, kind: str) -> None:
    """That is no refusal of the statement: another session looks it up."""
    with contextlib.closing(prepared.database.connect()) as holder:
        holder.execute("begin")
        holder.execute("lock table own")
        running = asyncio.create_task(arun(prepared.conninfo, Job("select n from own", id="j", kind=kind)))
        waiting = (
            "select pid from pg_stat_activity where application_name = 'pgbg: launching' and wait_event_type = 'Lock'"
        )
        [(pid,)] = await eventually(lambda: prepared.sql(waiting), "the statement is looked up")
        prepared.terminate([pid])
        holder.execute("rollback")
        assert (await within(running)).row_count == 100


@pytest.mark.parametrize("work", WORKS)
@pytest.mark.parametrize("who", ["caller", "another process"])
async def test_cancelled(prepared: Watched, work: str, who: str) -> None:
    with held(prepared) as release:
        running = asyncio.create_task(arun(prepared.conninfo, Job(WORKS[work], id="j")))
        await in_the_middle(prepared)
        if who == "caller":
            running.cancel()
        else:
            async with Launcher(prepared.conninfo) as other:
                assert await within(other.cancel("j")) == "cancelled"
            release()
        end = await ended(running)
    expected = asyncio.CancelledError if who == "caller" else errors.JobCancelled
    assert isinstance(end, expected), end
    assert prepared.states() == {"j": "cancelled"}
    assert prepared.effects() == (2 if work == "call" else 0)
    await eventually(lambda: not prepared.workers(), "no worker is left")
    assert prepared.value("select count(*) from pg_index where indisvalid and indrelid = 'own'::regclass") == 0
    with pytest.raises(errors.JobCancelled):
        await within(arun(prepared.conninfo, Job(WORKS[work], id="j")))


@pytest.mark.parametrize("work", WORKS)
@pytest.mark.parametrize("verified", [False, True])
async def test_server_restarted(own_db: Callable[..., Watched], work: str, verified: bool) -> None:
    """An immediate restart leaves no worker, no supervisor and no word: only a verify_sql can tell."""
    db = prepare(own_db())
    verify = {"vacuum": "select true", "index": None, "call": "select true"}[work] if verified else None
    job = Job(WORKS[work], id="j", verify_sql=verify)
    with held(db):
        running = asyncio.create_task(arun(db.conninfo, job))
        await in_the_middle(db)
        db.close()
        await asyncio.to_thread(db.server.restart, "immediate")
    end = await ended(running)
    done = 2 if work == "call" else 0
    assert db.effects() == done
    if work == "index":
        # The catalog tells that it was not built, so it is launched again, and meets what the first build left.
        assert isinstance(end, errors.WorkerError), end
        assert end.sqlstate in ("42P07", "23505")
        assert "DROP INDEX CONCURRENTLY public.ux;" in str(end)
    elif verified:
        assert isinstance(end, Outcome), end
        assert end.proof == "verify_sql"
    else:
        assert isinstance(end, errors.OutcomeUnknown), end
        assert db.states() == {"j": "unknown"}
        assert isinstance(await ended(asyncio.create_task(arun(db.conninfo, job))), errors.OutcomeUnknown)
    assert db.effects() == done, "nothing is launched again that cannot be told"


async def test_cancel_of_a_job_whose_supervisor_is_gone_says_that_nobody_knows(prepared: Watched) -> None:
    prepared.let_supervisors_die()
    with held(prepared):
        running = asyncio.create_task(arun(prepared.conninfo, Job(WORKS["call"], id="j")))
        await in_the_middle(prepared)
        # The supervisor holds the locks; on the stand-in's 1.9 surface it bears no name.
        prepared.sql(
            "select pg_terminate_backend(pid) from (select distinct pid from pg_locks where locktype = 'advisory'"
            " and database = (select oid from pg_database where datname = current_database())) as supervisor"
        )
        async with Launcher(prepared.conninfo) as other:
            with pytest.raises(errors.OutcomeUnknown):
                await within(other.cancel("j"))
    assert isinstance(await ended(running), errors.OutcomeUnknown)
    await eventually(lambda: not prepared.workers(), "no worker is left")
    assert prepared.effects() == 2


async def test_newer_generation_ends_an_older_one_that_is_told_of(prepared: Watched) -> None:
    """The older worker is signalled, not its supervisor: so the older job is known to be cancelled."""
    older = asyncio.create_task(
        arun(prepared.conninfo, Job("call steps('old', 1000, 0)", id="s#0", series="s", generation=0))
    )
    await eventually(prepared.effects, "the older one is at work")
    await within(arun(prepared.conninfo, Job("vacuum own", id="s#1", series="s", generation=1)))
    assert isinstance(await ended(older), errors.Superseded)
    assert prepared.states() == {"s#0": "cancelled", "s#1": "committed"}
    assert prepared.effects() < 1000


async def test_setting_that_the_server_refuses_leaves_no_claim(prepared: Watched) -> None:
    with pytest.raises(errors.InvalidJob) as caught:
        await within(arun(prepared.conninfo, Job("vacuum own", id="j", settings={"work_mem": "lots"})))
    assert caught.value.sqlstate == "22023"
    assert (await within(arun(prepared.conninfo, Job("vacuum own", id="j")))).launched


async def test_role_that_may_not_launch_leaves_no_claim(prepared: Watched) -> None:
    """Its worker starts as the role, which needs the extension's functions; one that has them runs it."""
    prepared.role("pgbg_plain", "nologin", [])
    prepared.sql(f"grant pgbg_plain to {APP}")
    prepared.sql("alter table own owner to pgbg_plain")
    try:
        with pytest.raises(errors.WorkerError) as caught:
            await within(arun(prepared.conninfo, Job("vacuum own", id="j", role="pgbg_plain")))
        assert caught.value.sqlstate == "42501"
        assert prepared.states() == {"j": "failed"}
        prepared.sql("grant pgbackground_role to pgbg_plain")
        assert (await within(arun(prepared.conninfo, Job("vacuum own", id="j", role="pgbg_plain")))).launched
    finally:
        prepared.sql("drop table own")
        prepared.sql("drop owned by pgbg_plain")
        prepared.sql("drop role pgbg_plain")


async def test_search_path_of_the_job(prepared: Watched) -> None:
    """The statement is read as its worker reads it, and a result with a type of that schema is read to its end."""
    prepared.sql("create schema app")
    prepared.sql(f"grant usage on schema app to {APP}")
    prepared.sql("create type app.mood as enum ('fine')")
    prepared.sql("create function app.f() returns app.mood language sql as $$ select 'fine'::app.mood $$")
    prepared.sql("create procedure app.p() language plpgsql as $$ begin commit; end $$")
    app = {"search_path": "app"}
    assert (await within(arun(prepared.conninfo, Job("call p()", settings=app)))).launched
    # The stand-in's own reader does not find a type in another schema than its own.
    for kind in () if prepared.server.is_standin else ("supervised", "session"):
        outcome = await within(arun(prepared.conninfo, Job("select f()", settings=app, kind=kind)))
        assert outcome.row_count == 1


async def test_invalid_index_is_named_and_dropped_when_asked(prepared: Watched) -> None:
    job = Job("create unique index concurrently ux on own (n)", id="j", drop_invalid_index=True)
    with pytest.raises(errors.WorkerError) as caught:
        await within(arun(prepared.conninfo, job))
    assert caught.value.sqlstate == "23505"
    assert "DROP INDEX CONCURRENTLY public.ux;" in str(caught.value)
    prepared.sql("truncate own")
    prepared.sql("insert into own values (1), (2)")
    seen = Recorder()
    assert (await within(arun(prepared.conninfo, job, observer=seen))).launched
    assert "dropped_invalid_index" in seen.kinds()
    assert prepared.value("select indisvalid from pg_index where indexrelid = 'ux'::regclass") is True


async def test_valid_index_is_never_dropped(prepared: Watched) -> None:
    prepared.sql("create index ux on own (n)")
    before = prepared.value("select 'ux'::regclass::oid")
    with pytest.raises(errors.WorkerError) as caught:
        await within(arun(prepared.conninfo, Job("create index concurrently ux on own (n)", drop_invalid_index=True)))
    assert caught.value.sqlstate == "42P07"
    assert prepared.value("select 'ux'::regclass::oid") == before


@pytest.mark.real
async def test_four_slots_twenty_jobs_four_processes(own_db: Callable[..., Watched]) -> None:
    """Processes that know nothing of one another: no supervisor keeps a slot that its own worker waits for."""
    db = own_db(max_worker_processes=4)
    db.sql(PROCEDURE)
    number = count(5, 25)
    async with contextlib.AsyncExitStack() as stack:
        children = [await stack.enter_async_context(launching_process(db.conninfo)) for _ in range(4)]
        ids = [[uuid.uuid4().hex for _ in range(number)] for _ in children]
        answers = [
            child.run({"sql": f"call steps('{name}', 2, 0)", "id": name})
            for child, names in zip(children, ids, strict=True)
            for name in names
        ]
        told = await within(asyncio.gather(*answers), 240)
    assert [answer.get("error") for answer in told] == [None] * len(told)
    assert db.effects_by_job() == {name: 2 for names in ids for name in names}


async def test_cancel_all_spares_supervisors(prepared: Watched) -> None:
    """The extension's cancel_all would hit the supervisor, and nobody could tell how its worker ended."""
    async with Launcher(prepared.conninfo) as launcher:
        running = asyncio.create_task(launcher.run(Job("call steps('j', 1000, 0)", id="j")))
        await eventually(prepared.effects, "the job is at work")
        assert await within(launcher.cancel_all()) == 0
        running.cancel()
        assert isinstance(await ended(running), asyncio.CancelledError)
    assert prepared.states() == {"j": "cancelled"}
    assert prepared.effects() < 1000


@pytest.mark.parametrize("timeout", [0.8])
async def test_deadline(prepared: Watched, timeout: float) -> None:
    with pytest.raises(errors.DeadlinePassed):
        await within(arun(prepared.conninfo, call(1000, id="j", timeout=timeout)))
    await eventually(lambda: not prepared.workers(), "no worker is left")
    assert prepared.states() == {"j": "cancelled"}


async def test_if_not_exists_does_not_pass_an_invalid_index_off_as_built(prepared: Watched) -> None:
    with pytest.raises(errors.WorkerError):
        await within(arun(prepared.conninfo, Job("create unique index concurrently ux on own (n)")))
    prepared.sql("truncate own")
    job = Job("create unique index concurrently if not exists ux on own (n)", drop_invalid_index=True)
    await within(arun(prepared.conninfo, job))
    assert prepared.value("select indisvalid from pg_index where indexrelid = 'ux'::regclass") is True


async def test_prune_leaves_the_claim_of_a_job_at_work(prepared: Watched) -> None:
    with held(prepared) as release:
        running = asyncio.create_task(arun(prepared.conninfo, Job("vacuum own", id="j")))
        await in_the_middle(prepared)
        prepared.sql("select pgbg.prune('0 s')")
        release()
        assert (await within(running)).launched
    assert prepared.states() == {"j": "committed"}


async def test_same_id_in_two_databases(
    prepared: Watched, fresh_database: Callable[..., Database], server: Server
) -> None:
    """Markers are of one database: an equal job next door neither holds this one up nor is cancelled with it."""
    other = fresh_database(server)
    with contextlib.closing(other.connect()) as conn:
        conn.execute("create table own ()")
        conn.execute(f"alter table own owner to {APP}")
        with held(prepared) as release:
            first = asyncio.create_task(arun(prepared.conninfo, Job("vacuum own", id="j")))
            await in_the_middle(prepared)
            assert (await within(arun(other.conninfo_as(APP), Job("vacuum own", id="j")))).launched
            release()
            assert (await within(first)).launched
