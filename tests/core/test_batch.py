"""Jobs side by side: how many at once, what the first failure ends, and what each one's end says."""

from __future__ import annotations

import asyncio
from functools import partial

import pytest

from pgbg_orchestration import Cause, Job, Launcher, Outcome, errors
from pgbg_orchestration.batch import Batch, Call, Preparation, was_stopped
from tests.core.kit import Recorder, Watched, cancelled, effect, eventually, slow, within

pytestmark = pytest.mark.any_surface

BAD = "select 1/0"


async def test_each_job_has_its_end(db: Watched) -> None:
    async with Launcher(db.conninfo) as launcher:
        jobs = {"good": Job(effect("good"), id="good"), "bad": Job(BAD, id="bad")}
        ends = await within(launcher.run_many(jobs))
        assert isinstance(ends["good"], Outcome)
        assert isinstance(ends["bad"], errors.WorkerError)
        # The one that committed is not run again.
        again = await within(launcher.run_many({**jobs, "bad": Job("select 1", id="bad 2")}))
    assert all(isinstance(end, Outcome) for end in again.values())
    assert db.effects() == 1


async def test_so_many_at_once_and_no_more(db: Watched) -> None:
    db.sql("create table peak (n int)")
    db.sql("grant insert on peak to public")
    peak = "insert into peak select count(*) from pg_stat_activity where backend_type = 'pg_background'"
    jobs = {str(i): Job(f"{peak}; select pg_sleep(0.05)", id=str(i)) for i in range(8)}
    async with Launcher(db.conninfo) as launcher:
        ends = await within(launcher.run_many(jobs, at_once=2))
    assert set(ends) == set(jobs)
    assert db.value("select count(*) from peak") == 8
    assert db.value("select max(n) from peak") <= 2


async def test_none_and_too_few(db: Watched) -> None:
    async with Launcher(db.conninfo) as launcher:
        assert await launcher.run_many({}, at_once=3, fail_fast=True) == {}
        with pytest.raises(errors.InvalidJob, match="at_once must be at least 1"):
            await launcher.run_many({}, at_once=0)


async def test_the_first_failure_ends_the_others_and_a_later_call_runs_them(db: Watched) -> None:
    """At work, or waiting for its turn: both are cancelled, and say so."""
    jobs = {
        "at work": Job(slow("at work", 60), id="at work"),
        "bad": Job(f"select pg_sleep(0.3); {BAD}", id="bad"),
        "waiting": Job(effect("waiting"), id="waiting"),
    }
    async with Launcher(db.conninfo) as launcher:
        ends = await within(launcher.run_many(jobs, at_once=2, fail_fast=True))
        assert next(iter(ends)) == "bad"
        assert {name for name, end in ends.items() if was_stopped(end)} == {"at work", "waiting"}
        assert db.effects() == 0
        # Its marks are known as its own: a job of it that looks for the first time does not take one for an old one.
        tries = {(await launcher.look(name)).of_try for name in ("at work", "waiting")}
        assert len(tries) == 1
        assert None not in tries

        mended = {name: Job(effect(name), id=name) for name in jobs}
        ends = await within(
            launcher.run_many(mended, retry_cancelled={Cause.FAILED_BESIDE}, accept_changed_sql=True, fail_fast=True)
        )
    assert all(isinstance(end, Outcome) for end in ends.values()), ends
    assert db.effects() == 3


async def test_one_that_has_committed_before_says_so_though_its_turn_never_came(db: Watched) -> None:
    done = Job(effect("done"), id="done")
    async with Launcher(db.conninfo) as launcher:
        await within(launcher.run(done))
        ends = await within(launcher.run_many({"bad": Job(BAD, id="bad"), "done": done}, at_once=1, fail_fast=True))
    assert isinstance(ends["done"], Outcome), ends
    assert not ends["done"].launched


async def test_a_worker_that_an_earlier_process_left_is_cancelled_too(db: Watched) -> None:
    left = Job(slow("left", 60), id="left")
    async with Launcher(db.conninfo) as earlier:
        call = asyncio.create_task(earlier.run(left, on_cancel="leave"))
        await db.at_work("left")
        await cancelled(call)
    async with Launcher(db.conninfo) as launcher:
        ends = await within(launcher.run_many({"bad": Job(BAD, id="bad"), "left": left}, at_once=1, fail_fast=True))
    assert was_stopped(ends["left"]), ends
    assert db.states()["left"] == "cancelled"


@pytest.mark.servers("real", "embedded")
async def test_one_without_a_receipt_is_ended_by_the_call_that_runs_it(db: Watched) -> None:
    """Whatever its own ``on_cancel`` says; one whose turn never came is not launched."""
    seen = Recorder()

    async def bad() -> Call:
        await eventually(lambda: "launched" in seen.kinds(), "the other one is at work")
        return Call(Job(BAD, id="bad"), {})

    async def session(name: str) -> Call:
        job = Job("select pg_sleep(60)", id=name, label=name, kind="session")
        return Call(job, {"on_cancel": "leave", "observer": seen})

    async with Launcher(db.conninfo) as launcher:
        members: dict[str, Preparation] = {
            "session": partial(session, "session"),
            "bad": bad,
            "waiting": partial(session, "waiting"),
        }
        ends = await within(Batch(launcher, members, at_once=2, fail_fast=True).run())
    assert {name for name, end in ends.items() if was_stopped(end)} == {"session", "waiting"}, ends
    assert {event.label for event in seen.events} == {"session"}
    assert not db.workers()


async def test_a_batch_that_is_cancelled_tells_which_jobs_were_begun(db: Watched) -> None:
    async def call(name: str) -> Call:
        return Call(Job(slow(name, 60), id=name), {"on_cancel": "leave"})

    async with Launcher(db.conninfo) as launcher:
        batch = Batch(launcher, {name: partial(call, name) for name in "ab"}, at_once=1)
        running = asyncio.create_task(batch.run())
        await db.at_work("a")
        await cancelled(running)
        assert running.cancelled()
        assert [job.id for job in batch.interrupted] == ["a"]
        assert await within(launcher.cancel("a")) == "cancelled"
    assert db.states() == {"a": "cancelled"}
