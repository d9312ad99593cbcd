"""A cancel is safe at any moment, final, and its verdict is the one that the data shows."""

from __future__ import annotations

import asyncio
import re
import signal
from typing import Any

import pytest
from psycopg import AsyncConnection

from pgbg_orchestration import Cause, EventKind, Job, Launcher, Outcome, arun, errors, run
from pgbg_orchestration.outcome import OF_A_TRY
from tests.core.kit import (
    APP,
    GENEROUS,
    Recorder,
    Watched,
    cancelled,
    count,
    effect,
    ended,
    eventually,
    launching_process,
    seeded,
    slow,
    within,
)


def crashes(db: Watched) -> int:
    """How often the server lost a process to a signal."""
    return db.server.log().count("was terminated by signal")


async def test_cancelled_at_random_moments(db: Watched) -> None:
    """None is a success without its effect, none runs on, none crashes the server."""
    chance = seeded("cancels")
    jobs = count(40, 200)
    crashes_before = crashes(db)

    async def one(launcher: Launcher, number: int) -> tuple[str, Outcome | BaseException]:
        job = Job(slow(f"j{number}", chance.choice([0, 0, 0.02, 30])), id=f"j{number}", label=f"cancel {number}")
        launched = asyncio.Event()
        task = asyncio.create_task(
            launcher.run(job, observer=lambda event: launched.set() if event.kind == "launched" else None)
        )
        launch = asyncio.create_task(launched.wait())
        await asyncio.wait([task, launch], return_when=asyncio.FIRST_COMPLETED)
        launch.cancel()
        await asyncio.sleep(chance.uniform(0, 0.05))
        return f"j{number}", await cancelled(task)

    ends: list[tuple[str, Outcome | BaseException]] = []
    async with Launcher(db.conninfo) as launcher:
        for first in range(0, jobs, 10):
            ends += await within(asyncio.gather(*(one(launcher, n) for n in range(first, min(first + 10, jobs)))), 120)
        # A worker that was still starting at its verdict may be there yet: it is refused.
        await eventually(lambda: not db.workers(), "no worker outlives the verdict on its job", 15)
    effects, committed, marked = db.effects_by_job(), db.receipts(), db.receipts("cancelled")
    for name, end in ends:
        if isinstance(end, Outcome):
            assert effects.get(name) == 1, f"{name}: a success without its effect"
        else:
            assert isinstance(end, asyncio.CancelledError | errors.JobCancelled), f"{name}: {end!r}"
        assert (name in effects) == (name in committed), name
        assert (name in committed) != (name in marked), f"{name}: neither committed nor cancelled for good"
    states = db.states()
    assert {name for name, state in states.items() if state == "committed"} == set(effects)
    assert {name for name, state in states.items() if state == "cancelled"} == marked
    assert crashes(db) == crashes_before
    print(f"{len(committed)} committed, {len(marked)} cancelled")


async def test_cancel_tells_the_one_who_waits(db: Watched) -> None:
    """Launcher.cancel from elsewhere: the waiting call ends with JobCancelled, and a rerun stays refused."""
    async with Launcher(db.conninfo) as launcher:
        job = Job(slow("j", 30), id="j")
        task = asyncio.create_task(launcher.run(job))
        await db.at_work("j")
        async with Launcher(db.conninfo) as other:
            assert await within(other.cancel("j", reason="no longer wanted")) == "cancelled"
        error = await ended(task)
        assert isinstance(error, errors.JobCancelled)
        assert "no longer wanted" in str(error)
        assert db.effects() == 0
        assert db.states() == {"j": "cancelled"}
        with pytest.raises(errors.JobCancelled):
            await within(launcher.run(job))
        assert db.effects() == 0
        outcome = await within(launcher.run(Job(slow("j", 0), id="j"), retry_cancelled=True, accept_changed_sql=True))
        assert outcome.launched
        assert outcome.attempt == 2
        assert await within(launcher.cancel("j")) == "committed"
    assert db.effects() == 1


