"""How SQL and a job's page are shown in Dagster's metadata."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

from dagster import MetadataValue

SQL_LIMIT = 20_000
"""Characters of SQL that go into the event log; every materialization keeps its own copy there."""


CUT = "-- … "


def sql_block(sql: str) -> MetadataValue[Any]:
    """Return SQL as a fenced block of Markdown, cut at ``SQL_LIMIT`` characters."""
    text = sql if len(sql) <= SQL_LIMIT else f"{sql[:SQL_LIMIT]}\n{CUT}{len(sql) - SQL_LIMIT} more characters"
    fence = "```"
    while fence in text:
        fence += "`"
    return MetadataValue.md(f"{fence}sql\n{text}\n{fence}")


def sql_of_block(block: str) -> str | None:
    """Return the SQL of a block that :func:`sql_block` made; None where it was cut."""
    sql = block.partition("\n")[2].rpartition("\n")[0]
    return None if sql.rpartition("\n")[2].startswith(CUT) else sql


def page_of(web_url: str, job_id: str) -> str:
    """Return the address of a job's page below that of the jobs' page (``pgbg web``, or the one in Airflow's UI)."""
    return f"{web_url.rstrip('/')}/#job=/{quote(job_id, safe='')}"
