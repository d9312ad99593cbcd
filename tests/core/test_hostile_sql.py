"""SQL that tampers with its session, and roles that tamper with others' jobs: nobody is fooled."""

from __future__ import annotations

import asyncio

import psycopg
import pytest

from pgbg_orchestration import Job, Launcher, Outcome, arun, errors, pace
from tests.core.kit import APP, Watched, effect, ended, eventually, slow, within

pytestmark = pytest.mark.any_surface

TAMPERING = [
    "reset all",
    "set role none",
    "set session authorization default",
    "select pg_advisory_unlock_all()",
    "set local search_path to ''",
    "set search_path to ''; set client_min_messages to debug5",
    "select set_config('search_path', '', false)",
    "discard plans",
    "discard sequences",
    "discard temp",
    "reset session authorization",
    "set application_name to 'psql'",
    "set local lock_timeout to 1; set local statement_timeout to 0",
    "select pg_advisory_unlock_shared(1), pg_advisory_unlock(1)",
    "create temp table receipt (i int); create temp table job (i int)",
    "set local pgbg.step to 'mine'",
    "deallocate all",
    "set constraints all immediate",
]


@pytest.mark.parametrize("tampering", TAMPERING)
@pytest.mark.parametrize("where", ["before", "after"])
@pytest.mark.servers("real", "embedded", "standin20")
async def test_tampering_sql(db: Watched, tampering: str, where: str) -> None:
    """Effect and receipt together or neither, a second run does nothing, and another job of the session works."""
    work = "insert into public.effects (job) values ('j')"
    parts = [tampering, work] if where == "before" else [work, tampering]
    async with Launcher(db.conninfo) as launcher:
        job = Job("; ".join(parts), id="j")
        end = await ended(asyncio.ensure_future(launcher.run(job)))
        assert isinstance(end, Outcome | errors.WorkerError), end
        assert db.effects("j") == (1 if isinstance(end, Outcome) else 0)
        assert db.receipts() == ({"j"} if isinstance(end, Outcome) else set())
        if isinstance(end, Outcome):
            assert (await within(launcher.run(job))).launched is False
            assert db.effects("j") == 1
        assert (await within(launcher.run(Job(effect("k"), id="k")))).launched
        assert db.effects("k") == 1


async def test_unlock_all_keeps_the_series(db: Watched) -> None:
    """pg_advisory_unlock_all cannot give the series' lock away: another process attaches, and does not launch."""
    job = Job(f"select pg_advisory_unlock_all(); {slow('j', 1.5)}", id="j")
    first = asyncio.create_task(arun(db.conninfo, job))
    pid = await db.at_work("j")
    async with Launcher(db.conninfo) as other:
        outcome = await within(other.run(job))
    assert (outcome.launched, outcome.worker_pid) == (False, pid)
    assert (await within(first)).launched
    assert db.effects("j") == 1


