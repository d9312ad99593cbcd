"""What the catalog knows of statements that can carry no receipt: whether an index was built or dropped.

``CREATE INDEX CONCURRENTLY`` and ``DROP INDEX CONCURRENTLY`` of a named index can be looked up afterwards. VACUUM,
CALL and ``REINDEX … CONCURRENTLY`` leave nothing that tells that they were done.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from psycopg import AsyncConnection, sql

from . import Statement, UnterminatedSql, named
from .lexer import Token, TokenKind, tokens

QUERIES = named.queries(__package__, "queries.sql")


@dataclass(frozen=True, slots=True)
class Name:
    """A name with or without its schema, as the catalog has them (``parts``) and as SQL (``text``)."""

    parts: tuple[str, ...]
    text: str

    @property
    def last(self) -> str:
        """The name without its schema."""
        return self.parts[-1]

    @property
    def schema(self) -> str | None:
        """Its schema, where one was given."""
        return self.parts[-2] if len(self.parts) > 1 else None


@dataclass(frozen=True, slots=True)
class ConcurrentIndex:
    """What one ``CREATE`` or ``DROP INDEX CONCURRENTLY`` says: ``table`` is None for a DROP, ``index`` if unnamed."""

    index: Name | None
    table: Name | None
    unique: bool = False


def concurrent_index(statements: Sequence[Statement]) -> ConcurrentIndex | None:
    """Read a job's statement; None for any other than a single concurrent build or drop of an index.

    Parameters
    ----------
    statements:
        The job's statements, with parameters in.
    """
    if len(statements) != 1 or "CONCURRENTLY" not in statements[0].keywords:
        return None
    try:
        words = _Words(statements[0].text)
    except UnterminatedSql:
        return None
    if words.take("DROP", "INDEX", "CONCURRENTLY"):
        words.take("IF", "EXISTS")
        index = words.name()
        return ConcurrentIndex(index, None) if index and not words.at(",") else None
    unique = words.take("CREATE", "UNIQUE", "INDEX", "CONCURRENTLY")
    if not unique and not words.take("CREATE", "INDEX", "CONCURRENTLY"):
        return None
    words.take("IF", "NOT", "EXISTS")
    index = None if words.at("ON") else words.name()
    if not words.take("ON"):
        return None
    words.take("ONLY")
    table = words.name()
    return ConcurrentIndex(index, table, unique) if table else None


def verify_sql(statements: Sequence[Statement], settings: Sequence[str] = ()) -> str | None:
    """Return the query that tells whether the statement's work is done; None where the catalog cannot tell.

    Parameters
    ----------
    statements:
        The job's statements, with parameters in.
    settings:
        Names of the settings of the job's own: with a ``search_path`` among them an unqualified name means
        something that this query does not see.
    """
    found = concurrent_index(statements)
    if found is None or found.index is None:
        return None
    where = found.table or found.index
    if where.schema is None and "search_path" in map(str.lower, settings):
        return None
    if found.table is None:
        return _query("select pg_catalog.to_regclass({name}) is null", name=found.index.text)
    return _query(
        QUERIES["index_is_built"],
        table=found.table.text,
        index=found.index.last,
        unique=found.unique,
    )


async def invalid_indexes(conn: AsyncConnection[Any], found: ConcurrentIndex) -> list[str]:
    """Return the invalid indexes that a failed build may have left, qualified and quoted.

    Of an unnamed index they are all invalid ones of its table; a build that is still at work shows up as well.
    """
    if found.table is None:
        return []
    names = {
        "table": found.table.last,
        "schema": found.table.schema,
        "index": found.index.last if found.index else None,
    }
    cursor = await conn.execute(QUERIES["invalid_indexes"], names)
    return [str(row[0]) for row in await cursor.fetchall()]


async def drop_invalid_index(conn: AsyncConnection[Any], found: ConcurrentIndex) -> str | None:
    """Drop the invalid index that an earlier build of this name left; returns its name, None when there is none.

    Parameters
    ----------
    conn:
        A connection in autocommit mode with the search_path and the role of the job.

    Raises
    ------
    psycopg.Error
        The login may not, or a lock is not to be had in time.
    """
    if found.index is None or found.table is None:
        return None
    query = QUERIES["invalid_index"]
    names = (found.table.text, found.index.last)
    if await (await conn.execute(query, names)).fetchone() is None:
        return None
    async with conn.transaction():
        # Every concurrent build holds this lock to its end, so what is invalid behind it is no build at work.
        await conn.execute(f"lock table {found.table.text} in share update exclusive mode".encode())
        row = await (await conn.execute(query, names)).fetchone()
    if row is None:
        return None
    await conn.execute(f"drop index concurrently if exists {row[0]}".encode())
    return str(row[0])


def _query(text: str, **values: object) -> str:
    literals = {name: sql.Literal(value).as_string(None) for name, value in values.items()}
    return text.format_map(literals)


class _Words:
    """The tokens of a statement, read from the front."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._tokens = list(tokens(text))

    def take(self, *words: str) -> bool:
        """Take these unquoted words, all or none."""
        head = [t.text if t.kind is TokenKind.WORD else None for t in self._tokens[: len(words)]]
        if head != [*words]:
            return False
        del self._tokens[: len(words)]
        return True

    def at(self, text: str) -> bool:
        """Whether this symbol or unquoted word comes next."""
        return bool(self._tokens) and self._tokens[0].kind is not TokenKind.NAME and self._tokens[0].text == text

    def name(self) -> Name | None:
        """Take a name, which may be qualified."""
        found: list[Token] = []
        while self._tokens and self._tokens[0].kind in (TokenKind.WORD, TokenKind.NAME):
            found.append(self._tokens.pop(0))
            if not self.at("."):
                break
            self._tokens.pop(0)
        raw = [self._text[token.start : token.end] for token in found]
        if not raw or self.at("&"):  # U&"…" is spelled otherwise than the catalog has it
            return None
        return Name(tuple(map(_as_in_catalog, raw)), ".".join(raw))


def _as_in_catalog(raw: str) -> str:
    if raw.startswith('"'):
        return raw[1:-1].replace('""', '"')
    # As PostgreSQL folds: ASCII only.
    return "".join(char.lower() if char.isascii() else char for char in raw)