async def test_cancel_ends_a_call_that_takes_earlier_cancels_back(db: Watched) -> None:
    """``retry_cancelled`` is about cancels from before the call: one that comes later is final for it too."""
    async with Launcher(db.conninfo) as launcher, Launcher(db.conninfo) as other:
        assert await within(other.cancel("j")) == "cancelled"
        calls = [asyncio.create_task(launcher.run(Job(slow("j", 30), id="j"), retry_cancelled=True))]
        await db.at_work("j")
        attached = Recorder()
        calls += [asyncio.create_task(other.run(Job(slow("j", 30), id="j"), retry_cancelled=True, observer=attached))]
        await eventually(lambda: "attached" in attached.kinds(), "the second call is attached")
        assert await within(other.cancel("j", reason="now really")) == "cancelled"
        for end in [await ended(call) for call in calls]:
            assert isinstance(end, errors.JobCancelled), end
            assert "now really" in str(end)
    assert db.states() == {"j": "cancelled"}
    assert db.effects() == 0


@pytest.mark.parametrize("cause", ["deadline", "given up"])
async def test_a_cancel_of_a_job_that_is_marked_already_is_final(db: Watched, cause: str) -> None:
    """The next call for a job takes such a mark back by itself, but not a user's cancel that came after it."""
    db.sql(
        "insert into pgbg.receipt (owner, job_digest, status, job_id, cause) values (%s, pgbg.digest('j'),"
        " 'cancelled', 'j', %s)", APP, cause,
    )  # fmt: skip
    async with Launcher(db.conninfo) as launcher:
        assert await within(launcher.cancel("j", reason="no longer wanted")) == "cancelled"
        with pytest.raises(errors.JobCancelled, match="no longer wanted"):
            await within(launcher.run(Job(effect("j"), id="j")))
    assert db.effects() == 0


@pytest.mark.parametrize("cause", sorted(OF_A_TRY))
async def test_a_persons_cancel_is_not_taken_back_with_a_trys(db: Watched, cause: Cause) -> None:
    """Whatever the words: a person's reason may read like one of ours, and ours like a person's."""
    words = "another job of the batch failed"
    async with Launcher(db.conninfo) as launcher:
        assert await within(launcher.cancel("j", cause=cause, reason=words)) == "cancelled"
        assert await within(launcher.cancel("j", reason=words)) == "cancelled"
        with pytest.raises(errors.JobCancelled, match=words) as caught:
            await within(launcher.run(Job(effect("j"), id="j"), retry_cancelled=OF_A_TRY))
        assert caught.value.cause is Cause.ASKED
        # The other way round too: what a try says after a person changes nothing.
        assert await within(launcher.cancel("j", cause=cause, reason=words)) == "cancelled"
        assert (await launcher.look("j")).cause is Cause.ASKED
    assert db.effects() == 0


@pytest.mark.parametrize("cause", sorted(OF_A_TRY))
async def test_a_cancel_of_a_try_is_taken_back_by_the_next_one(db: Watched, cause: Cause) -> None:
    async with Launcher(db.conninfo) as launcher:
        assert await within(launcher.cancel("j", cause=cause, of_try="1")) == "cancelled"
        for options in ({}, {"retry_cancelled": OF_A_TRY - {cause}}, {"retry_cancelled": OF_A_TRY, "of_try": "1"}):
            with pytest.raises(errors.JobCancelled) as caught:
                await within(launcher.run(Job(effect("j"), id="j"), **options))
            assert caught.value.cause is cause
        outcome = await within(launcher.run(Job(effect("j"), id="j"), retry_cancelled=OF_A_TRY, of_try="2"))
    assert outcome.launched
    assert db.effects() == 1


