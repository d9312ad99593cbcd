"""A job's rows, kept beside its receipt: what the worker runs in place of a statement whose rows are wanted.

The rows go through a temporary table, for three reasons: a query that makes a table keeps its parallel plan, which a
worker's own SELECT has not; the table is made with the rights of the job's role, and read with those of the login; and
a bound is known before anything is kept.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg import AsyncConnection, sql

from pgbg_orchestration.errors import InvalidJob, NoPrivilege
from pgbg_orchestration.job import Job
from pgbg_orchestration.postgres import catalog, connection, describe
from pgbg_orchestration.rows import Fetch
from pgbg_orchestration.statements import Statement
from pgbg_orchestration.statements.row_source import RowSource, RowSourceKind, call_source, row_source, unkeepable

_TEXT = 25  # the oid of the type text
PATIENCE = "2s"  # for a describe that waits for somebody's lock; given up, the worker's table tells the columns


@dataclass(frozen=True, slots=True)
class ColumnType:
    """A column as a describe tells it; ``is_pseudo``: of a type that no table has, such as ``void``."""

    name: str
    oid: int
    typmod: int
    type: str
    is_pseudo: bool


@dataclass(frozen=True, slots=True)
class RowPlan:
    """How the rows of one statement are kept.

    Attributes
    ----------
    number:
        The statement's number in the job, from 1.
    source:
        How it gives rows.
    columns:
        Its columns; None where the server can tell them only once the statements before it have run.
    """

    number: int
    source: RowSource
    columns: tuple[ColumnType, ...] | None

    @property
    def table(self) -> str:
        """The temporary table that its rows go through."""
        return f"pg_temp.pgbg_rows_{self.number}"

    @property
    def names(self) -> str:
        """The table's columns, as a list in parentheses; nothing where they are the statement's own."""
        return f" ({', '.join(f'c{n}' for n in range(1, len(self.columns) + 1))})" if self.columns else ""

    @property
    def description(self) -> str | None:
        """What the temporary table does not say of the columns, as JSON for the schema's ``keep_table``."""
        if self.columns is None:
            return None
        return json.dumps(
            [
                {"name": c.name, "oid": c.oid, "typmod": c.typmod}
                | ({"type": c.type} if c.is_pseudo or self.source.kind is RowSourceKind.REPORT else {})
                for c in self.columns
            ]
        )


async def plan(
    job: Job, fetch: Fetch, parts: Sequence[Statement], conn: AsyncConnection[Any], settings: Mapping[str, str]
) -> tuple[RowPlan, ...]:
    """Return how the rows of a job are kept, each statement that gives rows or the last one.

    Parameters
    ----------
    parts:
        The job's statements, with their parameters in.
    conn:
        A connection to the database that the job is for.
    settings:
        Those that the meaning of the statements may depend on, the role included.

    Raises
    ------
    NoPrivilege
        Whoever runs the SQL may make no temporary table.
    InvalidJob
        A statement whose rows are wanted is SHOW ALL, FETCH, or EXECUTE of a statement that gives rows.
    """
    first = len(parts) if fetch.return_last else 1
    kept: list[RowPlan] = []
    for number, part in enumerate(parts[first - 1 :], first):
        if word := unkeepable(part, parts[: number - 1]):
            raise InvalidJob(
                f"statement {number} is {word}, whose rows cannot be kept",
                job_id=job.id,
                label=job.label,
                todo="Put the query itself in its place, or leave fetch out.",
            )
        source = row_source(part) or call_source(part)
        if source is None:
            continue
        columns = await _describe(conn, part.text, settings)
        if source.tag == "CALL" and not columns:
            continue  # a procedure without output, or one that a statement before it makes
        if not kept:
            await _require_temporary(job, conn)
        if source.tag == "SHOW" and columns is not None and len(columns) != 1:
            raise InvalidJob(
                f"statement {number} gives {len(columns)} columns, and rows of SHOW are kept where there is one",
                job_id=job.id,
                label=job.label,
                todo="Query pg_settings instead.",
            )
        kept.append(RowPlan(number, source, columns))
    return tuple(kept)


async def _require_temporary(job: Job, conn: AsyncConnection[Any]) -> None:
    may, role, database = await catalog.temporary_privilege(conn, job.role)
    if not may:
        raise NoPrivilege(
            f"the rows of a job go through a temporary table, and {role} may make none in this database",
            sqlstate="42501",
            todo=f"GRANT TEMPORARY ON DATABASE {database} TO {role};",
            job_id=job.id,
            label=job.label,
        )


async def _describe(
    conn: AsyncConnection[Any], text: str, settings: Mapping[str, str]
) -> tuple[ColumnType, ...] | None:
    try:
        async with conn.transaction(force_rollback=True):
            await conn.execute("set local search_path to default")  # the login's own, as its workers have it
            await connection.configure(conn, (("lock_timeout", PATIENCE), *settings.items()), local=True)
            columns = await describe.named_columns_of(conn, text)
            types = await catalog.types(conn, ((oid, modifier) for _, oid, modifier in columns))
    except psycopg.Error as error:
        if connection.is_lost(conn, error):
            raise
        return None  # it may use what the statements before it make; if it is wrong, the worker fails with it
    return tuple(
        ColumnType(name, oid, modifier, type_, pseudo)
        for (name, oid, modifier), (type_, pseudo) in zip(columns, types, strict=True)
    )


