"""A job of kind receipt below a supervisor: how it ended stands in the history, though nobody waited for it."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from pgbg_orchestration import Job, Launcher, arun, errors
from pgbg_orchestration.outcome import EventKind
from tests.core.kit import APP, Recorder, Watched, cancelled, effect, eventually, launching_process, within

pytestmark = pytest.mark.any_surface

GATE = "select pg_advisory_xact_lock_shared(4242)"


@pytest.fixture
def gate(db: Watched) -> Iterator[psycopg.Connection]:
    """What jobs wait at with ``GATE``, until its connection is closed."""
    connection = db.database.connect()
    connection.execute("select pg_advisory_lock(4242)")
    yield connection
    connection.close()


def history(db: Watched, job_id: str) -> dict[str, Any]:
    names = (
        "state", "attempt", "row_count", "command_tag", "sqlstate", "message", "detail", "hint", "context",
        "seconds", "constraint_name", "worker_pid",
    )  # fmt: skip
    row = db.sql(
        "select j.state, j.attempt, j.row_count, j.command_tag, j.sqlstate, j.message, j.detail, j.hint, j.context,"
        " extract(epoch from j.ended_at - j.started_at)::float8, h.constraint_name, j.worker_pid"
        " from pgbg.jobs j join pgbg.job h using (job_id) where j.job_id = %s",
        job_id,
    )[0]
    return dict(zip(names, row, strict=True))


async def settled(db: Watched, job_id: str) -> dict[str, Any]:
    """What the history has of a job, once nobody of it is at work and its end is written down."""

    def is_settled() -> bool:
        written = db.value("select outcome is not null from pgbg.job where job_id = %s", job_id)
        return bool(written) and not supervisors(db)

    await eventually(is_settled, f"the end of {job_id} in the history")
    return history(db, job_id)


def supervisors(db: Watched) -> list[int]:
    query = "select pid from pg_stat_activity where application_name like 'pgbg supervises%' and state <> 'idle'"
    return [int(pid) for (pid,) in db.sql(query)]


async def supervisors_at_work(db: Watched) -> list[int]:
    """The supervisors that have come back from their launch, in which they bear no name."""
    return await eventually(lambda: supervisors(db), "a supervisor at work")


async def left(db: Watched, gate: psycopg.Connection, **job: Any) -> None:
    """Launch a job that waits at the gate, kill its launching process, and open the gate."""
    async with launching_process(db.conninfo) as child:
        child.run(job, supervisor=True)
        await db.at_work(job["id"])
        child.signal(signal.SIGKILL)
        await child.killed()
    assert db.states()[job["id"]] == "running"
    gate.close()


@pytest.mark.parametrize(
    ("sql", "tag", "rows"),
    [
        (f"{GATE}; insert into effects (job) select 'j' from generate_series(1, 3)", "INSERT", 3),
        (f"{GATE}; {effect('j')}; select repeat('x', 100) from generate_series(1, 3000)", "SELECT", 3000),
        (f"{GATE}; {effect('j')}; create table made as select 1 from generate_series(1, 5)", "CREATE TABLE AS", 5),
        (f"{GATE}; {effect('j')}; set local work_mem = '8MB'", "SET", 0),
    ],
)
async def test_commit_that_nobody_waited_for(
    db: Watched, gate: psycopg.Connection, sql: str, tag: str, rows: int
) -> None:
    db.sql(f"grant create on schema public to {APP}")
    await left(db, gate, id="j", sql=sql)
    seen = await settled(db, "j")
    assert (seen["state"], seen["command_tag"], seen["row_count"]) == ("committed", tag, rows)
    assert seen["worker_pid"] == db.value("select distinct pid from effects")
    assert seen["seconds"] > 0
    assert (await within(arun(db.conninfo, Job(sql, id="j")))).launched is False


@pytest.mark.majors
async def test_failure_that_nobody_waited_for(db: Watched, gate: psycopg.Connection) -> None:
    raised = "raise 'it is wrong' using errcode = 'ZZ001', detail = 'very', hint = 'mend it'"
    sql = f"{effect('j')}; {GATE}; do $$begin {raised}; end$$; select 1"
    await left(db, gate, id="j", sql=sql)
    seen = await settled(db, "j")
    told = [seen[name] for name in ("state", "sqlstate", "message", "detail", "hint", "attempt")]
    assert told == ["failed", "ZZ001", "it is wrong", "very", "mend it", 1]
    assert "inline_code_block" in seen["context"]
    assert (db.effects(), db.receipts()) == (0, set())
    with pytest.raises(errors.WorkerError):
        await within(arun(db.conninfo, Job(sql, id="j")))
    assert history(db, "j")["attempt"] == 2, "nothing of it was committed, so a later call does run it"


async def test_constraint_that_fails_at_the_commit(db: Watched, gate: psycopg.Connection) -> None:
    db.sql("create table parent (n int primary key)")
    db.sql("create table child (n int constraint has_parent references parent deferrable initially deferred)")
    db.sql(f"grant all on parent, child to {APP}")
    await left(db, gate, id="j", sql=f"{GATE}; insert into child values (7)")
    seen = await settled(db, "j")
    assert (seen["state"], seen["sqlstate"]) == ("failed", "23503")
    assert "(n)=(7)" in seen["detail"]


async def test_rows_are_kept_and_counted(db: Watched, gate: psycopg.Connection) -> None:
    await left(db, gate, id="j", sql=f"{GATE}; insert into effects (job) values ('j'), ('j') returning n", fetch=True)
    seen = await settled(db, "j")
    assert (seen["command_tag"], seen["row_count"]) == ("INSERT", 2)
    async with Launcher(db.conninfo) as launcher:
        assert [tuple(row) for row in (await launcher.rows("j"))[0]] == [(1,), (1,)]


async def test_details_that_are_withheld(db: Watched, gate: psycopg.Connection) -> None:
    await left(db, gate, id="j", sql=f"{GATE}; do $$begin raise 'secret' using detail = 'secret'; end$$",
               redact_details=True)  # fmt: skip
    seen = await settled(db, "j")
    assert seen["sqlstate"] == "P0001"
    assert "secret" not in str(seen)


@pytest.mark.majors
async def test_call_that_waits_is_told_the_same(db: Watched) -> None:
    recorder = Recorder()
    job = Job(f"{effect('j')}; {effect('j', 2)}", id="j")
    outcome = await within(arun(db.conninfo, job, supervisor=True, observer=recorder))
    assert (outcome.launched, outcome.command_tag, outcome.row_count, outcome.proof) == (True, "INSERT", 1, "receipt")
    assert db.effects() == 2
    assert outcome.worker_pid == db.value("select distinct pid from effects")
    assert (await within(arun(db.conninfo, job, supervisor=True))).launched is False
    with pytest.raises(errors.WorkerError) as caught:
        await within(arun(db.conninfo, Job("select 1; select 1 / 0", id="k"), supervisor=True))
    assert caught.value.sqlstate == "22012"
    assert caught.value.data_state == "Nothing of this job is committed."
    assert EventKind.SESSION_LOST not in recorder.kinds()


async def test_worker_is_as_any_other(db: Watched) -> None:
    """Its label, its settings and its role: what the supervisor has of its own does not reach it."""
    db.role("pgbg_etl", "nologin", [])
    db.sql(f"grant pgbg_etl to {APP}")
    db.sql("grant insert on effects to pgbg_etl")
    db.sql("create table told (name text, user_name name, mem text, timeout text)")
    db.sql("grant insert on told to pgbg_etl")
    text = (
        "insert into told values (current_setting('application_name'), current_user, current_setting('work_mem'),"
        " current_setting('statement_timeout'))"
    )
    job = Job(text, id="j", label="daily", role="pgbg_etl", settings={"work_mem": "7MB", "statement_timeout": "50s"})
    await within(arun(db.conninfo, job))
    await within(arun(db.conninfo, Job(text, **{**job_options(job), "id": "k"}), supervisor=True))
    plain, watched = db.sql("select regexp_replace(name, '[0-9]+$', ''), user_name, mem, timeout from told")
    assert plain == watched
    db.sql("drop owned by pgbg_etl")
    db.sql("drop role pgbg_etl")


def job_options(job: Job) -> dict[str, Any]:
    return {"label": job.label, "role": job.role, "settings": job.settings}


@pytest.mark.parametrize("fails", [False, True])
async def test_killed_supervisor_leaves_what_the_receipt_tells(
    db: Watched, gate: psycopg.Connection, fails: bool
) -> None:
    """The proof is the worker's: without its supervisor it commits, or is lost as one without any."""
    db.let_supervisors_die()
    sql = f"{effect('j')}; {GATE}" + ("; select 1 / 0" if fails else "")
    running = asyncio.create_task(arun(db.conninfo, Job(sql, id="j"), supervisor=True, on_cancel="leave"))
    await db.at_work("j")
    db.terminate(await supervisors_at_work(db))
    await eventually(lambda: not supervisors(db), "the end of the supervisor")
    gate.close()
    if not fails:
        outcome = await within(running)
        assert (outcome.launched, db.effects()) == (True, 1)
        return
    # It is launched once more, as a lost worker's job is, and that one's failure is told.
    with pytest.raises(errors.WorkerError) as caught:
        await within(running)
    assert (caught.value.sqlstate, history(db, "j")["attempt"], db.effects()) == ("22012", 2, 0)