@pytest.mark.parametrize("cause", [None, *sorted(OF_A_TRY)])
async def test_a_caller_says_when_it_is_cancelled_whether_its_worker_ends(db: Watched, cause: Cause | None) -> None:
    async with Launcher(db.conninfo) as launcher:
        seen = Recorder()
        call = asyncio.create_task(
            launcher.run(Job(slow("j", 30), id="j"), on_cancel=lambda: cause, of_try="7", observer=seen)
        )
        await db.at_work("j")
        await cancelled(call)
        assert call.cancelled()
        sighting = await launcher.look("j")
        assert (sighting.cause, sighting.of_try) == ((cause, "7") if cause else (None, None))
        decided = [event for event in seen.events if event.kind is EventKind.LET_GO]
        if cause is None:
            assert not decided
            assert sighting.holds_this_job
            assert await within(launcher.cancel("j")) == "cancelled"
        else:
            error = errors.PgbgError.from_dict(decided[0].data["error"])
            assert isinstance(error, errors.JobCancelled)
            assert error.cause is cause


def test_the_receipts_column_takes_every_cause_and_no_other(db: Watched) -> None:
    (definition,) = db.sql(
        "select pg_get_constraintdef(oid) from pg_constraint where conrelid = 'pgbg.receipt'::regclass"
        " and conname like '%%cause%%'"
    )[0]
    assert set(re.findall(r"'([^']+)'", definition)) == set(Cause)


async def test_cancel_before_any_launch_is_final(db: Watched) -> None:
    async with Launcher(db.conninfo) as launcher:
        assert await within(launcher.cancel("j")) == "cancelled"
        assert await within(launcher.cancel("j")) == "cancelled"
        with pytest.raises(errors.JobCancelled):
            await within(launcher.run(Job(effect("j"), id="j")))
    assert db.effects() == 0


async def test_cancel_from_another_process_while_it_starts(db: Watched) -> None:
    """Between launch and lock: the job leaves no effect, or the cancel is told "committed"."""
    chance = seeded("cancel while it starts")
    async with launching_process(db.conninfo) as child:
        for number in range(count(12, 100)):
            name = f"j{number}"
            answer = child.run({"sql": effect(name), "id": name})
            async with Launcher(db.conninfo) as launcher:
                await launcher.facts()
                await asyncio.sleep(chance.uniform(0, 0.02))
                verdict = await within(launcher.cancel(name))
            end = await within(answer)
            assert db.effects(name) == (1 if verdict == "committed" else 0)
            if verdict == "committed":
                assert "outcome" in end, end
            else:
                assert end["error"] == "JobCancelled"


@pytest.mark.servers("real", "embedded")
async def test_cancel_while_the_worker_is_slow_to_start(own_db) -> None:  # type: ignore[no-untyped-def]
    """Every new process sleeps a second before its first command: no lock, no query, and no signal is accepted."""
    db = own_db(settings={"post_auth_delay": 1})
    async with launching_process(db.conninfo) as child, Launcher(db.conninfo) as launcher:
        warm_up = await within(child.run({"sql": "select 1", "id": "first"}))
        assert "outcome" in warm_up
        await within(launcher.look("first"))
        answer = child.run({"sql": effect("j"), "id": "j"})
        # Nothing shows a worker that starts, so its registration must do: the launch call follows at once.
        await eventually(lambda: "j" in db.states(), "the registration")
        await asyncio.sleep(0.4)
        assert db.effects() == 0, "the worker was not slow"
        verdict = await within(launcher.cancel("j"))
        end = await within(answer)
    assert verdict == "cancelled"
    assert end["error"] == "JobCancelled"
    assert db.effects() == 0
    assert db.states()["j"] == "cancelled"


async def test_cancel_of_a_launch_on_its_way(db: Watched) -> None:
    """asyncio cancels the call at any await of it: what was launched is tracked and decided all the same."""
    chance = seeded("launches cancelled on their way")
    async with Launcher(db.conninfo) as launcher:
        await within(launcher.run(Job("select 1", id="warm")))
        for number in range(count(20, 300)):
            name = f"j{number}"
            task = asyncio.create_task(launcher.run(Job(slow(name, 30), id=name)))
            for _ in range(chance.randrange(0, 6)):
                await asyncio.sleep(0)
            await asyncio.sleep(chance.choice([0, chance.uniform(0, 0.02)]))
            await cancelled(task)
        # A worker that was still starting at its verdict is refused; one that nobody tracks would sleep on.
        await eventually(lambda: not db.workers(), "all workers have ended", 15)
    effects = db.effects_by_job()
    assert set(effects) == db.receipts() - {"warm"}
    assert set(effects.values()) <= {1}
    assert not {name for name, state in db.states().items() if state in ("running", "waiting", "lost")}


