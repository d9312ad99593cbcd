"""Queries whose answer is a number of rows: a worker's row count is all that comes back from it."""

from __future__ import annotations

from typing import Literal

from pgbg_orchestration.errors import InvalidJob

from .sql import Sql

Expectation = Literal["no_rows", "true"]

# A table takes the rows instead of the worker's output queue, which holds 64 KiB and has no reader. It has no columns,
# so that it costs little.
NO_ROWS = "create temporary table pgbg_check on commit drop as select from (\n{query}\n) as violation"
TRUE = """create temporary table pgbg_check on commit drop as
with answer (holds) as materialized (
{query}
)
select from answer where holds is not true
union all
select where not exists (select from answer)"""


def counting_query(sql: Sql, expect: Expectation) -> str:
    """Return SQL whose row count is the number of rows that are wrong.

    Raises
    ------
    InvalidJob
        It is not a single statement.
    ValueError
        ``expect`` is neither ``no_rows`` nor ``true``.
    """
    from pgbg_orchestration import statements

    if expect not in ("no_rows", "true"):
        raise ValueError(f"expect must be 'no_rows' or 'true', not {expect!r}")
    texts = [sql.text] if isinstance(sql.text, str) else sql.text
    try:
        parts = [part for text in texts for part in statements.split(text)]
    except ValueError as error:
        raise InvalidJob(str(error)) from error
    if len(parts) != 1:
        raise InvalidJob(f"a check is one query, and this is {len(parts)} statements")
    template = NO_ROWS if expect == "no_rows" else TRUE
    return template.replace("{query}", parts[0].text)
