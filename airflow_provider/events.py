"""What a trigger tells its task: one dict, from the outcome or the error of a job, and back.

Airflow logs the dict in full and keeps it in its metadata database, so it carries no SQL, no parameters and no rows.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from .arguments import LARGEST, SMALLEST, shape_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pgbg_orchestration import Event, Outcome
    from pgbg_orchestration.batch import End
    from pgbg_orchestration.errors import PgbgError

COMMITTED = "committed"
FAILED = "failed"
TIMED_OUT = "timed_out"

# A server's CONTEXT quotes the SQL that failed inside a function; `pgbg.jobs` keeps it for those who may see it.
_KEPT_BACK = ("context",)


def of_outcome(outcome: Outcome, arguments: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the event of a job that committed; times are ISO 8601 with their time zone.

    Parameters
    ----------
    outcome:
        Its outcome, of which no rows are told.
    arguments:
        Those of the job. Of one that keeps rows it is told which statements its SQL has, for who reads them.
    """
    event = {"status": COMMITTED, **outcome.to_dict()}
    if arguments is not None and arguments.get("fetch"):
        event["shape"] = shape_of(arguments["sql"])
    return event


def of_error(error: PgbgError) -> dict[str, Any]:
    """Return the event of a job that did not commit."""
    event = error.to_dict()
    if "fields" in event:
        event["fields"] = {name: value for name, value in event["fields"].items() if name not in _KEPT_BACK}
    return {"status": FAILED, **event}


def of_end(end: End, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the event of a job of a batch, however it ended; ``arguments`` as for one that committed."""
    from pgbg_orchestration.errors import PgbgError

    return of_error(end) if isinstance(end, PgbgError) else of_outcome(end, arguments)


def to_error(event: Mapping[str, Any]) -> PgbgError:
    """Return the error that an event tells of, in its own type.

    A task may be resumed by a worker that is a release behind the triggerer: what it does not know is left out.
    """
    from pgbg_orchestration.errors import PgbgError

    return PgbgError.from_dict(event)


def result_of(event: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the XCom value of a committed job's event.

    Raises
    ------
    PgbgError
        The job did not commit: the error that the trigger met, in its own type.
    """
    if event is None:
        from pgbg_orchestration.errors import OutcomeUnknown

        raise OutcomeUnknown(
            "the task was resumed without an event", todo="Clear it: a job that committed is not run again."
        )
    if event.get("status") != COMMITTED:
        raise add_advice(to_error(event))
    return {name: value for name, value in event.items() if name not in ("status", "shape")}


def add_advice(error: PgbgError) -> PgbgError:
    """Add what can be done in Airflow to what the error says."""
    from pgbg_orchestration.errors import ExtensionMissing, ExtensionTooOld

    if isinstance(error, ExtensionMissing | ExtensionTooOld):
        other = "Where it cannot be installed, SQLExecuteQueryOperator runs the SQL in a session of the task's own."
        error.todo = f"{error.todo or ''} {other}".strip()
    return error


LONGEST = 20_000
"""Characters that an event keeps of one text: a server's message may be megabytes, and Airflow stores and logs them."""


def plain(payload: Any) -> Any:
    """Return a payload in which everything can be stored, sent and read back by Airflow, whatever a server told.

    A triggerer that cannot send an event ends, with all triggers of all tasks in it.
    """
    if isinstance(payload, dict):
        return {str(plain(name)): plain(value) for name, value in payload.items()}
    if isinstance(payload, list | tuple):
        return [plain(value) for value in payload]
    if payload is None or isinstance(payload, bool):
        return payload
    if isinstance(payload, int) and SMALLEST <= payload <= LARGEST:
        return int(payload)
    if isinstance(payload, float) and math.isfinite(payload):
        return float(payload)
    # NUL is no character of PostgreSQL's texts, which hold Airflow's metadata, and half a surrogate pair none of UTF-8.
    text = str(payload).replace("\0", "\N{REPLACEMENT CHARACTER}").encode(errors="replace").decode()
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def follow(_event: Event) -> None:
    """Take events of a job's way: the core looks at progress for those who watch, and itself writes each to the log."""