@pytest.mark.parametrize("times", [1, 3])
async def test_task_cancelled_again_while_it_cancels(db: Watched, times: int) -> None:
    task = asyncio.create_task(arun(db.conninfo, Job(slow("j", 30), id="j")))
    await db.at_work("j")
    for _ in range(times):
        task.cancel()
        await asyncio.sleep(0.001)
    assert isinstance(await ended(task), asyncio.CancelledError)
    await eventually(lambda: not db.workers(), "the worker has ended")
    assert db.effects() == 0
    assert db.states() == {"j": "cancelled"}


async def test_a_closed_launcher_connects_no_more(db: Watched) -> None:
    """Whoever asked may be gone, and its question go on: a close ends it, even where the cancel is swallowed."""
    asked: list[AsyncConnection[Any]] = []

    async def question(conn: AsyncConnection[Any]) -> None:
        asked.append(conn)
        try:
            await asyncio.sleep(GENEROUS)
        except asyncio.CancelledError:
            # As psycopg does when the answer comes in the same moment (wait_for of Python 3.11, bpo-37658).
            await conn.execute("select 1")

    async with Launcher(db.conninfo) as launcher:
        task = asyncio.create_task(launcher.ledger.run(question))
        await eventually(lambda: asked, "the question is asked")
        await cancelled(task)
    await asyncio.sleep(0.5)  # long enough to connect and ask again
    assert len(asked) == 1


async def test_leave_then_attach(db: Watched) -> None:
    db.sql("select pg_advisory_lock(77)")
    job = Job("insert into effects (job) select 'j' from pg_advisory_xact_lock(77)", id="j")
    task = asyncio.create_task(arun(db.conninfo, job, on_cancel="leave"))
    pid = await db.at_work("j")
    assert isinstance(await cancelled(task), asyncio.CancelledError)
    assert db.value("select running_pid from pgbg.jobs") == pid
    seen = Recorder()
    following = asyncio.create_task(arun(db.conninfo, job, observer=seen))
    await eventually(lambda: "attached" in seen.kinds() or following.done(), "it attaches")
    db.sql("select pg_advisory_unlock(77)")
    outcome = await within(following)
    assert outcome.launched is False
    assert outcome.worker_pid == pid
    assert "attached" in seen.kinds()
    assert "launched" not in seen.kinds()
    assert db.effects("j") == 1
    assert db.value("select ended_at from pgbg.jobs") is None, "nobody knows: its launching side was gone by then"


async def test_cancel_after_the_commit_is_a_success(db: Watched) -> None:
    """The task is cancelled when the data is there already: the receipt decides, for this call and for the next."""
    job = Job(effect("j"), id="j")
    task = asyncio.create_task(arun(db.conninfo, job))
    await eventually(lambda: db.effects("j"), "the commit")
    end = await cancelled(task)
    assert isinstance(end, Outcome | asyncio.CancelledError)
    outcome = await within(arun(db.conninfo, job))
    assert outcome.launched is False
    assert db.effects("j") == 1
    assert db.states() == {"j": "committed"}


QUEUE = 4096


@pytest.mark.servers("real", "embedded")
async def test_worker_cancelled_after_its_commit_is_a_success(db: Watched) -> None:
    """Its output fills the queue so exactly that only its last message waits, after the commit: a cancel then makes it
    report 57014."""
    signalled = 0
    for size in range(QUEUE - 400, QUEUE, 8):
        name = f"j{size}"
        # Rows that nobody reads are not sent; a message that the job asks for is.
        sql = f"do $$ begin {effect(name)}; raise notice '%', repeat('x', {size}); end $$"
        # Heard of, its commit would soon have it detached, and so let go.
        settings = {"client_min_messages": "notice", "pgbg.notify": "off"}
        job = Job(sql, id=name, queue_size=QUEUE, settings=settings)
        task = asyncio.create_task(arun(db.conninfo, job))
        while not db.effects(name) and not task.done():
            await asyncio.sleep(0)
        waits = "select pid from pg_stat_activity where wait_event = 'MessageQueuePutMessage'"
        while not (waiting := db.sql(waits)) and not task.done():
            await asyncio.sleep(0)
        for (pid,) in waiting:
            signalled += db.value("select pg_cancel_backend(%s)", pid)
        outcome = await within(task)
        assert outcome.job_id == name
        assert db.effects(name) == 1
        assert db.states()[name] == "committed"
        if signalled == count(1, 5):
            break
    assert signalled, "no worker waited after its commit"


