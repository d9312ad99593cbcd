"""What a materialization shows of the job behind it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dagster import MetadataValue

if TYPE_CHECKING:
    from .outcome import PgBackgroundOutcome

SQL_LIMIT = 20_000
"""Characters of SQL that go into the event log; every materialization keeps its own copy there."""

# Command tags whose count is that of the rows put into a table. UPDATE and DELETE say nothing of its size.
FILLING = ("INSERT", "CREATE TABLE AS", "COPY", "MERGE")


def sql_block(sql: str) -> MetadataValue[Any]:
    """Return SQL as a fenced block of Markdown, cut at ``SQL_LIMIT`` characters."""
    text = sql if len(sql) <= SQL_LIMIT else f"{sql[:SQL_LIMIT]}\n-- … {len(sql) - SQL_LIMIT} more characters"
    fence = "```"
    while fence in text:
        fence += "`"
    return MetadataValue.md(f"{fence}sql\n{text}\n{fence}")


def of_outcome(outcome: PgBackgroundOutcome) -> dict[str, Any]:
    """Return the metadata of a job that committed; what is not known is left out."""
    metadata: dict[str, Any] = {
        "pgbg/job_id": outcome.job_id,
        "pgbg/label": outcome.label,
        "pgbg/sql": sql_block(outcome.sql),
        "pgbg/launched": outcome.launched,
        "pgbg/proof": outcome.proof,
    }
    known = {
        "pgbg/row_count": outcome.row_count,
        "pgbg/command_tag": outcome.command_tag,
        "pgbg/worker_pid": outcome.worker_pid,
        "pgbg/attempt": outcome.attempt,
        "pgbg/duration_seconds": outcome.duration,
    }
    metadata |= {name: value for name, value in known.items() if value is not None}
    if outcome.row_count is not None and (outcome.command_tag or "").startswith(FILLING):
        if outcome.partition is None:
            metadata["dagster/row_count"] = outcome.row_count
        elif not outcome.is_range:  # a range's materializations would each show the count of all
            metadata["dagster/partition_row_count"] = outcome.row_count
    return metadata
