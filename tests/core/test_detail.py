"""What the history keeps of a job beside its line: its SQL without values, its attempts, the first of its rows."""

from __future__ import annotations

import hashlib

import psycopg
import pytest

from pgbg_orchestration import Job, Launcher, arun, errors
from pgbg_orchestration.ledger import install
from pgbg_orchestration.ledger.history import JobDetail
from pgbg_orchestration.walk.worker_sql import MOST_OF_A_STATEMENT
from tests.conftest import Database
from tests.core import earlier_schemas
from tests.core.kit import APP, Watched, effect, within

pytestmark = pytest.mark.any_surface

SECRET = "canary-4711"


async def detail_of(conninfo: str, job_id: str, owner: str = APP) -> JobDetail | None:
    async with Launcher(conninfo) as launcher:
        return await within(launcher.ledger.detail(owner, job_id))


async def statement_of(conninfo: str, job_id: str) -> str | None:
    found = await detail_of(conninfo, job_id)
    assert found is not None
    return found.statement


@pytest.mark.parametrize("kind", ["receipt", "supervised"])
async def test_the_sql_is_kept_without_the_values_of_its_parameters(db: Watched, kind: str) -> None:
    text = "insert into effects (job) select %(job)s where %(card)s <> '' and 'a%%' <> ''"
    job = Job(text, id="j", kind=kind, parameters={"job": "j", "card": SECRET})
    await within(arun(db.conninfo, job))
    assert await statement_of(db.conninfo, "j") == text
    assert SECRET not in str(db.sql("select j::text from pgbg.job as j"))


async def test_the_sql_of_a_job_that_is_registered_by_itself(db: Watched) -> None:
    """One whose notices are read is not registered together with its launch."""
    text = "insert into effects (job) values (%s) returning job"
    job = Job(text, id="j", parameters=[SECRET])
    await within(arun(db.conninfo, job, notices=True))
    assert await statement_of(db.conninfo, "j") == text


async def test_statements_of_a_list_and_a_long_text(db: Watched) -> None:
    await within(arun(db.conninfo, Job(["select 1", effect("list")], id="list")))
    assert await statement_of(db.conninfo, "list") == f"select 1;\n{effect('list')}"
    long = "select 1 /* " + "x" * MOST_OF_A_STATEMENT + "*/"
    await within(arun(db.conninfo, Job(long, id="long")))
    kept = await statement_of(db.conninfo, "long")
    assert kept == f"{long[:MOST_OF_A_STATEMENT]}\n... and 14 characters more"


async def test_it_is_kept_only_where_it_may_be(db: Watched) -> None:
    await within(arun(db.conninfo, Job("select 1", id="hidden", redact_details=True)))
    db.sql(f"alter role {APP} set pgbg.keep_sql = off")
    try:
        await within(arun(db.conninfo, Job("select 1", id="off")))
    finally:
        db.sql(f"alter role {APP} reset pgbg.keep_sql")
    assert [await statement_of(db.conninfo, job) for job in ("hidden", "off")] == [None, None]


async def test_each_attempt_is_told(db: Watched) -> None:
    async with Launcher(db.conninfo) as launcher:
        for wrong in ("select 1/0", "select 'x'::int"):
            with pytest.raises(errors.WorkerError):
                await within(launcher.run(Job(wrong, id="j"), accept_changed_sql=True))
        await within(launcher.run(Job(effect("j"), id="j"), accept_changed_sql=True))
        (entry,) = await within(launcher.ledger.jobs(job_id="j"))
    found = await detail_of(db.conninfo, "j")
    assert found is not None
    past = [(one.attempt, one.outcome, one.sqlstate) for one in found.past_attempts]
    assert past == [(1, "failed", "22012"), (2, "failed", "22P02")]
    assert all(one.worker_pid and one.ended_at for one in found.past_attempts)
    assert (entry.attempt, entry.state) == (3, "committed")
    assert found.statement == effect("j")


async def test_the_end_of_an_earlier_attempt_that_is_told_late(db: Watched) -> None:
    """Its launcher wrote it down after another one had registered the next attempt, and that one had ended too."""
    with psycopg.connect(db.conninfo, autocommit=True) as conn:
        for _ in range(2):
            conn.execute("select pgbg.register(null, 'j', 'j', 1, 'j', 'receipt', '\\x00', false, 'me')")
        for attempt, code in ((2, "22012"), (1, "23505")):
            conn.execute(
                "select pgbg.record(null, 'j', %s, 'failed', 7, null, null, null, array[%s, 'why'])", (attempt, code)
            )
    found = await detail_of(db.conninfo, "j")
    assert found is not None
    assert [(one.outcome, one.sqlstate, one.worker_pid) for one in found.past_attempts] == [("failed", "23505", 7)]
    assert db.sql("select attempt, sqlstate from pgbg.job") == [(2, "22012")]


