"""Which statement of a job is at work or failed, and where in it; values of parameters are never shown.

Before each statement the worker tells its number, in two ways:

- It raises an INFO. That is sent whatever ``client_min_messages`` is, needs no privilege that a ``SET ROLE`` of the
  job's could take away, and is not logged by default. It stays in the worker's queue, where it is read after a failure.
- It reports its progress. That takes no room in the queue, and is seen while the worker runs, also by a supervisor.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any
from unicodedata import east_asian_width

import psycopg
from psycopg import AsyncClientCursor, AsyncConnection

from pgbg_orchestration import statements
from pgbg_orchestration.errors import InvalidJob, shorten
from pgbg_orchestration.job import Job
from pgbg_orchestration.outcome import ErrorFields
from pgbg_orchestration.postgres import literals

NUMBER = "PB006"
"""The SQLSTATE of such an INFO, by which it is known from those that the job's SQL raises."""
MOST = 200  # statements: their INFOs take half of a queue of the usual size at most
BYTES = 160  # that such an INFO takes in the queue
SHOWN = 60  # characters of a line, around the place that is pointed at


_PROGRESS = re.compile(r"statement ([0-9]+) of ([0-9]+)")


def numbered(bodies: Sequence[str], *, raised: bool = True, progress_function: str | None = None) -> str:
    """Return statements as one text, each behind a ``DO`` that tells its number.

    The ``DO`` makes the rows of the statements before it visible, as ``statements.SEPARATOR`` does.

    Parameters
    ----------
    raised:
        Whether the number is raised as an INFO.
    progress_function:
        The extension's function by which the number is reported as progress; left out where the role in force may not
        call it. None: it is not reported.
    """
    of = len(bodies)

    def telling_number(number: int) -> str:
        info = f"raise info '{number}' using errcode='{NUMBER}';" if raised else ""
        percent = 100 * (number - 1) // of
        call = f"perform {progress_function}({percent},'{progress_text(number, of)}');" if progress_function else ""
        return f"do $$begin {info}{f'begin {call}exception when others then null;end;' if call else ''}end$$"

    return "\n;".join(f"{telling_number(number)}\n;{body}" for number, body in enumerate(bodies, 1))


def progress_text(number: int, of: int) -> str:
    """Return what a worker reports as its progress when it comes to a statement."""
    return f"statement {number} of {of}"


def number_in_progress(message: str | None, of: int) -> int | None:
    """Return the statement's number in a report of progress; None for what the job's own SQL reports."""
    match = _PROGRESS.fullmatch(message or "")
    return int(match[1]) if match and int(match[2]) == of and 1 <= int(match[1]) <= of else None


def without_number(error: ErrorFields, of: int) -> tuple[ErrorFields, int | None]:
    """Take the line with the statement's number, which a supervisor adds, off an error's context; return both."""
    lines = (error.context or "").splitlines()
    number = number_in_progress(lines[-1], of) if lines else None
    return (error, None) if number is None else (replace(error, context="\n".join(lines[:-1]) or None), number)


def is_of_commit(context: str | None) -> bool:
    """Say whether an error came at the commit, from its context as reading the worker's result gives it.

    The worker adds a line ("background worker, pid …") to an error in a statement, and reading the result adds the same
    line to any error: an error at the commit has it once.
    """
    lines = (context or "").splitlines()
    return bool(lines) and (len(lines) == 1 or lines[-1] != lines[-2])


def number_of(diag: psycopg.errors.Diagnostic) -> int | None:
    """Return the statement's number that an INFO tells; None for what the job's own SQL raises."""
    text = diag.message_primary or ""
    return int(text) if diag.sqlstate == NUMBER and text.isdecimal() else None


@dataclass(frozen=True, slots=True)
class ErrorPlace:
    """What is known of a failure's place.

    Attributes
    ----------
    position:
        Of the error in the text that was launched, in characters from 1; None where the server gives none.
    number:
        Of the statement whose number the worker told last; None where it told none, or the error came at the commit.
    at_commit:
        It came at the commit, after the last statement.
    inside:
        The text of a statement inside of a function, and the position in it, of an error in there.
    """

    position: int | None = None
    number: int | None = None
    at_commit: bool = False
    inside: tuple[str, int] | None = None


def place(text: str, body: str, bodies: Sequence[str], failure: ErrorPlace) -> tuple[int | None, int | None]:
    """Return which statement failed, from 0, and where in its body, as an offset; None for what is not known.

    Parameters
    ----------
    text:
        What was launched.
    body:
        The part of it that the job's statements make.
    bodies:
        The text of each of them in it, in their order.
    """
    if failure.position is not None:
        at = failure.position - 1 - text.rindex(body)
        begin = 0
        for number, part in enumerate(bodies):
            begin = body.index(part, begin)
            if begin <= at <= begin + len(part):
                return number, at - begin
            begin += len(part)
    if len(bodies) == 1:
        return 0, None
    return (failure.number - 1 if failure.number is not None and failure.number <= len(bodies) else None), None


