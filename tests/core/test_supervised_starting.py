"""A supervisor that ends before anybody saw its worker, which may begin at any time after that."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator

import pytest

from pgbg_orchestration import Job, Outcome, arun, errors
from tests.core.kit import APP, Watched, ended, eventually, within
from tests.core.test_supervised import PROCEDURE

pytestmark = pytest.mark.real  # a stand-in's worker is a connection that its launcher opens
SQL = "call steps('j', 5, 0, 0.05)"


@contextlib.asynccontextmanager
async def worker_that_starts(db: Watched, job: Job) -> AsyncIterator[tuple[asyncio.Task[Outcome], int]]:
    """Run a job and kill its supervisor while the worker is on its way: it waits for a lock on a system catalog.

    It needs that catalog to take over default_text_search_config, which comes before the marker.

    Yields the call and the worker's pid; the worker is stopped then, and waits for nothing else.
    """
    db.sql(PROCEDURE)
    db.let_supervisors_die()
    with contextlib.closing(db.database.connect()) as holder, contextlib.closing(db.database.connect()) as locker:
        # The supervisor waits to claim its receipt, past its own start.
        holder.execute("begin")
        holder.execute(
            "insert into pgbg.receipt (owner, job_digest, status, job_id)"
            " values (%s, pgbg.digest('j'), 'cancelled', 'j')",
            (APP,),
        )
        call = asyncio.create_task(arun(db.conninfo, job))
        waits = (
            "select pid from pg_stat_activity"
            " where application_name like 'pgbg supervises%' and wait_event_type = 'Lock'"
        )
        [(supervisor,)] = await eventually(lambda: db.sql(waits), "a supervisor that waits to claim its receipt")
        locker.execute("begin")
        locker.execute("lock table pg_ts_config in access exclusive mode")
        holder.execute("rollback")
        starting = "select pid from pg_locks where not granted and relation = 'pg_ts_config'::regclass"
        [(worker,)] = await eventually(lambda: db.sql(starting), "a worker that starts")
        os.kill(worker, signal.SIGSTOP)
        try:
            shown = "select count(*) from pg_stat_activity where application_name ~ '^pgbg:[0-9a-f]{12}:'"
            # Its supervisor bears the marker while it launches.
            await eventually(lambda: db.value(shown) == 0, "nobody bears the marker")
            locker.execute("rollback")
            db.terminate([supervisor])
            yield call, worker
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker, signal.SIGCONT)
    await eventually(lambda: db.effects() >= 5 and not db.workers(), "it has begun and ended")


async def test_nothing_is_launched_beside_it(db: Watched) -> None:
    job = Job(SQL, id="j", verify_sql="select count(*) = 5 from effects")
    async with worker_that_starts(db, job) as (call, _):
        end = await ended(call)
        assert isinstance(end, errors.OutcomeUnknown), end
        assert "may begin yet" in str(end)
        assert isinstance(await ended(asyncio.create_task(arun(db.conninfo, job))), errors.OutcomeUnknown)
        assert db.effects() == 0
    assert db.effects() == 5
    assert (await within(arun(db.conninfo, job))).proof == "verify_sql"
    assert db.effects() == 5, "nothing ran twice"


async def test_a_cancel_meanwhile_is_not_told_to_be_one(db: Watched) -> None:
    """It runs after that."""
    async with worker_that_starts(db, Job(SQL, id="j", verify_sql="select false")) as (call, _):
        call.cancel()
        await ended(call)
        assert db.states() == {"j": "unknown"}
    assert db.effects() == 5


async def test_once_it_is_seen_verify_sql_decides(db: Watched) -> None:
    """Whoever sees it at work names it in the receipt: so its end is an end, and the job is launched again."""
    async with worker_that_starts(db, Job(SQL, id="j", verify_sql="select false")) as (call, worker):
        os.kill(worker, signal.SIGCONT)
        outcome = await within(call)
    assert outcome.launched
    in_order = [pid for (pid,) in db.sql("select pid from effects order by ctid")]
    assert len(in_order) == 10
    assert set(in_order[:5]) == {worker}
    assert len(set(in_order[5:])) == 1, "one after the other"
