"""Fixtures of our own suite: the servers, fresh databases on them, and the check that no worker is left."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import psycopg
import pytest
from hypothesis import settings

from pgbg_orchestration.embedded.databases import Contents, Databases
from pgbg_orchestration.embedded.extension import RealExtensionUnavailableError
from tests.kit.order import longest_first
from tests.kit.proxy import Proxy
from tests.matrix import LONG, asked_for, at_a_push
from tests.servers.debian import ServerUnavailableError
from tests.servers.kinds import KINDS, Server

# No test asserts a time: an example that took 0.3 s on a busy machine is no failure.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

OLDER = "the server is older: "
"""How the reason starts for which a test marked ``since`` is skipped."""
WORKERS_END_WITHIN = 10.0
"""Seconds that a test's workers get to end by themselves before they count as left over."""


@dataclass(frozen=True)
class Database:
    """A fresh database on a server, for one test."""

    server: Server
    name: str

    @property
    def conninfo(self) -> str:
        return self.server.conninfo(self.name)

    def conninfo_as(self, user: str, **parameters: str) -> str:
        """A connection string for another role, or with further libpq parameters."""
        return self.server.conninfo(self.name, user, **parameters)

    def connect(self, user: str = "postgres") -> psycopg.Connection:
        """An autocommit connection; the caller closes it."""
        return self.server.connect(self.name, user)

    def function(self, name: str) -> str:
        """How the extension here calls what 2.0 calls ``pg_background_<name>``."""
        return f"pg_background_{name}{'' if self.server.surface == '2.0' else '_v2'}"

    def workers(self) -> list[tuple[object, ...]]:
        """The workers that run in this database: (pid, application_name, state, wait_event, query)."""
        with self.server.connect() as connection:
            # A stand-in's worker is a client backend; 1.9 gives it no label, and the core's own marker may stand there.
            return connection.execute(
                "select pid, application_name, state, wait_event, query from pg_stat_activity where datname = %s"
                " and (backend_type = 'pg_background'"
                " or application_name ~ '^(pg_background(:.*)?|pgbg:[0-9a-f]{12}:.*)$')",
                (self.name,),
            ).fetchall()


class Running:
    """The servers of this test process: each started when first asked for, all removed at the end."""

    def __init__(self) -> None:
        self._servers: dict[str, Server] = {}
        self._databases: dict[str, Databases] = {}
        self._unavailable: dict[str, str] = {}

    def get(self, kind: str) -> Server:
        """The shared server of a kind; started anew if a test left it stopped."""
        if kind in self._unavailable:
            raise ServerUnavailableError(self._unavailable[kind])
        if kind not in self._servers:
            try:
                self._servers[kind] = make_server(kind)
            except (ServerUnavailableError, RealExtensionUnavailableError) as error:
                self._unavailable[kind] = str(error)
                raise
            self._databases[kind] = Databases(self._servers[kind])
        return self._servers[kind].start()

    def databases(self, server: Server) -> Databases:
        """The maker of databases on a shared server, which keeps its templates."""
        return self._databases[server.name]

    def used(self) -> list[Server]:
        """The servers that were started."""
        return list(self._servers.values())

    def remove_all(self) -> None:
        """Stop and delete all."""
        while self._servers:
            self._servers.popitem()[1].remove()


def make_server(kind: str, max_worker_processes: int = 64, settings: Mapping[str, str | int] | None = None) -> Server:
    """Start a new server of a kind, for the caller alone."""
    if reason := KINDS[kind].why_not():
        raise ServerUnavailableError(reason)
    return KINDS[kind].make(max_worker_processes, settings).start()


_RUNNING = pytest.StashKey[Running]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--servers",
        help=f"comma-separated servers to run on: {', '.join(KINDS)} (default: all that can be had here). "
        "One that is named here and cannot be had fails instead of being skipped.",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_RUNNING] = Running()
    config.addinivalue_line("markers", "servers(*kinds): run on these kinds of server only")
    config.addinivalue_line("markers", "majors: run on an older major version of PostgreSQL too")
    config.addinivalue_line("markers", "since(extension, postgres): about what came with these versions")
    config.addinivalue_line("markers", "until(postgres): about what this version is the last to have")
    unknown = set(_named(config)) - KINDS.keys()
    if unknown:
        raise pytest.UsageError(f"--servers: unknown {', '.join(sorted(unknown))}; known: {', '.join(KINDS)}")