@pytest.mark.parametrize("how", ["pg_cancel_backend", "pg_terminate_backend"])
async def test_worker_ended_by_somebody_else(db: Watched, how: str) -> None:
    """Never a success, no effect, not final: the same job can be run again."""
    task = asyncio.create_task(arun(db.conninfo, Job(slow("j", 30), id="j", kind="receipt")))
    pid = await db.at_work("j")
    db.sql(f"select {how}(%s)", pid)
    if how == "pg_terminate_backend":
        # A worker that is gone without an error may be launched again: it then waits for the second end.
        await eventually(
            lambda: task.done() or db.sql("select 1 from pgbg.jobs where running_pid <> %s", pid), "an end"
        )
        if not task.done():
            await cancelled(task)
            assert db.effects() == 0
            return
    error = await ended(task)
    assert isinstance(error, errors.WorkerError | errors.WorkerLost), error
    assert error.sqlstate in ("57014", "57P01", None)
    assert db.effects() == 0
    outcome = await within(arun(db.conninfo, Job(slow("j", 0), id="j"), accept_changed_sql=True))
    assert outcome.launched
    assert db.effects() == 1


async def test_worker_that_catches_the_cancel_is_reported(db: Watched) -> None:
    """SQL that swallows query_canceled commits in spite of the cancel: then that is what is told."""
    sql = (
        f"{effect('j')}; do $$ begin perform pg_sleep(30);"
        " exception when query_canceled then raise notice 'no'; end $$; select pg_sleep(0.2)"
    )
    async with Launcher(db.conninfo) as launcher:
        task = asyncio.create_task(launcher.run(Job(sql, id="j")))
        await db.at_work("j")
        await asyncio.sleep(0.1)
        async with Launcher(db.conninfo) as other:
            verdict = await within(other.cancel("j"))
        end = await ended(task)
    if verdict == "committed":
        assert isinstance(end, Outcome)
        assert db.effects() == 1
    else:
        assert isinstance(end, errors.JobCancelled)
        assert db.effects() == 0


@pytest.mark.servers("real", "embedded", "standin19")
async def test_ctrl_c_in_run(db: Watched) -> None:
    """SIGINT to a process in run(): the worker is cancelled, and that is decided before the process ends."""
    code = (
        # A suite that runs in the background of a script ignores SIGINT, and so would its children.
        "import signal, sys\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from pgbg_orchestration import Job, run\n"
        "try:\n    run(sys.argv[1], Job(sys.argv[2], id='j'))\n"
        "except KeyboardInterrupt:\n    sys.exit(42)\n"
    )
    import sys

    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, db.conninfo, slow("j", 30))
    await db.at_work("j")
    process.send_signal(signal.SIGINT)
    assert await within(process.wait()) == 42
    assert not db.workers()
    assert db.effects() == 0
    assert db.states() == {"j": "cancelled"}


async def test_run_in_a_running_loop_is_refused(db: Watched) -> None:
    with pytest.raises(errors.InvalidJob, match="arun"):
        run(db.conninfo, Job(effect("j"), id="j"))
    assert db.effects() == 0


def test_run_without_a_loop(db: Watched) -> None:
    outcome = run(db.conninfo, Job(effect("j"), id="j"))
    assert outcome.launched
    assert db.value("select owner from pgbg.receipt") == APP
    assert run(db.conninfo, Job(effect("j"), id="j")).launched is False
    assert db.effects() == 1
