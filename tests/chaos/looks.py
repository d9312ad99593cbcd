"""What the models' launchers see, in the very form that the walk sees it. Cached: there is little that can be seen."""

from __future__ import annotations

from datetime import UTC, datetime
from functools import cache
from typing import TypeAlias

from pgbg_orchestration.ledger.sighting import Registration, Sighting
from pgbg_orchestration.outcome import Cause, ErrorFields
from pgbg_orchestration.postgres.pg_background import ResultInfo

NOW = datetime(2013, 1, 1, tzinfo=UTC)
"""The only moment there is: the models know an order of steps, and no time."""


Report: TypeAlias = tuple[ResultInfo, ErrorFields | None]


@cache
def info(sqlstate: str | None = None, tag: str | None = None, *, failed: bool = False) -> Report:
    """What the handle of an ended worker tells."""
    return ResultInfo(True, failed, None, tag), ErrorFields(sqlstate) if failed else None


@cache
def registration(verdict: str, generation: int, attempt: int = 1) -> Registration:
    """What comes of registering a launch."""
    return Registration(verdict, generation, generation, attempt, False)


@cache
def sighting(
    *,
    generation: int = 1,
    holder: int | None = None,
    status: str | None = None,
    cause: str | None = None,
    attempt: int | None = None,
    newest: int | None = None,
    marked: bool = False,
    may_begin: bool = False,
    failed: bool = False,
    reported: bool = True,
) -> Sighting:
    """What a look shows to a job of that generation; ``holder`` is the generation of the job that holds the lock."""
    return Sighting(
        looked_at=NOW,
        holder_pid=None if holder is None else 1,
        holder_user=None if holder is None else "app",
        holder_is_owner=True,
        holder_job=None if holder is None else f"#{holder}",
        holder_generation=holder,
        holds_this_job=holder == generation,
        marked_pid=2 if marked else None,
        may_begin=may_begin,
        wait_event=None,
        status=status,
        receipt_attempt=attempt,
        receipt_pid=None,
        receipt_started_at=None,
        cause=Cause.known(cause),
        of_try=None,
        reason=None,
        decided_by=None,
        decided_at=None if status is None else NOW,
        newest=newest,
        generation=generation,
        attempt=attempt,
        sql_digest=b"",
        outcome="failed" if failed else None,
        ended_at=NOW if failed else None,
        reported_at=NOW if reported else None,
        row_count=None,
        command_tag=None,
        error=ErrorFields(),
    )
