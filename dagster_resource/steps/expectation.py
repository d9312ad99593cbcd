"""Queries whose answer is a number of rows: it comes back as the worker's row count, and no row does."""

from __future__ import annotations

from typing import Literal

from pgbg_orchestration.errors import InvalidJob

from .sql import Sql

Expectation = Literal["no_rows", "true"]

# A cursor that is moved to its end counts the rows, for any role and without a row in the worker's output queue, which
# holds 64 KiB and has no reader. A temporary table would do so too, and needs a privilege.
COUNTING = """declare pgbg_check no scroll cursor for
{query}
;
move forward all in pgbg_check"""
WHOLE = {"cursor_tuple_fraction": "1"}
"""Settings with which the planner knows that all rows will be asked for."""

NO_ROWS = "select from (\n{query}\n) as violation"
# As JSON a row has all of its columns, those of one name too, and tells what is a boolean.
TRUE = """with pgbg_answer as materialized (
{query}
)
select from pgbg_answer
where pg_catalog.row_to_json(pgbg_answer)::text = '{}' or exists (
    select from pg_catalog.json_each(pg_catalog.row_to_json(pgbg_answer)) as pgbg_column (name, value)
    where not case pg_catalog.json_typeof(value)
        when 'boolean' then value::text = 'true'
        when 'null' then false
        else ('a column that is no boolean: ' || name)::boolean
    end
)
union all
select where not exists (select from pgbg_answer)"""


def counting_query(sql: Sql, expect: Expectation) -> str:
    """Return statements whose row count is the number of rows that are wrong.

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
    return COUNTING.replace("{query}", template.replace("{query}", parts[0].text))