@pytest.mark.parametrize("sqlstate", ["PB001", "PB002", "PB003", "PB004", "57014", "53000", "08006", "42704", "55000"])
async def test_sql_that_raises_our_own_codes(db: Watched, sqlstate: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is an error of the job's like any other: no success, no endless attaching, no effect."""
    monkeypatch.setattr(pace, "RETRY_LATEST", 0.3)
    raising = f"do $$ begin raise exception using errcode = '{sqlstate}', message = 'made up'; end $$"
    with pytest.raises(errors.WorkerError) as caught:
        await within(arun(db.conninfo, Job(f"{effect('j')}; {raising}", id="j")))
    assert (caught.value.sqlstate, caught.value.fields.message) == (sqlstate, "made up")
    assert db.effects() == 0
    assert not db.receipts()
    assert not db.receipts("cancelled")
    assert db.states() == {"j": "failed"}


async def test_sql_that_raises_our_code_after_a_commit_of_the_same_job(db: Watched) -> None:
    """The job is committed; a second run must not even launch."""
    job = Job(effect("j"), id="j")
    await within(arun(db.conninfo, job))
    raising = "do $$ begin raise exception using errcode = 'PB001'; end $$"
    outcome = await within(arun(db.conninfo, Job(raising, id="j"), accept_changed_sql=True))
    assert outcome.launched is False
    assert db.effects() == 1


@pytest.mark.servers("real", "embedded", "standin19")
@pytest.mark.parametrize(
    "sql",
    [
        "select * from pgbg.prune('-1 hour')",
        "select pgbg.lift_cancel(null, 'j')",
        "select pgbg.mark_cancelled(null, 'j', 'asked', 'by itself')",
        "select pgbg.end_supervision(null, 'j', 1, 'failed', null, null, null, null)",
        "select pgbg.record(null, 'j', 1, 'failed', null, null, null, null, null)",
    ],
)
async def test_sql_that_meddles_with_its_own_receipt(db: Watched, sql: str) -> None:
    """It may call what its login may call, and takes no receipt away that its own effect stands behind."""
    job = Job(f"{effect('j')}; {sql}", id="j")
    assert (await within(arun(db.conninfo, job))).launched
    assert (db.effects("j"), db.receipts(), db.states()) == (1, {"j"}, {"j": "committed"})
    assert not (await within(arun(db.conninfo, job))).launched
    assert db.effects("j") == 1


async def test_default_settings_of_the_role_do_not_matter(db: Watched) -> None:
    """A login whose own defaults are unfriendly: an empty search_path, a strict isolation level, short timeouts."""
    login = "pgbg_odd"
    db.role(login, "login", ["pgbackground_role"])
    db.sql(f"grant insert, select on effects to {login}")
    try:
        for setting in (
            "search_path = ''",
            "default_transaction_isolation = 'serializable'",
            "client_min_messages = 'debug1'",
            "datestyle = 'German, DMY'",
            "bytea_output = 'escape'",
            "standard_conforming_strings = on",
            "extra_float_digits = 0",
            "intervalstyle = 'sql_standard'",
            "timezone = 'Asia/Kathmandu'",
            "application_name = 'odd'",
            "idle_in_transaction_session_timeout = '1s'",
        ):
            db.sql(f"alter role {login} set {setting}")
        conninfo = db.database.conninfo_as(login)
        job = Job(f"{slow('j', 0.5)}".replace("effects", "public.effects"), id="j")
        outcomes = await within(asyncio.gather(arun(conninfo, job), arun(conninfo, job)))
        assert sorted(outcome.launched for outcome in outcomes) == [False, True]
        assert db.effects("j") == 1
    finally:
        db.sql(f"drop owned by {login}")
        db.sql(f"drop role {login}")


async def test_nobody_forges_reads_or_deletes_anothers_receipt(db: Watched, enemy: psycopg.Connection) -> None:
    await within(arun(db.conninfo, Job(effect("j"), id="j")))
    for statement in (
        "select * from pgbg.receipt",
        "select * from pgbg.job",
        "select * from pgbg.series",
        "delete from pgbg.receipt",
        "truncate pgbg.receipt",
        "update pgbg.receipt set status = 'cancelled'",
        "insert into pgbg.receipt (owner, job_digest, status, job_id) values ('pgbg_app', '\\x00', 'committed', 'k')",
        "begin; lock table pgbg.receipt in access exclusive mode",
        "begin; lock table pgbg.job in access share mode",
        "select * from pgbg.receipt for update",
        "drop table pgbg.receipt",
        "create table pgbg.mine (i int)",
        "create function pgbg.digest(text) returns bytea language sql return null",
        "alter function pgbg.digest(text) owner to pgbg_enemy",
        "grant pgbg_owner to pgbg_enemy",
        "set role pgbg_owner",
        "select pgbg.begin_work('pgbg_app', 'k', 'k', 0, 'k', 1, '\\x00')",
        "select pgbg.register('pgbg_app', 'k', 'k', 5, 'k', 'receipt', '\\x00', true, 'me')",
        "select pgbg.mark_cancelled('pgbg_app', 'k', 'asked', 'hihi')",
        "select pgbg.mark_older('pgbg_app', 'k', 100)",
        "select pgbg.lift_cancel('pgbg_app', 'k')",
        "select pgbg.record('pgbg_app', 'j', 1, 'failed', 1, now(), 1, 'x', null)",
        "select pgbg.look(array['pgbg_app'], array['\\x00'::bytea], array['\\x00'::bytea])",
    ):
        with pytest.raises(psycopg.Error) as caught:
            enemy.execute(statement)
        assert not isinstance(caught.value, psycopg.errors.SyntaxError), (statement, caught.value)
        if not isinstance(caught.value, psycopg.errors.UndefinedFunction):
            assert isinstance(caught.value, psycopg.errors.InsufficientPrivilege), (statement, caught.value)
        enemy.rollback()
    assert enemy.execute("select count(*) from pgbg.jobs").fetchone() == (0,)
    enemy.execute("select pgbg.prune('0')")
    assert db.receipts() == {"j"}
    assert db.states() == {"j": "committed"}
    assert (await within(arun(db.conninfo, Job(effect("j"), id="j")))).launched is False
    assert db.effects() == 1


async def test_the_same_id_of_another_login_is_another_job(db: Watched, enemy: psycopg.Connection) -> None:
    db.sql("grant insert, select on effects to pgbg_enemy")
    own = db.database.conninfo_as("pgbg_enemy")
    assert (await within(arun(own, Job(effect("theirs"), id="j")))).launched
    async with Launcher(own) as launcher:
        await within(launcher.cancel("k"))
    for name in ("j", "k"):
        assert (await within(arun(db.conninfo, Job(effect(name), id=name)))).launched
    assert db.effects_by_job() == {"theirs": 1, "j": 1, "k": 1}


async def test_nobody_owns_a_job_for_a_role_one_is_not_in(db: Watched, enemy: psycopg.Connection) -> None:
    with pytest.raises(errors.PgbgError) as caught:
        await within(arun(db.database.conninfo_as("pgbg_enemy"), Job("select 1", id="j", owner=APP)))
    assert isinstance(caught.value, errors.NoPrivilege | errors.InvalidJob)
    assert caught.value.sqlstate == "42501"
    assert APP in str(caught.value)
    assert not db.receipts()


async def test_set_role_does_not_change_the_owner(db: Watched) -> None:
    """A job that becomes another role still leaves the login's receipt, and a role of the session cannot forge one."""
    db.role("pgbg_other", "nologin", ["pgbackground_role"])
    db.sql(f"grant pgbg_other to {APP}")
    db.sql("grant insert on effects to pgbg_other")
    try:
        await within(arun(db.conninfo, Job("set role pgbg_other; insert into effects values ('j')", id="j")))
        assert db.sql("select owner, job_id from pgbg.receipt") == [(APP, "j")]
        assert (await within(arun(db.conninfo, Job(effect("k"), id="k")))).launched
        assert db.sql("select who from effects order by job") == [("pgbg_other",), (APP,)]
    finally:
        db.sql("drop owned by pgbg_other")
        db.sql("drop role pgbg_other")


@pytest.mark.servers("real", "embedded", "standin19")
@pytest.mark.parametrize(("what", "lock"), [("series", "pg_advisory_lock"), ("job", "pg_advisory_lock_shared")])
async def test_a_stranger_on_the_lock_is_named_and_left_alone(
    db: Watched, enemy: psycopg.Connection, monkeypatch: pytest.MonkeyPatch, what: str, lock: str
) -> None:
    """Anyone can take an advisory lock: the wait for it has a bound, and names who holds it."""
    monkeypatch.setattr(pace, "STRANGER", 1.0)
    key = db.value("select pgbg.lock_key(%s, %s, pgbg.digest(%s))", what, APP, "j")
    enemy.execute(f"select {lock}(%s)", (key,))
    with pytest.raises(errors.SeriesHeld) as caught:
        await within(arun(db.conninfo, Job(effect("j"), id="j")), 120)
    assert str(enemy.info.backend_pid) in str(caught.value)
    assert "pgbg_enemy" in str(caught.value)
    assert enemy.execute("select 1").fetchone() == (1,)
    assert db.effects() == 0
    enemy.execute("select pg_advisory_unlock_all()")
    assert (await within(arun(db.conninfo, Job(effect("j"), id="j")))).launched
    assert db.effects() == 1


async def test_a_stranger_on_the_job_lock_does_not_fool_the_watchers(db: Watched, enemy: psycopg.Connection) -> None:
    await within(arun(db.conninfo, Job(effect("j"), id="j")))
    with pytest.raises(errors.WorkerError):
        await within(arun(db.conninfo, Job("select 1/0", id="k")))
    for job_id in "jk":
        key = db.value("select pgbg.lock_key('job', %s, pgbg.digest(%s))", APP, job_id)
        enemy.execute("select pg_advisory_lock_shared(%s)", (key,))
    assert db.states() == {"j": "committed", "k": "failed"}
    assert (await within(arun(db.conninfo, Job(effect("j"), id="j")))).launched is False


async def test_a_cancel_by_an_administrator_signals_no_stranger(db: Watched, enemy: psycopg.Connection) -> None:
    """He may signal everybody, and signals only who works for the owner."""
    key = db.value("select pgbg.lock_key('job', %s, pgbg.digest(%s))", APP, "j")
    enemy.execute("select pg_advisory_lock(%s)", (key,))
    sleeping = asyncio.create_task(asyncio.to_thread(enemy.execute, "select pg_sleep(1)"))
    async with Launcher(db.database.conninfo) as administrator:
        assert await within(administrator.cancel("j", owner=APP)) == "cancelled"
    await within(sleeping)


@pytest.mark.servers("real", "embedded")
@pytest.mark.parametrize("kind", ["session", "supervised"])
async def test_a_stranger_with_the_marker_of_a_job_is_overlooked(
    db: Watched, enemy: psycopg.Connection, kind: str
) -> None:
    """Anyone can take the application_name by which workers without a lock are found."""
    marker = db.value("select pgbg.marker(%s, 'j')", APP)
    enemy.execute("select set_config('application_name', %s, false)", (marker,))
    job = Job(effect("j"), id="j", kind=kind)
    assert (await within(arun(db.conninfo, job))).launched
    assert db.effects("j") == 1
    assert enemy.execute("select 1").fetchone() == (1,)


async def test_open_transaction_of_another_role_blocks_nobody(db: Watched, enemy: psycopg.Connection) -> None:
    """It can hold its own rows in an open transaction, never those of others."""
    enemy.autocommit = False
    enemy.execute("select pgbg.mark_cancelled(null, 'j', 'asked', 'mine')")
    enemy.execute("select pgbg.begin_work(null, 'k', 'k', 0, 'k', 1, '\\x00')")
    assert (await within(arun(db.conninfo, Job(effect("j"), id="j")))).launched
    assert (await within(arun(db.conninfo, Job(effect("k"), id="k")))).launched
    async with Launcher(db.conninfo) as launcher:
        assert await within(launcher.cancel("l")) == "cancelled"
    enemy.rollback()
    assert db.effects_by_job() == {"j": 1, "k": 1}


async def test_a_dropped_owner_breaks_nobodys_view(db: Watched) -> None:
    """Receipts of a role that is gone: the view, prune and other jobs go on."""
    db.role("pgbg_leaver", "login", ["pgbackground_role"])
    db.sql("grant insert, select on effects to pgbg_leaver")
    await within(arun(db.database.conninfo_as("pgbg_leaver"), Job(effect("left"), id="left")))
    await eventually(lambda: not db.workers() and not db.sessions(), "the leaver's sessions have ended")
    db.sql("drop owned by pgbg_leaver")
    db.sql("drop role pgbg_leaver")
    await within(arun(db.conninfo, Job(effect("j"), id="j")))
    assert "j" in db.states()
    with psycopg.connect(db.conninfo, autocommit=True) as connection:
        assert connection.execute("select job_id from pgbg.jobs").fetchall() == [("j",)]
        connection.execute("select pgbg.prune('1 day')")
    assert db.effects_by_job() == {"left": 1, "j": 1}


async def test_the_view_tells_only_under_read_committed(db: Watched) -> None:
    await within(arun(db.conninfo, Job(effect("j"), id="j")))
    with psycopg.connect(db.conninfo) as connection:
        for level in (psycopg.IsolationLevel.REPEATABLE_READ, psycopg.IsolationLevel.SERIALIZABLE):
            connection.isolation_level = level
            with pytest.raises(psycopg.Error, match=r"(?i)read committed"):
                connection.execute("select state from pgbg.jobs")
            connection.rollback()
