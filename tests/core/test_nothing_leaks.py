"""Hostile texts stay texts, others' objects are never called, and parameters are told to nobody but the server."""

from __future__ import annotations

import asyncio
import logging
import traceback
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import psycopg
import pytest
from psycopg import sql
from typer.testing import CliRunner

from pgbg_orchestration import Job, Launcher, Outcome, arun, errors
from pgbg_orchestration.cli import app
from pgbg_orchestration.ledger.install import install, uninstall
from tests.core.kit import APP, Recorder, Watched, count, effect, ended, eventually, within

pytestmark = pytest.mark.any_surface

HOSTILE = [
    "'; drop table effects; --",
    "'); drop table effects; --",
    "\\'; drop table effects; --",
    'x"; drop table effects; --',
    "$$; drop table effects; --",
    "$pgbg$; drop table effects; $pgbg$",
    "%s %(a)s %% {} {0}",
    "*/ drop table effects; /*",
    "\n; drop table effects\n;",
    "dbname=postgres user=postgres",
]


@pytest.fixture
def owned(db: Watched) -> Watched:
    """The table belongs to the login, so that injected SQL could drop it."""
    db.sql(f"alter table effects owner to {APP}")
    return db


def intact(db: Watched) -> None:
    assert db.value("select to_regclass('public.effects')"), "injected SQL was run"


# Texts --------------------------------------------------------------------------------------------------------------


# The stand-in hands settings with a dot in their name on only where a list says so.
ALL_SETTINGS = pytest.mark.servers("real", "embedded")


@ALL_SETTINGS
@pytest.mark.parametrize("kind", ["receipt", "supervised", "session"])
async def test_ids_labels_and_values_are_texts(owned: Watched, kind: str) -> None:
    async def one(launcher: Launcher, text: str) -> None:
        job = Job(
            "insert into effects (job, who) values (%(text)s, current_setting('a.b'))", id=f"id {text}", label=text,
            series=f"series {text}", parameters={"text": text}, settings={"a.b": text}, kind=kind,
        )  # fmt: skip
        assert (await launcher.run(job)).label == text
        assert await launcher.cancel(f"other {text}", reason=text) == "cancelled"

    async with Launcher(owned.conninfo) as launcher:
        await within(asyncio.gather(*(one(launcher, text) for text in HOSTILE)))
    intact(owned)
    assert sorted(owned.sql("select job, who from effects")) == sorted((text, text) for text in HOSTILE)
    jobs = owned.sql("select job_id, label, series from pgbg.jobs where state = 'committed'")
    assert sorted(jobs) == ([] if kind == "session" else sorted((f"id {t}", t, f"series {t}") for t in HOSTILE))
    cancelled = owned.sql("select job_id, reason from pgbg.jobs where state = 'cancelled'")
    assert sorted(cancelled) == sorted((f"other {text}", text) for text in HOSTILE)


async def test_roles_and_names_of_settings_are_names(owned: Watched) -> None:
    async with Launcher(owned.conninfo) as launcher:
        for text in HOSTILE:
            for name in ("role", "owner"):
                with pytest.raises(errors.InvalidJob, match="there is no role"):
                    await within(launcher.run(Job("select 1", id="j", **{name: text})))  # type: ignore[arg-type]
            for name, value in (("settings", {text: "1"}), ("isolation", text), ("kind", text)):
                with pytest.raises(errors.InvalidJob):
                    Job("select 1", id="j", **{name: value})  # type: ignore[arg-type]
            with pytest.raises(errors.InvalidJob):
                await within(launcher.run(Job("select 1", id="j", settings={"work_mem": text})))
    intact(owned)


@ALL_SETTINGS
async def test_a_role_of_any_name(owned: Watched) -> None:
    name = 'a"; drop table effects; --'
    role = sql.Identifier(name).as_string(None)
    owned.sql(f"create role {role} nologin")
    owned.sql(f"grant {role} to {APP}")
    owned.sql(f"grant pgbackground_role to {role}")
    owned.sql(f"grant insert on effects to {role}")
    try:
        for kind in ("receipt", "supervised"):
            await within(arun(owned.conninfo, Job(effect(kind), id=kind, role=name, owner=name, kind=kind)))
        intact(owned)
        assert owned.sql("select distinct who from effects") == [(name,)]
        assert owned.sql("select distinct owner from pgbg.receipt") == [(name,)]
    finally:
        owned.sql(f"drop owned by {role}")
        owned.sql(f"drop role {role}")


