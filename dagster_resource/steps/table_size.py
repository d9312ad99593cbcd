"""Whether the row count of a job is the number of rows in a table: what Dagster shows as the table's size.

A count says how many rows the last statement dealt with. It is a table's size where that statement made the table, or
filled one that the same job had made or emptied before; after any other insert, a merge or a delete it is not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pgbg_orchestration.statements import Statement

# Statements that leave a table as many rows as it had.
HARMLESS = frozenset({"ALTER", "ANALYZE", "COMMENT", "CREATE", "DROP", "GRANT", "LOCK", "REVOKE"})
TEMPORARY = frozenset({"TEMP", "TEMPORARY"})


def is_size_of_table(sql: str, command_tag: str | None, row_count: int | None) -> bool:
    """Tell whether the count is the size of the table that the job's last statement filled.

    Parameters
    ----------
    sql:
        The job's statements; empty where they are not known.
    command_tag, row_count:
        Of the job.
    """
    if row_count is None or command_tag is None:
        return False
    parts = _split(sql)
    last = _words(parts[-1]) if parts else []
    match command_tag:
        case "REFRESH MATERIALIZED VIEW" | "CREATE MATERIALIZED VIEW" | "CREATE TABLE AS":
            # With none it may have had no data, or have been there already.
            return row_count > 0 and not TEMPORARY.intersection(last[:4])
        case "SELECT":
            return _makes_table(last) and not TEMPORARY.intersection(last)
        case "INSERT" | "COPY":
            return bool(last) and "ON CONFLICT" not in " ".join(last) and _was_empty(parts, _target(last))
        case _:
            return False


def is_size_of_partition(sql: str, command_tag: str | None, row_count: int | None) -> bool:
    """Tell whether the count is that of the rows which the job's last statement put into a table for its partition."""
    if is_size_of_table(sql, command_tag, row_count):
        return True
    parts = _split(sql)
    last = _words(parts[-1]) if parts else []
    return row_count is not None and command_tag in ("INSERT", "COPY") and _target(last) is not None


def _split(sql: str) -> Sequence[Statement]:
    from pgbg_orchestration import statements

    return statements.split(sql) if sql else ()


def _words(statement: Statement) -> list[str]:
    """Return the statement's words, names and symbols outside of parentheses, words in upper case."""
    from pgbg_orchestration.statements.lexer import tokens

    return list(_outside(token.text for token in tokens(statement.text)))


def _outside(texts: Iterator[str]) -> Iterator[str]:
    depth = 0
    for text in texts:
        depth -= text == ")"
        if depth == 0 and text != ")":
            yield text
        depth += text == "("


def _makes_table(words: Sequence[str]) -> bool:
    """Tell whether it is ``select … into``, or a CREATE TABLE AS whose tag tells no more."""
    if words[:1] == ["CREATE"]:
        return "AS" in words
    return words[:1] in (["SELECT"], ["WITH"]) and "INTO" in words


def _target(words: Sequence[str]) -> str | None:
    """Return the table that an INSERT or a COPY … FROM puts rows into; None for any other statement."""
    if words[:1] == ["COPY"]:
        return _name(words[1:]) if "FROM" in words else None
    if words[:1] in (["INSERT"], ["WITH"]) and "INTO" in words:
        return _name(words[words.index("INTO") + 1 :])
    return None


def _was_empty(parts: Sequence[Statement], table: str | None) -> bool:
    """Tell whether the job itself has left the table without a row before its last statement."""
    if table is None:
        return False
    for part in reversed(parts[:-1]):
        words = _words(part)
        if _empties(words, table):
            return True
        if words[:1] == ["TRUNCATE"] or words[:2] == ["DELETE", "FROM"]:
            continue  # another table, or a part of this one
        if words[:1] == [] or words[0] not in HARMLESS or "AS" in words[:8]:
            return False
    return False


def _empties(words: Sequence[str], table: str) -> bool:
    match words:
        case ["TRUNCATE", *rest]:
            names = [word for word in rest if word not in ("TABLE", "ONLY")]
            return table in _names(names)
        case ["DELETE", "FROM", *rest]:
            rest = rest[1:] if rest[:1] == ["ONLY"] else rest
            return not {"WHERE", "USING"}.intersection(rest) and _name(rest) == table
        case ["CREATE", *rest] if "TABLE" in rest[:3] and "EXISTS" not in rest[:5]:
            made = rest[rest.index("TABLE") + 1 :]
            return "AS" not in made and "PARTITION" not in made[:3] and _name(made) == table
        case _:
            return False


def _name(words: Sequence[str]) -> str | None:
    """Return the possibly qualified name that the words begin with."""
    if not words:
        return None
    name, rest = words[0], words[1:]
    while len(rest) > 1 and rest[0] == ".":
        name, rest = f"{name}.{rest[1]}", rest[2:]
    return name


def _names(words: Sequence[str]) -> list[str | None]:
    """Return the names of a list."""
    names: list[str | None] = []
    current: list[str] = []
    for word in [*words, ","]:
        if word == ",":
            names.append(_name(current))
            current = []
        else:
            current.append(word)
    return names
