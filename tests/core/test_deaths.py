"""Whatever dies (the launching process, its sessions, the server, the worker): one commit, and the right outcome."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable
from typing import Any

import pytest

from pgbg_orchestration import Job, Launcher, Outcome, arun, errors, pace
from pgbg_orchestration.testing.faults import POINTS
from tests.core.kit import (
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

pytestmark = pytest.mark.any_surface

CANCEL_POINTS = tuple(point for point in POINTS if point.endswith(("_cancel", "_mark")))
RUN_POINTS = tuple(point for point in POINTS if point not in CANCEL_POINTS)


@pytest.mark.servers("real", "embedded", "standin19")
@pytest.mark.parametrize(
    ("known", "point"),
    # What is new is registered and launched in one round trip, with nothing between the two.
    [(known, point) for known in (False, True) for point in RUN_POINTS if known or point != "after_register"],
)
async def test_launching_process_killed(db: Watched, known: bool, point: str) -> None:
    """SIGKILL at a point of the algorithm; a second process runs the same job."""
    # A result that is read to its end takes its handle with it: only other handles are detached.
    work = f"select pg_sleep(0.4); {effect('j')}" if point == "after_detach" else slow("j", 0.4)
    job: dict[str, Any] = {"sql": work, "id": "j", "series": "s", "generation": 1}
    if known:
        await within(arun(db.conninfo, Job("select 1", id="older", series="s", generation=0)))
    async with launching_process(db.conninfo, f"{point}:kill") as child:
        child.run(job)
        await child.killed()
    outcome = await within(arun(db.conninfo, Job(**job)))
    assert db.effects("j") == 1
    assert db.states()["j"] == "committed"
    assert outcome.launched is (point in ("before_register", "after_register", "before_launch"))
    assert outcome.worker_pid == db.value("select pid from effects")
    again = await within(arun(db.conninfo, Job(**job)))
    assert again.launched is False
    assert db.effects("j") == 1


@pytest.mark.servers("real", "embedded")
@pytest.mark.parametrize("point", ["after_launch", "while_running", "after_end", "before_record"])
async def test_launching_process_killed_after_a_failing_launch(db: Watched, point: str) -> None:
    """The SQL fails with nobody there to hear it: the second process runs it again and tells the error."""
    job: dict[str, Any] = {"sql": f"{effect('j')}; select pg_sleep(0.3); select 1/0", "id": "j"}
    async with launching_process(db.conninfo, f"{point}:kill") as child:
        child.run(job)
        await child.killed()
    with pytest.raises(errors.WorkerError) as caught:
        await within(arun(db.conninfo, Job(**job)))
    assert caught.value.sqlstate == "22012"
    assert db.effects() == 0
    assert db.states() == {"j": "failed"}


@pytest.mark.servers("real", "embedded", "standin19")
@pytest.mark.parametrize("point", CANCEL_POINTS)
async def test_cancelling_process_killed(db: Watched, point: str) -> None:
    """A cancel half done leaves a job that is at work, committed or cancelled, and can be cancelled again."""
    job = Job(slow("j", 30), id="j")
    task = asyncio.create_task(arun(db.conninfo, job))
    await db.at_work("j")
    async with launching_process(db.conninfo, f"{point}:kill") as child:
        child.cancel("j")
        await child.killed()
        async with Launcher(db.conninfo) as launcher:
            assert await within(launcher.cancel("j")) == "cancelled"
    end = await ended(task)
    assert isinstance(end, errors.JobCancelled | errors.WorkerError), end
    assert db.effects() == 0
    assert db.states() == {"j": "cancelled"}


@pytest.mark.servers("real", "embedded")
@pytest.mark.parametrize("point", CANCEL_POINTS)
async def test_process_killed_while_it_cancels_its_own_job(db: Watched, point: str) -> None:
    async with launching_process(db.conninfo, f"{point}:kill") as child:
        tag, _ = child.order("run", job={"sql": slow("j", 1.5), "id": "j"})
        await db.at_work("j")
        child.order("cancel_task", of=tag)
        await child.killed()
    end = await ended(asyncio.ensure_future(arun(db.conninfo, Job(slow("j", 1.5), id="j"))))
    assert db.effects() == (1 if isinstance(end, Outcome) else 0)
    assert isinstance(end, Outcome | errors.JobCancelled), end


@pytest.mark.servers("real", "embedded", "standin19")
async def test_launching_sessions_terminated(db: Watched) -> None:
    """pg_terminate_backend of all of our sessions while the job is at work: it is followed to its end all the same."""
    seen = Recorder()
    task = asyncio.create_task(arun(db.conninfo, Job(slow("j", 2), id="j"), observer=seen))
    pid = await db.at_work("j")
    sessions = [row[0] for row in db.sessions("pgbg:%")]
    assert sessions
    db.terminate(sessions)
    outcome = await within(task)
    assert outcome.worker_pid == pid
    assert db.effects("j") == 1
    assert "session_lost" in seen.kinds()


@pytest.mark.servers("real", "embedded", "standin20")
async def test_sessions_terminated_at_random(db: Watched) -> None:
    """Jobs side by side while somebody terminates our sessions again and again."""
    chance = seeded("terminations")
    jobs = count(15, 80)
    stop = asyncio.Event()

    async def terminator() -> int:
        terminated = 0
        while not stop.is_set():
            await asyncio.sleep(chance.uniform(0.02, 0.4))
            sessions = [row[0] for row in db.sessions("pgbg:%")]
            if sessions:
                db.terminate([chance.choice(sessions)])
                terminated += 1
        return terminated

    async with Launcher(db.conninfo) as launcher:
        ending = asyncio.create_task(terminator())
        try:
            ends = await within(
                asyncio.gather(
                    *(launcher.run(Job(slow(f"j{n}", chance.choice([0, 0.05, 0.5])), id=f"j{n}")) for n in range(jobs)),
                    return_exceptions=True,
                ),
                150,
            )
        finally:
            stop.set()
            print(f"{await ending} sessions terminated")
    assert all(isinstance(end, Outcome) for end in ends), [end for end in ends if not isinstance(end, Outcome)]
    assert db.effects_by_job() == {f"j{n}": 1 for n in range(jobs)}


@pytest.mark.servers("real", "embedded", "standin20")
@pytest.mark.parametrize("moment", ["at work", "random"])
async def test_server_stopped_immediate_and_started(own_db: Callable[..., Watched], moment: str) -> None:
    """One commit and the right outcome, by the call that waited or by the next one."""
    db = own_db()
    chance = seeded("immediate stops")
    for number in range(count(1, 5)):
        name = f"j{number}"
        job = Job(slow(name, 0.3 if moment == "random" else 1.5), id=name)
        task = asyncio.create_task(arun(db.conninfo, job))
        if moment == "random":
            await asyncio.sleep(chance.uniform(0, 0.5))
        else:
            await db.at_work(name)
        await asyncio.to_thread(db.server.stop, "immediate")
        await asyncio.sleep(chance.uniform(0, 0.5))
        await asyncio.to_thread(db.server.start)
        with contextlib.suppress(Exception):
            db.admin.execute("select 1")  # finds its connection broken
        end = await within(ended(task), 120)
        if not isinstance(end, Outcome):
            assert isinstance(end, errors.ServerUnreachable | errors.WorkerLost), end
            end = await within(arun(db.conninfo, job))
        assert db.effects(name) == 1
        assert db.receipts() >= {name}
        assert db.states()[name] == "committed"


@pytest.mark.servers("real", "embedded", "standin20")
async def test_server_stopped_after_the_commit(own_db: Callable[..., Watched]) -> None:
    db = own_db()
    job = Job(effect("j"), id="j")
    await within(arun(db.conninfo, job))
    await asyncio.to_thread(db.server.restart, "immediate")
    with contextlib.suppress(Exception):
        db.admin.execute("select 1")
    outcome = await within(arun(db.conninfo, job))
    assert outcome.launched is False
    assert db.effects("j") == 1


@pytest.mark.servers("real", "embedded")
async def test_worker_killed_brings_the_server_down_and_back(own_db: Callable[..., Watched]) -> None:
    """SIGKILL of the worker: PostgreSQL restarts all its processes, and the job is launched again by itself."""
    db = own_db()
    task = asyncio.create_task(arun(db.conninfo, Job(slow("j", 0.5), id="j")))
    pid = await db.at_work("j")
    os.kill(pid, signal.SIGKILL)
    await asyncio.sleep(0.3)
    with contextlib.suppress(Exception):
        db.admin.execute("select 1")
    end = await within(ended(task), 120)
    if not isinstance(end, Outcome):
        assert isinstance(end, errors.ServerUnreachable | errors.WorkerLost), end
        await within(arun(db.conninfo, Job(slow("j", 0.5), id="j")))
    await eventually(lambda: db.effects("j") == 1, "one effect")


async def test_leave_and_close_leaves_the_worker_at_work(db: Watched) -> None:
    """A triggerer that shuts down: its sessions end, the worker goes on, the next one attaches."""
    job = Job(slow("j", 1.5), id="j")
    async with Launcher(db.conninfo) as launcher:
        task = asyncio.create_task(launcher.run(job, on_cancel="leave"))
        pid = await db.at_work("j")
        await cancelled(task)
    assert db.states() == {"j": "running"}
    outcome = await within(arun(db.conninfo, job))
    assert (outcome.launched, outcome.worker_pid) == (False, pid)
    assert db.effects() == 1


@pytest.mark.servers("real", "embedded")
@pytest.mark.parametrize("kind", ["receipt", "supervised"])
async def test_deadline_without_anybody_left_to_keep_it(
    db: Watched, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """The server ends the SQL by itself, a while after its deadline."""
    monkeypatch.setattr(pace, "DEADLINE_MARGIN", 0.0)
    async with Launcher(db.conninfo) as launcher:
        task = asyncio.create_task(launcher.run(Job(slow("j", 40), id="j", kind=kind, timeout=2), on_cancel="leave"))
        await db.at_work("j")
        await cancelled(task)
    await eventually(lambda: not db.workers(), "the worker has ended", 30)
    assert db.effects() == 0


async def test_jobs_watched_by_another_process(db: Watched) -> None:
    """Committed jobs are never called lost, whenever somebody looks."""
    jobs = count(80, 500)
    wrong: list[tuple[str, str]] = []
    looks = 0
    done = asyncio.Event()

    async def watch() -> None:
        nonlocal looks
        while not done.is_set():
            wrong.extend((job, state) for job, state in db.states().items() if state not in GOOD_STATES)
            looks += 1
            await asyncio.sleep(0)

    GOOD_STATES = {"waiting", "running", "committed"}  # noqa: N806
    async with launching_process(db.conninfo) as child:
        answers = [child.run({"sql": effect(f"j{n}"), "id": f"j{n}"}) for n in range(jobs)]
        watching = asyncio.create_task(watch())
        ends = await within(asyncio.gather(*answers), 240)
        done.set()
        await watching
    assert not wrong, wrong[:10]
    assert looks > 1
    assert all("outcome" in end for end in ends)
    assert set(db.states().values()) == {"committed"}
    assert db.effects_by_job() == {f"j{n}": 1 for n in range(jobs)}
    print(f"{looks} looks at {jobs} jobs")


@pytest.mark.servers("real", "embedded", "standin19")
async def test_a_job_that_waits_for_its_launch_is_waiting(db: Watched) -> None:
    """However long it has waited for its turn: lost is only what nobody is there to launch any more."""
    await within(arun(db.conninfo, Job("select 1", id="older", series="s", generation=0)))
    async with launching_process(db.conninfo, "after_register:stop") as child:
        child.run({"sql": effect("j"), "id": "j", "series": "s", "generation": 1})
        await child.stopped()
        db.sql("update pgbg.job set launched_at = launched_at - interval '1 hour'")
        assert db.states()["j"] == "waiting"
        child.signal(signal.SIGKILL)
        await child.killed()
        await eventually(lambda: not db.sessions("pgbg:%"), "its sessions have ended")
        assert db.states()["j"] == "lost"
    assert (await within(arun(db.conninfo, Job(effect("j"), id="j", series="s", generation=1)))).launched
    assert db.effects("j") == 1