def texts(parts: Sequence[Statement], kept: Sequence[RowPlan], fetch: Fetch, keep_table: str) -> list[list[str]]:
    """Return what the worker runs for each statement: itself, or what runs it and keeps its rows.

    Parameters
    ----------
    parts:
        The job's statements.
    kept:
        Those whose rows are kept.
    fetch:
        The bounds.
    keep_table:
        The call of the schema's function, up to its first two arguments, the job's owner and id.
    """
    of_number = {plan.number: plan for plan in kept}
    bodies: list[list[str]] = []
    for number, part in enumerate(parts, 1):
        plan = of_number.get(number)
        if plan is None:
            bodies.append([part.text])
            continue
        rest = (number, plan.description, plan.source.tag, fetch.max_rows, fetch.max_bytes)
        body = [
            *_making(plan, part.text, fetch.max_rows + 1),
            f"grant select on {plan.table} to public",  # a role made it, the login reads it, nobody else sees it
            _TO_THE_LOGIN,
            f"{keep_table}, {', '.join(sql.Literal(value).as_string(None) for value in rest)})",
            _BACK_AGAIN,
        ]
        bodies.append(body)
    return bodies


BEFORE_ALL = (
    "select pg_catalog.set_config('pgbg.login_role', pg_catalog.current_setting('role'), true),"
    " case when pg_catalog.pg_my_temp_schema() = 0 then pg_catalog.set_config('temp_buffers',"
    " (greatest(pg_catalog.pg_size_bytes(pg_catalog.current_setting('temp_buffers')), 33554432)"
    " / pg_catalog.current_setting('block_size')::bigint)::text, true) end"
)
"""Before the job's own role and statements: who may call the schema's functions; and room for the rows in memory, which
can be had until the first temporary table is made."""
_TO_THE_LOGIN = (
    "select pg_catalog.set_config('pgbg.job_role', pg_catalog.current_setting('role'), true),"
    " pg_catalog.set_config('role', pg_catalog.current_setting('pgbg.login_role'), true)"
)
_BACK_AGAIN = "select pg_catalog.set_config('role', pg_catalog.current_setting('pgbg.job_role'), true)"


def _making(plan: RowPlan, text: str, limit: int) -> list[str]:
    """Return the statements that run ``text`` and put its rows into the temporary table."""
    make, names, source = f"create temporary table {plan.table}", plan.names, plan.source
    match source.kind:
        case RowSourceKind.REPORT:
            tag = "pgbg"
            while f"${tag}$" in text:
                tag += "_"
            run = sql.Literal(text).as_string(None)
            columns = [(c.oid, c.typmod) for c in plan.columns] if plan.columns is not None else [(_TEXT, -1)]
            # By oid: what a type is called depends on a search_path that the job itself may set.
            types = ", ".join(f"pg_catalog.format_type({oid}, {modifier})" for oid, modifier in columns)
            named = ", ".join(f"c{n} %s" for n in range(1, len(columns) + 1))
            table = f"execute pg_catalog.format('{make} ({named}) using heap on commit drop', {types})"
            loop = f"for line in execute {run} loop insert into {plan.table} values (line.*); end loop"
            return [
                f"do $pgbg$ begin {table}; end $pgbg$",
                f"do ${tag}$ declare line {plan.table}%rowtype; begin {loop}; end ${tag}$",
            ]
        case RowSourceKind.CHANGE:
            before, change = text[: source.verb_at], text[source.verb_at :]
            with_ = f"{before}, " if source.has_with else f"{before}with "
            query = f"{with_}pgbg_returned{names} as (\n{change}\n) table pgbg_returned"
        case RowSourceKind.QUERY_AT_TOP:
            query = text
        case _:
            # One row more than may be kept is enough to refuse it. A plain LIMIT could change the query's plan; outside
            # of a join, and with OFFSET 0 inside, the planner still plans for all of its rows.
            whole = f"(select * from (\n{text}\n) as q offset 0) as q{names}"
            once = "pg_catalog.generate_series(1, 1) as once"
            query = f"select {_listed(plan)} from {whole}, {once} limit {limit}"
    # A heap, whatever default_table_access_method is: keep_table goes through its blocks.
    return [f"{make}{names} using heap on commit drop as\n{query}"]


def _listed(plan: RowPlan) -> str:
    if plan.columns is None:
        return "q.*"
    return ", ".join(
        f"case when q.c{n} is distinct from null then pg_catalog.format('%s', q.c{n}) end" if c.is_pseudo else f"q.c{n}"
        for n, c in enumerate(plan.columns, 1)
    )
