"""A network that cuts, stalls, half-closes and refuses: the job is followed to its end, or the error says so."""

from __future__ import annotations

import asyncio
import os
import socket

import pytest

from pgbg_orchestration import Job, Launcher, Outcome, arun, errors, pace
from pgbg_orchestration.postgres import connection, handles
from tests.core.kit import Watched, cancelled, count, effect, ended, eventually, seeded, slow, within
from tests.kit.proxy import TO_CLIENT, TO_SERVER, Proxy

pytestmark = [pytest.mark.servers("real", "embedded", "standin19"), pytest.mark.any_surface]
LAUNCH = b"begin_job"


@pytest.mark.parametrize("what", ["answer lost", "request lost", "stalled, then cut"])
async def test_cut_between_the_sending_of_a_launch_and_its_answer(db: Watched, proxy: Proxy, what: str) -> None:
    """The launch may be running: it is attached to, never run twice."""
    if what == "request lost":
        when = proxy.when(TO_SERVER, LAUNCH, cut=True)
    else:
        when = proxy.when(TO_SERVER, LAUNCH, stall=TO_CLIENT)
    task = asyncio.create_task(arun(proxy.through(db.conninfo), Job(slow("j", 1), id="j")))
    await asyncio.to_thread(when.wait)
    if what != "request lost":
        if what == "stalled, then cut":
            await asyncio.sleep(1)
        proxy.cut()
    outcome = await within(task, 120)
    assert db.effects("j") == 1
    assert outcome.worker_pid == db.value("select pid from effects")


@pytest.mark.servers("real", "embedded")
@pytest.mark.parametrize("verified", [False, True])
async def test_session_job_whose_launch_gets_no_answer(db: Watched, proxy: Proxy, verified: bool) -> None:
    """It may be running, and nothing would turn a second one away: it is not launched again."""
    when = proxy.when(TO_SERVER, b"pg_background_launch", stall=TO_CLIENT)
    verify = "select exists (select from effects)" if verified else None
    job = Job("insert into effects (job) select 'j' from pg_sleep(1)", id="j", kind="session", verify_sql=verify)
    task = asyncio.create_task(arun(proxy.through(db.conninfo), job))
    await asyncio.to_thread(when.wait)
    await eventually(db.workers, "the worker")
    proxy.cut()
    end = await ended(task)
    assert isinstance(end, Outcome if verified else errors.OutcomeUnknown), end
    await eventually(lambda: not db.workers(), "the worker has ended")
    assert db.effects("j") == 1


async def test_a_launch_that_gets_no_answer_stops_no_other_job(
    db: Watched, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pace, "CALL", 3.0)
    conninfo = proxy.through(db.conninfo)
    async with Launcher(conninfo) as launcher:
        await within(launcher.run(Job(effect("warm"), id="warm")))
        other = asyncio.create_task(launcher.run(Job(slow("other", 1), id="other")))
        await db.at_work("other")
        when = proxy.when(TO_SERVER, LAUNCH, stall=(TO_CLIENT,))
        stuck = asyncio.create_task(launcher.run(Job(effect("stuck"), id="stuck")))
        await asyncio.to_thread(when.wait)
        assert isinstance(await ended(other), Outcome)
        outcome = await within(launcher.run(Job(effect("later"), id="later")), 120)
        assert outcome.launched
        end = await within(ended(stuck), 150)
        assert isinstance(end, Outcome)
        assert end.launched, "by this very call, though it never had the answer"
    assert db.effects_by_job() == {"warm": 1, "other": 1, "stuck": 1, "later": 1}


@pytest.mark.servers("real", "embedded")
async def test_a_deadline_while_the_launch_gets_no_answer(db: Watched, proxy: Proxy) -> None:
    """The worker was at work, whoever has its handle: it was cancelled, and the error does not say otherwise."""
    when = proxy.when(TO_SERVER, LAUNCH, stall=(TO_CLIENT,))
    end = await ended(arun(proxy.through(db.conninfo), Job(slow("j", 60), id="j", timeout=3)))
    assert when.happened
    assert isinstance(end, errors.DeadlinePassed), end
    assert "its worker has ended" in str(end)
    assert db.effects("j") == 0


