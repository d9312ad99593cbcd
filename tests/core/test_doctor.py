"""The doctor, on servers with and without what it looks for, and as logins that may see much or little."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from typer.testing import CliRunner

from pgbg_orchestration.cli import app
from pgbg_orchestration.cli.codes import ExitCode
from pgbg_orchestration.doctor.examination import Finding, Status, examine, worst
from pgbg_orchestration.errors import PoolerInTransactionMode, ServerUnreachable
from pgbg_orchestration.walk.host import Host
from tests.conftest import Database
from tests.core.kit import APP, Watched
from tests.servers.kinds import Server

# Not of the database but of the machine, the server's load, or the kind of server under test.
ELSEWHERE = {"shared memory", "worker slots"}
KNOWN_FAULTS = {"real 1.9": {"cancel"}, "real 1.10": {"cancel", "memory leak"}}
"""What the doctor warns of on an old version of the extension."""


async def look(conninfo: str, schema: str = "pgbg") -> dict[str, Finding]:
    findings = await examine(conninfo, schema=schema)
    assert len({finding.name for finding in findings}) == len(findings), "a name twice"
    return {finding.name: finding for finding in findings}


def troubles(found: dict[str, Finding]) -> set[str]:
    return {name for name, f in found.items() if f.status in (Status.FAILS, Status.WARNING)} - ELSEWHERE


def by_nature(server: Server) -> set[str]:
    """What is in trouble on this kind of server when all is well."""
    return {"pg_background"} if server.is_standin else KNOWN_FAULTS.get(server.extension, set())


async def test_all_is_well(db: Watched) -> None:
    """For the login that has pgbackground_role and nothing else."""
    found = await look(db.conninfo)

    expected = by_nature(db.server)
    assert troubles(found) == expected
    assert worst(found.values()) is (Status.WARNING if expected else Status.OK)
    assert APP in found["reached"].text
    version = db.value("select extversion from pg_extension where extname = 'pg_background'")
    assert found["pg_background"].text.count(version) == 1
    assert "stand-in" in found["pg_background"].text or not db.server.is_standin
    assert db.workers() == []


async def test_no_extension(empty_database: Database) -> None:
    found = await look(empty_database.conninfo)

    assert found["pg_background"].status is Status.FAILS
    assert found["pgbg"].status is Status.FAILS
    todo = found["pg_background"].todo or ""
    assert "CREATE EXTENSION pg_background;" in todo or "install its package" in todo
    assert "library" not in found


async def test_no_schema(extension_database: Database) -> None:
    found = await look(extension_database.conninfo)

    assert found["library"].status is Status.OK
    assert found["pgbg"].status is Status.FAILS
    assert "pgbg install" in (found["pgbg"].todo or "")


async def test_a_schema_of_another_name(db: Watched) -> None:
    assert (await look(db.conninfo, schema="other"))["other"].status is Status.FAILS


async def test_a_login_without_the_role(db: Watched) -> None:
    db.role("pgbg_nobody", "login", ())

    found = await look(db.database.conninfo_as("pgbg_nobody"))

    assert found["role membership"].status is Status.FAILS
    todo = found["role membership"].todo or ""
    assert todo == 'GRANT "pgbackground_role" TO "pgbg_nobody";'
    assert found["pgbg"].status is Status.FAILS

    db.sql(todo)
    assert "role membership" not in troubles(await look(db.database.conninfo_as("pgbg_nobody")))
    db.sql("revoke pgbackground_role from pgbg_nobody")


async def test_a_login_that_does_not_inherit(db: Watched) -> None:
    db.role("pgbg_noinherit", "login noinherit")

    found = await look(db.database.conninfo_as("pgbg_noinherit"))

    assert found["role membership"].status is Status.FAILS
    db.sql(found["role membership"].todo or "")
    assert "role membership" not in troubles(await look(db.database.conninfo_as("pgbg_noinherit")))
    db.sql("drop role pgbg_noinherit")


async def test_grants_on_the_schema_that_are_gone(db: Watched) -> None:
    db.sql("revoke execute on all functions in schema pgbg from pgbackground_role")
    functions = (await look(db.conninfo))["functions"]
    assert functions.status is Status.FAILS
    db.sql("revoke usage on schema pgbg from pgbackground_role")
    assert (await look(db.conninfo))["pgbg"].status is Status.FAILS

    db.sql(functions.todo or "")
    assert "pgbg" not in troubles(await look(db.conninfo))
    assert "functions" not in await look(db.conninfo)


async def test_a_schema_of_another_version(db: Watched) -> None:
    db.sql("delete from pgbg.meta where version > 1")
    db.sql("update pgbg.meta set version = 99")
    newer = (await look(db.conninfo))["pgbg"]
    db.sql("update pgbg.meta set version = 0")
    older = (await look(db.conninfo))["pgbg"]

    assert (newer.status, older.status) == (Status.FAILS, Status.FAILS)
    assert "Upgrade" in (newer.todo or "")
    assert older.todo == "pgbg install"


async def test_who_could_forge_receipts(db: Watched) -> None:
    db.role("pgbg_forger", "login", ("pgbackground_role", "pgbg_owner"))
    try:
        owner = (await look(db.database.conninfo_as("pgbg_forger")))["owner"]
        assert owner.status is Status.WARNING
        assert owner.todo == 'REVOKE "pgbg_owner" FROM "pgbg_forger";'
    finally:
        db.sql("drop role pgbg_forger")


async def test_settings_that_hurt(db: Watched) -> None:
    options = (
        "-c statement_timeout=5min -c lock_timeout=3s -c synchronous_commit=off -c default_transaction_read_only=on"
    )

    found = await look(db.database.conninfo_as(APP, options=options))

    hurting = {"statement_timeout", "lock_timeout", "synchronous_commit", "read-write"}
    assert hurting <= troubles(found)
    assert found["statement_timeout"].text.startswith("5min ")
    assert found["read-write"].status is Status.FAILS
    assert worst(found.values()) is Status.FAILS


@pytest.mark.servers("real", "embedded")
async def test_what_a_login_may_not_see_is_not_visible(db: Watched) -> None:
    ordinary = (await look(db.conninfo))["worker slots"]
    administrator = (await look(db.admin_conninfo))["worker slots"]

    assert ordinary.status is Status.HIDDEN
    assert "not visible" in ordinary.text
    assert ordinary.todo == f'GRANT pg_read_all_stats TO "{APP}";'
    assert administrator.status is Status.OK


async def test_what_is_told_of_who_is_in_a_jobs_way(db: Watched) -> None:
    """Advice, and nothing that keeps jobs from running: neither a failure nor a warning."""
    before = (await look(db.conninfo))["blockers"]
    db.sql(before.todo or "")
    after = (await look(db.conninfo))["blockers"]
    db.sql(f"revoke pg_read_all_stats from {APP}")

    assert before.status is Status.HIDDEN
    assert "What that session runs, in what state and for how long, is not visible to this login." in before.text
    assert before.todo == f'GRANT pg_read_all_stats TO "{APP}";'
    assert (after.status, after.todo) == (Status.OK, None)
    assert worst([before]) is Status.OK
    assert (await look(db.admin_conninfo))["blockers"].status is Status.OK


@pytest.mark.servers("real", "embedded")
async def test_few_slots_and_none_free(own_db: Callable[..., Watched]) -> None:
    db = own_db(max_worker_processes=2, settings={"track_activities": "off"})
    assert (await look(db.admin_conninfo))["room"].status is Status.WARNING

    with db.database.connect() as launching:
        launching.execute(f"select * from {db.database.function('launch')}('select pg_sleep(60)')".encode())
        found = await look(db.admin_conninfo)
        launching.execute(f"select {db.database.function('cancel_all')}()".encode())

    # The launcher of logical replication has the other slot.
    assert found["worker slots"].status is Status.WARNING
    assert "All 2 are used (1 pg_background, 1 logical replication)" in found["worker slots"].text
    assert found["track_activities"].status is Status.WARNING


async def test_known_faults_of_old_versions(database: Database, server: Server) -> None:
    found = await look(database.conninfo)

    if server.is_standin:
        assert "cancel" not in found
    else:
        old = server.surface == "1.9"
        assert found["cancel"].status is (Status.WARNING if old else Status.OK)
        assert "pg_cancel_backend" in found["cancel"].text


async def test_a_pooler_in_transaction_mode(db: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """No pooler can be had here: the launcher is made to see one. The rest is looked at all the same."""

    async def refuse(_: Host) -> None:
        raise PoolerInTransactionMode("this connection goes through a pooler", todo="Connect to the server itself.")

    monkeypatch.setattr(Host, "_look_at_server", refuse)

    found = await look(db.conninfo)

    assert found["pooler"].status is Status.FAILS
    assert found["pooler"].todo == "Connect to the server itself."
    assert found["pgbg"].status is Status.OK


async def test_unreachable() -> None:
    with pytest.raises(ServerUnreachable):
        await examine("host=127.0.0.1 port=1 connect_timeout=2")


def test_the_command(db: Watched) -> None:
    people = CliRunner().invoke(app, ["doctor", "--dsn", db.conninfo])
    machines = CliRunner().invoke(app, ["doctor", "--dsn", db.conninfo, "--json"])
    failing = CliRunner().invoke(app, ["doctor", "--dsn", db.conninfo, "--schema", "other"])

    warned = by_nature(db.server)
    expected = ExitCode.DOCTOR_WARNS if warned else ExitCode.OK
    assert (people.exit_code, machines.exit_code, failing.exit_code) == (expected, expected, ExitCode.DOCTOR_FAILS)
    document = json.loads(machines.stdout)
    assert document["status"] == ("warning" if warned else "ok")
    assert {finding["status"] for finding in document["findings"]} <= {"ok", "warning", "fails", "not visible"}
    assert all(finding["name"] in people.stdout for finding in document["findings"])


async def test_a_login_with_too_much_power(db: Watched) -> None:
    db.role("pgbg_mighty", "login createrole createdb", ("pgbackground_role", "pg_write_all_data"))
    try:
        mighty = (await look(db.database.conninfo_as("pgbg_mighty")))["login"]
        assert mighty.status is Status.WARNING
        assert "CREATEROLE, CREATEDB, pg_write_all_data" in mighty.text
        assert "SUPERUSER" in (await look(db.admin_conninfo))["login"].text
    finally:
        db.sql("drop role pgbg_mighty")


@pytest.mark.parametrize(
    ("grant", "to"),
    [
        ("grant insert on pgbg.receipt to pgbackground_role", "pgbackground_role"),
        ("grant delete on pgbg.job to public", "PUBLIC"),
        ("grant create on schema pgbg to pgbackground_role", "pgbackground_role"),
        ("grant execute on function pgbg.prune(interval) to public", "PUBLIC"),
    ],
)
async def test_grants_that_go_too_far(db: Watched, grant: str, to: str) -> None:
    db.sql(grant)
    grants = (await look(db.conninfo))["grants"]
    assert grants.status is Status.WARNING
    assert to in grants.text

    db.sql(grants.todo.replace(" then ", " ") if grants.todo else "")
    assert troubles(await look(db.conninfo)) == by_nature(db.server)


async def test_a_search_path_that_is_open_to_all(db: Watched) -> None:
    db.sql("grant create on schema public to public")
    found = (await look(db.conninfo))["search_path"]
    assert found.status is Status.WARNING

    db.sql(found.todo or "")
    assert (await look(db.conninfo))["search_path"].status is Status.OK


async def test_what_the_servers_log_gets(db: Watched) -> None:
    db.sql(f"alter role {APP} in database {db.database.name} set log_min_error_statement to panic")
    quiet = await look(db.conninfo)
    db.sql(f"alter role {APP} in database {db.database.name} set log_statement to 'all'")
    assert "no SQL" in quiet["server log"].text
    assert "log_statement = all" in (await look(db.conninfo))["server log"].text
