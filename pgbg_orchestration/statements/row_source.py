"""Which statements give rows, and how one is put into another that keeps them.

Read off a statement's own words, parentheses counted: only what stands outside of them says what it does.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import islice

from .lexer import TokenKind, tokens
from .split import Statement

__all__ = ["RowSource", "RowSourceKind", "call_source", "row_source", "unkeepable"]

_QUERIES = frozenset({"SELECT", "VALUES", "TABLE"})
_CHANGES = frozenset({"INSERT", "UPDATE", "DELETE", "MERGE"})
_REPORTS = frozenset({"EXPLAIN", "SHOW"})


class RowSourceKind(Enum):
    """How a statement that gives rows can be put into another one."""

    QUERY = "query"
    """In parentheses, as a subquery."""
    QUERY_AT_TOP = "query at top"
    """Where a query may stand at the top only: a WITH of it changes data."""
    CHANGE = "change"
    """As a WITH query of its own: INSERT, UPDATE, DELETE or MERGE with RETURNING."""
    REPORT = "report"
    """By PL/pgSQL's EXECUTE only: EXPLAIN, SHOW and CALL."""


@dataclass(frozen=True, slots=True)
class RowSource:
    """How a statement gives rows.

    Attributes
    ----------
    kind:
        Of which sort it is.
    tag:
        Its command tag.
    verb_at:
        Where the word stands that says what it does: behind its WITH clause, if it has one.
    has_with:
        Whether it has one.
    """

    kind: RowSourceKind
    tag: str
    verb_at: int
    has_with: bool


def row_source(statement: Statement) -> RowSource | None:
    """Return how a statement gives rows; None for one that gives none, or none that can be kept."""
    depth = 0
    verb: tuple[str, int] | None = None
    has_with = changes_inside = returns = into = False
    for token in tokens(statement.text):
        if token.kind is TokenKind.SYMBOL and token.text in "()":
            if verb is None and not has_with and token.text == "(":
                verb = ("SELECT", token.start)  # (select …) union …
            depth = max(depth + (1 if token.text == "(" else -1), 0)
        elif token.kind is not TokenKind.WORD:
            continue
        elif depth:
            changes_inside = changes_inside or (has_with and token.text in _CHANGES)
        elif verb is None:
            if token.text == "WITH":
                has_with = True
            elif token.text in _QUERIES | _CHANGES | _REPORTS:
                verb = (token.text, token.start)
            elif not has_with:
                return None
        else:
            returns = returns or token.text == "RETURNING"
            into = into or token.text == "INTO"
    if verb is None:
        return None
    word, at = verb
    if word in _REPORTS:
        return RowSource(RowSourceKind.REPORT, word, at, has_with)
    if word in _CHANGES:
        return RowSource(RowSourceKind.CHANGE, word, at, has_with) if returns else None
    if word == "SELECT" and into:
        return None
    return RowSource(RowSourceKind.QUERY_AT_TOP if changes_inside else RowSourceKind.QUERY, "SELECT", at, has_with)


def call_source(statement: Statement) -> RowSource | None:
    """Return how a CALL gives the row of its procedure's output, if that has any; None for any other statement."""
    return RowSource(RowSourceKind.REPORT, "CALL", 0, False) if statement.keywords[:1] == ("CALL",) else None


def unkeepable(statement: Statement, before: Sequence[Statement]) -> str | None:
    """Return the word of a statement that gives rows which no other statement can take from it; None for all others.

    Parameters
    ----------
    statement:
        FETCH, or EXECUTE of a prepared statement that gives rows.
    before:
        The statements before it in the job, which PREPARE what it executes.
    """
    word = statement.keywords[0] if statement.keywords else ""
    if word == "FETCH":
        return word
    if word != "EXECUTE":
        return None
    name = _second_name(statement)
    for part in reversed(before):
        if part.keywords[:1] == ("PREPARE",) and _second_name(part) == name:
            return word if row_source(_prepared(part)) is not None else None
    return None  # the server refuses it


def _second_name(statement: Statement) -> str:
    """Return the name behind a statement's first word, as the server reads it."""
    _, token, *_ = *islice(tokens(statement.text), 2), None
    if token is None:
        return ""
    return token.text.lower() if token.kind is TokenKind.WORD else token.text[1:-1].replace('""', '"')


def _prepared(statement: Statement) -> Statement:
    """Return what a PREPARE prepares."""
    at = next((t.end for t in tokens(statement.text) if t.kind is TokenKind.WORD and t.text == "AS"), 0)
    return Statement(statement.text[at:], (), statement.line, statement.position)