@pytest.mark.parametrize("reset", [True, False], ids=["RST", "FIN"])
async def test_all_connections_cut_while_at_work(db: Watched, proxy: Proxy, reset: bool) -> None:
    # What stands between the statements, and tells which of them is next, comes after the cut.
    job = Job(f"select pg_sleep(1); {slow('j', 1)}", id="j")
    task = asyncio.create_task(arun(proxy.through(db.conninfo), job))
    pid = await db.at_work("j")
    assert proxy.cut(reset=reset) >= 1
    outcome = await within(task)
    assert outcome.worker_pid == pid
    assert db.effects("j") == 1


async def test_connections_cut_at_random(db: Watched, proxy: Proxy) -> None:
    chance = seeded("cuts")
    jobs = count(12, 60)
    stop = asyncio.Event()

    async def cutter() -> None:
        while not stop.is_set():
            await asyncio.sleep(chance.uniform(0.05, 0.8))
            proxy.cut(reset=chance.choice([True, False]))

    cutting = asyncio.create_task(cutter())
    async with Launcher(proxy.through(db.conninfo)) as launcher:
        try:
            ends = await within(
                asyncio.gather(
                    *(launcher.run(Job(slow(f"j{n}", chance.choice([0, 0.1, 0.6])), id=f"j{n}")) for n in range(jobs)),
                    return_exceptions=True,
                ),
                150,
            )
        finally:
            stop.set()
            await cutting
    # Nobody else is there to launch them, however many handles were lost.
    assert [end for end in ends if not (isinstance(end, Outcome) and end.launched)] == []
    assert db.effects_by_job() == {f"j{n}": 1 for n in range(jobs)}


async def test_server_that_cannot_be_reached_for_a_while(db: Watched, proxy: Proxy) -> None:
    task = asyncio.create_task(arun(proxy.through(db.conninfo), Job(slow("j", 1), id="j")))
    pid = await db.at_work("j")
    proxy.refuse()
    proxy.cut()
    await asyncio.sleep(3)
    assert not task.done()
    proxy.resume()
    outcome = await within(task)
    assert outcome.worker_pid == pid
    assert db.effects("j") == 1


