"""What PostgreSQL 19 runs alone only, by the server's own word, and what is told of it before a launch."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import psycopg
import pytest

from pgbg_orchestration import Job, Launcher, arun, errors
from pgbg_orchestration.statements.refuse import outside_transaction
from pgbg_orchestration.statements.split import split
from tests.conftest import Database, FreshDatabases
from tests.core.kit import APP, Watched, eventually, only_long, within
from tests.servers.kinds import Server

pytestmark = [pytest.mark.servers("standin_pg19", "real19"), only_long]

MADE = """
create table t (i int primary key); insert into t values (1); cluster t using t_pkey;
create table p (i int primary key) partition by range (i);
create table p1 partition of p for values from (0) to (10);
create index p_i on p (i);
create materialized view m as select i from t; create unique index on m (i)
"""
ALONE = (
    "repack",
    "repack using index",
    "repack (verbose) using index",
    "repack (analyze) t",
    "repack (analyze) t (i)",
    "repack (concurrently) t",
    'repack ("concurrently") t',
    "repack (concurrently, verbose) t using index t_pkey",
    "cluster",
    "vacuum t",
    "vacuum (full) t",
    "reindex (concurrently) table t",
    "reindex table concurrently t",
    "create index concurrently on t (i)",
    "alter table p detach partition p1 concurrently",
    "alter system reset work_mem",
    "discard all",
)
BESIDE_OTHERS = (
    "repack t",
    "repack (verbose) t",
    "repack (analyze off) t",
    "repack (concurrently off) t",
    "repack t using index t_pkey",
    "cluster t using t_pkey",
    "analyze t",
    "reindex table t",
    "refresh materialized view concurrently m",
    "checkpoint",
    "discard temp",
)
NOT_TOLD_BY_THE_TEXT = ("repack p", "reindex index p_i")
"""Whether a table or an index is partitioned is known to the server only."""


def ends(database: Database, text: str) -> str:
    """Run a text in one message, on fresh tables, and return how it ended: ok, or the SQLSTATE."""
    with database.connect() as session:
        session.execute("drop schema public cascade; create schema public")
        session.execute(MADE)
        try:
            psycopg.ClientCursor(session).execute(text.encode())
        except psycopg.Error as error:
            return error.sqlstate or ""
    return "ok"


@pytest.mark.parametrize("text", [*ALONE, *BESIDE_OTHERS, *NOT_TOLD_BY_THE_TEXT])
def test_what_is_told_is_what_the_server_does(database: Database, text: str) -> None:
    [statement] = split(text)
    assert ends(database, text) == "ok"
    beside = ends(database, f"select 1; {text}")
    assert beside == ("ok" if text in BESIDE_OTHERS else "25001")
    assert outside_transaction(statement) == (text in ALONE)


def test_wait_for_lsn(database: Database) -> None:
    """It says that it wants a standby, beside others too; there it is refused with 0A000."""
    [statement] = split("wait for lsn '0/0'")
    assert ends(database, "wait for lsn '0/0'") == "55000"
    assert outside_transaction(statement)


@pytest.mark.parametrize("kind", ["supervised", "session"])
async def test_a_wait_that_ends_and_one_that_times_out(db: Watched, kind: str) -> None:
    """Its own timeout has the code of a cancel, and is told as what it is."""
    there = Job("wait for lsn '0/1' with (mode 'primary_flush')", id="there", kind=kind)
    assert (await within(arun(db.conninfo, there))).command_tag == "WAIT"
    far = Job("wait for lsn 'FFFF/0' with (mode 'primary_flush', timeout '100ms')", id="far", kind=kind)
    with pytest.raises(errors.WorkerError) as caught:
        await within(arun(db.conninfo, far))
    assert not isinstance(caught.value, errors.JobCancelled)
    assert caught.value.sqlstate == "57014"
    assert "timed out while waiting" in str(caught.value)


@pytest.mark.parametrize("kind", ["supervised", "session"])
@pytest.mark.parametrize("text", ["repack", "repack using index", "repack (concurrently) t", "repack (analyze) t"])
async def test_what_runs_alone_runs_as_a_job(db: Watched, text: str, kind: str) -> None:
    db.sql("create table t (i int primary key); insert into t values (1); cluster t using t_pkey")
    db.sql(f"alter table t owner to {APP}")
    assert (await within(arun(db.conninfo, Job(text, id="j", kind=kind)))).command_tag == "REPACK"
    with pytest.raises(errors.InvalidJob, match="cannot run in a transaction"):
        await within(arun(db.conninfo, Job(text, id="no", kind="receipt")))


def test_a_concurrent_repack_takes_a_worker_slot(own_server: Callable[..., Server]) -> None:
    """A worker of its own decodes what others write meanwhile; one slot is the logical replication launcher's."""
    with own_server(1).connect() as session:
        session.execute("create table t (i int primary key)")
        with pytest.raises(psycopg.errors.ConfigurationLimitExceeded):
            session.execute("repack (concurrently) t")
    with own_server(2).connect() as session:
        session.execute("create table t (i int primary key)")
        assert session.execute("repack (concurrently) t").statusmessage == "REPACK"


