"""What a job's end looks like: the outcome of a success, the fields of a server's error, events on the way.

What decides is a code here, an enum's member: no text of an error, a cancel or an event is ever compared.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from datetime import datetime
from enum import StrEnum
from typing import Any, Self

from .rows import Results, Rows

WITHHELD = "(withheld: redact_details)"
"""What stands for a server's message that is not to be told; the SQL of the schema has the same text."""


_LEVELS = {"DEBUG": logging.DEBUG, "WARNING": logging.WARNING}


def level_of(severity: str) -> int:
    """Return the level of :mod:`logging` for what SQL raises with a severity of the server's."""
    return _LEVELS.get(severity, logging.INFO)


class Cause(StrEnum):
    """Why a job was cancelled; it stands in the receipt, in a column of its own beside the reason in words."""

    ASKED = "asked"
    """Somebody asked for it: a person, or a program of theirs. Only ``retry_cancelled=True`` takes that back."""
    DEADLINE = "deadline"
    """The job's time was up; its next call takes the mark back by itself."""
    GIVEN_UP = "given up"
    """Another launch of it ended, and one that was lost must not commit any more; taken back like a deadline."""
    SUPERSEDED = "superseded"
    """A newer generation of its series is registered; this is never taken back."""
    INTERRUPTED = "interrupted"
    """Whoever waited for it was ended: a killed task, a terminated run, Ctrl-C."""
    FAILED_BESIDE = "failed beside"
    """Another job of the same batch failed, and one failure was to end all."""
    RUN_GONE = "run gone"
    """The orchestrator's run that it belonged to has ended without it."""

    @property
    def ended_a_try(self) -> bool:
        """Whether it ended one try of the work, and not the work: whoever is let to try again may take it back."""
        return self in OF_A_TRY

    @classmethod
    def known(cls, value: object) -> Cause | None:
        """Return the cause of that value; None for none, and for one of a newer version."""
        if value is None:  # of nearly every job, and thousands are read at once
            return None
        return cls(value) if value in {each.value for each in cls} else None


OF_A_TRY = frozenset({Cause.INTERRUPTED, Cause.FAILED_BESIDE, Cause.RUN_GONE})
"""Causes that ended one try of the work. A person's cancel is none of them."""