async def test_a_schema_of_any_name(owned: Watched) -> None:
    schema = "a\"; drop table effects; -- 'b'"
    owner = "o\"; drop table effects; -- 'p'"
    install(owned.admin_conninfo, schema=schema, owner=owner)
    try:
        for kind in ("receipt", "supervised"):
            assert (await within(arun(owned.conninfo, Job(effect(kind), id=kind, kind=kind), schema=schema))).launched
        async with Launcher(owned.conninfo, schema=schema) as launcher:
            assert await within(launcher.cancel("k")) == "cancelled"
    finally:
        await eventually(lambda: not owned.workers(), "the workers have ended")
        uninstall(owned.admin_conninfo, schema=schema, owner=owner)
    intact(owned)
    assert not owned.value("select count(*) from pg_roles where rolname = %s", owner)


def test_arguments_of_the_command_line(owned: Watched) -> None:
    def pgbg(command: str, *arguments: str) -> Any:
        return CliRunner().invoke(app, [command, "--dsn", owned.conninfo, *arguments])

    for text in HOSTILE[: count(2, len(HOSTILE))]:
        given = (f"--id={text}", f"--label={text}", "-p", f"x={text}", "-q")
        ran = pgbg("run", "insert into effects values (%(x)s)", *given)
        assert ran.exit_code == 0, ran.output
        assert owned.effects(text) == 1
        assert pgbg("jobs", f"--id={text}").exit_code == 0
        assert pgbg("cancel", "--", text).exit_code == 11
        assert pgbg("jobs", f"--id=no {text}").exit_code == 12
        assert pgbg("doctor", f"--schema={text}").exit_code == 13
        assert pgbg("run", "select 1", f"--role={text}").exit_code == 2
        assert pgbg("run", "select 1", f"--set={text}=1").exit_code == 2
        intact(owned)


# Objects of others --------------------------------------------------------------------------------------------------

TRAPS = """
create function {schema}.trap() returns void language plpgsql as $$
begin insert into public.trapped values (current_user, current_query()); end $$;
create function {schema}.trap_mod(bigint, int) returns bigint language plpgsql as
    $$ begin perform {schema}.trap(); return 1; end $$;
create operator {schema}.% (leftarg = bigint, rightarg = int, function = {schema}.trap_mod);
create function {schema}.hashtextextended(text, int) returns bigint language plpgsql as
    $$ begin perform {schema}.trap(); return 1; end $$;
create function {schema}.pg_advisory_xact_lock(int) returns void language plpgsql as
    $$ begin perform {schema}.trap(); end $$;
create function {schema}.decode(text, varchar) returns bytea language plpgsql as
    $$ begin perform {schema}.trap(); return null; end $$;
create function {schema}.starts_with(text, varchar) returns boolean language plpgsql as
    $$ begin perform {schema}.trap(); return true; end $$;
create function {schema}.digest(text) returns bytea language plpgsql as
    $$ begin perform {schema}.trap(); return null; end $$;
create function {schema}.begin_work(text, text, text, int, text, int, bytea) returns void language plpgsql as
    $$ begin perform {schema}.trap(); end $$;
create table {schema}.receipt (i int);
create table {schema}.pg_locks (i int);
create table {schema}.pg_stat_activity (i int);
"""


@pytest.fixture
def enemy(db: Watched) -> Iterator[psycopg.Connection]:
    """A session of a role that may run jobs of its own, and create what it wants in public."""
    db.role("pgbg_trapper", "login")
    db.sql("create table trapped (who text, how text); grant insert on trapped to public")
    db.sql("grant create on schema public to pgbg_trapper")
    connection = psycopg.connect(db.database.conninfo_as("pgbg_trapper"), autocommit=True)
    yield connection
    connection.close()
    db.sql("drop owned by pgbg_trapper cascade")
    db.sql("drop role pgbg_trapper")


