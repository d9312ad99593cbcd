"""Servers, databases and logins that are set up otherwise than usual: jobs run there as anywhere, or are refused."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg import sql

from pgbg_orchestration import Job, arun, errors
from pgbg_orchestration.doctor import examination
from pgbg_orchestration.ledger.install import install
from tests.conftest import Database, FreshDatabases
from tests.core.kit import APP, Watched, effect, within
from tests.servers.kinds import Server

pytestmark = pytest.mark.any_surface

ODD = "pgbg \"odd\" 'näme' \\ %s"


async def check_all_kinds(conninfo: str, schema: str = "pgbg") -> None:
    """A job of each kind runs once, tells its outcome, and what fails is told with its fields."""
    with psycopg.connect(conninfo, autocommit=True) as conn:
        conn.execute("create table public.proof (what text)")
    for kind in ("receipt", "supervised", "session"):
        job = Job(f"insert into public.proof values ('{kind} C:\\')", id=f"an 'id' \\ of {kind}", kind=kind)
        assert (await within(arun(conninfo, job, schema=schema))).launched
        if kind != "session":
            assert (await within(arun(conninfo, job, schema=schema))).launched is False
        with pytest.raises(errors.WorkerError) as caught:
            await within(arun(conninfo, Job("select 1/0", id=f"{kind} fails", kind=kind), schema=schema))
        assert caught.value.sqlstate == "22012"
    assert (await within(arun(conninfo, Job("vacuum public.proof", id="v"), schema=schema))).command_tag == "VACUUM"
    with psycopg.connect(conninfo, autocommit=True) as conn:
        rows = conn.execute("select convert_to(what, 'UTF8') from public.proof order by 1").fetchall()
    assert [bytes(row[0]).decode() for row in rows] == ["receipt C:\\", "session C:\\", "supervised C:\\"]


@pytest.mark.majors
async def test_nothing_unusual(db: Watched) -> None:
    db.sql(f"grant create on schema public to {APP}")
    await check_all_kinds(db.conninfo)
    db.sql("drop table public.proof")


@pytest.fixture
def odd_role(server: Server, fresh_database: FreshDatabases) -> Iterator[str]:
    """A login whose name needs every kind of quoting."""
    name = sql.Identifier(ODD)
    fresh_database(server, "extension")  # which makes the role that it is granted
    with server.connect() as conn:
        conn.execute(sql.SQL("create role {} login in role pgbackground_role").format(name))
    yield ODD
    for database in fresh_database.made:
        with database.connect() as conn:
            conn.execute(sql.SQL("drop owned by {} cascade").format(name))
    with server.connect() as conn:
        conn.execute(sql.SQL("drop role {}").format(name))


@pytest.mark.servers("real", "embedded")  # a stand-in connects back by names, and cannot by all of these
async def test_names_that_need_quoting(server: Server, fresh_database: Callable[..., Database], odd_role: str) -> None:
    """Database, login, owner of the job, role of the SQL, and the package's schema."""
    database = fresh_database(server, "extension", name=f"pgbg \"Odd\" 'db' {os.urandom(3).hex()}")
    install(database.conninfo, schema='odd "schema"', owner="pgbg_owner")
    name = sql.Identifier(odd_role)
    with database.connect() as conn:
        conn.execute(sql.SQL("grant create, usage on schema public to {}").format(name))
    await check_all_kinds(database.conninfo_as(odd_role), schema='odd "schema"')
    for kind in ("receipt", "supervised"):
        job = Job("create table mine ()", id=f"as {kind}", kind=kind, role=odd_role, owner=odd_role)
        assert (await within(arun(database.conninfo, job, schema='odd "schema"'))).launched
        with database.connect() as conn:
            owner = conn.execute(
                "select pg_get_userbyid(relowner)::text from pg_class where relname = 'mine'"
            ).fetchone()
            assert owner == (odd_role,)
            conn.execute("drop table mine")


