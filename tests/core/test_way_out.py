"""The way out is bounded: a cancelled call raises its cancel and nothing else, and a deadline holds, whatever hangs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import psycopg
import pytest

from pgbg_orchestration import Job, Kind, Launcher, Outcome, arun, errors, pace
from pgbg_orchestration.ledger.ledger import Ledger
from pgbg_orchestration.postgres.listener import Listener
from tests.core.kit import Recorder, Watched, effect, ended, eventually, slow, within
from tests.kit.proxy import TO_CLIENT, TO_SERVER, Proxy

pytestmark = pytest.mark.servers("real", "embedded")


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound, made short: what is tested is that there is one."""
    monkeypatch.setattr(pace, "CANCEL", 3.0)


SLEEPING = "select pid from pg_stat_activity where wait_event = 'PgSleep' and query like '%pg_sleep(60)%'"


def told_of(seen: Recorder) -> dict[str, Any]:
    """The error that a call was let go with."""
    return dict(next(event for event in seen.events if event.kind == "let_go").data["error"])


async def test_a_timeout_of_the_callers_becomes_a_timeout_error_whatever_the_ledger_says(
    db: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(*_: object, **__: object) -> None:
        raise psycopg.errors.InsufficientPrivilege("permission denied for function mark_cancelled")

    monkeypatch.setattr(Ledger, "mark_cancelled", refuse)
    monkeypatch.setattr(Ledger, "signal", refuse)
    seen = Recorder()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(2):
            await arun(db.conninfo, Job(slow("j", 4), id="j"), observer=seen)
    assert "let_go" in seen.kinds()
    await eventually(lambda: not db.workers(), "the worker has ended by itself")


async def test_a_cancelled_call_raises_its_cancel_when_the_schema_is_gone(db: Watched) -> None:
    async with Launcher(db.conninfo) as launcher:
        task = asyncio.create_task(launcher.run(Job(slow("j", 3), id="j")))
        await db.at_work("j")
        db.sql("alter schema pgbg rename to gone")
        task.cancel()
        assert isinstance(await ended(task), asyncio.CancelledError)
        await eventually(lambda: not db.workers(), "the worker has ended by itself")
        db.sql("alter schema gone rename to pgbg")


async def test_cancelled_while_the_server_is_away(
    own_db: Callable[..., Watched], caplog: pytest.LogCaptureFixture
) -> None:
    db = own_db()
    async with Launcher(db.conninfo) as launcher:
        await within(launcher.run(Job("select 1", id="warm")))  # its facts are known
        db.close()
        db.server.stop()
        try:
            seen = Recorder()
            task = asyncio.create_task(launcher.run(Job(effect("j"), id="j"), observer=seen))
            await asyncio.sleep(0.5)
            task.cancel()
            assert isinstance(await ended(task), asyncio.CancelledError)
        finally:
            db.server.start()
    told = told_of(seen)
    assert told["data_state"] == errors.NOT_BY_THIS_CALL
    assert "could not be decided within 3 s" in told["message"]


async def test_a_deadline_holds_while_the_server_is_away(own_db: Callable[..., Watched]) -> None:
    db = own_db()
    async with Launcher(db.conninfo) as launcher:
        await within(launcher.run(Job("select 1", id="warm")))
        db.close()
        db.server.stop()
        try:
            end = await ended(launcher.run(Job(effect("j"), id="j", timeout=1)))
        finally:
            db.server.start()
    assert isinstance(end, errors.ServerUnreachable)
    assert end.data_state == errors.NOT_BY_THIS_CALL


async def test_a_server_that_is_away_from_a_committed_job(own_db: Callable[..., Watched]) -> None:
    """A call that sees nothing of the job speaks of itself alone: an earlier one has launched it."""
    db = own_db()
    assert (await within(arun(db.conninfo, Job(effect("j"), id="j")))).launched
    db.close()
    db.server.stop()
    try:
        end = await ended(arun(db.conninfo, Job(effect("j"), id="j")))
    finally:
        db.server.start()
    assert isinstance(end, errors.ServerUnreachable)
    assert end.data_state == errors.NOT_BY_THIS_CALL
    assert (await within(arun(db.conninfo, Job(effect("j"), id="j")))).launched is False


async def test_a_cancel_from_outside_while_the_server_is_away(own_db: Callable[..., Watched]) -> None:
    db = own_db()
    async with Launcher(db.conninfo) as launcher:
        await within(launcher.run(Job("select 1", id="warm")))
        db.close()
        db.server.stop()
        try:
            end = await ended(launcher.cancel("j"))
        finally:
            db.server.start()
    assert isinstance(end, errors.ServerUnreachable)
    assert "could not be decided within 3 s" in end.message


@pytest.mark.parametrize("on_cancel", ["cancel", "leave"])
async def test_cancelled_while_the_server_is_silent(
    db: Watched, proxy: Proxy, on_cancel: Literal["cancel", "leave"]
) -> None:
    """Nothing comes back any more, on connections that are open and on new ones."""
    seen = Recorder()
    task = asyncio.create_task(
        arun(proxy.through(db.conninfo), Job(slow("j", 5), id="j"), observer=seen, on_cancel=on_cancel)
    )
    await db.at_work("j")
    proxy.stall(TO_CLIENT)
    task.cancel()
    assert isinstance(await ended(task), asyncio.CancelledError)
    if on_cancel == "cancel":
        told = told_of(seen)
        assert "Nothing was launched" not in told["data_state"]
    proxy.cut()
    await eventually(lambda: not db.workers(), "the worker has ended")


async def test_rows_that_cannot_be_read_in_time(db: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """The deadline passes while the rows of a job are read that has committed."""
    asked = asyncio.Event()

    async def never(*_: object, **__: object) -> None:
        asked.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(Ledger, "rows", never)
    seen = Recorder()
    task = asyncio.create_task(arun(db.conninfo, Job("select 1", id="j", fetch=True), observer=seen))
    await within(asked.wait())
    task.cancel()
    assert isinstance(await ended(task), asyncio.CancelledError)
    told = told_of(seen)
    assert told["data_state"] == errors.COMMITTED


async def test_a_cancel_while_it_closes_leaves_no_connection(db: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    closing, close = asyncio.Event(), Listener.close

    async def slowly(self: Listener) -> None:
        closing.set()
        await asyncio.sleep(0.3)
        await close(self)

    monkeypatch.setattr(Listener, "close", slowly)
    task = asyncio.create_task(arun(db.conninfo, Job(effect("j"), id="j")))
    await within(closing.wait())
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await eventually(lambda: not db.sessions("pgbg: %"), "all are closed", 10)


async def test_a_launch_without_an_answer_is_not_said_to_be_none(db: Watched, proxy: Proxy) -> None:
    """The deadline passes while nothing comes back from the server any more, where the job commits."""
    async with Launcher(proxy.through(db.conninfo)) as launcher:
        await within(launcher.run(Job("select 1", id="warm")))
        when = proxy.when(TO_SERVER, b"begin_job", stall=TO_CLIENT)
        task = asyncio.create_task(ended(launcher.run(Job(effect("j"), id="j", timeout=2))))
        await asyncio.to_thread(when.wait)
        proxy.stall(TO_CLIENT)
        await eventually(lambda: db.effects("j"), "it has committed")
        end = await task
        proxy.cut()
    assert isinstance(end, errors.ServerUnreachable), end
    assert "Nothing was launched" not in end.data_state


@contextmanager
def standby_away(db: Watched) -> Iterator[None]:
    """Commits wait for a synchronous standby that is not there, but for the test's own."""
    db.sql("set synchronous_commit to local")
    db.sql("alter system set synchronous_standby_names = 'away'")
    db.sql("select pg_reload_conf()")
    try:
        yield
    finally:
        db.sql("alter system reset synchronous_standby_names")
        db.sql("select pg_reload_conf()")


async def missed(db: Watched) -> None:
    await eventually(lambda: db.value("show synchronous_standby_names") == "away", "the standby is missed")


async def test_a_deadline_holds_while_commits_wait_for_a_standby(own_db: Callable[..., Watched]) -> None:
    """What this package writes for itself does not wait for the standby; the job's own commit does."""
    db = own_db()
    with standby_away(db):
        await missed(db)
        seen = Recorder()
        end = await ended(arun(db.conninfo, Job(effect("j"), id="j", timeout=5), observer=seen))
        assert "launched" in seen.kinds(), "the registration did not wait"
        # Cancelled while it waited, the commit is made on this server alone: the receipt says so.
        assert isinstance(end, Outcome), end
        assert db.effects() == 1
        late = await ended(arun(db.conninfo, Job(slow("k", 60), id="k", timeout=2)))
        assert isinstance(late, errors.DeadlinePassed), late


@pytest.mark.parametrize("kind", [Kind.RECEIPT, Kind.SUPERVISED])
async def test_an_interrupt_is_decided_while_commits_wait_for_a_standby(
    own_db: Callable[..., Watched], kind: Kind
) -> None:
    db = own_db()
    with standby_away(db):
        await missed(db)
        seen = Recorder()
        job = Job("select pg_sleep(60)", id="j", kind=kind)
        task = asyncio.create_task(arun(db.conninfo, job, observer=seen))
        await eventually(lambda: db.sql(SLEEPING), "it is at work")
        task.cancel()
        assert isinstance(await ended(task), asyncio.CancelledError)
        assert told_of(seen)["error"] == "JobCancelled", "nothing of it waited for the standby"
        assert db.receipts("cancelled") == {"j"}


@pytest.mark.parametrize("kind", [Kind.RECEIPT, Kind.SUPERVISED])
async def test_an_interrupt_while_the_commit_itself_waits_for_a_standby(
    own_db: Callable[..., Watched], kind: Kind
) -> None:
    """The wait for the standby is what is cancelled: the commit is made on this server, and that is told."""
    db = own_db()
    with standby_away(db):
        await missed(db)
        seen = Recorder()
        task = asyncio.create_task(arun(db.conninfo, Job(effect("j"), id="j", kind=kind), observer=seen))
        await eventually(lambda: db.sql("select pid from pg_stat_activity where wait_event = 'SyncRep'"), "it waits")
        task.cancel()
        assert isinstance(await ended(task), asyncio.CancelledError)
        let_go = next(event for event in seen.events if event.kind == "let_go")
        assert let_go.data.get("outcome"), let_go.data
        assert db.effects("j") == 1
        assert db.receipts() == {"j"}


async def test_a_persons_cancel_is_in_force_at_once_and_says_what_a_failover_would_lose(
    own_db: Callable[..., Watched], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pace, "CONFIRM", 0.5)
    monkeypatch.setattr(pace, "CANCEL", 30.0)
    db = own_db()
    async with Launcher(db.conninfo) as launcher:
        assert await within(launcher.cancel("i")) == "cancelled"
        assert not caplog.messages, "no standby is wanted"
        with standby_away(db):
            await missed(db)
            assert await within(launcher.cancel("j")) == "cancelled"
            assert db.receipts("cancelled") == {"i", "j"}
            assert any("no synchronous standby has confirmed it" in line for line in caplog.messages)


async def test_a_job_that_waits_for_no_standby_is_not_kept_waiting_for_one(own_db: Callable[..., Watched]) -> None:
    """Its registration and the word of its end wait for none either, and nor do the other jobs of the session."""
    db = own_db()
    async with Launcher(db.conninfo) as launcher:
        await within(launcher.run(Job("select 1", id="warm")))
        with standby_away(db):
            await missed(db)
            (here,) = await eventually(lambda: db.sessions("pgbg: launching"), "the launching session")
            for name in ("i", "j", "k"):
                job = Job(slow(name, 1) + f"; {effect(name)}", id=name, settings={"synchronous_commit": "local"})
                outcome = await within(launcher.run(job))
                assert (outcome.row_count, outcome.command_tag) == (1, "INSERT")
        assert here[0] in [row[0] for row in db.sessions("pgbg: launching")], "the session was not given up"
