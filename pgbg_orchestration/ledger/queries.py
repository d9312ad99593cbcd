"""The named queries of ``sql/queries.sql``."""

from __future__ import annotations

import re
from functools import cache
from importlib import resources

from psycopg import sql

from pgbg_orchestration.postgres.opening import AWAIT_NO_STANDBY

_NAME = re.compile(r"^-- name: (\w+)$", re.MULTILINE)
_COMMENT = re.compile(r"^ *--.*\n", re.MULTILINE)


@cache
def _texts() -> dict[str, str]:
    """Return every query by its name; comments stay in the file, and do not travel to the server with each call."""
    text = resources.files(__package__).joinpath("sql", "queries.sql").read_text(encoding="utf-8")
    _, *parts = _NAME.split(text)
    return {name: _COMMENT.sub("", body).strip() for name, body in zip(parts[::2], parts[1::2], strict=True)}


def names() -> tuple[str, ...]:
    """Return the names of all queries."""
    return tuple(_texts())


@cache
def query(name: str, schema: str) -> sql.Composed:
    """Return a query for the package's schema of that name; raises ``KeyError`` where there is no such query."""
    return filled(name, schema)


def filled(name: str, schema: str, **parts: object) -> sql.Composed:
    """Return a query with further parts of its text put in: SQL as it is, values as literals."""
    return sql.SQL(_texts()[name]).format(
        schema=sql.Identifier(schema), await_no_standby=sql.SQL(AWAIT_NO_STANDBY), **parts
    )
