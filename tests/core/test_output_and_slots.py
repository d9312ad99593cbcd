"""Output that nobody reads, worker slots that are used up, and how many connections a process needs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from pgbg_orchestration import Job, Launcher, arun, errors
from tests.core.kit import Recorder, Watched, cancelled, count, effect, ended, eventually, slow, within


@pytest.mark.parametrize(
    "output",
    [
        "select repeat('x', 100) from generate_series(1, 100000)",
        "do $$ begin for i in 1..20000 loop raise notice 'notice %', i; end loop; end $$",
        "select repeat('x', 1000000)",
    ],
    ids=["100,000 rows", "20,000 notices", "one long row"],
)
async def test_output_that_nobody_reads(db: Watched, output: str) -> None:
    seen = Recorder()
    outcome = await within(arun(db.conninfo, Job(f"{effect('j')}; {output}", id="j"), observer=seen))
    assert outcome.launched
    assert db.effects("j") == 1
    if "notice" in output:
        assert "output_blocked" not in seen.kinds(), "NOTICEs are not sent at all"


@pytest.mark.servers("real", "embedded")
async def test_notices_that_the_job_asks_for(db: Watched) -> None:
    """client_min_messages set by the text itself lets the NOTICEs through to the queue."""
    sql = (
        f"{effect('j')}; set local client_min_messages to debug1;"
        " do $$ begin for i in 1..20000 loop raise notice 'notice %', i; end loop; end $$"
    )
    await within(arun(db.conninfo, Job(sql, id="j")))
    assert db.effects("j") == 1


@pytest.mark.servers("real", "embedded")
async def test_rows_and_then_an_error(db: Watched) -> None:
    """The rows are not sent, so they are in nobody's way: the error is told."""
    sql = f"{effect('j')}; select repeat('x', 100), 1 / (5000 - g) from generate_series(1, 100000) g"
    with pytest.raises(errors.WorkerError) as caught:
        await within(arun(db.conninfo, Job(sql, id="j")))
    assert caught.value.sqlstate == "22012"
    assert db.effects() == 0


@pytest.mark.servers("real", "embedded")
async def test_cancel_of_a_job_whose_output_nobody_reads(db: Watched) -> None:
    sql = f"{effect('j')}; select repeat('x', 100), pg_sleep(g % 2000 / 1999 * 0.1) from generate_series(1, 10000000) g"
    task = asyncio.create_task(arun(db.conninfo, Job(sql, id="j")))
    await db.at_work("j")
    await asyncio.sleep(0.3)
    await cancelled(task)
    await eventually(lambda: not db.workers(), "the worker has ended")
    assert db.effects() == (1 if "j" in db.receipts() else 0)


async def test_many_jobs_with_output_side_by_side(db: Watched) -> None:
    jobs = count(6, 30)
    calls = (
        arun(db.conninfo, Job(f"{effect(f'j{n}')}; select repeat('x', 100) from generate_series(1, 5000)", id=f"j{n}"))
        for n in range(jobs)
    )
    await within(asyncio.gather(*calls), 120)
    assert db.effects_by_job() == {f"j{n}": 1 for n in range(jobs)}


@pytest.fixture
def small(own_db: Callable[..., Watched]) -> Watched:
    """A database on a server with max_worker_processes = 8, PostgreSQL's default."""
    return own_db(8)


@pytest.mark.servers("real", "embedded")
async def test_50_jobs_with_8_worker_processes(small: Watched) -> None:
    """All succeed in their first attempt; a launch that finds no slot is no attempt."""
    seen = Recorder()
    # The first jobs keep their slots until another one has found none.
    small.sql("select pg_advisory_lock(7)")
    calls = asyncio.gather(
        *(
            arun(
                small.conninfo,
                Job(f"{effect(f'j{n}')}; select pg_advisory_xact_lock_shared(7)", id=f"j{n}"),
                observer=seen,
            )
            for n in range(50)
        )
    )
    await eventually(lambda: "waiting_for_slot" in seen.kinds(), "no slot is left")
    small.sql("select pg_advisory_unlock(7)")
    ends = await within(calls, 180)
    assert small.effects_by_job() == {f"j{n}": 1 for n in range(50)}
    assert {end.attempt for end in ends} == {1}
    assert all(end.launched for end in ends)


@pytest.mark.servers("real", "embedded")
async def test_slots_are_waited_for_in_turn_by_two_processes(small: Watched) -> None:
    from tests.core.kit import launching_process

    async with launching_process(small.conninfo) as one, launching_process(small.conninfo) as two:
        answers = [
            (one if n % 2 else two).run({"sql": slow(f"j{n}", 0.1), "id": f"j{n}"}) for n in range(count(24, 60))
        ]
        ends = await within(asyncio.gather(*answers), 180)
    assert all("outcome" in end for end in ends), ends
    assert {end["outcome"]["attempt"] for end in ends} == {1}
    assert set(small.effects_by_job().values()) == {1}


