"""The lines that a view shows: jobs, and workers that no job is known of; pure, without I/O."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatchcase
from typing import Any

from pgbg_orchestration.ledger.board import Board, WorkerSeen
from pgbg_orchestration.ledger.history import JobEntry
from pgbg_orchestration.phrases import duration
from pgbg_orchestration.series import DAGSTER_NAMESPACE, airflow_task, dagster_run

from .states import ALL_STATES, BY_HAND, NOT_VISIBLE


class Order(StrEnum):
    """What lines are sorted by; jobs at work come before those that ended, whatever the order."""

    SINCE = "time"
    LABEL = "label"
    STATE = "state"
    ROWS = "rows"


@dataclass(frozen=True, slots=True)
class Line:
    """One line: a job, a worker that no job is known of, or a job with its worker.

    Attributes
    ----------
    key:
        Tells lines apart, from one look to the next.
    seconds:
        For how long it has run, or ran; None where that is not known.
    waits_for:
        What its worker waits for, and for whom; empty while it works, or where the login may not see it.
    blocker:
        The job that holds the lock which its worker waits for; None where that is no job that the login may see.
    progress, percent:
        The command that the server shows the progress of, with its phase, and how much of the phase is done.
    by_orchestrator:
        The Airflow task or the Dagster step that wants it, where its series tells.
    """

    key: str
    state: str
    label: str
    series: str
    by: str
    by_orchestrator: str
    seconds: float | None
    waits_for: str
    blocker: JobEntry | None
    progress: str
    percent: int | None
    rows: int | None
    pid: int | None
    attempt: int | None
    sqlstate: str | None
    message: str | None
    job: JobEntry | None
    worker: WorkerSeen | None

    @property
    def is_at_work(self) -> bool:
        """Whether it has not ended."""
        return self.state in ("running", "waiting", BY_HAND, NOT_VISIBLE)


def lines_of(board: Board) -> list[Line]:
    """Return a line for each job and for each worker that no job is known of, in no order."""
    at_work = {job.running_pid: job for job in board.jobs if job.running_pid is not None}
    lines = [line_of_job(job, board, at_work) for job in board.jobs]
    return lines + [_of_worker(worker, board, at_work) for pid, worker in board.workers.items() if pid not in at_work]


def chosen(lines: Iterable[Line], *, pattern: str = "", states: frozenset[str] = frozenset()) -> list[Line]:
    """Return the lines whose label or series fits, and whose state is one of ``states``.

    Parameters
    ----------
    pattern:
        Stands anywhere in the label or the series, whatever the case; ``*`` and ``?`` stand for any characters, and for
        one. Empty: all.
    states:
        Of ``ALL_STATES``; none: all.
    """
    wanted = f"*{pattern.lower()}*"
    return [
        line
        for line in lines
        if (not states or line.state in states)
        and (not pattern or fnmatchcase(line.label.lower(), wanted) or fnmatchcase(line.series.lower(), wanted))
    ]


def arranged(lines: Iterable[Line], order: Order = Order.SINCE, *, reverse: bool = False) -> list[Line]:
    """Return the lines in an order: those at work first, in each part the longest, the first or the most first."""
    keys: dict[Order, Callable[[Line], Any]] = {
        Order.SINCE: lambda line: -(line.seconds or 0.0),
        Order.LABEL: lambda line: line.label,
        Order.STATE: lambda line: ALL_STATES.index(line.state),
        Order.ROWS: lambda line: -(line.rows if line.rows is not None else -1),
    }
    sort = keys[order]
    by_key = sorted(lines, key=lambda line: line.key)
    ordered = sorted(by_key, key=sort, reverse=reverse)
    return sorted(ordered, key=lambda line: not line.is_at_work)


def orchestrator_of(series: str | None, job_id: str = "") -> str:
    """Return which Airflow task or Dagster step a job is of; empty for any other.

    Dagster's are told by the run in their ids, whatever the resource's namespace is, or by its default namespace.
    """
    if series is None:
        return ""
    if task := airflow_task(series):
        return f"Airflow {task.dag_id}.{task.task_id}" + ("" if task.map_index < 0 else f"[{task.map_index}]")
    if series.startswith("airflow:"):
        return series
    if series.startswith(f"{DAGSTER_NAMESPACE}/") or dagster_run(job_id):
        return f"Dagster {series.removeprefix(f'{DAGSTER_NAMESPACE}/')}"
    return ""


def wait_of(worker: WorkerSeen | None, at_work: Mapping[int, JobEntry] | None = None) -> str:
    """Return what a worker waits for, and for whom, in words; empty while it waits for nothing.

    Parameters
    ----------
    worker:
        The one that waits.
    at_work:
        Jobs by the process id of their workers: one of them is called by its label.
    """
    at = worker.activity if worker is not None else None
    if at is None or at.wait_event is None:
        return ""
    if not at.blockers:
        return f"{at.wait_event_type}: {at.wait_event}"
    other, *more = at.blockers
    job = (at_work or {}).get(other.pid)
    label = _label_of(other.application or "")
    if other.pid == 0:
        who = "a prepared transaction"
    elif job is not None:
        who = f"job {job.label or job.job_id} of {job.owner} (pid {other.pid})"
    elif label is not None:
        who = f"worker {label}" + (f" of {other.user_name}" if other.user_name else "") + f" (pid {other.pid})"
    else:
        who = f"pid {other.pid}" + (f" of {other.user_name}" if other.user_name else "")
        who += f" ({other.application})" if other.application else ""
    waited = "" if at.waited is None else f", for {duration(at.waited)}"
    return f"lock: {who}{f' and {len(more)} more' if more else ''}{waited}"


def progress_of(worker: WorkerSeen | None) -> tuple[str, int | None]:
    """Return how far a worker's command is: its name and phase, and the percentage where the phase counts something."""
    command = worker.activity.command if worker is not None and worker.activity is not None else None
    if command is None:
        return "", None
    return f"{command.name}: {command.phase}" if command.phase else command.name, command.percent


