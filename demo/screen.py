"""What the demo prints, for terminals from 80 columns on, and for files."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.rule import Rule
from rich.status import Status
from rich.table import Table
from rich.text import Text

from .airflow_run import AirflowRun
from .dagster_run import DagsterRun
from .jobs import JobRow

WIDEST = 120  # columns; wider lines are hard to read

console = Console(highlight=False)
if console.width > WIDEST:
    console = Console(highlight=False, width=WIDEST)


class Step:
    """A step under way; ``done`` is what is printed when it has ended, ``now`` says what it is about."""

    def __init__(self, doing: str, status: Status) -> None:
        self.done = doing
        self._status = status

    def now(self, text: str) -> None:
        """Show what is going on."""
        self._status.update(text)


@contextmanager
def step(doing: str) -> Iterator[Step]:
    """Show a step while it lasts, and how long it took at its end."""
    began = time.monotonic()
    if not console.is_terminal:
        console.print(Text(f"… {doing}", "dim"))
    with console.status(doing, spinner="dots") as status:
        current = Step(doing, status)
        yield current
    line = Table.grid(expand=True, padding=(0, 1))
    line.add_column(width=1)
    line.add_column(ratio=1, overflow="fold")
    line.add_column(justify="right", no_wrap=True)
    line.add_row(Text("✓", "green"), Text(current.done), Text(took(time.monotonic() - began), "dim"))
    console.print(line)


def headline(text: str, note: str = "") -> None:
    """Print a line that begins a part."""
    console.print()
    console.print(Rule(Text.assemble((text, "bold"), ("  " + note if note else "", "dim")), align="left", style="dim"))


def say(text: str) -> None:
    """Print a sentence."""
    console.print(Text(text))


def fail(text: str) -> None:
    """Print why the demo ends."""
    console.print(Text.assemble(("✗ ", "bold red"), text), soft_wrap=True)


def took(seconds: float | None) -> str:
    """Return a duration as people say it."""
    if seconds is None:
        return ""
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def airflow_tasks(run: AirflowRun) -> None:
    """Print what each task of a DAG run did, every try of it that ended, and what the server said to failed ones."""
    table, errors = _table("TASK"), _notes()
    for task_id, state in run.tasks.items():
        failed, job = run.failed_tries.get(task_id), run.jobs.get(task_id)
        if failed is not None and failed.attempt != (job.attempt if job else None):
            _add(table, task_id, "retried", failed, "tried again")
            _note(errors, task_id, failed)
        if job is None:
            table.add_row(task_id, _state(state), "", "", "", "")
        elif state == "failed":
            tries = run.tries[task_id]
            _add(table, task_id, state, job, "not retried" if tries == 1 else f"{tries} tries")
            _note(errors, task_id, job)
        else:
            _add(table, "" if failed else task_id, state, job)
    console.print(table)
    if errors.row_count:
        console.print()
        console.print(errors)


def dagster_jobs(run: DagsterRun) -> None:
    """Print what each job of a Dagster run did, and what the server said to a check that did not pass."""
    table, errors = _table("ASSET"), _notes()
    for job in run.jobs:
        name = job.series.removeprefix("dagster/").replace("/", " · ")
        if job.state == "failed":
            _add(table, name, "warning", job)
            _note(errors, name, job)
        else:
            _add(table, name, "success", job)
    console.print(table)
    if errors.row_count:
        console.print()
        console.print(errors)


def _table(first: str) -> Table:
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0), pad_edge=False, expand=True)
    table.add_column(first, no_wrap=True, overflow="ellipsis", max_width=34)
    table.add_column("RESULT", no_wrap=True)
    table.add_column("WORKER", justify="right", no_wrap=True)
    table.add_column("ROWS", justify="right", no_wrap=True)
    table.add_column("TOOK", justify="right", no_wrap=True)
    table.add_column("WHAT", ratio=1, overflow="fold")
    return table


def _notes() -> Table:
    notes = Table.grid(padding=(0, 2, 0, 0), expand=True)
    notes.add_column(no_wrap=True, style="bold")
    notes.add_column(no_wrap=True, style="dim")
    notes.add_column(ratio=1, overflow="fold", style="italic dim")
    return notes


def _note(notes: Table, name: str, job: JobRow) -> None:
    notes.add_row(job.sqlstate or "", name, Text(job.message or ""))


def _add(table: Table, name: str, state: str, job: JobRow, consequence: str = "") -> None:
    done = job.state == "committed"
    rows = f"{job.row_count:,}" if done and job.row_count else ""
    what = Text(job.command_tag or "", "dim") if done else Text(f"{job.sqlstate} {consequence}".strip(), "yellow")
    table.add_row(name, _state(state), str(job.worker_pid or ""), rows, took(job.seconds), what)


_STATES = {
    "success": ("✓ success", "green"),
    "failed": ("✗ failed", "red"),
    "warning": ("! warning", "yellow"),
    "retried": ("✗ failed", "yellow"),
    "skipped": ("- skipped", "dim"),
}


def _state(state: str) -> Text:
    word, style = _STATES.get(state, (f"  {state}", ""))
    return Text(word, style)
