"""What a job's end looks like: the outcome of a success, the fields of a server's error, events on the way."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from datetime import datetime
from typing import Any

WITHHELD = "(withheld: redact_details)"
"""What stands for a server's message that is not to be told; the SQL of the schema has the same text."""


@dataclass(frozen=True, slots=True)
class ErrorFields:
    """The fields of a PostgreSQL error, as ``error_info`` of pg_background gives them.

    The last four are known on pg_background 2.0 only. See the PostgreSQL manual, 54.8 "Error and Notice
    Message Fields".
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

    def lines(self) -> list[str]:
        """Return one line for each known field, SQLSTATE first, as psql shows them."""
        names = {f.name: getattr(self, f.name) for f in fields(self)}
        head = f"SQLSTATE {names.pop('sqlstate')}: {names.pop('message')}"
        return [head, *(f"{name.replace('_', ' ').upper()}: {value}" for name, value in names.items() if value)]

    def redacted(self) -> ErrorFields:
        """Return what can hold no data: the SQLSTATE, and the names of schema, table, column and constraint."""
        return replace(self, message=WITHHELD, detail=None, hint=None, context=None)


NO_FIELDS = ErrorFields()


@dataclass(frozen=True, slots=True)
class Outcome:
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


@dataclass(frozen=True, slots=True)
class Event:
    """Something a person who watches a job wants to know.

    ``kind`` is one of ``waiting_for_slot``, ``launched``, ``attached``, ``progress``, ``waiting_for_series``,
    ``output_blocked``, ``session_lost``, ``server_unreachable``, ``cancelling``, ``found_failed``,
    ``dropped_invalid_index``, ``committed``.
    """

    kind: str
    message: str
    job_id: str
    label: str
    data: dict[str, Any] = field(default_factory=dict)
