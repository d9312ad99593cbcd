"""DDL that meets DDL on the real server: which error comes, and that the policy has it tried again, soon."""

from __future__ import annotations

import asyncio
import contextlib

import psycopg
import pytest

from pgbg_orchestration import Job, arun, errors
from pgbg_orchestration.retry import Action, RetryPolicy
from tests.core.kit import Watched, eventually, within

PREPARED = """
create schema ddl; grant all on schema ddl to pgbg_app; grant create on database {} to pgbg_app;
set role pgbg_app;
create table ddl.t (i int);
create function ddl.f() returns int language sql as 'select 1';
reset role
"""

pytestmark = pytest.mark.servers("real")


@pytest.mark.parametrize(
    ("first", "second", "sqlstate"),
    [
        ("grant select on ddl.t to pg_monitor", "grant insert on ddl.t to pg_monitor", "XX000"),
        (
            "create or replace function ddl.f() returns int language sql as 'select 2'",
            "create or replace function ddl.f() returns int language sql as 'select 3'",
            "XX000",
        ),
        (
            "drop function ddl.f()",
            "create or replace function ddl.f() returns int language sql as 'select 3'",
            "XX000",
        ),
        ("create table if not exists ddl.n (i int)", "create table if not exists ddl.n (i int)", "23505"),
        ("create schema if not exists n", "create schema if not exists n", "23505"),
        ("create or replace view ddl.v as select 1 as i", "create or replace view ddl.v as select 1 as i", "23505"),
    ],
)
async def test_it_is_tried_again(db: Watched, first: str, second: str, sqlstate: str) -> None:
    db.sql(PREPARED.format(db.database.name))
    with contextlib.closing(psycopg.connect(db.conninfo)) as other:
        other.execute(first)
        job = asyncio.create_task(arun(db.conninfo, Job(second, id="ddl")))
        blocked = "select count(*) from pg_stat_activity where datname = %s and wait_event_type = 'Lock'"
        await eventually(lambda: db.value(blocked, db.database.name), "the job waits for the other session")
        other.commit()
    with pytest.raises(errors.WorkerError) as caught:
        await within(job)

    assert caught.value.sqlstate == sqlstate
    decision = RetryPolicy().decide(caught.value)
    assert decision.action is Action.RETRY
    assert decision.delay is not None
    assert decision.delay <= 5
    outcome = await within(arun(db.conninfo, Job(second, id="ddl")))
    assert outcome.launched
    db.sql("drop schema if exists n cascade; drop schema ddl cascade; revoke pg_monitor from pgbg_app")


async def test_a_duplicate_of_the_users_own_is_not(db: Watched) -> None:
    db.sql("create unique index only_one on effects (job)")
    with pytest.raises(errors.WorkerError) as caught:
        await within(arun(db.conninfo, Job("insert into effects select 'twice' from generate_series(1, 2)", id="own")))
    assert (caught.value.sqlstate, caught.value.fields.constraint_name) == ("23505", "only_one")
    assert RetryPolicy().decide(caught.value).action is Action.FAIL
