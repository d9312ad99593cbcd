"""Fixtures of the core's tests: a database whose effects are counted, and what must be true after every test."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import psycopg
import pytest

from tests.conftest import Database
from tests.core.kit import Watched
from tests.servers.kinds import Server


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