async def test_concurrent_repacks_on_a_server_with_four_slots(own_db: Callable[..., Watched]) -> None:
    """Supervisor, worker and decoding worker: one job at a time, with the replication launcher's slot.

    The stand-in's workers take none of the server's slots, so only the real extension can fail here.
    """
    db = own_db(max_worker_processes=4)
    db.sql("".join(f"create table t{n} (i int primary key); alter table t{n} owner to {APP};" for n in range(4)))
    jobs = [Job(f"repack (concurrently) t{n}", kind="supervised") for n in range(4)]
    async with Launcher(db.conninfo) as launcher:
        with db.database.connect() as holder, holder.transaction():
            holder.execute("lock table t0, t1, t2, t3")
            running = asyncio.gather(*map(launcher.run, jobs))
            waiting = "select count(*) from pg_locks where locktype = 'relation' and not granted"
            await eventually(lambda: db.value(waiting) > 0, "a REPACK that waits for its table")
            await asyncio.sleep(0.5)  # time for another supervisor to take the slot that the first REPACK needs next
        outcomes = await within(running)
    assert [outcome.attempt for outcome in outcomes] == [1, 1, 1, 1]


async def test_a_concurrent_repack_waits_for_a_receipt_in_another_database(
    db: Watched, fresh_database: FreshDatabases, server: Server
) -> None:
    """A receipt's transaction has an id from its start, and the new slot of REPACK waits for all in the cluster."""
    other = fresh_database(server, "empty")
    with db.database.connect() as holder, other.connect() as repacking, other.connect() as looking:
        holder.execute("select pg_advisory_lock(4711)")
        job = asyncio.create_task(arun(db.conninfo, Job("select pg_advisory_xact_lock(4711)", id="holds")))
        waiting = "select from pg_locks where locktype = 'advisory' and objid = 4711 and not granted"
        await eventually(lambda: looking.execute(waiting).fetchall(), "the job at work")
        repacking.execute("create table t (i int primary key)")
        repack = asyncio.create_task(asyncio.to_thread(repacking.execute, "repack (concurrently) t"))
        held = "select from pg_stat_activity where backend_type like 'REPACK %' and wait_event = 'transactionid'"
        await eventually(lambda: looking.execute(held).fetchall(), "REPACK waits for the job")
        holder.execute("select pg_advisory_unlock(4711)")
        await within(job)
        assert (await within(repack)).statusmessage == "REPACK"


def test_strings_have_no_escapes(database: Database) -> None:
    assert ends(database, "set standard_conforming_strings = off") == "0A000"


def test_its_own_progress_view(database: Database) -> None:
    with database.connect() as session:
        columns = session.execute(
            "select array_agg(attname::text) from pg_attribute where attrelid = 'pg_stat_progress_repack'::regclass"
        ).fetchone()
    assert columns is not None
    assert {"pid", "command", "phase", "heap_blks_scanned", "heap_blks_total"} <= set(columns[0])
