"""SQL that can carry no receipt, below a supervisor: the outcome that is told is the one that happened."""

from __future__ import annotations

import asyncio
import itertools
import uuid
from typing import Any

import pytest

from pgbg_orchestration import Job, Kind, Launcher, arun, errors
from pgbg_orchestration.ledger.ledger import Ledger
from pgbg_orchestration.outcome import EventKind
from pgbg_orchestration.postgres import launch_message
from pgbg_orchestration.postgres.pg_background import Handle
from pgbg_orchestration.testing import faults
from tests.core.kit import APP, Recorder, Watched, cancelled, eventually, within

PROCEDURE = """
create procedure steps(job text, n int, fails_at int, naps float default 0.05) language plpgsql as $$
begin
    for i in 1 .. n loop
        if i = fails_at then
            raise exception 'step % fails', i using errcode = '22012', detail = 'as it was told to';
        end if;
        insert into effects (job, n) values (job, i);
        commit;
        perform pg_sleep(naps);
    end loop;
end $$
"""


@pytest.fixture
def steps(db: Watched) -> Watched:
    """The watched database with a procedure that commits at each step, and a table that the login owns."""
    db.sql(PROCEDURE)
    db.sql("create table own (n int)")
    db.sql("insert into own select 1 from generate_series(1, 100)")
    db.sql(f"alter table own owner to {APP}")
    db.sql(f"grant create on schema public to {APP}")
    return db


def call(n: int, fails_at: int = 0, naps: float = 0.05, **given: object) -> Job:
    name = uuid.uuid4().hex
    given = {"id": name, **given}
    return Job(f"call steps('{given['id']}', {n}, {fails_at}, {naps})", **given)  # type: ignore[arg-type]


async def supervisor(db: Watched) -> int:
    """The pid of the supervisor, once its worker has made its first step."""

    def look() -> int | None:
        if not db.effects():
            return None
        found = db.sql("select pid from pg_stat_activity where application_name like 'pgbg supervises%'")
        return int(found[0][0]) if found else None

    pid = await eventually(look, "a supervisor and a step of its worker")
    assert pid is not None
    return pid


@pytest.mark.majors
@pytest.mark.parametrize(
    ("sql", "tag"),
    [
        ("vacuum (analyze) own", "VACUUM"),
        ("create index concurrently ix on own (n)", "CREATE INDEX"),
        ("call steps('all', 5, 0)", "CALL"),
    ],
)
async def test_such_a_statement_is_supervised_and_proven(steps: Watched, sql: str, tag: str) -> None:
    job = Job(sql, id=uuid.uuid4().hex)
    assert job.kind is Kind.SUPERVISED
    outcome = await within(arun(steps.conninfo, job))
    assert (outcome.launched, outcome.command_tag) == (True, tag)
    assert (await within(arun(steps.conninfo, job))).launched is False
    assert steps.states()[str(job.id)] == "committed"


@pytest.mark.parametrize("kind", ["session", "supervised"])
async def test_rows_that_cannot_be_read_are_counted(steps: Watched, kind: str) -> None:
    """No column definition list can name the type void: what is read is the statements' tags."""
    outcome = await within(arun(steps.conninfo, Job("select pg_sleep(0)", kind=kind)))
    assert (outcome.command_tag, outcome.row_count) == ("SELECT", 1)


@pytest.mark.majors
async def test_procedure_that_fails_at_its_sixth_step(steps: Watched) -> None:
    job = call(10, fails_at=6)
    with pytest.raises(errors.WorkerError) as caught:
        await within(arun(steps.conninfo, job))
    assert caught.value.sqlstate == "22012"
    assert caught.value.fields.detail == "as it was told to"
    assert "what it had committed stays" in caught.value.data_state
    assert steps.effects() == 5
    assert steps.states()[str(job.id)] == "failed"


async def test_unique_index_that_fails_says_why_and_what_it_leaves(steps: Watched) -> None:
    with pytest.raises(errors.WorkerError) as caught:
        await within(arun(steps.conninfo, Job("create unique index concurrently ux on own (n)")))
    assert caught.value.sqlstate == "23505"
    assert "invalid index" in str(caught.value)


@pytest.mark.majors
async def test_cancel_reaches_the_worker_below(steps: Watched) -> None:
    job = call(1000)
    running = asyncio.create_task(arun(steps.conninfo, job))
    await supervisor(steps)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await within(running)
    done = steps.effects()
    assert steps.states()[str(job.id)] == "cancelled"
    with pytest.raises(errors.JobCancelled):
        await within(arun(steps.conninfo, job))
    assert steps.effects() == done < 1000


