"""Every kind of server the suite runs on starts, stops, crashes and recovers, and its extension runs a job."""

from __future__ import annotations

import stat
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg
import pytest
from psycopg import sql

from pgbg_debian_extension import debian
from pgbg_orchestration.embedded.server import EmbeddedServer, EmbeddedServerError
from pgbg_orchestration.embedded.status import SOCKET_PATH_LIMIT, socket_directory, status
from tests.conftest import Database, FreshDatabases
from tests.kit.processes import running
from tests.kit.proxy import TO_CLIENT, TO_SERVER, Proxy
from tests.servers.kinds import Server

pytestmark = pytest.mark.embedded_differs

MakeServer = Callable[..., Server]
MakeDatabase = FreshDatabases


def launch(connection: psycopg.Connection, surface: str, statement: str) -> tuple[int, int]:
    name = "pg_background_launch" if surface == "2.0" else "pg_background_launch_v2"
    row = connection.execute(
        sql.SQL("select pid, cookie from {}(%s)").format(sql.Identifier(name)), (statement,)
    ).fetchone()
    assert row is not None
    return int(row[0]), int(row[1])


def result(connection: psycopg.Connection, surface: str, handle: tuple[int, int]) -> list[tuple[object, ...]]:
    name = "pg_background_result" if surface == "2.0" else "pg_background_result_v2"
    query = sql.SQL("select * from {}(%s, %s) as (value int)").format(sql.Identifier(name))
    return connection.execute(query, handle).fetchall()


def test_extension_runs_a_job(extension_database: Database) -> None:
    surface = extension_database.server.surface
    with extension_database.connect() as connection:
        handle = launch(connection, surface, "select 40 + 2")
        assert result(connection, surface, handle) == [(42,)]


def test_extension_version_is_that_of_the_surface(extension_database: Database) -> None:
    with extension_database.connect() as connection:
        row = connection.execute("select extversion from pg_extension where extname = 'pg_background'").fetchone()
    server = extension_database.server
    assert row is not None
    assert server.surface == ("1.9" if row[0] in ("1.9", "1.10") else row[0])
    assert server.extension.split()[-1].startswith(row[0])


@pytest.mark.real
def test_real_worker_is_a_background_worker(database: Database, no_worker_left: None) -> None:
    with database.connect() as connection:
        launch(connection, database.server.surface, "select pg_sleep(600)")
        deadline = time.monotonic() + 30
        while not (workers := database.workers()) and time.monotonic() < deadline:
            time.sleep(0.02)
        pids = [row[0] for row in workers]
        kinds = connection.execute("select backend_type from pg_stat_activity where pid = any(%s)", (pids,)).fetchall()
        assert kinds == [("pg_background",)]
        assert connection.execute("select pg_terminate_backend(%s)", pids).fetchone() == (True,)


def test_proxy_breaks_between_a_launch_and_its_answer(
    extension_database: Database, proxy: Proxy, no_worker_left: None
) -> None:
    """The launch arrives and its worker commits, while the client never hears of it."""
    database = extension_database
    with database.connect() as observer, psycopg.connect(proxy.through(database.conninfo), autocommit=True) as client:
        observer.execute("create table done (n int)")
        when = proxy.when(TO_SERVER, b"insert into done", stall=TO_CLIENT)
        with ThreadPoolExecutor(1) as pool:
            call = pool.submit(launch, client, database.server.surface, "insert into done values (1)")
            when.wait()
            deadline = time.monotonic() + 30
            while not observer.execute("select n from done").fetchall() and time.monotonic() < deadline:
                time.sleep(0.02)
            assert not call.done()
            proxy.cut()
            with pytest.raises(psycopg.OperationalError):
                call.result(30)
        assert observer.execute("select n from done").fetchall() == [(1,)]


@pytest.mark.parametrize("name", ["with space", 'quo"te', "apos'trophe", "Ünïcode", "back\\slash", "UPPER", "%s"])
def test_conninfo_of_odd_database_names(server: Server, fresh_database: MakeDatabase, name: str) -> None:
    database = fresh_database(server, "empty", name=name)
    with database.connect() as connection:
        assert connection.execute("select current_database()").fetchone() == (name,)


def test_what_a_new_database_holds(server: Server, fresh_database: MakeDatabase) -> None:
    found = {}
    for contents in ("empty", "extension", "schema"):
        with fresh_database(server, contents).connect() as connection:
            found[contents] = connection.execute(
                "select exists (select from pg_extension where extname = 'pg_background'),"
                " to_regnamespace('pgbg') is not null"
            ).fetchone()
    assert found == {"empty": (False, False), "extension": (True, False), "schema": (True, True)}


def test_conninfo_and_data_survive_restart_stop_and_crash(own_server: MakeServer) -> None:
    server = own_server()
    conninfo = server.conninfo()

    def rows() -> list[tuple[object, ...]]:
        with psycopg.connect(conninfo, autocommit=True) as connection:
            return connection.execute("select n from kept order by n").fetchall()

    with server.connect() as connection:
        connection.execute("create table kept as select 1 as n")
    server.restart()
    assert rows() == [(1,)]
    with server.connect() as connection:
        connection.execute("insert into kept values (2)")
    server.restart("immediate")
    assert rows() == [(1,), (2,)]
    with server.connect() as connection:
        connection.execute("insert into kept values (3)")
    pid = server.pid()
    assert pid is not None
    server.crash()
    assert not server.is_running()
    assert not running(pid)
    with pytest.raises(psycopg.OperationalError):
        psycopg.connect(conninfo)
    server.start()
    assert rows() == [(1,), (2,), (3,)]
    server.stop()
    assert server.pid() is None
    server.start()
    assert rows() == [(1,), (2,), (3,)]
    assert server.conninfo() == conninfo


