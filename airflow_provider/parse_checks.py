"""What is refused when a DAG file is parsed: arguments of another operator, and values that no DAG can carry.

A DAG file imports this, so it imports nothing heavy.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from airflow.sdk.definitions.mappedoperator import OperatorPartial

SMALLEST_CARRIED, LARGEST_CARRIED = -(2**63), 2**64 - 1
"""The whole numbers that a DAG can carry: Airflow's processes tell one another of it in MessagePack."""

_HALF = re.compile("[\ud800-\udfff]")

ELSEWHERE: Mapping[str, str] = {
    "conn_id": "here it is postgres_conn_id",
    "autocommit": (
        "a job is one transaction, and a single VACUUM, CREATE INDEX CONCURRENTLY or CALL runs outside of one by "
        "itself; statements that commit one by one are tasks or the jobs of a PgBackgroundBatchOperator"
    ),
    "hook_params": (
        "server settings are settings={…}, what the SQL raises is logged with enable_log_db_messages=True, another "
        "database is database, the connection has libpq options"
    ),
    "requires_result_fetch": "a handler is always called, and without one the SQL runs to its end all the same",
    "retry_on_failure": "retries=0, or retry_policy=SqlStateRetryPolicy({…}) for some errors only",
    "runtime_parameters": "here they are settings",
}
"""Parameters of ``SQLExecuteQueryOperator`` and of the ``PostgresOperator`` before it, and what is in their place."""

OF_THE_HOOK: Mapping[str, str] = {
    "enable_log_db_messages": "here it is enable_log_db_messages, a parameter of the operator",
    "options": 'here they are settings, {"work_mem": "1GB"} for "-c work_mem=1GB"; the connection may have options too',
    "database": "here it is database",
    "schema": "here it is database",
    "cursor": "a handler gets tuples here, and the columns' names in cursor.description",
}
"""What users hand to ``PostgresHook`` by ``hook_params``, and what is in its place."""


def check(kind: type, given: Mapping[str, Any]) -> None:
    """Refuse arguments that an operator cannot take.

    Parameters
    ----------
    kind:
        The operator's class.
    given:
        Its arguments by name; those of ``partial`` and ``expand`` too.

    Raises
    ------
    TypeError
        One of them is a parameter of ``SQLExecuteQueryOperator``, or a value of one, that there is not here: it says
        what there is in its place.
    ValueError
        One of them holds a number, or half of a character, that a DAG cannot carry.
    """
    who = f"{kind.__name__} {given.get('task_id', '')!r}"
    for name in given:
        if name in ELSEWHERE:
            place = _place_of_hook_params(given[name]) if name == "hook_params" else ELSEWHERE[name]
            raise TypeError(f"{who} has no {name!r}, which is SQLExecuteQueryOperator's: {place}")
    if given.get("split_statements", True) is False:
        raise TypeError(
            f"{who} has no split_statements=False: a text is split as psql splits it, and all of its statements run in "
            "one transaction"
        )
    for name, value in given.items():
        if (strange := _not_carried(value, set())) is not None:
            how = "Write it as text or as a Decimal, or compute it when the task runs."
            if isinstance(strange, _Text):
                how = "Write whole characters."
            raise ValueError(f"{who}: {name} holds {strange}, which Airflow cannot carry in a DAG. {how}")


def _place_of_hook_params(given: object) -> str:
    """Return what there is in the place of those parameters of the hook that are given, of all where none is known."""
    each = given if isinstance(given, list | tuple) else [given]  # `expand` has one for each task
    known = [name for name in OF_THE_HOOK if any(isinstance(one, Mapping) and name in one for one in each)]
    return "; ".join(f"{name}: {OF_THE_HOOK[name]}" for name in known) or ELSEWHERE["hook_params"]


class _Text(str):
    """What is strange about a text."""


def _not_carried(value: object, seen: set[int]) -> str | None:
    if isinstance(value, str):
        return _Text("half of a surrogate pair, which is no UTF-8") if _HALF.search(value) else None
    if isinstance(value, int):
        return None if SMALLEST_CARRIED <= value <= LARGEST_CARRIED else "a whole number of more than 64 bits"
    if isinstance(value, float):
        # PostgreSQL, where Airflow keeps its DAGs, knows no JSON with one of these.
        return None if math.isfinite(value) else f"the number {float(value)}"
    if id(value) in seen:
        return None
    if isinstance(value, Mapping):
        # One by one: the `values` of Airflow's `params` are wrapped.
        items: list[object] = [*value, *(value[key] for key in value)]
    elif isinstance(value, list | tuple | set | frozenset):
        items = list(value)
    else:
        return None
    seen.add(id(value))
    return next((found for item in items if (found := _not_carried(item, seen)) is not None), None)


def checked(mapped: OperatorPartial) -> OperatorPartial:
    """Return what ``partial`` made, whose ``expand`` and ``expand_kwargs`` refuse the same as the operator itself."""
    from airflow.sdk.definitions.mappedoperator import OperatorPartial

    class Checked(OperatorPartial):
        __slots__ = ()

        def expand(self, **mapped_kwargs: Any) -> Any:
            check(self.operator_class, {"task_id": self.kwargs.get("task_id"), **mapped_kwargs})
            return super().expand(**mapped_kwargs)

        def expand_kwargs(self, kwargs: Any, *, strict: bool = True) -> Any:
            for given in kwargs if isinstance(kwargs, list | tuple) else ():
                if isinstance(given, Mapping):
                    check(self.operator_class, {"task_id": self.kwargs.get("task_id"), **given})
            return super().expand_kwargs(kwargs, strict=strict)

    mapped.__class__ = Checked
    return mapped