@pytest.mark.majors
@pytest.mark.parametrize("how", ["job", "supervisor", "caller"])
async def test_cancel_ends_the_work(db: Watched, gate: psycopg.Connection, how: str) -> None:
    job = Job(f"{effect('j')}; {GATE}", id="j")
    running = asyncio.create_task(arun(db.conninfo, job, supervisor=True))
    await db.at_work("j")
    if how == "job":
        async with Launcher(db.conninfo) as launcher:
            assert await within(launcher.cancel("j")) == "cancelled"
        with pytest.raises(errors.JobCancelled):
            await within(running)
    elif how == "supervisor":
        db.sql("select pg_cancel_backend(pid) from unnest(%s::int[]) pid", await supervisors_at_work(db))
        with pytest.raises(errors.WorkerError) as caught:
            await within(running)
        assert caught.value.sqlstate == "57014"
    else:
        assert isinstance(await cancelled(running), asyncio.CancelledError)
    assert db.effects() == 0
    assert db.states()["j"] == ("failed" if how == "supervisor" else "cancelled")


async def test_end_that_is_being_written_down_is_not_lost(db: Watched, gate: psycopg.Connection) -> None:
    """Between the end of the worker and the word of its supervisor, which waits here for a row that somebody holds."""
    async with launching_process(db.conninfo) as child:
        child.run({"id": "j", "sql": f"{GATE}; select 1 / 0"}, supervisor=True)
        await db.at_work("j")
        child.signal(signal.SIGKILL)
        await child.killed()
    db.sql("update pgbg.job set launched_at = launched_at - interval '1 hour'")
    with db.database.connect() as holder, holder.transaction():
        holder.execute("select from pgbg.job for update")
        gate.close()
        await eventually(
            lambda: db.value(
                "select count(*) from pg_stat_activity where wait_event_type = 'Lock' and query ~ 'watch'"
            ),
            "the supervisor waits to write",
        )
        assert db.states()["j"] == "waiting"
    assert (await settled(db, "j"))["state"] == "failed"


@pytest.mark.servers("real", "embedded")
async def test_two_slots_are_needed(own_db: Any) -> None:
    """Without the second one nothing is launched, and no attempt is used up."""
    db = own_db(max_worker_processes=1, settings={"max_logical_replication_workers": 0})
    recorder = Recorder()
    with pytest.raises(errors.NoWorkerSlot):
        await within(arun(db.conninfo, Job(effect("j"), id="j"), supervisor=True, slot_timeout=2, observer=recorder))
    assert EventKind.WAITING_FOR_SLOT in recorder.kinds()
    assert db.effects() == 0


@pytest.mark.parametrize("given", [{"kind": "session"}, {}])
async def test_what_a_supervisor_cannot_do_is_refused(db: Watched, given: dict[str, Any]) -> None:
    with pytest.raises(errors.InvalidJob):
        await within(arun(db.conninfo, Job("select 1", **given), supervisor=True, notices=not given))


async def test_supervised_job_has_its_supervisor_anyway(db: Watched) -> None:
    db.sql("create table own (n int)")
    db.sql(f"alter table own owner to {APP}")
    outcome = await within(arun(db.conninfo, Job("vacuum own"), supervisor=True))
    assert outcome.command_tag == "VACUUM"