async def test_what_others_put_into_the_search_path_is_not_called(db: Watched, enemy: psycopg.Connection) -> None:
    """Neither as the login, in sessions, workers and supervisors, nor as the superuser who installs (CVE-2018-1058)."""
    enemy.execute(TRAPS.format(schema="public").encode())
    enemy.execute("select 5::bigint % 3")
    assert db.sql("select who from trapped") == [("pgbg_trapper",)], "the trap is none"
    # A supervisor looks every second whether its worker's output is blocked.
    jobs = [Job(f"{effect('r')}", id="r"), Job("do $$ begin perform pg_sleep(1.5); end $$", id="s", kind="supervised")]
    await within(asyncio.gather(*(arun(db.conninfo, job) for job in jobs)))
    async with Launcher(db.conninfo) as launcher:
        assert await within(launcher.cancel("k")) == "cancelled"
        assert await within(launcher.cancel("s")) == "committed"
    install(db.admin_conninfo, schema="another", owner="pgbg_owner")
    uninstall(db.admin_conninfo, schema="another", owner="pgbg_none")
    assert db.sql("select who, how from trapped where who <> 'pgbg_trapper'") == []


async def test_temporary_objects_shadow_nothing(db: Watched, enemy: psycopg.Connection) -> None:
    """The package's functions run as its owner: what a caller has in pg_temp must not be theirs."""
    await within(arun(db.conninfo, Job(effect("j"), id="j")))
    enemy.execute(TRAPS.format(schema="pg_temp").encode())
    enemy.execute("create temp table job (owner text); create temp table series (owner text)")
    enemy.execute("create temp table pg_roles as select 'pgbg_app'::name as rolname, 10::oid as oid, true as rolsuper")
    enemy.execute("set search_path to pg_temp, public, pg_catalog")
    assert enemy.execute("select count(*) from pgbg.jobs").fetchone() == (0,)
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        enemy.execute("select pgbg.mark_cancelled('pgbg_app', 'k', 'asked', 'mine')")
    enemy.execute("select pgbg.register(null, 'k', 'k', null, 'k', 'receipt', '\\x00', true, 'me')")
    enemy.execute("select pgbg.mark_cancelled(null, 'k', 'asked', 'mine')")
    enemy.execute("select * from pgbg.prune('1 day')")
    assert db.sql("select who from trapped") == []
    assert db.sql("select owner, job_id from pgbg.receipt order by job_id") == [(APP, "j"), ("pgbg_trapper", "k")]


# Every function -----------------------------------------------------------------------------------------------------

VALUES = {
    "text": "'pgbg_app'",
    "text[]": "array['pgbg_app', 'pgbg_app', 'pgbg_app', 'pgbg_app']",
    "bytea": "pgbg.digest('j')",
    "bytea[]": "array[pgbg.digest('j')]",
    "bigint": "7",
    "integer": "1",
    "boolean": "true",
    "interval": "'-1 day'",
    "timestamp with time zone": "now()",
    "jsonb": "'[]'",
}
NAMED = {"p_owner": "'pgbg_app'", "p_job_id": "'j'", "p_series": "'j'",
         "p_outcome": "'committed'", "p_cause": "'asked'"}  # fmt: skip
HARMLESS = {
    "sendable",
    "tell",
    "notify",
    "digest",
    "lock_key",
    "marker",
    "marked",
    "is_borne",
    "is_mine",
    "is_member",
    "require_read_committed",
    "await_no_standby",
    "await_worker",
    "redacted",
}
"""Functions that read and write nothing of anybody's jobs, but by other functions of these."""
OF_THE_LOGIN = {"prune", "find_jobs", "list_jobs", "orphans"}
"""Functions that take no owner, and keep to what the login may see."""
SEEN_BY_MEMBERS = {"job_detail", "first_rows"}
"""Functions that find nothing of another owner, as the list of jobs does."""


