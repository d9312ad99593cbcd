"""What a task's job is made of: the operator's attributes, in a form of our own that travels as one text.

Airflow stores a trigger's arguments by a serialiser that changes some values and cannot read others back (3.3.2: a
Decimal loses digits, a far date its microseconds; one value that it cannot read ends the triggerer with every trigger
in it). So it gets nothing of a user's but text: a job as JSON, in which each parameter is an SQL literal.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .identity import Identity

SQL_OPTIONS = (
    "settings", "role", "isolation", "kind", "queue_size", "verify_sql", "drop_invalid_index",
    "redact_details", "fetch",
)  # fmt: skip
"""The names of :data:`pgbg_orchestration.job.SQL_OPTIONS`, again, since a DAG file does not import the core."""

JOB_FIELDS = ("sql", "parameters", "worker_label", *SQL_OPTIONS)
"""Attributes that say what is to be run: of the operator and, so that Airflow renders them, of the start trigger."""

LEAD = timedelta(seconds=5)
"""How much later than the deadline of a job that began in the triggerer Airflow's own timeout comes.

Airflow's timeout ends the trigger at once: no ``on_kill``, no outcome of the job's, and its worker left at work.
"""

SMALLEST, LARGEST = -(2**63), 2**63 - 1
"""The whole numbers that everything which Airflow stores and sends can hold."""


_HALF = re.compile("[\ud800-\udfff]")
"""Half of a surrogate pair: no text in UTF-8."""


def job_arguments(given: Any, identity: Identity, ti: Any) -> dict[str, Any]:
    """Return the arguments of a task's job, as :func:`job_of` and :func:`pack` take them.

    Parameters
    ----------
    given:
        The operator or trigger whose attributes say what is to be run.
    identity:
        Which job it is.
    ti:
        What has ``dag_id`` and ``task_id``, for a label where none is given.

    Raises
    ------
    InvalidJob
        A parameter cannot be written as SQL.
    """
    label = label_of(given, identity, ti)
    return {
        "sql": given.sql if isinstance(given.sql, str) else list(given.sql),
        "literals": literals_of(given, identity.job_id, label),
        "id": identity.job_id,
        "series": identity.series,
        "generation": identity.generation,
        "label": label,
        **{name: getattr(given, name) for name in SQL_OPTIONS},
        "settings": settings_of(given.settings),
        "fetch": fetch_of(given.fetch),
    }


def fetch_of(given: Any) -> dict[str, Any] | None:
    """Return how many rows a job keeps as plain data, or None for a job that keeps none.

    Raises
    ------
    ValueError
        It is nothing that :class:`pgbg_orchestration.Job` takes.
    """
    if given is None or given is False:
        return None
    from pgbg_orchestration import Fetch

    fetch = Fetch.of(given)
    return None if fetch is None else fetch.to_dict()


def shape_of(sql: str | Sequence[str]) -> dict[str, Any]:
    """Return whether SQL is a list, and the numbers of its statements.

    ``ends``: of the last statement of each item, or of each statement of a text. ``gives``: of those that give rows.

    Raises
    ------
    ValueError
        A string, comment or quoted identifier does not end.
    """
    from pgbg_orchestration import statements
    from pgbg_orchestration.statements.row_source import row_source

    items = [statements.split(item) for item in ([sql] if isinstance(sql, str) else sql)]
    counts = [len(parts) for parts in items]
    every = [part for parts in items for part in parts]
    gives = [number for number, part in enumerate(every, 1) if row_source(part) is not None]
    if isinstance(sql, str):
        return {"listed": False, "ends": list(range(1, len(every) + 1)), "gives": gives}
    ends = [sum(counts[: at + 1]) if count else 0 for at, count in enumerate(counts)]
    return {"listed": True, "ends": ends, "gives": gives}


def literals_of(given: Any, job_id: str | None, label: str | None) -> Any:
    """Return the SQL literals of a job's parameters, or None where there are none.

    Raises
    ------
    InvalidJob
        One of them cannot be written as SQL, or they are no sequence and no mapping.
    """
    from pgbg_orchestration import Job
    from pgbg_orchestration.postgres import literals

    # The job knows what parameters are.
    checked = Job("select 1", id=job_id, label=label, parameters=given.parameters).parameters
    return None if checked is None else literals.literals_of(checked, given.sql, job_id=job_id, label=label)


def settings_of(given: Any) -> Any:
    """Return a job's settings as texts, which the job checks."""
    if not isinstance(given, Mapping):
        return given or None
    return {name: _setting(value) for name, value in given.items()} or None


def _setting(value: object) -> object:
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, int | float) else value


def job_of(arguments: Mapping[str, Any]) -> Any:
    """Return the job of these arguments.

    Raises
    ------
    InvalidJob
        It cannot be run.
    TypeError
        Another version of this package stored them.
    """
    from pgbg_orchestration import Job
    from pgbg_orchestration.postgres import literals

    named = dict(arguments)
    texts = named.pop("literals", None)
    if texts is not None:
        named["parameters"] = literals.bound(texts)
    return Job(**named)


def pack(name: str, value: Any) -> str:
    """Return what a trigger carries, as one text.

    Parameters
    ----------
    name:
        What it is, for an error.
    value:
        Texts, numbers, booleans, None, and lists and dicts of them.

    Raises
    ------
    InvalidJob
        It does not come back as it is.
    """
    from pgbg_orchestration.errors import InvalidJob

    try:
        text = json.dumps(value)
        same = unpacked(text) == value
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidJob(f"the {name} of a trigger cannot be stored: {error}") from error
    if not same:
        raise InvalidJob(f"the {name} of a trigger cannot be stored: it would come back as something else")
    return text


def unpacked(stored: Any) -> Any:
    """Return what :func:`pack` was given; a row of a release before it holds the value itself."""
    return json.loads(stored) if isinstance(stored, str) else stored


def moment(stored: datetime | str | None) -> datetime | None:
    """Return a deadline as it was; triggers carry its text, in which no digit is lost."""
    return datetime.fromisoformat(stored) if isinstance(stored, str) else stored


def not_plain(value: object) -> str | None:
    """Return what about a value nothing that Airflow stores or sends can hold as it is, or None.

    Texts, booleans, None, finite numbers of 64 bits, and lists of them are plain.
    """
    if value is None or type(value) is bool:
        return None
    if type(value) is str:
        return "a text that cannot be stored as UTF-8" if "\0" in value or _HALF.search(value) else None
    if type(value) is int:
        return None if SMALLEST <= value <= LARGEST else "a whole number of more than 64 bits with its sign"
    if type(value) is float:
        return None if math.isfinite(value) else f"{value}"
    if type(value) is list:
        return next((found for item in value if (found := not_plain(item))), None)
    return f"a {type(value).__name__}"


def label_of(given: Any, identity: Identity, ti: Any, member: str = "") -> str:
    """Return the label of a task's job: the one that is given, else the DAG's and the task's id and the map index.

    Parameters
    ----------
    given, identity, ti:
        As :func:`job_arguments` takes them.
    member:
        Name of the job in its batch; it stands at the end.
    """
    from pgbg_orchestration.labels import shorten_label

    mapped = "" if identity.map_index is None else f"[{identity.map_index}]"
    label: str = given.worker_label or f"{ti.dag_id}.{ti.task_id}{mapped}"
    if member:
        label = f"{label}.{member}"
    elif given.worker_label:
        return label  # as the user wants it, or an error that says how long it may be
    return shorten_label(label)
