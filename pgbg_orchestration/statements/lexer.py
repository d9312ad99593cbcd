"""PostgreSQL's lexical rules, as far as finding the ends of statements needs them.

Source of every rule: ``src/backend/parser/scan.l`` (``src/fe_utils/psqlscan.l`` mirrors it) with
``standard_conforming_strings = on``; the manual tells them in "Lexical Structure". The launching session has to set
that to ``on``: with ``off`` the server reads backslashes in plain strings otherwise than this module does.

Two readers share the rules. `skip_run` leaps over whatever cannot end a statement, which keeps 20 MB of SQL bearable;
`tokens` names each token, for the few places where words matter.
"""

import re
from collections.abc import Iterator
from enum import Enum
from typing import NamedTuple

__all__ = ["Token", "TokenKind", "UnterminatedSql", "leading_words", "skip_blank", "skip_opaque", "skip_run", "tokens"]

# Any character above 0x7f is a letter (`ident_start` in scan.l): U+00A0 is part of an identifier and no blank.
_LETTER = r"A-Za-z_\x80-\U0010ffff"
# An `e` starts an escape string only as a token of its own: in `ne'\'` it ends the identifier ne.
_WORD = rf"(?![eE]')[{_LETTER}][{_LETTER}0-9$]*+"
_BLANK = r"[ \t\n\r\f\v]++|--[^\n\r]*+"
# B'', X'', N'' and U&'' end where a plain string ends, so their prefixes need no rule of their own.
# Those with a doubled quote in them are left to `_end_of_quoted`.
_STRING = r"'[^']*+'(?!')"
_NAME = r'"[^"]*+"(?!")'
_TAG_AFTER_DOLLAR = rf"(?:[{_LETTER}][{_LETTER}0-9]*+)?\$"

# Bounded, since a plain `*` keeps a frame for each repetition, gigabytes of them for a long dump. Not possessive: up to
# Python 3.11.4 (Debian 12 has 3.11.2) a possessive group keeps what its last, failed repetition had read (gh-106052).
_SOME = "{1,500}"
_RUN = re.compile(
    rf"(?:[^{_LETTER}'\"$;()/\-]++|{_WORD}|{_STRING}|--[^\n\r]*+|-|{_NAME}|/(?!\*)|\$(?!{_TAG_AFTER_DOLLAR})){_SOME}"
)
_BLANKS = re.compile(rf"(?:{_BLANK}){_SOME}")
_WORD_TOKEN = re.compile(_WORD)
# Before 15 a number ended where its digits end (1e'\'' was 1 and an escape string); since then what follows them
# directly is part of it or an error. So 1_000 may be read as 1 and _000 here: no statement ends otherwise for it.
_NUMBER_TOKEN = re.compile(r"\$?[0-9]+")
_DOLLAR_TAG = re.compile(rf"\${_TAG_AFTER_DOLLAR}")
_COMMENT_MARK = re.compile(r"/\*|\*/")
# Inside of an escape string: a quote that is doubled, or behind a backslash, does not end it.
_ESCAPED = re.compile(rf"(?:[^'\\]+|\\.|''){_SOME}", re.DOTALL)
# `quotecontinue` in scan.l: the next segment of E'a' <newline> 'b\'' is read with backslash escapes too.
_CONTINUATION = re.compile(r"(?:[ \t\f\v]++|--[^\n\r]*+)*[\n\r](?:[ \t\n\r\f\v]++|--[^\n\r]*+[\n\r])*(?=')")


class UnterminatedSql(ValueError):
    """A string, a quoted identifier or a comment in the SQL is never closed.

    Attributes
    ----------
    what:
        What is open, for example ``string``.
    line:
        The line in which it starts, counted from 1.
    position:
        The offset in the SQL, in characters, at which it starts.
    """

    def __init__(self, what: str, line: int, position: int) -> None:
        super().__init__(f"the {what} that starts in line {line} of the SQL is never closed")
        self.what = what
        self.line = line
        self.position = position

    def __reduce__(self) -> tuple[type["UnterminatedSql"], tuple[str, int, int]]:
        """Make it travel between processes: by default an exception is rebuilt from its message alone."""
        return type(self), (self.what, self.line, self.position)


class TokenKind(Enum):
    """What a token is, as far as classifying statements needs it."""

    WORD = "word"
    """An unquoted identifier or a keyword."""
    NAME = "name"
    """A quoted identifier."""
    STRING = "string"
    """A string constant of any spelling, dollar quotes included."""
    NUMBER = "number"
    """A run of digits, or a parameter such as $1."""
    SYMBOL = "symbol"
    """Any other single character."""


