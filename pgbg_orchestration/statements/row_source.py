"""Which statements give rows, and how one is put into another that keeps them.

Read off a statement's own words, parentheses counted: only what stands outside of them says what it does.
"""

from dataclasses import dataclass
from enum import Enum

from .lexer import TokenKind, tokens
from .split import Statement

__all__ = ["RowSource", "RowSourceKind", "row_source"]

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
    """By EXECUTE only: EXPLAIN and SHOW."""


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
