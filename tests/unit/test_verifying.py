"""What is read from a CREATE or DROP INDEX CONCURRENTLY, and when the catalog can tell that it was done."""

from __future__ import annotations

import pytest

from pgbg_orchestration import statements
from pgbg_orchestration.statements import index_builds


def read(sql: str) -> index_builds.ConcurrentIndex | None:
    return index_builds.concurrent_index(statements.split(sql))


@pytest.mark.parametrize(
    ("sql", "index", "table", "unique"),
    [
        ("create index concurrently ix on t (a)", ("ix",), ("t",), False),
        ("CREATE UNIQUE INDEX CONCURRENTLY IF NOT EXISTS Ix ON ONLY S.T USING gin (a)", ("ix",), ("s", "t"), True),
        ('create index concurrently "I ""x" on "S".T (a) where b = $$ on x $$', ('I "x',), ("S", "t"), False),
        ("create /* on t */ index concurrently -- x\n on t (a)", None, ("t",), False),
        ('create index concurrently "on" on t (a)', ("on",), ("t",), False),
        ("drop index concurrently ix", ("ix",), None, False),
        ("drop index concurrently if exists s.ix cascade", ("s", "ix"), None, False),
    ],
)
def test_statement_is_read(sql: str, index: tuple[str, ...], table: tuple[str, ...], unique: bool) -> None:
    found = read(sql)
    assert found is not None
    assert (found.index.parts if found.index else None) == index
    assert (found.table.parts if found.table else None) == table
    assert found.unique is unique


@pytest.mark.parametrize(
    "sql",
    [
        "create index ix on t (a)",
        "reindex index concurrently ix",
        "reindex (concurrently) table t",
        "vacuum t",
        "call p()",
        "create index concurrently ix",
        "create index concurrently ix on",
        'create index concurrently U&"d\\0061t" on t (a)',
        "drop index ix",
        "drop index concurrently a, b",
        "select 'create index concurrently ix on t (a)'",
        "vacuum t; create index concurrently ix on t (a)",
    ],
)
def test_other_statements_are_not(sql: str) -> None:
    assert read(sql) is None
    assert index_builds.verify_sql(statements.split(sql)) is None


def test_query_quotes_what_it_is_given() -> None:
    query = index_builds.verify_sql(statements.split('create index concurrently "it\'s {x}" on "a\'b" (c)'))
    assert query is not None
    assert "c.relname = 'it''s {x}'::name" in query
    assert "to_regclass('\"a''b\"')" in query


def test_unnamed_index_cannot_be_told() -> None:
    assert index_builds.verify_sql(statements.split("create index concurrently on t (a)")) is None


def test_search_path_of_the_job_leaves_only_qualified_names() -> None:
    parts = statements.split("create index concurrently ix on t (a)")
    assert index_builds.verify_sql(parts, ["Search_Path"]) is None
    assert index_builds.verify_sql(statements.split("drop index concurrently s.ix"), ["search_path"]) is not None
