"""How SQL is shown in Dagster's metadata."""

from __future__ import annotations

from typing import Any

from dagster import MetadataValue

SQL_LIMIT = 20_000
"""Characters of SQL that go into the event log; every materialization keeps its own copy there."""


def sql_block(sql: str) -> MetadataValue[Any]:
    """Return SQL as a fenced block of Markdown, cut at ``SQL_LIMIT`` characters."""
    text = sql if len(sql) <= SQL_LIMIT else f"{sql[:SQL_LIMIT]}\n-- … {len(sql) - SQL_LIMIT} more characters"
    fence = "```"
    while fence in text:
        fence += "`"
    return MetadataValue.md(f"{fence}sql\n{text}\n{fence}")