@pytest.mark.majors
async def test_launcher_that_went_away_is_replaced_by_one_that_attaches(steps: Watched) -> None:
    job = call(20)
    running = asyncio.create_task(arun(steps.conninfo, job, on_cancel="leave"))
    await supervisor(steps)
    running.cancel()
    await asyncio.wait({running})
    outcome = await within(arun(steps.conninfo, job))
    assert outcome.launched is False
    assert steps.effects() == 20


@pytest.mark.parametrize("verify_sql", [None, "select count(*) = 20 from effects", "select false"])
async def test_killed_supervisor_leaves_what_can_be_told(steps: Watched, verify_sql: str | None) -> None:
    steps.let_supervisors_die()
    job = call(20, verify_sql=verify_sql)
    running = asyncio.create_task(arun(steps.conninfo, job))
    steps.sql("select pg_terminate_backend(%s)", await supervisor(steps))
    await within(asyncio.wait({running}))
    if verify_sql is None:
        assert isinstance(running.exception(), errors.OutcomeUnknown)
        assert steps.effects() == 20, "its worker outlives it, and is waited for before anything is said"
        assert steps.states()[str(job.id)] == "unknown"
        with pytest.raises(errors.OutcomeUnknown):
            await within(arun(steps.conninfo, job))
        assert steps.effects() == 20, "it is never launched again without a verify_sql"
        return
    outcome = running.result()
    assert steps.effects() == (40 if verify_sql == "select false" else 20)
    assert outcome.proof == ("receipt" if verify_sql == "select false" else "verify_sql")
    assert steps.states()[str(job.id)] == "committed"


RENAMED = """
create procedure renamed(job text, n int) language plpgsql as $$
begin
    perform set_config('application_name', 'a name of my own', false);
    call steps(job, n, 0);
end $$
"""


async def followed(db: Watched) -> int:
    """The pid of the worker that a supervisor has named in the claimed receipt."""

    def look() -> int | None:
        found = db.sql("select worker_pid from pgbg.receipt where status = 'launching' and worker_pid is not null")
        return int(found[0][0]) if found and db.effects() else None

    pid = await eventually(look, "a worker that its supervisor has named")
    assert pid is not None
    return pid


@pytest.mark.parametrize("verify_sql", [None, "select false"])
async def test_sql_that_takes_its_marker_off_is_found_by_its_process(steps: Watched, verify_sql: str | None) -> None:
    """Its supervisor's death leaves it running: it is waited for, and nothing is launched beside it."""
    steps.let_supervisors_die()
    steps.sql(RENAMED)
    running = asyncio.create_task(arun(steps.conninfo, Job("call renamed('j', 80)", id="j", verify_sql=verify_sql)))
    await followed(steps)
    steps.sql("select pg_terminate_backend(%s)", await supervisor(steps))
    await within(asyncio.wait({running}))
    if verify_sql is None:
        assert isinstance(running.exception(), errors.OutcomeUnknown)
        assert steps.effects() == 80
    else:
        assert running.result().launched
        in_order = [pid for (pid,) in steps.sql("select pid from effects order by ctid")]
        assert len(in_order) == 160
        assert len(set(in_order[:80])) == len(set(in_order[80:])) == 1, "one after the other"


async def test_cancel_reaches_sql_that_took_its_marker_off(steps: Watched) -> None:
    steps.sql(RENAMED)
    running = asyncio.create_task(arun(steps.conninfo, Job("call renamed('j', 1000)", id="j")))
    pid = await followed(steps)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await within(running)
    assert steps.states() == {"j": "cancelled"}
    assert steps.value("select count(*) from pg_stat_activity where pid = %s and state = 'active'", pid) == 0
    assert steps.effects() < 1000


async def test_several_statements_in_one_transaction(steps: Watched) -> None:
    job = Job("create table later (a int); insert into later values (1); select a from later", kind="supervised")
    assert (await within(arun(steps.conninfo, job))).launched
    assert steps.value("select count(*) from later") == 1


async def test_output_that_nobody_reads(steps: Watched) -> None:
    job = Job("select repeat('x', 100) from generate_series(1, 100000)", kind="supervised")
    assert (await within(arun(steps.conninfo, job))).row_count == 100_000


