"""What people see of a worker: the pid whose cancel ends the SQL, and a label by which they know it."""

from __future__ import annotations

import asyncio

import pytest

from pgbg_orchestration import Job, Launcher, errors
from pgbg_orchestration.labels import NAME_BYTES, shown
from tests.core.kit import Recorder, Watched, effect, ended, eventually, within

REAL = pytest.mark.servers("real", "embedded")
WORKERS = (
    "select pid, application_name from pg_stat_activity where backend_type = 'pg_background' and datname = %s"
    " and query ~ 'pg_sleep' and not starts_with(application_name, 'pgbg supervises: ')"
)


async def names(db: Watched, number: int) -> list[str]:
    """The names of the workers whose own SQL is at work."""

    def look() -> list[str]:
        found = [str(name) for _, name in db.sql(WORKERS, db.database.name)]
        return found if len(found) == number else []

    return await eventually(look, f"{number} workers at work")


@REAL
@pytest.mark.parametrize("kind", ["receipt", "supervised", "session"])
@pytest.mark.parametrize("start", ["etl.", "été…"], ids=["ascii", "escaped"])
async def test_labels_that_differ_at_their_end_are_told_apart(db: Watched, kind: str, start: str) -> None:
    long = f"{start}warehouse_of_everything.load_all_the_facts_of_the_day"
    jobs = [Job("select pg_sleep(2)", id=f"{long}.{n}", kind=kind) for n in ("a", "b")]
    async with Launcher(db.conninfo) as launcher:
        tasks = [asyncio.create_task(launcher.run(job)) for job in jobs]
        seen = await names(db, 2)
        await within(asyncio.gather(*tasks))
    assert len({name[:NAME_BYTES] for name in seen}) == 2
    ends = ["of_the_day.a", "of_the_day.b"] if kind == "receipt" else ["day.a", "day.b"]
    for end in ends:
        assert any(end in name for name in seen), (end, seen)


@REAL
@pytest.mark.parametrize("kind", ["supervised", "session"])
async def test_a_short_label_is_seen_whole(db: Watched, kind: str) -> None:
    async with Launcher(db.conninfo) as launcher:
        task = asyncio.create_task(launcher.run(Job("select pg_sleep(1)", id="j", label="nightly load é", kind=kind)))
        (name,) = await names(db, 1)
        await within(task)
    assert name.endswith(shown("nightly load é", server_version=db.admin.info.server_version))


@REAL
async def test_the_pid_that_is_shown_ends_the_sql(db: Watched) -> None:
    told = Recorder()
    async with Launcher(db.conninfo) as launcher:
        job = Job(f"do $$begin {effect('j')}; perform pg_sleep(60); end$$", id="j", kind="supervised")
        task = asyncio.create_task(launcher.run(job, observer=told))
        pid = await db.at_work("j")
        await eventually(lambda: "at_work" in told.kinds(), "it is told who is at work")
        assert {event.data["pid"] for event in told.events if event.kind == "at_work"} == {pid}
        assert {event.data["pid"] for event in told.events if event.kind == "launched"} == {None}
        assert db.value("select worker_pid from pgbg.jobs") == pid
        assert db.value("select pg_cancel_backend(%s)", pid)
        end = await ended(task)
    assert isinstance(end, errors.WorkerError)
    assert end.sqlstate == "57014"
    assert isinstance(end, errors.WorkerError)
    assert "no timeout in force was as short" in (end.todo or "")
    assert db.effects("j") == 0
    assert db.sql("select state, worker_pid from pgbg.jobs") == [("failed", pid)]
    assert db.value("select count(*) from pgbg.receipt") == 0


async def supervisor_of(db: Watched, name: str) -> int:
    """The supervisor, once its worker is named in the receipt."""
    query = "select supervisor_pid from pgbg.receipt where job_id = %s and worker_pid is not null"
    return int((await eventually(lambda: db.sql(query, name), "a supervisor"))[0][0])


@REAL
@pytest.mark.parametrize("catches", [False, True], ids=["ends", "goes on"])
async def test_a_cancelled_supervisor(db: Watched, catches: bool) -> None:
    """The cancel is handed on, and the job ends as its worker does."""
    caught = "begin perform pg_sleep(3); exception when query_canceled then null; end;"
    body = caught if catches else "perform pg_sleep(60);"
    async with Launcher(db.conninfo) as launcher:
        job = Job(f"do $$begin {effect('j')}; {body} end$$", id="j", kind="supervised")
        task = asyncio.create_task(launcher.run(job))
        assert db.value("select pg_cancel_backend(%s)", await supervisor_of(db, "j"))
        end = await ended(task)
    if catches:
        assert not isinstance(end, BaseException)
        assert (end.proof, db.effects("j"), db.receipts()) == ("receipt", 1, {"j"})
    else:
        assert isinstance(end, errors.WorkerError)
        assert (end.sqlstate, db.effects("j"), db.states()) == ("57014", 0, {"j": "failed"})
