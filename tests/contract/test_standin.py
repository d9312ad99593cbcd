"""The stand-in itself: how it is installed, what it hides, and that its table of differences is in use."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest
from psycopg import errors

from pgbg_orchestration.embedded.standin import (
    DIFFERENCES,
    STANDIN_COMMENT,
    extension_settings,
    install_standin,
    write_extension,
)
from pgbg_orchestration.postgres.pg_background import Extension
from tests.conftest import Database
from tests.contract.background import Background
from tests.contract.conftest import differences_used

NOT_TESTABLE = {
    # Chances and crashes of the real extension, which no test can call up at will on every server:
    "launch_cancel", "pids_reused", "parallel_select", "early_cancel", "settings_known", "relocatable", "query_text",
}  # fmt: skip
pytestmark = pytest.mark.servers("standin20", "standin19")


def test_every_difference_is_claimed_by_a_test() -> None:
    assert differences_used() | NOT_TESTABLE == set(DIFFERENCES)


def test_it_is_an_extension_of_the_real_ones_name_and_version(extension: Extension, session: Background) -> None:
    assert extension.version in ("2.0", "1.9")
    assert session.value(
        "select obj_description(oid, 'pg_extension') from pg_extension where extname = 'pg_background'"
    ) == (STANDIN_COMMENT)


def test_installing_it_twice_changes_nothing_and_another_surface_is_refused(
    extension_database: Database, extension: Extension
) -> None:
    install_standin(extension_database.conninfo, "2.0" if extension.version == "2.0" else "1.9")
    with pytest.raises(errors.DuplicateObject, match="DROP EXTENSION"):
        install_standin(extension_database.conninfo, "1.9" if extension.version == "2.0" else "2.0")


def test_it_can_be_put_into_any_schema_and_be_dropped_whole(empty_database: Database) -> None:
    install_standin(empty_database.conninfo, schema="an odd Schema")
    with empty_database.connect() as connection:
        connection.execute("set search_path = ''")
        session = Background(connection, Extension("2.0", "an odd Schema"))
        assert session.fetch("select 7", "v int") == [(7,)]
        connection.execute("drop extension pg_background")
        left = connection.execute(
            "select count(*) from pg_catalog.pg_proc where pronamespace = '\"an odd Schema\"'::pg_catalog.regnamespace"
        ).fetchone()
        assert left == (0,)


def test_it_can_be_created_from_files(empty_database: Database, embedded_home: Path) -> None:
    assert write_extension(embedded_home) == embedded_home / "extension"
    (settings,) = extension_settings(embedded_home).items()
    with empty_database.connect() as connection:
        if connection.info.server_version < 180000:
            pytest.skip("cannot be had here: extension_control_path came with PostgreSQL 18")
        connection.execute("select set_config(%s, %s, false)", settings)
        connection.execute("create schema s")
        connection.execute("create extension pg_background schema s version '1.9'")
        session = Background(connection, Extension("1.9", "s"))
        assert session.fetch("select 7", "v int") == [(7,)]


@pytest.mark.parametrize(
    "function", ["_pgbg_connect('x', 'y')", "_pgbg_dblink_connect('x', 'y')", "_pgbg_control('select 1')"]
)
def test_a_role_without_the_privilege_reaches_none_of_its_functions(
    session: Background, open_session: Callable[..., Background], function: str
) -> None:
    session.execute("drop role if exists contract_stranger")
    session.execute("create role contract_stranger login")
    stranger = open_session("contract_stranger")
    with pytest.raises(errors.InsufficientPrivilege):
        stranger.execute(f"select {function}")
    stranger.connection.close()
    session.execute("drop role contract_stranger")


def test_a_lost_control_connection_makes_the_handles_unknown_and_nothing_worse(
    session: Background, observer: psycopg.Connection
) -> None:
    handle = session.launch("select pg_sleep(1)")
    observer.execute(
        "select pg_terminate_backend(pid, 5000) from pg_stat_activity"
        " where application_name = 'pg_background stand-in' and datname = current_database()"
    )
    with pytest.raises(errors.UndefinedObject):
        session.info(handle)
    assert session.run("select 1")["command_tag"] == "SELECT"


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("", []),
        (" ; ;; -- c", []),
        ("select 1", ["SELECT"]),
        ("select 'C:\\'; select 2", ["SELECT", "SELECT"]),
        ("select e'\\';'; vacuum t;", ["SELECT", "VACUUM"]),
        ("select 1 /* a /* ; */ ; */ ; -- ; \n table t", ["SELECT", "SELECT"]),
        ("do $a$ begin; $b$ ; $a$; do '; ''; '", ["DO", "DO"]),
        ('select 1 as ";"";"; (select 2); values (1)', ["SELECT", "SELECT", "SELECT"]),
        ("create rule r as on insert to t do (select 1; select 2); show all", ["CREATE", "SHOW"]),
        ("create function f() returns int begin atomic select case when true then 1 end; select 2; end; select 3",
         ["CREATE", "SELECT"]),
        ("with a as (insert into t select 1 returning 1) select * from a; with a as (select 1) delete from t",
         ["SELECT", "DELETE"]),
        ("select $1$; select 1$$2", ["SELECT", "SELECT"]),
        ("select 'never closed; select 2", ["SELECT"]),
    ],
)  # fmt: skip
def test_it_finds_the_statements_of_a_text(session: Background, text: str, kinds: list[str]) -> None:
    assert [s["kind"] for s in session.value("select _pgbg_statements(%s)", (text,))] == kinds


def test_it_finds_the_statements_of_a_long_text(session: Background) -> None:
    text = "insert into t values " + ", ".join(f"({n}, 'text; {n}')" for n in range(20_000)) + "; select 1"
    assert [s["kind"] for s in session.value("select _pgbg_statements(%s)", (text,))] == ["INSERT", "SELECT"]