def telling(error: ErrorFields, number: int, of: int, text: str | None, at: int | None) -> ErrorFields:
    """Return an error that tells its place.

    Parameters
    ----------
    number, of:
        Which statement it was, from 0, of how many.
    text, at:
        The statement as it may be shown, and where in it; None where it may not, or is not known.
    """
    if of > 1:
        error = replace(error, statement=f"{number + 1} of {of}")
    if text is None:
        return error
    first = shorten(next((line.strip() for line in text.splitlines() if line.strip()), ""))
    return replace(error, first_line=first, pointer=_pointer(text, at) if at is not None else None)


def offset_in(body: str, statement: str, verb_at: int, at: int) -> int | None:
    """Turn an offset in a statement's body into one in the statement; None where it is in neither.

    A body may hold the statement in two parts, since keeping its rows puts text between them.

    Parameters
    ----------
    verb_at:
        Where the second part of the statement begins.
    """
    for begin, part in ((0, statement), (verb_at, statement[verb_at:]), (0, statement[:verb_at])):
        part_at = body.find(part) if part else -1
        if 0 <= part_at <= at <= part_at + len(part):
            return begin + at - part_at
    return None


def inside(error: ErrorFields, failure: ErrorPlace) -> ErrorFields:
    """Return an error that points to its place within a function's statement, as psql shows it, where it came there."""
    if failure.inside is None or error.pointer is not None:
        return error
    text, position = failure.inside
    return replace(error, pointer=f"{_pointer(text, position - 1)}\nQUERY: {shorten(' '.join(text.split()))}")


def _pointer(text: str, at: int) -> str:
    """Return the line of a text that an offset is in, and a caret below it, as psql shows them."""
    number = text.count("\n", 0, at) + 1
    begin = text.rfind("\n", 0, at) + 1
    line = text[begin:].split("\n", 1)[0].rstrip("\r").replace("\t", " ")
    column = min(at - begin, len(line))
    head = f"LINE {number}: "
    cut = max(0, min(column - SHOWN // 2, len(line) - SHOWN))
    before, after = ("..." if cut else ""), ("..." if cut + SHOWN < len(line) else "")
    left = f"{head}{before}{line[cut:column]}"
    width = sum(2 if east_asian_width(char) in "WF" else 1 for char in left)
    return f"{head}{before}{line[cut : cut + SHOWN]}{after}\n{' ' * width}^"


@dataclass(frozen=True, slots=True)
class DisplayText:
    """A statement with its placeholders in place of the values, and where they stand."""

    pieces: tuple[str, ...]
    placeholders: tuple[str, ...]  # between the pieces
    literals: tuple[str, ...]  # what stands there in the bound text

    @property
    def text(self) -> str:
        """The statement as it was given."""
        return "".join(part for pair in zip(self.pieces, (*self.placeholders, ""), strict=True) for part in pair)

    @property
    def bound(self) -> str:
        """The statement as it was launched."""
        return "".join(part for pair in zip(self.pieces, (*self.literals, ""), strict=True) for part in pair)

    def at(self, offset: int) -> int:
        """Turn an offset in the bound text into one in the shown text; for one in a value, where its placeholder is."""
        shown = 0
        for piece, placeholder, literal in zip(
            self.pieces, (*self.placeholders, ""), (*self.literals, ""), strict=True
        ):
            if offset <= len(piece):
                return shown + offset
            shown, offset = shown + len(piece), offset - len(piece)
            if offset < len(literal):
                return shown
            shown, offset = shown + len(placeholder), offset - len(literal)
        return shown


async def display_texts(
    job: Job, parts: Sequence[statements.Statement], conn: AsyncConnection[Any]
) -> list[DisplayText] | None:
    """Return the statements of a job with its placeholders in them; None where they cannot be told from the values.

    Parameters
    ----------
    parts:
        Its statements as they were launched, with the values in.
    conn:
        The connection that psycopg quotes for.
    """
    texts = [job.sql] if isinstance(job.sql, str) else list(job.sql)
    word = f"pgbg{secrets.token_hex(4)}x"
    values = literals.literals_of(job.parameters or (), texts, job_id=job.id, label=job.label)
    named = isinstance(values, dict)
    of = [*(values.values() if isinstance(values, dict) else values)]
    words = [f"{word}{number}x" for number in range(len(of))]
    given = literals.bound(dict(zip(values, words, strict=True)) if isinstance(values, dict) else words)
    placeholders = [f"%({name})s" if named else "%s" for name in values]
    cursor = AsyncClientCursor(conn)
    literals.register(cursor)
    results: list[DisplayText] = []
    try:
        for text in texts:
            for part in job.split(cursor.mogrify(text, given)):
                cuts = re.split(f"({word}[0-9]+x)", part.text)
                at = [words.index(cut) for cut in cuts[1::2]]
                results.append(
                    DisplayText(tuple(cuts[::2]), tuple(placeholders[n] for n in at), tuple(of[n] for n in at))
                )
    except (psycopg.Error, InvalidJob, LookupError, TypeError, ValueError):
        return None
    return results if [one.bound for one in results] == [part.text for part in parts] else None