async def test_only_the_last_attempts_are_kept_and_go_with_the_job(db: Watched) -> None:
    with psycopg.connect(db.conninfo, autocommit=True) as conn:
        for _ in range(53):
            conn.execute("select pgbg.register(null, 'j', 'j', 1, 'j', 'receipt', '\\x00', false, 'me')")
    found = await detail_of(db.conninfo, "j")
    assert found is not None
    assert [one.attempt for one in found.past_attempts] == list(range(3, 53))
    assert {one.outcome for one in found.past_attempts} == {None}
    db.sql("update pgbg.job set launched_at = launched_at - interval '1 d'")
    db.sql("select pgbg.prune('1 hour')")
    assert db.sql("select * from pgbg.past_attempt") == []


async def test_the_first_rows(db: Watched) -> None:
    many = "select n, case n when 2 then null else repeat('x', 150 * n) end as text from generate_series(1, 30000) as n"
    async with Launcher(db.conninfo) as launcher:
        await within(launcher.run(Job(f"{many} limit 3", id="few", fetch=True)))
        await within(launcher.run(Job(many.replace("150 * n", "3"), id="many", fetch={"max_rows": 50_000})))
        await within(launcher.run(Job("select 1 where false", id="none", fetch=True)))
        await within(launcher.run(Job("select from generate_series(1, 3)", id="bare", fetch=True)))
        few, many_, none, bare = [
            await within(launcher.ledger.first_rows(APP, job_id, 2)) for job_id in ("few", "many", "none", "bare")
        ]
        detail = await within(launcher.ledger.detail(APP, "many"))
    assert [(one.columns, one.rows) for one in few] == [(("n", "text"), (("1", "x" * 150), ("2", None)))]
    assert [(one.columns, one.rows) for one in many_] == [(("n", "text"), (("1", "xxx"), ("2", None)))]
    assert [one.rows for one in none] == [()]
    assert [one.rows for one in bare] == [((), ())]
    assert detail is not None
    assert detail.kept == {1: 30000}


async def test_a_long_value_is_cut(db: Watched) -> None:
    async with Launcher(db.conninfo) as launcher:
        await within(launcher.run(Job("select repeat('x', 300)", id="j", fetch=True)))
        (found,) = await within(launcher.ledger.first_rows(APP, "j", 1))
    assert found.rows == (("x" * 197 + "...",),)


async def test_nobody_else_sees_any_of_it(db: Watched, enemy: psycopg.Connection) -> None:
    await within(arun(db.conninfo, Job("select 'mine'", id="j", fetch=True)))
    theirs = db.database.conninfo_as("pgbg_enemy")
    assert await detail_of(theirs, "j") is None
    async with Launcher(theirs) as launcher:
        assert await within(launcher.ledger.first_rows(APP, "j", 1)) == []
    for query in ("select statement from pgbg.job", "select * from pgbg.past_attempt"):
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            enemy.execute(query)


async def test_an_upgrade_keeps_what_version_1_wrote(extension_database: Database) -> None:
    """Receipts count on, whoever registers in the way of version 1 still can, and the new parts are empty."""
    text = "select 1"
    digest = hashlib.sha256(text.encode()).hexdigest()
    old = f"select pgbg.register(null, %s, %s, null, %s, 'receipt', '\\x{digest}', false, 'an older version')"
    conninfo = extension_database.conninfo
    earlier_schemas.install(conninfo, 1)
    with psycopg.connect(conninfo, autocommit=True) as conn:
        for job in ("done", "failed"):
            conn.execute(old, (job, job, job))
        conn.execute("select pgbg.begin_work(null, 'done', 'done', 1, 'done', 1, %s)", (bytes.fromhex(digest),))
        conn.execute("select pgbg.record(null, 'failed', 1, 'failed', 7, null, null, null, array['22012', 'why'])")
    assert [install.install(conninfo).to_version for _ in range(2)] == [install.VERSION] * 2

    assert not (await within(arun(conninfo, Job(text, id="done")))).launched
    assert (await within(arun(conninfo, Job(text, id="failed")))).launched
    with psycopg.connect(conninfo, autocommit=True) as conn:
        conn.execute(old, ("new", "new", "new"))
        told = conn.execute("select job_id, attempt, statement from pgbg.job order by 1").fetchall()
        past = conn.execute("select job_id, past_attempts #>> '{0,sqlstate}' from pgbg.job j, lateral"
                            " pgbg.job_detail(j.owner, j.job_id) where job_id = 'failed'").fetchall()  # fmt: skip
        assert conn.execute("select version from pgbg.meta order by 1").fetchall() == [
            (version,) for version in range(1, install.VERSION + 1)
        ]
    assert told == [("done", 1, None), ("failed", 2, text), ("new", 1, None)]
    assert past == [("failed", "22012")]
