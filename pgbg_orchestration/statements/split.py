"""Splits SQL text into its statements where the server itself would, and joins statements for one launch.

The rules for semicolons that do not end a statement are the grammar's (``src/backend/parser/gram.y``): those in
parentheses (``CREATE RULE … DO (…; …)``) and those in the ``BEGIN ATOMIC … END`` body of a function or procedure.
psql guesses the latter from the words BEGIN, CASE and END alone; this module goes by their places, and so also reads
an identifier ``begin`` or a column label ``end`` rightly.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from .files import BYTE_ORDER_MARK
from .lexer import TokenKind, leading_words, skip_blank, skip_opaque, skip_run, tokens

__all__ = ["SEPARATOR", "Statement", "join", "split"]

# Statements of one launch do not see each other's rows unless a utility statement stands between them (PG_BACKGROUND,
# Transactions). On lines of its own, or a trailing -- comment would swallow it; without quotes, so that no string in
# the statements can either.
SEPARATOR = "\n;set local pgbg.step to default\n;"

_SPACE = " \t\n\r\f\v"
_LEADING_WORDS = 8
_ATOMIC = re.compile("atomic", re.IGNORECASE)
_ROUTINE = ("FUNCTION", "PROCEDURE")


@dataclass(frozen=True, slots=True)
class Statement:
    """One statement of an SQL text.

    Attributes
    ----------
    text:
        The exact text from the first to the last character that is no blank, comments before and after
        included, without the semicolon that ends it.
    keywords:
        The unquoted words that it begins with, in upper case, eight at most:
        ``("CREATE", "UNIQUE", "INDEX", "CONCURRENTLY", "I", "ON", "T")``. Names are among them, as here.
    line:
        The line of its first word in the SQL text, counted from 1.
    position:
        The offset of ``text`` in the SQL text, in characters.
    """

    text: str
    keywords: tuple[str, ...]
    line: int
    position: int


def split(sql: str) -> tuple[Statement, ...]:
    """Split SQL text into its statements; empty ones and those of only comments are left out.

    A byte-order mark before a statement is a blank.

    Text that PostgreSQL cannot parse is split as far as its quotes and parentheses tell; the server then names the
    error.

    Parameters
    ----------
    sql:
        Any number of statements with semicolons between them.

    Returns
    -------
    The statements in their order; none for a text without statements.

    Raises
    ------
    UnterminatedSql
        A string, a quoted identifier or a comment is never closed.
    """
    statements: list[Statement] = []
    line, counted, position = 1, 0, 0
    while (head := skip_blank(sql, position)) < len(sql):
        if sql[head] == ";":
            position = head + 1
            continue
        if sql[head] == BYTE_ORDER_MARK:
            # Of a file that was included or appended. No statement can begin with it: it is a letter to the server.
            sql = f"{sql[:head]} {sql[head + 1 :]}"
            continue
        keywords, after = leading_words(sql, head, _LEADING_WORDS)
        end = _end_of_statement(sql, after)
        if _creates_routine(keywords) and _ATOMIC.search(sql, after, end):
            end = _end_of_routine(sql, head)
        line, counted = line + sql.count("\n", counted, head), head
        # Comments before the statement are kept: planner hints (pg_hint_plan) live in them.
        text = sql[position:end]
        start = position + len(text) - len(text.lstrip(_SPACE))
        statements.append(Statement(text.strip(_SPACE), keywords, line, start))
        position = end + 1
    return tuple(statements)


def join(statements: Iterable[Statement]) -> str:
    """Join statements into the text of one launch, in which each sees the rows of those before it.

    Parameters
    ----------
    statements:
        The statements, from `split`.

    Returns
    -------
    Their texts with `SEPARATOR` between them.
    """
    return SEPARATOR.join(statement.text for statement in statements)


def _creates_routine(keywords: tuple[str, ...] | list[str]) -> bool:
    match tuple(keywords[:4]):
        case ("CREATE", "OR", "REPLACE", what) | ("CREATE", what, *_):
            return what in _ROUTINE
        case _:
            return False


def _end_of_statement(sql: str, position: int) -> int:
    """Return the offset of the semicolon that ends the statement, or the length of ``sql``."""
    depth = 0
    while (position := skip_run(sql, position)) < len(sql):
        match sql[position]:
            case "(":
                depth += 1
            case ")":
                depth = max(depth - 1, 0)
            case ";":
                if depth == 0:
                    return position
            case _:
                position = skip_opaque(sql, position)
                continue
        position += 1
    return position


def _end_of_routine(sql: str, position: int) -> int:
    """Do what `_end_of_statement` does for CREATE FUNCTION and CREATE PROCEDURE.

    A body opens with BEGIN directly before ATOMIC, and closes with END as the first word of a statement in it: END is
    reserved, elsewhere it can only close a CASE or be a label. Bodies nest in the grammar, so they are counted.
    """
    depth = bodies = 0
    # The words that the innermost statement begins with; no more are added once another token came.
    lead: list[str] = []
    open_lead = True
    previous = ""
    for token in tokens(sql, position):
        word = token.text if token.kind is TokenKind.WORD else ""
        if token.kind is TokenKind.SYMBOL and token.text in "();":
            if token.text == "(":
                depth += 1
            elif token.text == ")":
                depth = max(depth - 1, 0)
            elif depth == 0 and bodies == 0:
                return token.start
            elif depth == 0:
                lead, open_lead, previous = [], True, ""
                continue
        elif depth == 0 and word == "ATOMIC" and previous == "BEGIN" and _creates_routine(lead):
            bodies += 1
            lead, open_lead, previous = [], True, ""
            continue
        elif depth == 0 and word == "END" and open_lead and not lead and bodies:
            bodies -= 1
        if word and open_lead and len(lead) < _LEADING_WORDS:
            lead.append(word)
        else:
            open_lead = False
        previous = word
    return len(sql)