def _blocker(worker: WorkerSeen | None, at_work: Mapping[int, JobEntry]) -> JobEntry | None:
    at = worker.activity if worker is not None else None
    return at_work.get(at.blockers[0].pid) if at is not None and at.blockers else None


def _label_of(application_name: str) -> str | None:
    """Return the label that a worker shows: pg_background, since 1.10, names it ``pg_background:LABEL:PID``."""
    parts = application_name.split(":")
    return ":".join(parts[1:-1]) if len(parts) > 2 and parts[0] == "pg_background" else None


def line_of_job(job: JobEntry, board: Board | None = None, at_work: Mapping[int, JobEntry] | None = None) -> Line:
    """Return the line of a job.

    Parameters
    ----------
    job:
        The job.
    board:
        Where its worker is seen, and what time it is.
    at_work:
        The board's jobs by the process id of their workers: one of them may be what it waits for.
    """
    worker = board.workers.get(job.running_pid) if board is not None and job.running_pid is not None else None
    end = job.ended_at or (board.looked_at if board is not None and job.state == "running" else None)
    began = job.started_at or job.launched_at
    progress, percent = progress_of(worker)
    return Line(
        key=f"{job.owner}/{job.job_id}",
        state=job.state,
        label=job.label or job.job_id,
        series=job.series or "",
        by=job.launched_by or "",
        by_orchestrator=orchestrator_of(job.series, job.job_id),
        seconds=max((end - began).total_seconds(), 0) if end is not None and began is not None else None,
        waits_for=wait_of(worker, at_work) if job.state == "running" else "",
        blocker=_blocker(worker, at_work or {}),
        progress=progress,
        percent=percent,
        rows=job.row_count,
        pid=job.running_pid,
        attempt=job.attempt,
        sqlstate=job.sqlstate,
        message=job.message,
        job=job,
        worker=worker,
    )


def _of_worker(worker: WorkerSeen, board: Board, at_work: Mapping[int, JobEntry]) -> Line:
    # What set its own name, and a worker before 1.10, shows no label.
    label = _label_of(worker.application_name)
    progress, percent = progress_of(worker)
    age = None if worker.began_at is None else max((board.looked_at - worker.began_at).total_seconds(), 0)
    return Line(
        key=f"worker/{worker.pid}/{worker.began_at}",
        state=BY_HAND if worker.is_visible else NOT_VISIBLE,
        label=(worker.application_name if label is None else label) or "(no label)",
        series="",
        by=worker.login or "",
        by_orchestrator="",
        seconds=age,
        waits_for=wait_of(worker, at_work),
        blocker=_blocker(worker, at_work),
        progress=progress,
        percent=percent,
        rows=None,
        pid=worker.pid,
        attempt=None,
        sqlstate=None,
        message=None,
        job=None,
        worker=worker,
    )