def test_settings_reach_the_server(own_server: MakeServer) -> None:
    server = own_server(max_worker_processes=8, settings={"log_line_prefix": "it's %p "})
    with server.connect() as connection:
        assert connection.execute("show max_worker_processes").fetchone() == ("8",)
        assert connection.execute("show log_line_prefix").fetchone() == ("it's %p ",)


def test_two_servers_of_a_kind_do_not_meet(own_server: MakeServer) -> None:
    one, two = own_server(), own_server()
    with one.connect() as connection:
        connection.execute("create table only_here ()")
    with two.connect() as connection:
        assert connection.execute("select to_regclass('only_here')").fetchone() == (None,)


def test_drop_ends_a_worker_that_still_runs(server: Server, fresh_database: MakeDatabase) -> None:
    """The teardown of every test relies on it: ``fresh_database`` drops while the worker sleeps."""
    database = fresh_database(server, "extension")
    with database.connect() as connection:
        launch(connection, server.surface, "select pg_sleep(600)")


def test_server_real_8_has_the_default_number_of_workers(server_real_8: Server) -> None:
    with server_real_8.connect() as connection:
        assert connection.execute("show max_worker_processes").fetchone() == ("8",)


def test_embedded_data_directory_is_kept_and_private(embedded_home: Path) -> None:
    home = embedded_home / "data"
    with EmbeddedServer(home) as server:
        extension = server.extension
        with server.connect() as connection:
            connection.execute("create table kept as select 1 as n")
        assert stat.S_IMODE(home.stat().st_mode) == 0o700
        assert list(home.glob(".s.PGSQL.*"))
        with server.connect() as connection:
            assert connection.execute("show listen_addresses").fetchone() == ("",)
    assert status(home) is None
    with EmbeddedServer(home) as server, server.connect() as connection:
        assert connection.execute("select n from kept").fetchone() == (1,)
        assert server.extension == extension


def test_embedded_second_start_downloads_nothing(embedded_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with EmbeddedServer(embedded_home / "first") as server:
        extension = server.extension
    monkeypatch.setattr(debian, "fetch", forbidden)
    monkeypatch.setattr("urllib.request.urlopen", forbidden)
    with EmbeddedServer(embedded_home / "second") as server:
        assert server.extension == extension


def forbidden(*_: object, **__: object) -> None:
    raise AssertionError("a download was tried")


def test_embedded_attaches_to_the_running_server(embedded_home: Path) -> None:
    home = embedded_home / "data"
    with EmbeddedServer(home) as first:
        with EmbeddedServer(home) as second:
            assert second.pid() == first.pid()
            assert second.extension == first.extension
        assert first.is_running(), "leaving the second must not stop what the first one started"
        seen = status(home)
        assert seen is not None
        assert (seen.pid, seen.extension) == (first.pid(), first.extension)
        with psycopg.connect(seen.conninfo()) as connection:
            assert connection.execute("select 1").fetchone() == (1,)


def test_embedded_long_path_gets_a_short_socket(embedded_home: Path) -> None:
    home = embedded_home / ("long-" * 20) / "data"
    with EmbeddedServer(home) as server:
        sockets = socket_directory(home)
        assert sockets != home
        assert len(str(sockets / ".s.PGSQL.5432")) <= SOCKET_PATH_LIMIT
        assert stat.S_IMODE(sockets.stat().st_mode) == 0o700
        with server.connect() as connection:
            assert connection.execute("select 1").fetchone() == (1,)
    assert not sockets.exists()


def test_embedded_refuses_what_is_not_its_own(embedded_home: Path) -> None:
    (embedded_home / "notes.txt").write_text("mine")
    with pytest.raises(EmbeddedServerError, match="not empty"):
        EmbeddedServer(embedded_home).start()
    old = embedded_home / "old"
    old.mkdir()
    (old / "PG_VERSION").write_text("9.6\n")
    with pytest.raises(EmbeddedServerError, match=r"made by PostgreSQL 9\.6"):
        EmbeddedServer(old).start()


def test_embedded_keeps_the_extension_that_its_data_was_made_with(embedded_home: Path) -> None:
    home = embedded_home / "data"
    with EmbeddedServer(home, extension="stand-in") as server:
        assert server.extension == "stand-in 2.0"
    with EmbeddedServer(home) as server:
        assert server.extension == "stand-in 2.0"
    with pytest.raises(EmbeddedServerError, match=r"made with stand-in 2\.0"):
        EmbeddedServer(home, extension="real").start()


def test_embedded_without_the_real_extension_says_why(embedded_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGBG_CACHE_DIR", str(embedded_home / "cache"))
    monkeypatch.setenv(debian.MIRROR_VARIABLE, "http://127.0.0.1:9")
    with EmbeddedServer(embedded_home / "data") as server:
        assert server.extension == "stand-in 2.0"
        assert server.why_standin is not None
        assert "127.0.0.1:9" in server.why_standin


def test_a_temporary_server_goes_with_its_stop() -> None:
    server = EmbeddedServer().start()
    home, pid = server.data_dir, server.pid()
    assert pid is not None
    server.stop()
    assert not home.exists()
    assert not running(pid)


def test_a_temporary_server_that_does_not_start_leaves_nothing(
    embedded_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(embedded_home))
    server = EmbeddedServer(settings={"shared_buffers": "no size"})
    with pytest.raises(EmbeddedServerError, match="did not start"):
        server.start()
    (parent,) = embedded_home.iterdir()
    assert [path.name for path in parent.iterdir()] == [".lock"]
    server.settings = {}
    with server:  # it can be tried again
        assert server.is_running()
