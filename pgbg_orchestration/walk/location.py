"""Which statement of a job is at work or failed, and where in it: as far as its worker told, parameters left out.

Between the statements of a job its worker tells the number of the one that comes next, in two ways. It raises an INFO,
which is sent whatever ``client_min_messages`` is, needs no privilege that a ``SET ROLE`` of the job's could take away,
and goes into no server's log by default. It waits in the worker's queue until whoever asks why a worker failed reads it
there. And it reports it as its progress, which needs no room in the queue and is seen while it is at work, also by a
supervisor inside the server.
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

MARK = "PB006"
"""The SQLSTATE of such an INFO; it is no error, and nobody else's is told by it."""
MOST = 200  # statements: their marks take half of a queue of the usual size at most
BYTES = 160  # that a mark takes in the queue
SHOWN = 60  # characters of a line, around the place that is pointed at


_PROGRESS = re.compile(r"statement ([0-9]+) of ([0-9]+)")


def numbered(bodies: Sequence[str], *, raised: bool = True, progress_function: str | None = None) -> str:
    """Return statements as one text, each behind the mark that tells its number.

    A mark is a utility statement, and makes the rows of those before it visible, as ``statements.SEPARATOR`` does.

    Parameters
    ----------
    raised:
        Whether it raises it.
    progress_function:
        The extension's function that it reports it with; where the role at work may not call that, it does not.
    """
    of = len(bodies)

    def mark(number: int) -> str:
        info = f"raise info '{number}' using errcode='{MARK}';" if raised else ""
        percent = 100 * (number - 1) // of
        call = f"perform {progress_function}({percent},'{progress_text(number, of)}');" if progress_function else ""
        return f"do $$begin {info}{f'begin {call}exception when others then null;end;' if call else ''}end$$"

    return "\n;".join(f"{mark(number)}\n;{body}" for number, body in enumerate(bodies, 1))


def progress_text(number: int, of: int) -> str:
    """Return what a worker reports as its progress when it comes to a statement."""
    return f"statement {number} of {of}"


def number_in_progress(message: str | None, of: int) -> int | None:
    """Return the number that such a report tells; None for what the job's own SQL reports."""
    found = _PROGRESS.fullmatch(message or "")
    return int(found[1]) if found and int(found[2]) == of and 1 <= int(found[1]) <= of else None


def without_number(error: ErrorFields, of: int) -> tuple[ErrorFields, int | None]:
    """Return an error as a supervisor told it, without the line that tells the statement, and that number."""
    lines = (error.context or "").splitlines()
    number = number_in_progress(lines[-1], of) if lines else None
    return (error, None) if number is None else (replace(error, context="\n".join(lines[:-1]) or None), number)


def is_of_commit(context: str | None) -> bool:
    """Say whether an error came behind the last statement, from its context as the launching session's result has it.

    The worker adds a line to what fails in a statement, and the result the same line to whatever it is.
    """
    lines = (context or "").splitlines()
    return bool(lines) and (len(lines) == 1 or lines[-1] != lines[-2])


def number_of(diag: psycopg.errors.Diagnostic) -> int | None:
    """Return the number that a mark tells; None for what the job's own SQL raises."""
    text = diag.message_primary or ""
    return int(text) if diag.sqlstate == MARK and text.isdecimal() else None


@dataclass(frozen=True, slots=True)
class ErrorPlace:
    """What is known of a failure's place.

    Attributes
    ----------
    position:
        Of the error in the text that was launched, in characters from 1, where the server has one.
    number:
        Of the statement that was told last; None where none was, or the error came at the commit.
    at_commit:
        It came behind the last statement.
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
        What stands in it for each of them, in their order.
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
    """Return where an offset in a statement's body is in the statement, which may stand in there in two parts.

    Parameters
    ----------
    verb_at:
        Where the second part begins.
    """
    for begin, part in ((0, statement), (verb_at, statement[verb_at:]), (0, statement[:verb_at])):
        found = body.find(part) if part else -1
        if 0 <= found <= at <= found + len(part):
            return begin + at - found
    return None


def inside(error: ErrorFields, told: ErrorPlace) -> ErrorFields:
    """Return an error of a statement inside of a function that tells its place there, as psql does."""
    if told.inside is None or error.pointer is not None:
        return error
    text, position = told.inside
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
    seen = f"{head}{before}{line[cut:column]}"
    width = sum(2 if east_asian_width(char) in "WF" else 1 for char in seen)
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
        """Return where an offset in the bound text is in the one that is shown; in a value: where it begins."""
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


async def shown(
    job: Job, parts: Sequence[statements.Statement], conn: AsyncConnection[Any]
) -> list[DisplayText] | None:
    """Return the statements of a job with parameters, its placeholders in them; None where the two cannot be matched.

    Parameters
    ----------
    parts:
        Its statements as they were launched, with the values in.
    conn:
        Which psycopg writes them for.
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
    found: list[DisplayText] = []
    try:
        for text in texts:
            for part in job.split(cursor.mogrify(text, given)):
                cuts = re.split(f"({word}[0-9]+x)", part.text)
                at = [words.index(cut) for cut in cuts[1::2]]
                found.append(
                    DisplayText(tuple(cuts[::2]), tuple(placeholders[n] for n in at), tuple(of[n] for n in at))
                )
    except (psycopg.Error, InvalidJob, LookupError, TypeError, ValueError):
        return None
    matches = len(found) == len(parts) and all(one.bound == part.text for one, part in zip(found, parts, strict=True))
    return found if matches else None
