"""The named queries of ``sql/queries.sql``."""

from __future__ import annotations

from functools import cache

from psycopg import sql

from pgbg_orchestration.postgres.opening import AWAIT_NO_STANDBY
from pgbg_orchestration.statements import named

QUERIES = named.queries(__package__, "sql", "queries.sql")


def names() -> tuple[str, ...]:
    """Return the names of all queries."""
    return tuple(QUERIES)


@cache
def query(name: str, schema: str) -> bytes:
    """Return a query for the package's schema of that name; raises ``KeyError`` where there is no such query."""
    return filled(name, schema)


def filled(name: str, schema: str, **parts: str) -> bytes:
    """Return a query with further parts of its text put in, which are SQL.

    As text that is done: psycopg would put the parts together anew with each call.
    """
    quoted = sql.Identifier(schema).as_string(None)
    return QUERIES[name].format(schema=quoted, await_no_standby=AWAIT_NO_STANDBY, **parts).encode()
