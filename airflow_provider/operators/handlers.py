"""Rows for handlers: what those of ``SQLExecuteQueryOperator`` are called with, and what becomes of their results."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from airflow_provider.hook import PgBackgroundHook
    from pgbg_orchestration import Rows

XCOM_BYTES = 1024 * 1024
"""How large a result may be, as JSON, that becomes an XCom: Airflow keeps it in its metadata database."""

_GIVE_ROWS = ("SELECT", "SHOW", "EXPLAIN", "FETCH")


class RowsCursor:
    """Rows that a job kept, as a cursor of a DB-API driver has them (PEP 249), for a handler to read.

    Parameters
    ----------
    rows:
        Those of one statement; None for one that gives none.

    Attributes
    ----------
    description:
        Seven values of each column, name and type's OID first; None where the statement gives no rows.
    rowcount:
        How many rows the statement gave or changed; -1 where that is not known.
    statusmessage:
        The statement's tag, None where that is not known.
    """

    arraysize = 1

    def __init__(self, rows: Rows | None) -> None:
        self.description: list[tuple[Any, ...]] | None = None
        self.rowcount = -1
        self.statusmessage: str | None = None
        self._left: Iterator[tuple[Any, ...]] = iter(())
        if rows is not None:
            self.description = [(column.name, column.type_oid, *[None] * 5) for column in rows.columns]
            self.rowcount = rows.row_count
            self.statusmessage = rows.command_tag
            self._left = iter(rows.rows)

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        return self._left

    def fetchone(self) -> tuple[Any, ...] | None:
        """Return the next row, or None after the last."""
        return next(self._left, None)

    def fetchmany(self, size: int | None = None) -> list[tuple[Any, ...]]:
        """Return the next ``size`` rows (``arraysize`` by default), or as many as are left."""
        count = self.arraysize if size is None else size
        return [row for _, row in zip(range(count), self._left, strict=False)]

    def fetchall(self) -> list[tuple[Any, ...]]:
        """Return the rows that are left."""
        return list(self._left)

    def close(self) -> None:
        """Do nothing: what is read is read."""


class Handling(NamedTuple):
    """What an operator does with rows, in the words of ``SQLExecuteQueryOperator``.

    Attributes
    ----------
    handler:
        Is called with a cursor for each statement that is asked for, and gives its result.
    output_processor:
        Is called with the results and the descriptions, and gives the results that are returned.
    return_last:
        Whether of a text the result of its last statement alone is wanted.
    show:
        Logs the results, where that is wanted.
    """

    handler: Callable[[Any], Any]
    output_processor: Callable[[list[Any], list[Any]], Any] | None
    return_last: bool
    show: Callable[[str, Any], None] | None


def read_rows(hook: PgBackgroundHook, schema: str, job_ids: Sequence[str]) -> dict[str, tuple[Rows, ...]]:
    """Return the rows that jobs kept, by their ids; none of one that kept none.

    They are read in the task's own process, over a connection of its own, whoever ran the jobs.

    Parameters
    ----------
    hook:
        Says which server.
    schema:
        Where ``pgbg_orchestration`` is installed there.
    job_ids:
        The jobs.

    Raises
    ------
    PgbgError
        As :meth:`pgbg_orchestration.Launcher.rows`.
    """
    from pgbg_orchestration import Launcher
    from pgbg_orchestration.rows import NoRows

    async def read() -> dict[str, tuple[Rows, ...]]:
        found: dict[str, tuple[Rows, ...]] = {}
        async with Launcher(hook.conninfo(), schema=schema) as launcher:
            for job_id in job_ids:
                try:
                    found[job_id] = await launcher.rows(job_id)
                except NoRows:
                    found[job_id] = ()
        return found

    return asyncio.run(read())


def run_handler(
    handling: Handling, outcome: Mapping[str, Any], shape: Mapping[str, Any], kept: tuple[Rows, ...]
) -> Any:
    """Return what a handler makes of a job's rows, as ``SQLExecuteQueryOperator`` returns it.

    Of a text it is the result of the last statement, of each with ``return_last=False``; of a list, a list with the
    result of each item's last statement.

    Parameters
    ----------
    handling:
        The handler, and what is returned of it.
    outcome:
        The job's.
    shape:
        Whether its SQL was a list, the number of the last statement of each of its items, or of each statement, and
        the numbers of those that give rows.
    kept:
        The rows of its statements.

    Raises
    ------
    AirflowFailException
        The SQL gives rows, and none are kept: the job was committed by a launch that did not ask for them, or they are
        pruned. The job is committed; a retry would find the same.
    """
    single = not shape["listed"] and handling.return_last
    numbers = shape["ends"][-1:] if single else shape["ends"]
    # An event of a release before this one does not tell which statements give rows.
    if not kept and (outcome["command_tag"] in _GIVE_ROWS or set(numbers) & set(shape.get("gives", ()))):
        raise _final(
            f"job {outcome['job_id']} is committed, and no rows of it are kept: whoever launched it did not ask for "
            "them, or they are pruned. Clear the task to run the SQL again."
        )
    by_statement = {rows.statement: rows for rows in kept}
    results, descriptions = [], []
    for number in numbers:
        cursor = RowsCursor(by_statement.get(number))
        results.append(handling.handler(cursor))
        descriptions.append(cursor.description)
    if handling.show is not None:
        handling.show("Operator output is: %s", results)
    if handling.output_processor is not None:
        results = handling.output_processor(results, descriptions)
    return results[-1] if single else results


def check_size(result: Any) -> None:
    """Refuse a result that is too large for an XCom.

    Raises
    ------
    AirflowFailException
        It is too large. The job is committed; a retry would find the same.
    """
    if (size := len(json.dumps(result, default=str).encode())) > XCOM_BYTES:
        raise _final(
            f"the job is committed, and what the handler returned has {size:,} bytes as JSON, of which an XCom holds "
            f"{XCOM_BYTES:,} here. Let the handler return less or store it elsewhere, or set do_xcom_push=False."
        )


def _final(message: str) -> Exception:
    from airflow_provider.compat import AirflowFailException

    return AirflowFailException(message)
