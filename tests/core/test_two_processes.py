"""Two processes and one job; generations of one series; ids that stand for other SQL; one owner behind two logins."""

from __future__ import annotations

import asyncio
import signal
from typing import Any

import pytest

from pgbg_orchestration import Job, Launcher, arun, errors
from tests.core.kit import (
    Recorder,
    Watched,
    count,
    effect,
    ended,
    eventually,
    launching_process,
    seeded,
    slow,
    within,
)

pytestmark = pytest.mark.any_surface


@pytest.mark.servers("real", "embedded", "standin19")
async def test_the_same_job_at_the_same_time(db: Watched) -> None:
    chance = seeded("races")
    async with launching_process(db.conninfo) as one, launching_process(db.conninfo) as two:
        for number in range(count(20, 100)):
            job = {"sql": slow(f"j{number}", chance.choice([0, 0.01, 0.1])), "id": f"j{number}"}
            answers = [one.run(job)]
            await asyncio.sleep(chance.choice([0, chance.uniform(0, 0.02)]))
            answers.append(two.run(job))
            ends = await within(asyncio.gather(*answers))
            assert all("outcome" in end for end in ends), ends
            assert sorted(end["outcome"]["launched"] for end in ends) == [False, True], ends
            assert len({end["outcome"]["worker_pid"] for end in ends}) == 1, ends
            assert [end["outcome"]["row_count"] for end in ends if end["outcome"]["launched"]] == [1], ends
            assert db.effects(f"j{number}") == 1


@pytest.mark.servers("real", "embedded", "standin20")
async def test_many_contenders_in_every_isolation_level(db: Watched) -> None:
    """Several calls of one process and of another for each job, in mixed isolation levels."""
    chance = seeded("contenders")
    jobs = count(15, 100)
    async with launching_process(db.conninfo) as child, Launcher(db.conninfo) as launcher:
        calls: list[asyncio.Future[Any]] = []
        for number in range(jobs):
            name = f"j{number}"
            isolation = chance.choice(["read committed", "repeatable read", "serializable"])
            fields: dict[str, Any] = {"sql": slow(name, chance.choice([0, 0.05])), "id": name, "isolation": isolation}
            calls += [asyncio.ensure_future(launcher.run(Job(**fields))) for _ in range(2)]
            calls.append(child.run(fields))
        ends = await within(asyncio.gather(*calls), 180)
    assert all(not isinstance(end, dict) or "outcome" in end for end in ends), [e for e in ends if isinstance(e, dict)]
    assert db.effects_by_job() == {f"j{number}": 1 for number in range(jobs)}


@pytest.mark.servers("real", "embedded")
@pytest.mark.parametrize("on_superseded", ["cancel", "wait"])
async def test_stopped_before_launch_while_a_newer_generation_commits(db: Watched, on_superseded: str) -> None:
    async with launching_process(db.conninfo, "before_launch:stop") as old:
        answer = old.run({"sql": effect("old"), "series": "s", "generation": 1})
        await old.stopped()
        newer = Job(effect("new"), series="s", generation=2)
        outcome = await within(arun(db.conninfo, newer, on_superseded=on_superseded))  # type: ignore[arg-type]
        assert outcome.launched
        old.signal(signal.SIGCONT)
        end = await within(answer)
        assert end["error"] == "Superseded", end
    assert db.effects_by_job() == {"new": 1}


@pytest.mark.servers("real", "embedded")
@pytest.mark.parametrize("point", ["before_register", "after_register", "after_launch"])
async def test_stopped_elsewhere_while_a_newer_generation_commits(db: Watched, point: str) -> None:
    """A launched old generation may commit before the newer one; it never does after it."""
    db.sql("alter table effects add at bigint generated always as identity")
    # Of a series that is known already: a first job is registered and launched in one message, without this point.
    await within(arun(db.conninfo, Job("select 1", series="s", generation=1)))
    async with launching_process(db.conninfo, f"{point}:stop") as old:
        answer = old.run({"sql": effect("old"), "series": "s", "generation": 2})
        await old.stopped()
        await within(arun(db.conninfo, Job(effect("new"), series="s", generation=3)))
        old.signal(signal.SIGCONT)
        end = await within(answer)
    order = [job for (job,) in db.sql("select job from effects order by at")]
    if "outcome" in end:
        assert order == ["old", "new"]
    else:
        assert end["error"] == "Superseded", end
        assert order == ["new"]


async def test_newer_generation_cancels_an_older_worker(db: Watched) -> None:
    old = asyncio.create_task(arun(db.conninfo, Job(slow("old", 30), series="s", generation=1)))
    await db.at_work("s#1")
    outcome = await within(arun(db.conninfo, Job(effect("new"), series="s", generation=2)))
    assert outcome.launched
    assert isinstance(await ended(old), errors.Superseded)
    assert db.effects_by_job() == {"new": 1}
    assert db.states() == {"s#1": "cancelled", "s#2": "committed"}
    with pytest.raises(errors.Superseded):
        await within(arun(db.conninfo, Job(slow("old", 30), series="s", generation=1), retry_cancelled=True))
    assert db.effects_by_job() == {"new": 1}


async def test_newer_generation_waits_for_an_older_worker(db: Watched) -> None:
    old = asyncio.create_task(arun(db.conninfo, Job(slow("old", 1), series="s", generation=1)))
    await db.at_work("s#1")
    seen = Recorder()
    newer = Job("insert into effects select 'new', count(*) from effects", series="s", generation=2)
    await within(arun(db.conninfo, newer, on_superseded="wait", observer=seen))
    assert "waiting_for_series" in seen.kinds()
    assert (await within(old)).launched
    # It saw the older one's effect: they did not run side by side.
    assert db.sql("select job, n from effects order by n") == [("old", 1), ("new", 1)]