class Token(NamedTuple):
    """One token: its kind, its text (words in upper case) and where it stands in the SQL."""

    kind: TokenKind
    text: str
    start: int
    end: int


def skip_blank(sql: str, position: int) -> int:
    """Return the offset of the first token at or after ``position``; blanks and comments are skipped.

    Raises
    ------
    UnterminatedSql
        A comment is never closed.
    """
    while True:
        if match := _BLANKS.match(sql, position):
            position = match.end()
        elif sql.startswith("/*", position):
            position = _end_of_comment(sql, position)
        else:
            return position


def skip_run(sql: str, position: int) -> int:
    """Return the offset of the next character that needs a decision, or the length of ``sql``.

    Such a character is a semicolon, a parenthesis, or the start of something that `skip_opaque` reads.
    """
    while match := _RUN.match(sql, position):
        position = match.end()
    return position


def skip_opaque(sql: str, position: int) -> int:
    """Return the end of the string, quoted identifier or block comment that starts at ``position``.

    Returns ``position`` itself where none of these starts.

    Raises
    ------
    UnterminatedSql
        It is never closed.
    """
    match sql[position : position + 1]:
        case "'":
            return _end_of_quoted(sql, position, "string")
        case '"':
            return _end_of_quoted(sql, position, "quoted identifier")
        case "e" | "E" if sql.startswith("'", position + 1):
            return _end_of_escape_string(sql, position)
        case "$" if tag := _DOLLAR_TAG.match(sql, position):
            end = sql.find(tag.group(), tag.end())
            if end < 0:
                raise _unterminated(f"dollar-quoted string {tag.group()}", sql, position)
            return end + len(tag.group())
        case "/" if sql.startswith("*", position + 1):
            return _end_of_comment(sql, position)
        case _:
            return position


def leading_words(sql: str, position: int, limit: int) -> tuple[tuple[str, ...], int]:
    """Return the unquoted words from ``position`` on, in upper case and ``limit`` at most, and the end of the last.

    Raises
    ------
    UnterminatedSql
        A comment between them is never closed.
    """
    words: list[str] = []
    end = position
    while len(words) < limit and (match := _WORD_TOKEN.match(sql, skip_blank(sql, position))):
        words.append(_fold(match.group()))
        position = end = match.end()
    return tuple(words), end


def tokens(sql: str, position: int = 0) -> Iterator[Token]:
    """Yield the tokens of ``sql`` from ``position`` on, without blanks and comments.

    Raises
    ------
    UnterminatedSql
        A string, a quoted identifier or a comment is never closed.
    """
    while (position := skip_blank(sql, position)) < len(sql):
        start = position
        if word := _WORD_TOKEN.match(sql, start):
            position = word.end()
            yield Token(TokenKind.WORD, _fold(word.group()), start, position)
        elif number := _NUMBER_TOKEN.match(sql, start):
            position = number.end()
            yield Token(TokenKind.NUMBER, number.group(), start, position)
        elif (position := skip_opaque(sql, start)) > start:
            kind = TokenKind.NAME if sql[start] == '"' else TokenKind.STRING
            yield Token(kind, sql[start:position], start, position)
        else:
            position = start + 1
            yield Token(TokenKind.SYMBOL, sql[start], start, position)


def _fold(word: str) -> str:
    # PostgreSQL folds keywords in ASCII only; `upper` would make the keyword INSERT of one with a dotless i.
    return word.upper() if word.isascii() else word


def _end_of_quoted(sql: str, position: int, what: str) -> int:
    """Return the end of the string or identifier whose quote is at ``position``; a doubled quote is part of it."""
    quote, at = sql[position], position
    while (at := sql.find(quote, at + 1)) >= 0:
        if not sql.startswith(quote, at + 1):
            return at + 1
        at += 1
    raise _unterminated(what, sql, position)


def _end_of_escape_string(sql: str, position: int) -> int:
    at = position + 2
    while True:
        while inside := _ESCAPED.match(sql, at):
            at = inside.end()
        if not sql.startswith("'", at):
            raise _unterminated("string with escapes (E'…')", sql, position)
        if not (continuation := _CONTINUATION.match(sql, at + 1)):
            return at + 1
        at = continuation.end() + 1


def _end_of_comment(sql: str, position: int) -> int:
    """Return the end of the block comment at ``position``; unlike in C, comments nest."""
    depth = 0
    for mark in _COMMENT_MARK.finditer(sql, position):
        depth += 1 if mark.group() == "/*" else -1
        if depth == 0:
            return mark.end()
    raise _unterminated("comment", sql, position)


def _unterminated(what: str, sql: str, position: int) -> UnterminatedSql:
    return UnterminatedSql(what, sql.count("\n", 0, position) + 1, position)
