"""Which forms of ALTER and DROP SUBSCRIPTION the server runs alone only, and what is told of them before a launch."""

from __future__ import annotations

from collections.abc import Callable

import psycopg
import pytest

from pgbg_orchestration.statements.refuse import best_alone, outside_transaction
from pgbg_orchestration.statements.split import split
from tests.conftest import FreshDatabases
from tests.core.kit import only_long
from tests.servers.kinds import Server

pytestmark = [pytest.mark.servers("real", "standin_pg19", "real19"), only_long]

ENABLED = (
    "alter subscription s refresh publication",
    "alter subscription s refresh publication with (copy_data = false)",
    "alter subscription s set publication q",
    "alter subscription s set publication q with (refresh = false)",
    "alter subscription s add publication r",
    "alter subscription s add publication r with (refresh = off)",
    "alter subscription s drop publication q",
    "alter subscription s drop publication q with (refresh = 0)",
    "alter subscription s set (binary = true)",
    "alter subscription s disable",
    "drop subscription s",
)
DISABLED = (
    "alter subscription s set (failover = true)",
    "alter subscription s set (failover = false)",
    "alter subscription s set (two_phase = true)",
    "alter subscription s set (two_phase)",
    "alter subscription s set (two_phase = false)",
    "alter subscription s set (streaming = off, two_phase = off)",
    "alter subscription s set (origin = none)",
    "alter subscription s skip (lsn = none)",
    "alter subscription s enable",
)
SINCE_19 = ("alter subscription s refresh sequences", "alter subscription s set (wal_receiver_timeout = '5s')")


def test_what_is_told_is_what_the_server_does(
    own_server: Callable[..., Server], fresh_database: FreshDatabases
) -> None:
    """A subscription to another database of its own server cannot make its slot: that waits for itself."""
    server = own_server(64, {"wal_level": "logical"})
    publisher, subscriber = fresh_database(server, "empty"), fresh_database(server, "empty")
    told: dict[str, bool] = {}
    seen: dict[str, bool] = {}
    with publisher.connect() as publishing, subscriber.connect() as subscribing:
        publishing.execute("create table t (i int)")
        subscribing.execute("create table t (i int)")
        for name in "pqr":
            publishing.execute(f"create publication {name} for table t")

        def runs(text: str, *, enabled: bool) -> bool:
            """Run a text on a fresh subscription, in one message; False for 25001."""
            publishing.execute("select pg_create_logical_replication_slot('s', 'pgoutput')")
            subscribing.execute(
                f"create subscription s connection '{publisher.conninfo}' publication p, q"
                f" with (create_slot = false, slot_name = 's', enabled = {enabled})"
            )
            try:
                psycopg.ClientCursor(subscribing).execute(text.encode())
            except psycopg.errors.ActiveSqlTransaction:
                return False
            finally:
                subscribing.execute("drop subscription if exists s")
            return True

        since = SINCE_19 if subscribing.info.server_version >= 190000 else ()
        for text in (*ENABLED, *since, *DISABLED):
            enabled = text not in DISABLED
            [statement] = split(text)
            assert runs(text, enabled=enabled), text
            told[text] = outside_transaction(statement) or best_alone(statement)
            seen[text] = not runs(f"select 1; {text}", enabled=enabled)
    assert told == seen