def pytest_unconfigure(config: pytest.Config) -> None:
    config.stash[_RUNNING].remove_all()


def pytest_report_header(config: pytest.Config) -> list[str]:
    lines = ["servers: all that a test is meant for" if LONG else "servers: a push's (tests/matrix.py)"]
    for kind in _named(config) or KINDS:
        reason = _why_not()[kind]
        lines.append(f"server {kind}: {f'not here, {reason}' if reason else 'yes'}")
    return lines


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    used = [f"{server.name} ({server.extension})" for server in config.stash[_RUNNING].used()]
    if used:
        terminalreporter.write_line(f"servers that the tests ran on: {', '.join(used)}")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give the files that share a real Airflow to one process, where ``--dist loadgroup`` is asked for.

    xdist's own groups stand in the node ids, which pytest 9.2 keeps to itself.
    """
    if config.getvalue("dist") != "loadgroup":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class BySharedServer(LoadScopeScheduling):  # type: ignore[misc]  # it ships no types
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::", maxsplit=1)[0]
            return "airflow" if file.startswith("tests/airflow/") else file

    return BySharedServer(config, log)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Have several processes begin with the longest files (``--no-loadscope-reorder`` keeps this order)."""
    if hasattr(config, "workerinput"):
        longest_first(items)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Import only the files that hold such a test when those with an orchestrator's processes are asked for."""
    if str(config.getoption("markexpr")).startswith("processes") and collection_path.name.startswith("test_"):
        return "mark.processes" not in collection_path.read_text() or None
    return None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that asks for a server on the kinds that it is meant for: at a push on a few (tests/matrix.py)."""
    if "server_kind" not in metafunc.fixturenames:
        return
    marker = metafunc.definition.get_closest_marker("servers")
    wanted = asked_for(
        metafunc.definition.path.parent.name,
        marker.args if marker else (),
        majors=metafunc.definition.get_closest_marker("majors") is not None,
    )
    kinds = _named(metafunc.config) or [kind for kind in KINDS if KINDS[kind].everywhere or kind in wanted]
    if marker:
        unknown = set(marker.args) - KINDS.keys()
        if unknown:
            raise pytest.UsageError(f"{metafunc.definition.nodeid}: unknown servers {sorted(unknown)}")
        kinds = [kind for kind in kinds if {kind, KINDS[kind].like} & {*marker.args}]
    if metafunc.definition.get_closest_marker("real"):
        kinds = [kind for kind in kinds if {kind, KINDS[kind].like} & {"real", "embedded"}]
    if not (LONG or _named(metafunc.config)):
        about = {
            mark: metafunc.definition.get_closest_marker(mark) is not None
            for mark in ("embedded_differs", "any_surface")
        }
        kinds = at_a_push(kinds, _why_not(), **about)
    metafunc.parametrize("server_kind", kinds, scope="session")


@cache
def _why_not() -> Mapping[str, str | None]:
    """Why each kind of server cannot be had here, asked once."""
    return {kind: KINDS[kind].why_not() for kind in KINDS}


@pytest.fixture(scope="session")
def running(pytestconfig: pytest.Config) -> Running:
    return pytestconfig.stash[_RUNNING]


@pytest.fixture(scope="session")
def server(server_kind: str, running: Running, pytestconfig: pytest.Config) -> Server:
    """A server shared by all tests of this process; the test runs on each kind of it.

    Do not stop or crash it: take ``own_server`` for that.
    """
    with _Skipping(server_kind, pytestconfig):
        return running.get(server_kind)


@pytest.fixture(autouse=True)
def _versions(request: pytest.FixtureRequest) -> None:
    """Skip a test on a server older than its mark ``since`` says, or newer than its mark ``until``."""
    since, until = (request.node.get_closest_marker(name) for name in ("since", "until"))
    if since is None and until is None:
        return
    server: Server = request.getfixturevalue("server")
    with server.connect() as connection:
        postgres = connection.info.server_version // 10000
    if since is not None and postgres < since.kwargs.get("postgres", 0):
        pytest.skip(f"{OLDER}PostgreSQL {postgres}, {since.kwargs['postgres']} is needed")
    extension = server.extension.split()[-1]
    if since is not None and _numbers(extension) < _numbers(since.kwargs.get("extension", "0")):
        pytest.skip(f"{OLDER}pg_background {extension}, {since.kwargs['extension']} is needed")
    if until is not None and postgres > until.kwargs["postgres"]:
        pytest.skip(f"the server is newer: PostgreSQL {postgres}, {until.kwargs['postgres']} is the last")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


@pytest.fixture
def own_server(server_kind: str, pytestconfig: pytest.Config) -> Iterator[Callable[..., Server]]:
    """Makes servers of the test's own, of the kind it runs on: own_server(max_worker_processes=64, settings=None)."""
    made: list[Server] = []

    def make(max_worker_processes: int = 64, settings: Mapping[str, str | int] | None = None) -> Server:
        with _Skipping(server_kind, pytestconfig):
            made.append(make_server(server_kind, max_worker_processes, settings))
        return made[-1]

    yield make
    for server in made:
        server.remove()


