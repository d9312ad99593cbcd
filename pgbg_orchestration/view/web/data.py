"""What the page gets as JSON: never the text that a worker runs, which holds parameters, nor anything of a connection.

A job's SQL is the one that was given, before the values of its parameters were put in.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from typing import Any
from urllib.parse import quote

from pgbg_orchestration.ledger.board import Board
from pgbg_orchestration.ledger.history import FirstRows, JobDetail, JobEntry
from pgbg_orchestration.series import airflow_task, dagster_run
from pgbg_orchestration.view.lines import Line, arranged, lines_of
from pgbg_orchestration.view.seen import JobSeen
from pgbg_orchestration.view.words import BLOCKERS_QUERY

Links = Mapping[str, str]
"""Base addresses of orchestrators' UIs, by ``airflow`` and ``dagster``."""


def of_board(board: Board, links: Links) -> dict[str, Any]:
    """Return what runs now, and ended a short while ago."""
    return {
        "looked_at": board.looked_at.isoformat(),
        "database": board.database,
        "server_version": board.server_version,
        "slots": board.slots,
        "slots_used": board.slots_used,
        "not_visible": board.not_visible,
        "ended_left_out": board.ended_left_out,
        "lines": [of_line(line, links) for line in arranged(lines_of(board))],
    }


def of_line(line: Line, links: Links) -> dict[str, Any]:
    """Return a line of the table."""
    return {
        "key": line.key,
        "owner": line.job.owner if line.job else None,
        "job_id": line.job.job_id if line.job else None,
        "state": line.state,
        "label": line.label,
        "series": line.series,
        "wanted_by": line.by_orchestrator,
        "by": line.by,
        "link": link_of(line.series, line.job.job_id if line.job else "", links),
        "seconds": line.seconds,
        "waits_for": line.waits_for,
        "blocker": _name_of(line.blocker),
        "progress": line.progress,
        "percent": line.percent,
        "rows": line.rows,
        "attempt": line.attempt,
        "pid": line.pid,
        "sqlstate": line.sqlstate,
        "message": line.message,
        "can_cancel": line.is_at_work and line.job is not None,
    }


def _name_of(job: JobEntry | None) -> dict[str, str] | None:
    return None if job is None else {"owner": job.owner, "job_id": job.job_id, "label": job.label or job.job_id}


def of_history(entries: Iterable[JobEntry]) -> list[dict[str, Any]]:
    """Return the bars of the timeline; times are milliseconds since 1970, of which a browser reads thousands faster."""
    return [
        {
            "owner": entry.owner,
            "job_id": entry.job_id,
            "label": entry.label or entry.job_id,
            "series": entry.series or "",
            "state": entry.state,
            "kind": entry.kind,
            "attempt": entry.attempt,
            "registered_at": _time(entry.registered_at),
            "launched_at": _time(entry.launched_at),
            "started_at": _time(entry.started_at),
            "ended_at": _time(entry.ended_at),
            "rows": entry.row_count,
            "sqlstate": entry.sqlstate,
        }
        for entry in entries
    ]


def of_job(
    seen: JobSeen, links: Links, *, shows_sql: bool = False, first_rows: Sequence[FirstRows] | None = None
) -> dict[str, Any]:
    """Return the page of one job.

    Parameters
    ----------
    seen:
        The job.
    shows_sql:
        Whether whoever asks may see its SQL.
    first_rows:
        The first of the rows that it kept; None where whoever asks may not see them.
    """
    return {
        **of_line(seen.line, links),
        "facts": [[name, value] for name, value in seen.facts() if name != BLOCKERS_QUERY],
        "sql": seen.statement if shows_sql else None,
        "sql_note": seen.why_no_statement if shows_sql else "Its SQL is not shown to you here.",
        "tries": [asdict(attempt) for attempt in seen.tries()],
        "kept": _kept(seen.detail, first_rows),
        "kept_note": "" if first_rows is not None else "The rows themselves are not shown to you here.",
    }


def _kept(detail: JobDetail | None, first_rows: Sequence[FirstRows] | None) -> list[dict[str, Any]]:
    first = {found.statement: found for found in first_rows or ()}
    return [
        {
            "statement": statement,
            "rows": rows,
            "columns": first[statement].columns if statement in first else (),
            "first": first[statement].rows if statement in first else (),
        }
        for statement, rows in (detail.kept if detail else {}).items()
    ]


def link_of(series: str, job_id: str, links: Links) -> str | None:
    """Return the address of the Airflow task instance or the Dagster run that wants a job; None where none is known."""
    if "airflow" in links and (task := airflow_task(series)):
        mapped = "" if task.map_index < 0 else f"/mapped/{task.map_index}"
        run = f"{links['airflow'].rstrip('/')}/dags/{quote(task.dag_id)}/runs/{quote(task.run_id, safe='')}"
        return f"{run}/tasks/{quote(task.task_id)}{mapped}"
    if "dagster" in links and (run_id := dagster_run(job_id)):
        return f"{links['dagster'].rstrip('/')}/runs/{run_id}"
    return None


def _time(value: datetime | None) -> int | None:
    return round(value.timestamp() * 1000) if value is not None else None