@pytest.mark.servers("real", "embedded")
async def test_no_slot_in_time(small: Watched) -> None:
    """slot_timeout, and a job's own deadline while it waits for a slot: nothing was launched, and it runs later."""
    async with Launcher(small.conninfo) as launcher:
        holders = [
            asyncio.create_task(launcher.run(Job(slow(f"h{n}", 60), id=f"h{n}"), slot_timeout=5)) for n in range(8)
        ]
        await eventually(
            lambda: len(small.workers()) + sum(holder.done() for holder in holders) == 8, "the slots are used up"
        )
        with pytest.raises(errors.NoWorkerSlot, match=r"its slot_timeout of 0\.3 s") as caught:
            await within(launcher.run(Job(effect("j"), id="j"), slot_timeout=0.3))
        assert "max_worker_processes" in str(caught.value)
        assert "Nothing was launched" in str(caught.value)
        # Also for one that waits behind another in the queue; and whichever bound ends that wait.
        head = asyncio.create_task(launcher.run(Job(effect("head"), id="head")))
        with pytest.raises(errors.NoWorkerSlot, match=r"its slot_timeout of 0\.3 s"):
            await within(launcher.run(Job(effect("second"), id="second"), slot_timeout=0.3))
        with pytest.raises(errors.NoWorkerSlot, match="its timeout of 5 s"):
            await within(launcher.run(Job(effect("k"), id="k", timeout=5)))
        assert isinstance(await cancelled(head), asyncio.CancelledError)
        waiting = asyncio.create_task(launcher.run(Job(effect("l"), id="l")))
        await asyncio.sleep(0.2)
        assert isinstance(await cancelled(waiting), asyncio.CancelledError)
        for holder in holders:
            holder.cancel()
        await asyncio.gather(*(ended(holder) for holder in holders))
        assert small.effects() == 0
        assert (await within(launcher.run(Job(effect("j"), id="j")))).launched
    assert small.effects_by_job() == {"j": 1}


@pytest.mark.servers("real", "embedded")
async def test_one_slot_is_not_enough_for_a_supervised_job(small: Watched) -> None:
    """Its slot_timeout runs from its first wait on: each of its supervisors finds its own slot, and no second one."""
    async with Launcher(small.conninfo) as launcher:
        # The launcher of logical replication has one of the eight.
        holders = [asyncio.create_task(launcher.run(Job(slow(f"h{n}", 60), id=f"h{n}"))) for n in range(6)]
        await eventually(lambda: len(small.workers()) == 6, "one slot is left")
        seen = Recorder()
        with pytest.raises(errors.NoWorkerSlot, match="its slot_timeout of 3 s") as caught:
            await within(launcher.run(Job("vacuum effects", id="j", kind="supervised"), slot_timeout=3, observer=seen))
        assert "Nothing was launched" in str(caught.value)
        assert "waiting_for_slot" in seen.kinds()
        for holder in holders:
            holder.cancel()
        await asyncio.gather(*(ended(holder) for holder in holders))
        assert (await within(launcher.run(Job("vacuum effects", id="j", kind="supervised")))).launched


@pytest.mark.servers("real", "embedded")
async def test_500_jobs_waiting_in_one_process(own_db: Callable[..., Watched]) -> None:
    """They wait over a few connections, whoever made them: arun shares one launcher."""
    jobs = count(80, 500)
    db = own_db(max_worker_processes=jobs + 20, settings={"max_connections": 60})
    tasks = [
        asyncio.create_task(arun(db.conninfo, Job(f"{effect(f'j{n}')}; select pg_sleep(300)", id=f"j{n}")))
        for n in range(jobs)
    ]
    try:
        running = "select count(*) from pgbg.jobs where state = 'running'"
        await eventually(
            lambda: db.value(running) == jobs or any(task.done() for task in tasks), "all are at work", 120
        )
        assert not any(task.done() for task in tasks), [task for task in tasks if task.done()][:3]
        sessions = db.sessions()
        assert len(sessions) <= 10, sessions
        print(f"{jobs} jobs over {len(sessions)} connections")
    finally:
        for task in tasks:
            task.cancel()
        ends = await within(asyncio.gather(*tasks, return_exceptions=True), 200)
    assert all(isinstance(end, asyncio.CancelledError) for end in ends)
    assert db.effects() == 0
    assert len(db.receipts("cancelled")) == jobs


@pytest.mark.servers("real", "embedded", "standin19")
async def test_many_quick_jobs_over_one_launcher(db: Watched) -> None:
    """Sessions are replaced after many launches, and nothing is lost on the way."""
    jobs = count(300, 2000)
    async with Launcher(db.conninfo) as launcher:
        limit = asyncio.Semaphore(20)

        async def one(number: int) -> bool:
            async with limit:
                return (await launcher.run(Job(effect(f"j{number}"), id=f"j{number}"))).launched

        launched = await within(asyncio.gather(*(one(n) for n in range(jobs))), 200)
    assert all(launched)
    assert db.effects_by_job() == {f"j{n}": 1 for n in range(jobs)}


async def test_one_jobs_error_breaks_no_others(db: Watched) -> None:
    async with Launcher(db.conninfo) as launcher:
        ends = await within(
            asyncio.gather(
                *(
                    launcher.run(Job(f"{effect(f'j{n}')}; select 1 / {n % 2}, pg_sleep(0.1)", id=f"j{n}"))
                    for n in range(12)
                ),
                return_exceptions=True,
            )
        )
    assert [type(end).__name__ for end in ends] == ["WorkerError", "Outcome"] * 6
    assert db.effects_by_job() == {f"j{n}": 1 for n in range(1, 12, 2)}