@pytest.fixture(scope="session")
def server_real_8(pytestconfig: pytest.Config) -> Iterator[Server]:
    """A real server with max_worker_processes = 8, PostgreSQL's default and so what most users have."""
    with _Skipping("real", pytestconfig):
        server = make_server("real", 8)
    yield server
    server.remove()


class FreshDatabases:
    """Makes databases for one test: call it with a server, and what each is to hold."""

    def __init__(self, running: Running) -> None:
        self.made: list[Database] = []
        self._running = running
        self._own: dict[int, Databases] = {}

    def __call__(self, server: Server, contents: Contents = "schema", name: str | None = None) -> Database:
        """Make one, dropped after the test with whatever runs in it."""
        database = Database(server, self._databases(server).create(contents, name=name))
        self.made.append(database)
        return database

    def drop_all(self) -> None:
        """Drop them all; on a server that the test has stopped or removed there is nothing to do."""
        for database in self.made:
            if database.server.is_running():
                self._databases(database.server).drop(database.name)

    def _databases(self, server: Server) -> Databases:
        if server in self._running.used():
            return self._running.databases(server)
        return self._own.setdefault(id(server), Databases(server))


@pytest.fixture
def fresh_database(running: Running) -> Iterator[FreshDatabases]:
    """Makes databases: ``fresh_database(server, contents="schema"|"extension"|"empty", name=None)``."""
    databases = FreshDatabases(running)
    yield databases
    databases.drop_all()


@pytest.fixture
def database(server: Server, fresh_database: FreshDatabases) -> Database:
    """A fresh database with the extension and the package's schema."""
    return fresh_database(server)


@pytest.fixture
def extension_database(server: Server, fresh_database: FreshDatabases) -> Database:
    """A fresh database with the extension and without the package's schema."""
    return fresh_database(server, "extension")


@pytest.fixture
def empty_database(server: Server, fresh_database: FreshDatabases) -> Database:
    """A fresh database with neither the extension nor the package's schema."""
    return fresh_database(server, "empty")


@pytest.fixture
def proxy(server: Server) -> Iterator[Proxy]:
    """A proxy in front of the shared server: ``proxy.through(database.conninfo)`` connects through it."""
    with Proxy.before(server.conninfo()) as made:
        yield made


@pytest.fixture
def embedded_home() -> Iterator[Path]:
    """A directory that an embedded server's own user can reach: pytest's tmp_path is closed to all but ourselves."""
    with tempfile.TemporaryDirectory(prefix="pgbg-test-") as directory:
        Path(directory).chmod(0o755)
        yield Path(directory)


@pytest.fixture
def no_worker_left(fresh_database: FreshDatabases) -> Iterator[None]:
    """Fail the test when a worker still runs in one of its databases a while after its end."""
    yield
    for database in fresh_database.made:
        deadline = time.monotonic() + WORKERS_END_WITHIN
        while (left := database.workers()) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not left, f"workers left running: {left}"


def _named(config: pytest.Config) -> list[str]:
    """The kinds that ``--servers`` names; none when it was not given."""
    option: str | None = config.getoption("--servers")
    return [kind.strip() for kind in option.split(",") if kind.strip()] if option else []


class _Skipping:
    """Skip, with the reason, what needs a server that cannot be had here; fail when it was asked for by name."""

    def __init__(self, kind: str, config: pytest.Config) -> None:
        self._kind = kind
        self._asked_for = kind in _named(config)

    def __enter__(self) -> None:
        return None

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        if isinstance(error, (ServerUnavailableError, RealExtensionUnavailableError)) and not self._asked_for:
            pytest.skip(f"server {self._kind} cannot be had here: {error}")