@pytest.mark.parametrize(
    "settings",
    [
        {"search_path": ""},
        pytest.param(
            {"standard_conforming_strings": "off", "backslash_quote": "on"},
            marks=pytest.mark.until(postgres=18),  # 19 refuses it: test_statements_on_19.py
        ),
        {"client_min_messages": "debug1", "lc_messages": "C"},
        {"default_transaction_isolation": "serializable", "default_transaction_deferrable": "on"},
        {"statement_timeout": "20s", "lock_timeout": "5s", "idle_in_transaction_session_timeout": "1s"},
        {"bytea_output": "escape", "intervalstyle": "sql_standard", "extra_float_digits": "-10"},
    ],
    ids=lambda settings: next(iter(settings)),
)
@pytest.mark.parametrize("where", ["database", "login"])
async def test_settings_of_the_database_or_the_login(db: Watched, settings: dict[str, str], where: str) -> None:
    login = "pgbg_set"
    db.role(login)
    db.sql(f"grant create on schema public to {login}")
    whose = sql.SQL("database {}").format(sql.Identifier(db.database.name))
    if where == "login":
        whose = sql.SQL("role {}").format(sql.Identifier(login))
    try:
        for name, value in settings.items():
            statement = sql.SQL("alter {} set {} = {}").format(whose, sql.Identifier(name), sql.Literal(value))
            db.admin.execute(statement)
        await check_all_kinds(db.database.conninfo_as(login))
    finally:
        db.sql("drop table if exists public.proof")
        db.sql(f"drop owned by {login}")
        db.sql(f"drop role {login}")


@pytest.mark.majors
@pytest.mark.parametrize("encoding", ["LATIN1", "SQL_ASCII"])
async def test_database_that_is_not_utf8(
    server: Server, fresh_database: Callable[..., Database], encoding: str
) -> None:
    database = fresh_database(server, "empty", name=f"pgbg_{encoding.lower()}_{os.urandom(3).hex()}")
    with server.connect() as conn:
        name = sql.Identifier(database.name)
        conn.execute(sql.SQL("drop database {}").format(name))
        conn.execute(
            sql.SQL("create database {} template template0 encoding {} locale 'C'").format(name, sql.Literal(encoding))
        )
    server.create_extension(database.name)
    install(database.conninfo)
    await check_all_kinds(database.conninfo)
    with database.connect() as conn:
        conn.execute("create table words (w text)")
    for kind in ("receipt", "supervised"):
        job = Job(
            "insert into words values (%s)", parameters=["Größe"], id=f"Übung {kind}", label=f"Übung {kind}", kind=kind
        )
        assert (await within(arun(database.conninfo, job))).launched
        assert (await within(arun(database.conninfo, job))).launched is False
        with pytest.raises(errors.WorkerError) as caught:
            await within(
                arun(database.conninfo, Job("do $$begin raise 'Größe fehlt'; end$$", id=f"ü {kind}", kind=kind))
            )
        assert caught.value.fields.message == "Größe fehlt"
    with psycopg.connect(database.conninfo, autocommit=True, client_encoding="utf8") as conn:
        words = conn.execute("select convert_to(w, 'UTF8') from words").fetchall()
    assert [bytes(word[0]).decode() for word in words] == ["Größe", "Größe"]


@pytest.mark.servers("real", "embedded")
@pytest.mark.parametrize("kind", ["receipt", "supervised"])
async def test_read_only_by_default(db: Watched, kind: str) -> None:
    """Refused, unless the job makes its own transaction writable."""
    read_only = db.database.conninfo_as("pgbg_app", options="-c default_transaction_read_only=on")
    with pytest.raises(errors.ReadOnlyServer) as caught:
        await within(arun(read_only, Job(effect("j"), id="j", kind=kind)))
    assert "default_transaction_read_only" in str(caught.value)
    job = Job(effect("j"), id="j", kind=kind, settings={"default_transaction_read_only": "off"})
    assert (await within(arun(read_only, job))).launched
    assert db.effects() == 1


@pytest.mark.servers("real")
async def test_hot_standby_is_refused(own_db: Callable[..., Watched]) -> None:
    """A server in recovery runs no background worker for a job: said before anything is launched."""
    db = own_db()
    db.close()
    server = db.server
    await asyncio.to_thread(server.stop, "fast")
    signal = data_directory(server) / "standby.signal"
    signal.touch()
    await asyncio.to_thread(server.start)
    try:
        for kind in ("receipt", "session", "supervised"):
            with pytest.raises(errors.ReadOnlyServer) as caught:
                await within(arun(db.conninfo, Job("select 1", id="j", kind=kind)))
            assert "hot standby" in str(caught.value)
            assert "target_session_attrs" in str(caught.value)
        findings = await within(examination.examine(db.conninfo))
        assert [f.name for f in findings if f.status is examination.Status.FAILS] == ["primary"]
    finally:
        await asyncio.to_thread(server.stop, "fast")
        signal.unlink()
        await asyncio.to_thread(server.start)


def data_directory(server: Server) -> Path:
    cluster: Path = server._cluster  # type: ignore[attr-defined]
    return cluster / "data"