async def test_jobs_of_one_series_never_overlap(db: Watched) -> None:
    """Ids of their own, no generation: each registered one is newer than those before it."""
    db.sql("create table spans (job text, began timestamptz, ended timestamptz)")
    db.sql("grant insert on spans to pgbg_app")
    chance = seeded("series")
    async with Launcher(db.conninfo) as launcher:
        calls = []
        for number in range(8):
            sql = (
                f"create temp table t on commit drop as select clock_timestamp() c; select pg_sleep(0.05);"
                f" insert into spans select 'j{number}', c, clock_timestamp() from t"
            )
            calls.append(
                launcher.run(Job(sql, id=f"j{number}", series="s"), on_superseded=chance.choice(["wait", "cancel"]))
            )
        ends = await within(asyncio.gather(*calls, return_exceptions=True), 120)
    for end in ends:
        assert not isinstance(end, BaseException) or isinstance(end, errors.Superseded), repr(end)
    overlaps = db.value(
        "select count(*) from spans a join spans b on a.job < b.job and a.began < b.ended and b.began < a.ended"
    )
    assert overlaps == 0
    assert {job for (job,) in db.sql("select job from spans")} == db.receipts()


async def test_id_reused_for_other_sql(db: Watched) -> None:
    await within(arun(db.conninfo, Job(effect("a"), id="j")))
    for other in (
        Job(effect("b"), id="j"),
        Job("insert into effects values (%s)", id="j", parameters=["c"]),
    ):
        with pytest.raises(errors.JobIdReused):
            await within(arun(db.conninfo, other))
    assert db.effects_by_job() == {"a": 1}
    outcome = await within(arun(db.conninfo, Job(effect("b"), id="j"), accept_changed_sql=True))
    assert outcome.launched is False
    assert db.effects_by_job() == {"a": 1}


async def test_id_reused_for_other_parameters(db: Watched) -> None:
    sql = "insert into effects values (%s)"
    await within(arun(db.conninfo, Job(sql, id="j", parameters=["a"])))
    with pytest.raises(errors.JobIdReused):
        await within(arun(db.conninfo, Job(sql, id="j", parameters=["b"])))
    assert (await within(arun(db.conninfo, Job(sql, id="j", parameters=["a"])))).launched is False
    assert db.effects_by_job() == {"a": 1}


async def test_id_reused_while_the_first_is_at_work(db: Watched) -> None:
    first = asyncio.create_task(arun(db.conninfo, Job(slow("a", 1), id="j")))
    await db.at_work("j")
    with pytest.raises(errors.JobIdReused):
        await within(arun(db.conninfo, Job(effect("b"), id="j")))
    assert (await within(first)).launched
    assert db.effects_by_job() == {"a": 1}


@pytest.mark.servers("real", "embedded", "standin19")
async def test_one_owner_behind_two_logins(db: Watched) -> None:
    """Rotating logins share their jobs: attach, outcome and cancel work across them."""
    db.role("pgbg_team", "nologin", [])
    logins = ["pgbg_login_a", "pgbg_login_b"]
    for login in logins:
        db.role(login, "login", ["pgbackground_role", "pgbg_team"])
        db.sql(f"grant insert, select on effects to {login}")
    a, b = (db.database.conninfo_as(login) for login in logins)
    try:
        job = Job(slow("j", 1.5), id="j", owner="pgbg_team")
        first = asyncio.create_task(arun(a, job))
        pid = await db.at_work("j")
        second = await within(arun(b, job))
        assert (second.launched, second.worker_pid) == (False, pid)
        assert (await within(first)).launched
        assert db.effects_by_job() == {"j": 1}
        assert db.sql("select owner, job_id from pgbg.receipt") == [("pgbg_team", "j")]
        # The same id under another owner is another job.
        assert (await within(arun(b, Job(slow("mine", 0), id="j")))).launched
        assert db.effects_by_job() == {"j": 1, "mine": 1}
        # A cancel by the other login, of a job that nobody has launched yet.
        async with Launcher(b) as launcher:
            assert await within(launcher.cancel("k", owner="pgbg_team")) == "cancelled"
        with pytest.raises(errors.JobCancelled):
            await within(arun(a, Job(effect("k"), id="k", owner="pgbg_team")))
        # And of one at work.
        work = asyncio.create_task(arun(a, Job(slow("l", 30), id="l", owner="pgbg_team")))
        await db.at_work("l")
        async with Launcher(b) as launcher:
            cancel = await ended(asyncio.ensure_future(launcher.cancel("l", owner="pgbg_team")))
        if isinstance(cancel, errors.NoPrivilege | errors.StillRunning):
            # PostgreSQL lets only the worker's own login (or a member of it) signal it.
            work.cancel()
            assert "pgbg_login_a" in str(cancel)
            assert "Nothing was launched" not in str(cancel)
        else:
            assert cancel == "cancelled"
        assert isinstance(await ended(work), errors.JobCancelled | asyncio.CancelledError)
        await eventually(lambda: not db.workers(), "the worker has ended")
        assert db.effects("l") == 0
    finally:
        db.sql("drop owned by pgbg_team, pgbg_login_a, pgbg_login_b")
        db.sql("drop role pgbg_login_a, pgbg_login_b, pgbg_team")
