"""A role with pgbackground_role that does what it can: others' jobs stay theirs, and go on."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import psycopg
import pytest

from pgbg_orchestration import Job, Launcher, Outcome, arun, errors
from pgbg_orchestration.ledger.install import install
from tests.core.kit import APP, Watched, effect, ended, eventually, slow, within

pytestmark = pytest.mark.servers("real", "embedded")

NASTY: dict[str, list[str]] = {
    "text": ["null", "''", "'j'", "'pgbg_app'", "'committed'", "'; drop table effects; --'", "repeat('x', 100000)"],
    "bigint": ["null", "0", "-1", "9223372036854775807"],
    "integer": ["null", "0", "-1", "2147483647"],
    "boolean": ["null", "true"],
    "bytea": ["null", "pgbg.digest('j')", "''"],
    "oid": ["null", "0", "10"],
    "interval": ["null", "'-1000 years'", "'1 day'"],
    "text[]": ["null", "'{}'", "array['pgbg_app']", "array[null]::text[]", "array['', 'a', 'b', 'c']"],
    "bytea[]": ["null", "'{}'", "array[pgbg.digest('j')]", "array[null]::bytea[]"],
    "jsonb": ["null", "'[]'", "'[{}]'", "'{\"name\": 1}'"],
    "timestamp with time zone": ["null", "'infinity'", "now()"],
}
"""Values to try for each type: of the victim's, of none, and of too much."""


def everything(db: Watched) -> list[tuple[Any, ...]]:
    """All that the victim has in the package's tables."""
    tables = ("receipt", "job", "past_attempt", "series", "row_set", "row_chunk")
    return [row for t in tables for row in db.sql(f"select t::text from pgbg.{t} as t where owner = %s", APP)]


def answer(enemy: psycopg.Connection, call: str) -> object:
    """What the server says to a call: rows, or an error."""
    try:
        cursor = enemy.execute(call.encode())
    except psycopg.Error as error:
        return error
    return cursor.fetchall() if cursor.description else None


async def test_every_function_with_every_argument(db: Watched, enemy: psycopg.Connection) -> None:
    """Nothing of the victim's is read, changed or locked by it, whatever the arguments are."""
    job = Job(f"{effect('j')} returning 'the victim''s'", id="j", label="the victim's", fetch=True)
    with pytest.raises(errors.WorkerError):
        await within(arun(db.conninfo, replace(job, sql="select 'the victim''s'::int")))
    await within(arun(db.conninfo, job, accept_changed_sql=True))
    async with Launcher(db.conninfo) as launcher:
        await within(launcher.cancel("k", reason="the victim's"))
    before = everything(db)
    functions = db.sql(
        "select p.proname, p.prokind, array(select t::regtype::text from unnest(p.proargtypes) t)"
        " from pg_proc p where p.pronamespace = 'pgbg'::regnamespace order by 1"
    )
    enemy.execute("set statement_timeout = '5s'")
    calls = 0
    for name, kind, types in functions:
        most = max((len(NASTY[t]) for t in types), default=1)
        # Each value of each argument, beside others at one distance and then at another.
        for shift in (0, 1, 2):
            for turn in range(most):
                values = [NASTY[t][(turn + shift * n) % len(NASTY[t])] + f"::{t}" for n, t in enumerate(types)]
                call = f"{'call' if kind == 'p' else 'select * from'} pgbg.{name}({', '.join(values)})"
                calls += 1
                told = answer(enemy, call)
                assert "the victim's" not in str(told), call
                assert not isinstance(told, psycopg.errors.InternalError_), (call, told)
    print(f"{calls} calls of {len(functions)} functions")
    assert everything(db) == before
    assert enemy.execute("select count(*) from pgbg.jobs where owner = 'pgbg_app'").fetchone() == (0,)
    # Whatever it holds now is its own.
    assert (await within(arun(db.conninfo, job))).rows == [("the victim's",)]
    assert (await within(arun(db.conninfo, Job(effect("l"), id="l")))).launched
    assert db.effects_by_job() == {"j": 1, "l": 1}


