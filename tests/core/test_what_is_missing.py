"""A server that lacks something: the error says what, which line to run, and that nothing was launched."""

from __future__ import annotations

from collections.abc import Callable

import psycopg
import pytest

from pgbg_orchestration import Job, arun, errors
from pgbg_orchestration.ledger.install import install
from tests.conftest import Database
from tests.core.kit import Watched, effect, within
from tests.servers.kinds import Server


async def refused(conninfo: str, expected: type[errors.PgbgError], job: Job | None = None) -> str:
    with pytest.raises(expected) as caught:
        await within(arun(conninfo, job or Job("select 1", id="j")))
    assert type(caught.value) is expected
    assert "Nothing was launched" in str(caught.value) or expected is errors.ServerUnreachable
    return str(caught.value)


async def test_no_extension(empty_database: Database) -> None:
    with empty_database.connect() as session:
        packaged = session.execute("select from pg_available_extensions where name = 'pg_background'").fetchone()
    # Where a stand-in's objects are created by plain SQL, the server has no package of the extension.
    line = "CREATE EXTENSION pg_background" if packaged is not None else "install its package"
    assert line in await refused(empty_database.conninfo, errors.ExtensionMissing)


async def test_no_schema(extension_database: Database) -> None:
    assert "pgbg install" in await refused(extension_database.conninfo, errors.SchemaMissing)


async def test_schema_of_another_name(extension_database: Database) -> None:
    conninfo = extension_database.conninfo
    install(conninfo, schema='My "Schema"', owner="pgbg_owner")
    outcome = await within(arun(conninfo, Job("select 1", id="j"), schema='My "Schema"'))
    assert outcome.launched
    assert (await within(arun(conninfo, Job("select 1", id="j"), schema='My "Schema"'))).launched is False
    await refused(conninfo, errors.SchemaMissing)


async def test_newer_schema(db: Watched) -> None:
    db.sql("insert into pgbg.meta (version, checksum) values (99, 'x')")
    assert "99" in await refused(db.conninfo, errors.SchemaVersionMismatch)


async def test_least_privilege_is_enough_and_less_is_told(db: Watched) -> None:
    login = "pgbg_nobody"
    db.role(login, "login", [])
    conninfo = db.database.conninfo_as(login)
    try:
        message = await refused(conninfo, errors.NoPrivilege)
        assert "grant" in message.lower()
        assert "pgbackground_role" in message
        db.sql(f"grant pgbackground_role to {login}")
        db.sql(f"grant insert on effects to {login}")
        assert (await within(arun(conninfo, Job(effect("j"), id="j")))).launched
        assert db.effects() == 1
    finally:
        db.sql(f"drop owned by {login}")
        db.sql(f"drop role {login}")


@pytest.mark.majors
@pytest.mark.parametrize("kind", ["receipt", "supervised"])
async def test_role_that_the_login_may_not_become(db: Watched, kind: str) -> None:
    """No member, or since PostgreSQL 16 one by a grant without its options: the line that is told helps."""
    login, role = "pgbg_member", "pgbg_work"
    db.role(login)
    db.role(role, "nologin")
    db.sql(f"grant insert on effects to {role}")
    if int(db.value("show server_version_num")) >= 160000:
        db.sql(f"grant {role} to {login} with inherit false, set false")
    job = Job(effect("j"), id="j", kind=kind, role=role)
    try:
        with pytest.raises(errors.NoPrivilege) as caught:
            await within(arun(db.database.conninfo_as(login), job))
        todo = caught.value.todo or ""
        assert f'GRANT "{role}" TO {login}' in todo
        db.sql(todo)
        assert (await within(arun(db.database.conninfo_as(login), job))).launched
        assert db.effects() == 1
    finally:
        db.sql(f"drop owned by {login}, {role}")
        db.sql(f"drop role {login}, {role}")


async def test_a_table_that_the_login_may_not_touch(db: Watched) -> None:
    db.sql("create table secret (i int)")
    with pytest.raises(errors.WorkerError) as caught:
        await within(arun(db.conninfo, Job(f"{effect('j')}; insert into secret values (1)", id="j")))
    assert caught.value.sqlstate == "42501"
    assert db.effects() == 0


async def test_read_only_session(db: Watched) -> None:
    read_only = db.database.conninfo_as("pgbg_app", options="-c default_transaction_read_only=on")
    await refused(read_only, errors.ReadOnlyServer, Job(effect("j"), id="j"))
    assert db.effects() == 0


async def test_no_server() -> None:
    # Port 1 belongs to nobody.
    message = await refused(
        "host=127.0.0.1 port=1 dbname=x user=secret_user password=hunter2", errors.ServerUnreachable
    )
    assert "hunter2" not in message


async def test_database_that_is_not_there(server: Server) -> None:
    with pytest.raises(errors.PgbgError) as caught:
        await within(arun(server.conninfo("no_such_database"), Job("select 1", id="j")))
    assert "no_such_database" in str(caught.value)


async def test_extension_in_a_schema_of_its_own(server: Server, fresh_database: Callable[..., Database]) -> None:
    """The extension is relocatable: its functions are found wherever they are."""
    if server.is_standin:
        database = fresh_database(server, "extension")
        with database.connect() as connection:
            assert connection.execute("select count(*) from pg_extension where extname = 'pg_background'").fetchone()
        connection.close()
        install(database.conninfo)
    else:
        database = fresh_database(server, "empty")
        with database.connect() as connection:
            connection.execute('create schema "Ext Schema"')
            connection.execute('create extension pg_background schema "Ext Schema"')
        install(database.conninfo)
    outcome = await within(arun(database.conninfo, Job("create table made (i int); select 1", id="j")))
    assert outcome.launched
    with psycopg.connect(database.conninfo) as connection:
        assert connection.execute("select count(*) from made").fetchone() == (0,)