@dataclass(frozen=True, slots=True)
class ErrorFields:
    """The fields of a PostgreSQL error, as ``error_info`` of pg_background gives them.

    Names of objects are known on pg_background 2.0 only. See the PostgreSQL manual, 54.8 "Error and Notice
    Message Fields". The last three say where the error was, as far as that is known: which statement of the job
    (``3 of 7``), its first line, and the line with a caret below the place, as psql shows it. Placeholders stand for
    parameters there.
    """

    sqlstate: str | None = None
    message: str | None = None
    detail: str | None = None
    hint: str | None = None
    context: str | None = None
    schema_name: str | None = None
    table_name: str | None = None
    column_name: str | None = None
    constraint_name: str | None = None
    statement: str | None = None
    first_line: str | None = None
    pointer: str | None = None

    def lines(self) -> list[str]:
        """Return one line for each known field, SQLSTATE first, as psql shows them."""
        names = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in PLACE}
        head = f"SQLSTATE {names.pop('sqlstate')}: {names.pop('message')}"
        lines = [f"{name.replace('_', ' ').upper()}: {value}" for name, value in names.items() if value]
        return [head, *lines, *self.place()]

    def place(self) -> list[str]:
        """Return the lines that tell where the error was."""
        if self.statement == AT_COMMIT:
            return ["AT THE COMMIT, behind the last statement"]
        lines = [f"STATEMENT{f' {self.statement}' if self.statement else ''}: {self.first_line or ''}".rstrip(": ")]
        pointer = self.pointer.splitlines() if self.pointer else []
        return [*(lines if self.statement or self.first_line else []), *pointer]

    def as_history(self) -> ErrorFields:
        """Return the fields as the history keeps them: the place is part of the context."""
        context = "\n".join([*([self.context] if self.context else []), *self.place()])
        return replace(self, context=context or None, statement=None, first_line=None, pointer=None)

    def to_dict(self) -> dict[str, str]:
        """Return the known fields, by their names."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> ErrorFields:
        """Return the fields that ``given`` has; other entries are left out."""
        return cls(**{f.name: given[f.name] for f in fields(cls) if given.get(f.name) is not None})

    def redacted(self) -> ErrorFields:
        """Return what can hold no data: the SQLSTATE, names of schema, table, column and constraint, a number."""
        return replace(self, message=WITHHELD, detail=None, hint=None, context=None, first_line=None, pointer=None)


PLACE = ("statement", "first_line", "pointer")
AT_COMMIT = "the commit"
"""What ``statement`` names where a job of several failed behind the last of them."""
NO_FIELDS = ErrorFields()


@dataclass(frozen=True, slots=True)
class Outcome(Results):
    """How a job that committed ended.

    Attributes
    ----------
    job_id, label:
        The job, and what a person sees on its worker.
    row_count:
        Rows of the job's last statement; None when the worker's report was lost (the commit is proven all the same).
    command_tag:
        Command tag of the last statement, such as ``INSERT``; None like ``row_count``.
    started_at, finished_at:
        When the worker began its work and when its end was known; with time zone.
    worker_pid:
        Process id of the worker that committed.
    attempt:
        Which launch of the job committed, from 1.
    launched:
        False when the work had been done, or was started, by somebody else.
    proof:
        ``receipt``, ``result`` (read to its end) or ``verify_sql``.
    results:
        The rows of the job's statements, where it was asked for them (``Job.fetch``) and they give any. ``rows``,
        ``columns``, ``as_dicts()`` and the rest are about the last of them.
    """

    job_id: str
    label: str
    row_count: int | None = None
    command_tag: str | None = None
    started_at: datetime | None = None
    finished_at: datetime | None = None
    worker_pid: int | None = None
    attempt: int | None = None
    launched: bool = True
    proof: str = "receipt"
    results: tuple[Rows, ...] = field(default=(), repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Return the outcome as plain data that JSON can carry; moments are ISO 8601 with their time zone.

        Rows stay where they are, in the server: :meth:`pgbg_orchestration.Launcher.rows` reads them again.
        """
        values = {f.name: getattr(self, f.name) for f in fields(Outcome) if f.name != "results"}
        return {name: value.isoformat() if isinstance(value, datetime) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> Self:
        """Return the outcome that :meth:`to_dict` told of; entries that this version does not know are left out."""
        values = {f.name: given[f.name] for f in fields(Outcome) if f.name in given and f.name != "results"}
        for name in ("started_at", "finished_at"):
            if isinstance(values.get(name), str):
                values[name] = datetime.fromisoformat(values[name])
        return cls(**values)


class EventKind(StrEnum):
    """What an event of a job's way tells; docs/python.md has the list."""

    meaning: str

    def __new__(cls, value: str, meaning: str = "") -> Self:
        """Make a member of its value and of what it means to a reader."""
        member = str.__new__(cls, value)
        member._value_ = value
        member.meaning = meaning
        return member

    WAITING_FOR_SLOT = "waiting_for_slot", "no worker slot is free; it is launched as soon as one is"
    LAUNCHED = "launched", "its worker was launched (`pid`; of a supervised job `at_work` tells it)"
    AT_WORK = "at_work", "the worker of a supervised job is at work (`pid`)"
    ATTACHED = "attached", "a worker that somebody else launched is at it, and is waited for (`pid`)"
    PROGRESS = (
        "progress",
        (
            "how far it is: what its SQL reports, or a command that the server tells of (`percent`); "
            "with `notices=True` also which `statement` of how many (`of`)"
        ),
    )
    BLOCKED = "blocked", "its worker waits for a lock of other sessions (`blockers`), or for a standby"
    NOTICE = "notice", "what its SQL raised (`severity`, `sqlstate`, `detail`, `hint`); with `notices=True`"
    WAITING_FOR_SERIES = "waiting_for_series", "another job of its series is at work, and is waited for (`pid`)"
    CANCELLING_OLDER = "cancelling_older", "the worker of an older generation is being cancelled (`pid`)"
    OUTPUT_BLOCKED = "output_blocked", "the worker's output is full and nobody reads it: it is dropped"
    SESSION_LOST = "session_lost", "the session that launched it is lost; it is followed by its lock and receipt"
    CANCELLING = "cancelling", "its worker is being cancelled (`pid`)"
    FOUND_FAILED = "found_failed", "its last launch had failed when nobody was there to be told"
    DROPPED_INVALID_INDEX = "dropped_invalid_index", "an invalid index that an earlier build left was dropped"
    COMMITTED = "committed", "it is committed (`pid`)"
    LET_GO = (
        "let_go",
        "its caller was interrupted, and how it ended is decided (`outcome` or `error`, as `to_dict` tells them)",
    )


@dataclass(frozen=True, slots=True)
class Event:
    """Something a person who watches a job wants to know.

    Attributes
    ----------
    kind:
        Which; :class:`EventKind` has all of them.
    message:
        For people.
    job_id, label:
        The job, and what a person sees on its worker.
    data:
        What the kind brings along, as :class:`EventKind` says.
    """

    kind: EventKind
    message: str
    job_id: str
    label: str
    data: dict[str, Any] = field(default_factory=dict)