async def test_newer_generation_ends_a_worker_whose_supervisor_is_gone(steps: Watched) -> None:
    steps.let_supervisors_die()
    series = uuid.uuid4().hex
    older = call(1000, id=f"{series}#0", series=series, generation=0)
    first = asyncio.create_task(arun(steps.conninfo, older, on_cancel="leave"))
    steps.sql("select pg_terminate_backend(%s)", await supervisor(steps))
    first.cancel()
    await asyncio.wait({first})
    await within(arun(steps.conninfo, Job("vacuum own", series=series, generation=1)))
    assert steps.effects() < 1000
    assert steps.workers() == []


async def test_more_jobs_than_pairs_of_slots(steps: Watched) -> None:
    jobs = [call(1, naps=(n % 3) / 20) for n in range(20)]
    async with Launcher(steps.conninfo) as launcher:
        outcomes = await within(asyncio.gather(*map(launcher.run, jobs)))
    assert [outcome.launched for outcome in outcomes] == [True] * 20
    assert steps.effects_by_job() == {job.id: 1 for job in jobs}


@pytest.mark.real
@pytest.mark.parametrize("slots", [4, 8])
async def test_few_slots_and_twenty_supervised_jobs(own_db: object, slots: int) -> None:
    """Four, and PostgreSQL's default, which other background processes share."""
    db: Watched = own_db(max_worker_processes=slots)  # type: ignore[operator]
    db.sql(PROCEDURE)
    jobs = [call(1) for _ in range(20)]
    async with Launcher(db.conninfo) as launcher, Launcher(db.conninfo) as other:
        outcomes = await within(
            asyncio.gather(
                *(one.run(job) for one, half in ((launcher, jobs[:10]), (other, jobs[10:])) for job in half)
            ),
            180,
        )
    assert len(outcomes) == 20
    assert db.effects_by_job() == {job.id: 1 for job in jobs}


async def test_cancelled_before_its_launch_call_is_answered(db: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its handle is let go as soon as it is there: its supervisor ends with nobody to look at it, and holds nothing."""
    seen = Recorder()
    run, signal = launch_message.run, Ledger.signal
    launched, answered, detached = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def answered_late(*arguments: Any, **named: Any) -> list[Handle | launch_message.StatementFailed | None]:
        handles = await run(*arguments, **named)
        launched.set()
        await answered.wait()
        return handles

    async def signalled_late(*arguments: Any, **named: Any) -> bool:
        answered.set()
        await detached.wait()
        return await signal(*arguments, **named)

    monkeypatch.setattr(launch_message, "run", answered_late)
    monkeypatch.setattr(Ledger, "signal", signalled_late)
    faults.install(lambda point: detached.set() if point == "after_detach" else None)
    try:
        async with Launcher(db.conninfo) as launcher:
            job = Job("select pg_sleep(60)", id="j", kind="supervised")
            task = asyncio.create_task(launcher.run(job, observer=seen))
            await within(launched.wait())
            sleeps = (
                "select count(*) from pg_stat_activity where wait_event = 'PgSleep' and query like '%pg_sleep(60)%'"
            )
            await eventually(lambda: db.value(f"{sleeps} and datname = current_database()"), "its worker")
            await cancelled(task)
    finally:
        faults.install(None)
    let_go = next(event for event in seen.events if event.kind is EventKind.LET_GO)
    assert let_go.data["error"]["error"] == "JobCancelled", let_go.message
    assert db.states() == {"j": "cancelled"}


async def test_a_supervisor_looks_the_more_seldom_the_older_its_worker(db: Watched) -> None:
    db.sql("create table pauses (n serial, milliseconds int)")
    calls = [
        "",
        "select 0::bigint, 'SELECT', (select count(*) = 600 from pauses), false where $1 = 0 and $2 = 0",
        "",
        "",
        "insert into pauses (milliseconds) select $3 where $1 = 0 and $2 = 0",
    ]
    db.sql("call pgbg.await_worker('o', 'j', 1, null, %s, 0, 0, null, null, false, false)", calls)
    pauses = [int(pause) for (pause,) in db.sql("select milliseconds from pauses order by n")]
    assert pauses[:21] == [1] * 4 + [10] * 16 + [50]
    assert pauses[20:] == sorted(pauses[20:])
    age = list(itertools.accumulate(pauses))
    assert all(pause <= 50 + before / 50 for before, pause in zip(age, pauses[1:], strict=False))
    assert pauses[-1] == 2000