@pytest.mark.servers("real", "embedded")
async def test_half_open_connections(db: Watched, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing comes any more and nobody says so: noticed by our own bound, named, and got over."""
    monkeypatch.setattr(pace, "CALL", 3.0)
    task = asyncio.create_task(arun(proxy.through(db.conninfo), Job(slow("j", 1), id="j")))
    await db.at_work("j")
    proxy.stall(TO_CLIENT)
    await asyncio.sleep(2)
    before = proxy.accepted
    await eventually(lambda: proxy.accepted > before or task.done(), "it tries a new connection", 150)
    proxy.cut()
    proxy.resume()
    outcome = await within(task, 150)
    assert outcome.job_id == "j"
    assert db.effects("j") == 1


@pytest.mark.servers("real", "embedded")
@pytest.mark.parametrize(
    ("silent", "sql"),
    [(b'"pgbg".look(', "select pg_sleep(1.5)"), (b"result_info", "select 1 / 0")],
    ids=["look", "poll"],
)
async def test_one_connection_that_goes_silent(
    db: Watched, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, silent: bytes, sql: str
) -> None:
    """It alone gives no answer any more, and nothing ever ends it: noticed by the bound of that very call."""
    monkeypatch.setattr(pace, "CALL", 1.0)
    when = proxy.when(TO_SERVER, silent, stall=TO_CLIENT)
    end = await ended(arun(proxy.through(db.conninfo), Job(sql, id="j")))
    assert when.happened
    if silent != b"result_info":
        assert isinstance(end, Outcome), end
    else:
        assert isinstance(end, errors.WorkerError), end
        assert end.sqlstate == "22012"


@pytest.mark.servers("real")
async def test_dead_hosts_are_noticed_by_the_kernel(db: Watched) -> None:
    """A connection that is idle, or that nobody acknowledges; what the connection string says wins."""
    for conninfo, idle in ((db.conninfo, 20), (f"{db.conninfo} keepalives_idle=7", 7)):
        conn = await connection.connect(conninfo, "pgbg: test")
        with socket.socket(fileno=os.dup(conn.fileno())) as ours:
            assert ours.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            assert ours.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == idle
            assert ours.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL) == 5
            assert ours.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT) == 3
            assert ours.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 30_000
        await connection.close(conn)


@pytest.mark.servers("real", "embedded")
async def test_another_server_session_behind_the_same_connection(db: Watched) -> None:
    """A pooler in transaction mode that hides behind one pid: the session-local token tells."""
    async with Launcher(db.conninfo) as launcher:
        task = asyncio.create_task(launcher.run(Job(slow("j", 2), id="j"), on_cancel="leave"))
        await db.at_work("j")
        (session,) = launcher._host._sessions
        await connection.configure(session._conn, ((handles.TOKEN, "another session's"),))
        with pytest.raises(errors.PoolerInTransactionMode, match="another server session"):
            await within(task)
        await eventually(lambda: not db.workers(), "the worker has ended")
        assert (await within(launcher.run(Job(slow("j", 2), id="j")))).launched is False
    assert db.effects("j") == 1


@pytest.mark.servers("real", "embedded")
async def test_half_closed_connections(db: Watched, proxy: Proxy) -> None:
    task = asyncio.create_task(arun(proxy.through(db.conninfo), Job(slow("j", 1.5), id="j")))
    pid = await db.at_work("j")
    proxy.half_close(TO_CLIENT)
    outcome = await within(task, 120)
    assert outcome.worker_pid == pid
    assert db.effects("j") == 1


@pytest.mark.servers("real", "embedded")
@pytest.mark.parametrize(("kind", "how"), [("supervised", "cut"), ("session", "stalled")])
async def test_session_lost_while_it_describes_the_result(
    db: Watched, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, kind: str, how: str
) -> None:
    """Nothing is launched yet, and nothing is wrong with the statement: another session is asked."""
    monkeypatch.setattr(pace, "CALL", 1.0)
    described = b"insert into effects"  # what is launched has the same text, later
    proxy.when(TO_SERVER, described, cut=how == "cut", stall=() if how == "cut" else TO_CLIENT)
    job = Job(effect("j"), id="j", kind=kind)
    assert (await within(arun(proxy.through(db.conninfo), job), 120)).launched
    assert db.effects("j") == 1


@pytest.mark.servers("real", "embedded")
async def test_result_that_never_comes(db: Watched, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """A session job's worker ends, and the connection that its result comes over has gone silent."""
    monkeypatch.setattr(pace, "CALL", 1.0)
    proxy.when(TO_SERVER, f'"{db.database.function("result")}"'.encode(), stall=TO_CLIENT)
    job = Job(effect("j"), id="j", kind="session", verify_sql="select exists (select from effects)")
    outcome = await within(arun(proxy.through(db.conninfo), job), 120)
    assert outcome.proof == "verify_sql"
    assert db.effects("j") == 1


async def test_cancel_over_a_cut_connection(db: Watched, proxy: Proxy) -> None:
    """The cancel is decided all the same: over a new connection, and before the call ends."""
    task = asyncio.create_task(arun(proxy.through(db.conninfo), Job(slow("j", 30), id="j")))
    await db.at_work("j")
    proxy.cut()
    assert isinstance(await cancelled(task), asyncio.CancelledError)
    await eventually(lambda: not db.workers(), "the worker has ended")
    assert db.effects() == 0
    assert db.states() == {"j": "cancelled"}


async def test_a_slow_network(db: Watched, proxy: Proxy) -> None:
    proxy.delay(0.05)
    calls = (arun(proxy.through(db.conninfo), Job(effect(f"j{n}"), id=f"j{n}")) for n in range(5))
    assert all(outcome.launched for outcome in await within(asyncio.gather(*calls)))
    assert db.effects_by_job() == {f"j{n}": 1 for n in range(5)}


async def test_never_reachable(db: Watched, proxy: Proxy) -> None:
    proxy.refuse()
    with pytest.raises(errors.ServerUnreachable):
        await within(arun(proxy.through(db.conninfo), Job(effect("j"), id="j")))
    assert db.effects() == 0