async def test_no_function_takes_another_owner(db: Watched, enemy: psycopg.Connection) -> None:
    """Every one that is there, so that one that is added is tried too."""
    await within(arun(db.conninfo, Job(f"{effect('j')} returning 1", id="j", fetch=True)))
    everything = "select array(select r::text from pgbg.receipt r), array(select s::text from pgbg.series s)"
    before = db.sql(f"{everything}, array(select j::text from pgbg.job j)")
    functions = db.sql(
        "select p.proname, p.prokind, array(select t::regtype::text from unnest(p.proargtypes) t), p.proargnames,"
        " p.prosecdef, p.proconfig, p.provolatile"
        " from pg_proc p where p.pronamespace = 'pgbg'::regnamespace order by 1"
    )
    # What begin_job reads in the place of arguments.
    enemy.execute(f"""set pgbg.work = '["{APP}", "k", "k", 0, "k", 1, "00"]'""".encode())
    # What keep_table reads; it has its caller's rights, and keeps by functions that have their owner's.
    enemy.execute("create temporary table pgbg_rows_1 as select 1 as n")
    tried = set()
    for name, kind, types, names, definer, config, _ in functions:
        fixed = [setting for setting in config or () if not setting.startswith("plan_cache_mode=")]
        assert not definer or fixed == ["search_path=pg_catalog, pg_temp"], f"{name} runs as its owner, anywhere"
        if name in HARMLESS:
            assert not definer, f"{name} runs as the schema's owner"
            continue
        arguments = [
            NAMED.get(n, VALUES[t]) if t == "text" else VALUES[t]
            for n, t in zip((names or [])[: len(types)], types, strict=True)
        ]
        call = f"{'call' if kind == 'p' else 'select * from'} pgbg.{name}({', '.join(arguments)})"
        if name in OF_THE_LOGIN:
            enemy.execute(call.encode())
        elif name in SEEN_BY_MEMBERS:
            assert enemy.execute(call.encode()).fetchall() == [], name
        else:
            with pytest.raises(psycopg.errors.InsufficientPrivilege, match="pgbg_app"):
                enemy.execute(call.encode())
        tried.add(name)
    assert tried >= {"begin_job", "begin_work", "try_begin", "begin_supervision",
                     "end_supervision", "try_lock", "try_claim", "register", "register_launch", "orphans", "look",
                     "mark_cancelled",
                     "mark_older", "lift_cancel", "record", "prune", "list_jobs", "supervise", "owner_for",
                     "keep_chunk", "keep_set", "keep_table", "job_detail", "first_rows"}  # fmt: skip
    assert db.sql(f"{everything}, array(select j::text from pgbg.job j)") == before


async def test_nobody_becomes_another_owner(db: Watched, enemy: psycopg.Connection) -> None:
    await within(arun(db.conninfo, Job(effect("j"), id="j")))
    for statement in (f"set session authorization {APP}", f"set role {APP}", "set role pgbg_owner"):
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            enemy.execute(statement.encode())
    # A role that it may become does not make it an owner either: the login counts.
    db.sql(f"grant pgbackground_role to {APP}")
    enemy.execute("set role pgbackground_role")
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        enemy.execute("select pgbg.lift_cancel('pgbg_app', 'j')")
    assert enemy.execute("select count(*) from pgbg.jobs").fetchone() == (0,)


# Secrets ------------------------------------------------------------------------------------------------------------

SECRET = "s3cr3t-canary"


@pytest.mark.parametrize("kind", ["receipt", "supervised", "session"])
async def test_parameters_are_told_to_nobody(db: Watched, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """Of jobs that fail, commit, are refused and are attached to: not in logs, events, errors, tables or reprs."""
    caplog.set_level(logging.DEBUG)
    seen = Recorder()
    told: list[object] = []
    for number, text in enumerate(
        (
            "do $$ begin perform 1 / 0; end $$ -- %(secret)s",
            "select 1 / (length(%(secret)s) - length(%(secret)s))",
            "select length(%(secret)s)",
            "select %(secret)s from no_such_table",
            "select %(secret)s, %(missing)s",
        )
    ):
        job = Job(text, id=f"j{number}", kind=kind, parameters={"secret": SECRET})
        for _ in range(2):
            end = await ended(asyncio.ensure_future(arun(db.conninfo, job, observer=seen)))
            told += [end, str(end), repr(end)]
            if isinstance(end, Outcome):
                told.append(asdict(end))
            else:
                told += ["".join(traceback.format_exception(end)), end.__dict__]
        told.append(repr(job))
    told += list(seen.events)
    for table in ("job", "receipt", "series"):
        told += db.sql(f"select t::text from pgbg.{table} as t")
    assert len(told) > 25
    assert [thing for thing in told if SECRET in repr(thing) or SECRET in str(thing)] == []
    assert SECRET not in caplog.text


def test_parameters_on_the_command_line(db: Watched) -> None:
    for text in ("select 1 / 0 -- %(secret)s", "select length(%(secret)s)"):
        for extra in ([], ["--json"]):
            ran = CliRunner().invoke(
                app, ["run", text, "-p", f"secret={SECRET}", *extra, "--dsn", db.conninfo], catch_exceptions=False
            )
            assert ran.exit_code in (0, 3)
            assert SECRET not in ran.output
    assert SECRET not in CliRunner().invoke(app, ["jobs", "--dsn", db.conninfo, "--json"]).output
