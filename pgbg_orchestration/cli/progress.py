"""What a person sees while a job is waited for: one line that lives on a terminal, lines of a log elsewhere."""

from __future__ import annotations

import logging
import time
from datetime import datetime
from typing import Self

from rich.console import Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from pgbg_orchestration.errors import PgbgError
from pgbg_orchestration.job import Job
from pgbg_orchestration.outcome import Event, EventKind, Outcome
from pgbg_orchestration.phrases import duration

from .screen import err, plain

_STATES = {
    EventKind.WAITING_FOR_SLOT: "waiting for a slot",
    EventKind.WAITING_FOR_SERIES: "waiting for its series",
    EventKind.LAUNCHED: "running",
    EventKind.ATTACHED: "running",
    EventKind.PROGRESS: "running",
    EventKind.CANCELLING: "cancelling",
    EventKind.SESSION_LOST: "running",
}


class Display(logging.Handler):
    """Shows a job's way on standard error, and keeps what the core says on it.

    Parameters
    ----------
    job:
        The job.
    silent:
        Show warnings only.
    """

    def __init__(self, job: Job, *, silent: bool) -> None:
        super().__init__(logging.INFO)
        self.launched = False
        self.decision: PgbgError | Outcome | None = None
        """How the core ended the job after an interrupt."""
        self._job = job
        self._silent = silent
        self._state = "starting"
        self._pid: int | None = None
        self._percent: float | None = None
        self._note = ""
        self._began = time.monotonic()
        self._spinner = Spinner("dots", style="cyan")
        self._live: Live | None = None
        if err.is_terminal and not silent:
            self._live = Live(console=err, get_renderable=self._render, refresh_per_second=10, transient=True)

    def __enter__(self) -> Self:
        logger = logging.getLogger("pgbg_orchestration")
        logger.addHandler(self)
        self._level, self._propagate = logger.level, logger.propagate
        logger.setLevel(logging.INFO)
        logger.propagate = False
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        logger = logging.getLogger("pgbg_orchestration")
        logger.removeHandler(self)
        logger.setLevel(self._level)
        logger.propagate = self._propagate
        self.close()

    def close(self) -> None:
        """Take the display away."""
        if self._live is not None:
            self._live.stop()
        super().close()

    def on_event(self, event: Event) -> None:
        """Take in an event of the job's way."""
        if event.kind is EventKind.LET_GO:
            error, outcome = event.data.get("error"), event.data.get("outcome")
            self.decision = PgbgError.from_dict(error) if error else Outcome.from_dict(outcome or {})
            return
        self._state = _STATES.get(event.kind, self._state)
        self._pid = event.data.get("pid") or self._pid
        self.launched = self.launched or event.kind is EventKind.LAUNCHED
        if event.kind is EventKind.PROGRESS:
            self._percent = event.data.get("percent")
        if event.kind is EventKind.COMMITTED:
            return
        if event.kind is EventKind.NOTICE:
            # It stays on the screen. A warning comes as one of the core's, in `emit`.
            if event.data["severity"] != "WARNING" and not self._silent:
                self._print(event.message)
            return
        self._note = "" if event.kind is EventKind.LAUNCHED else event.message
        if self._live is None and not self._silent:
            self._print(event.message + (f" (pid {event.data['pid']})" if event.data.get("pid") else ""))

    def say(self, text: str) -> None:
        """Say something that stays on the screen."""
        self._note = ""
        self._print(text, "yellow")

    def emit(self, record: logging.LogRecord) -> None:
        """Take in what the core logs; its news come as events, its warnings are shown."""
        if record.levelno >= logging.WARNING and self.decision is None:
            # The core's lines name the job, and so do these.
            self._print(record.getMessage().removeprefix(f"job {self._job.label}: "), "yellow")

    def _print(self, text: str, style: str = "") -> None:
        stamp = f"{datetime.now().astimezone():%H:%M:%S} "
        # Detail and hint have lines of their own; what comes from elsewhere begins none that looks like one of these.
        shown = plain(text, keep_lines=True).replace("\n", f"\n{' ' * len(stamp)}")
        err.print(Text.assemble((stamp, "dim"), (plain(self._job.label), ""), ": ", (shown, style)), soft_wrap=True)

    def _render(self) -> Group:
        line = Table.grid(padding=(0, 1), expand=True)
        line.add_column(width=1)
        line.add_column(no_wrap=True)
        line.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
        line.add_column(no_wrap=True, justify="right")
        line.add_row(
            self._spinner,
            Text(self._state, "bold cyan"),
            Text(plain(self._job.label), "bold"),
            Text(" · ".join(p for p in (f"pid {self._pid}" if self._pid else "", self._elapsed()) if p), "dim"),
        )
        return Group(line, *self._second_line())

    def _elapsed(self) -> str:
        return duration(time.monotonic() - self._began)

    def _second_line(self) -> list[Table]:
        if self._percent is None and not self._note:
            return []
        line = Table.grid(padding=(0, 1), expand=True)
        line.add_column(width=1)
        if self._percent is not None:
            line.add_column(width=24)
            line.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
            line.add_row("", _bar(self._percent), Text(plain(self._note)))
        else:
            line.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
            line.add_row("", Text(plain(self._note), "dim"))
        return [line]


def _bar(percent: float) -> ProgressBar:
    return ProgressBar(total=100, completed=percent, complete_style="cyan", finished_style="green")
