"""New jobs that wait for a session's turn are registered and launched in one message, each by itself."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

import psycopg
import pytest
from psycopg import AsyncConnection

from pgbg_orchestration import Job, Launcher, Outcome, errors
from pgbg_orchestration.postgres import launch_message, session
from pgbg_orchestration.postgres.launch_message import Opening, StatementFailed
from pgbg_orchestration.postgres.pg_background import Handle
from pgbg_orchestration.walk.host import Host
from tests.core.kit import Watched, effect, ended, within


@pytest.fixture
def messages(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The ids of the jobs in each message that is sent."""
    sent: list[list[str]] = []
    run = launch_message.run

    async def seen(
        conn: AsyncConnection, openings: Sequence[tuple[Opening, bytes]]
    ) -> list[Handle | StatementFailed | None]:
        sent.append([one.job_id for one, _ in openings])
        return await run(conn, openings)

    monkeypatch.setattr(launch_message, "run", seen)
    return sent


@pytest.fixture
async def launcher(db: Watched, messages: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Launcher]:
    """A launcher with one session, which is open, and has nothing to do."""
    monkeypatch.setattr(Host, "_most_sessions", lambda _: 1)
    async with Launcher(db.conninfo) as launcher:
        await within(launcher.run(Job("select 1")))
        messages.clear()
        yield launcher


async def test_jobs_that_come_together(
    db: Watched, launcher: Launcher, messages: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "OPENED_TOGETHER", 4)
    jobs = [Job(effect(f"j{number}", number), id=f"j{number}") for number in range(6)]
    outcomes = await within(asyncio.gather(*(launcher.run(job) for job in jobs)))
    assert messages == [["j0", "j1", "j2", "j3"], ["j4", "j5"]]
    assert [(one.job_id, one.attempt, one.launched) for one in outcomes] == [(job.id, 1, True) for job in jobs]
    assert [one.worker_pid for one in outcomes] == [
        db.value("select worker_pid from pgbg.receipt where job_id = %s", job.id) for job in jobs
    ]
    assert db.effects_by_job() == dict.fromkeys([f"j{number}" for number in range(6)], 1)


async def test_one_that_is_known_among_new_ones(db: Watched, launcher: Launcher, messages: list[list[str]]) -> None:
    """Nothing of it is launched, and that is no failure: those behind it begin in the same message."""
    jobs = [Job(effect(name), id=name) for name in ("a", "known", "b")]
    await within(launcher.run(jobs[1]))
    messages.clear()
    outcomes = await within(asyncio.gather(*(launcher.run(job) for job in jobs)))
    assert messages == [["a", "known", "b"]]
    assert [one.launched for one in outcomes] == [True, False, True]
    assert db.effects_by_job() == {"a": 1, "known": 1, "b": 1}


async def test_one_that_the_server_refuses_among_others(
    db: Watched, launcher: Launcher, messages: list[list[str]]
) -> None:
    """The server does nothing of what stands behind it, which goes in the next message, and never twice."""
    settings = {"refused": {"work_mem": "much"}}
    jobs = [Job(effect(name), id=name, settings=settings.get(name)) for name in ("a", "refused", "b", "c")]
    ends = await asyncio.gather(*(ended(launcher.run(job)) for job in jobs))
    assert messages == [["a", "refused", "b", "c"], ["b", "c"]]
    assert isinstance(ends[1], errors.InvalidJob), ends[1]
    assert [end.attempt for end in ends if isinstance(end, Outcome)] == [1, 1, 1]
    assert db.effects_by_job() == {"a": 1, "b": 1, "c": 1}
    told = {job_id: state for job_id, state in db.states().items() if job_id in ("a", "refused", "b", "c")}
    assert told == {"a": "committed", "refused": "failed", "b": "committed", "c": "committed"}


async def test_the_session_is_lost_on_the_way(
    db: Watched, launcher: Launcher, messages: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message was carried out and its answer lost: each of its jobs may be launched, and is done once."""
    run = launch_message.run
    lost: list[int] = []

    async def run_and_lose(
        conn: AsyncConnection, openings: Sequence[tuple[Opening, bytes]]
    ) -> list[Handle | StatementFailed | None]:
        ran = await run(conn, openings)
        if not lost:
            lost.append(len(openings))
            for one, _ in openings:
                one.registration = None
            await conn.close()
            raise psycopg.OperationalError("the answer is lost")
        return ran

    monkeypatch.setattr(launch_message, "run", run_and_lose)
    jobs = [Job(effect(f"j{number}"), id=f"j{number}") for number in range(4)]
    outcomes = await within(asyncio.gather(*(launcher.run(job) for job in jobs)))
    assert lost == [4]
    assert [one.attempt for one in outcomes] == [1] * 4
    assert db.effects_by_job() == dict.fromkeys([f"j{number}" for number in range(4)], 1)