async def test_role_of_all_is_no_owner_by_accident(db: Watched, enemy: psycopg.Connection) -> None:
    """Everybody is a member of pgbackground_role: jobs that name it as their owner are everybody's, others are not."""
    await within(arun(db.conninfo, Job(effect("mine"), id="mine")))
    await within(arun(db.conninfo, Job(effect("all"), id="all", owner="pgbackground_role")))
    assert enemy.execute("select job_id from pgbg.jobs").fetchall() == [("all",)]


@pytest.mark.parametrize("victim", [APP, "postgres"])
async def test_lock_of_a_job_held_by_a_stranger(db: Watched, enemy: psycopg.Connection, victim: str) -> None:
    """A cancel is decided all the same, and the stranger is not signalled, whoever the victim is."""
    enemy.execute("select pg_advisory_lock(pgbg.lock_key('job', %s, pgbg.digest('j')))", (victim,))
    enemy.autocommit = False
    enemy.execute("select 1")
    sleeping = asyncio.create_task(asyncio.to_thread(enemy.execute, "select pg_sleep(1)"))
    await eventually(lambda: [s for s in db.sessions() if "pg_sleep" in s[4]], "the stranger is at work")
    async with Launcher(db.database.conninfo_as(victim)) as launcher:
        assert await within(launcher.cancel("j")) == "cancelled"
    await within(sleeping)
    with pytest.raises(errors.JobCancelled):
        await within(arun(db.database.conninfo_as(victim), Job(effect("j"), id="j")))
    assert db.effects() == 0


@pytest.mark.parametrize("kind", ["supervised", "session"])
async def test_name_of_a_worker_borne_by_a_stranger(db: Watched, enemy: psycopg.Connection, kind: str) -> None:
    """A job whose marker a stranger bears runs, is not taken for being at work, and a cancel does not hit him."""
    enemy.execute("select set_config('application_name', pgbg.marker(%s, 'j'), false)", (APP,))
    assert (await within(arun(db.conninfo, Job(effect("j"), id="j", kind=kind)))).launched
    enemy.execute("select set_config('application_name', pgbg.marker(%s, 'k'), false)", (APP,))
    sleeping = asyncio.create_task(asyncio.to_thread(enemy.execute, "select pg_sleep(2)"))
    task = asyncio.create_task(arun(db.conninfo, Job("select pg_sleep(30)", id="k", kind=kind)))
    await eventually(lambda: [w for w in db.workers() if w[2] == "active"], "a worker is at work")
    await asyncio.sleep(0.5)
    task.cancel()
    assert isinstance(await ended(task), asyncio.CancelledError)
    await within(sleeping)
    await eventually(lambda: not db.workers(), "the worker has ended")
    assert db.effects_by_job() == {"j": 1}


@pytest.mark.parametrize("held", ["the lock of all installers", "a look in an open transaction"])
async def test_locks_that_keep_an_installation_up(db: Watched, enemy: psycopg.Connection, held: str) -> None:
    """Jobs go on; an upgrade waits for a few seconds, changes nothing, and says what to look for."""
    enemy.autocommit = False
    if held == "the lock of all installers":
        enemy.execute("select pg_advisory_lock(hashtextextended('pgbg:install', 0))")
        with pytest.raises(errors.LedgerError, match="pg_blocking_pids"):
            await asyncio.to_thread(install, db.admin_conninfo)
    else:
        enemy.execute("select * from pgbg.jobs")
        assert (await asyncio.to_thread(install, db.admin_conninfo)).text == ""
    task = asyncio.create_task(arun(db.conninfo, Job(slow("j", 0.2), id="j")))
    assert isinstance(await ended(task), Outcome)
    enemy.rollback()
    enemy.execute("select pg_advisory_unlock_all()")
    install(db.admin_conninfo)
    assert db.effects("j") == 1
