"""Fixtures of the core's tests: a database whose effects are counted, and what must be true after every test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest

from tests.conftest import Database
from tests.core.kit import LONG, Watched
from tests.servers.kinds import KINDS, Server
from tests.servers.older import MAJORS

HERE = Path(__file__).parent


@pytest.fixture
def db(database: Database) -> Iterator[Watched]:
    """A fresh database; afterwards no worker is left in it and nobody is connected to it."""
    watched = Watched(database)
    try:
        yield watched
        watched.assert_nothing_left()
    finally:
        watched.close()


@pytest.fixture
def own_db(
    own_server: Callable[..., Server], fresh_database: Callable[..., Database]
) -> Iterator[Callable[..., Watched]]:
    """Makes a database on a server of the test's own, which may be stopped: own_db(max_worker_processes, settings)."""
    made: list[Watched] = []

    def make(max_worker_processes: int = 64, settings: dict[str, str | int] | None = None) -> Watched:
        made.append(Watched(fresh_database(own_server(max_worker_processes, settings))))
        return made[-1]

    try:
        yield make
        for watched in made:
            watched.assert_nothing_left()
    finally:
        for watched in made:
            watched.close()


@pytest.fixture
def enemy(db: Watched) -> Iterator[psycopg.Connection]:
    """A session of a role that may run jobs of its own, and of nobody else's."""
    db.role("pgbg_enemy", "login", ["pgbackground_role"])
    connection = psycopg.connect(db.database.conninfo_as("pgbg_enemy"), autocommit=True)
    yield connection
    connection.close()
    db.sql("drop owned by pgbg_enemy")
    db.sql("drop role pgbg_enemy")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without ``--servers``, run on one server with the real extension and on the other surface only.

    PGBG_LONG=1 runs on all of them.
    """
    if LONG or config.getoption("--servers"):
        return
    chosen = {"real" if KINDS["real"].why_not() is None else "embedded", "standin19"}
    keep: list[pytest.Item] = []
    drop: list[pytest.Item] = []
    for item in items:
        callspec = getattr(item, "callspec", None)
        kind = callspec.params.get("server_kind") if callspec and HERE in item.path.parents else None
        marker = item.get_closest_marker("servers")
        other_surface = "standin20" if marker and "standin19" not in marker.args else "standin19"
        majors = set(MAJORS) if item.get_closest_marker("majors") else set()
        (keep if kind is None or kind in {*chosen, other_surface, *majors} else drop).append(item)
    if drop:
        config.hook.pytest_deselected(items=drop)
        items[:] = keep
