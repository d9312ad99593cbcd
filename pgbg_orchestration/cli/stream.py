"""``pgbg run --stream``: rows that are written as they come, for results too big to keep or to hold in memory."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, Any, TextIO

from pgbg_orchestration.errors import PgbgError, RowsGone
from pgbg_orchestration.job import Job
from pgbg_orchestration.launcher import Launcher
from pgbg_orchestration.outcome import Outcome
from pgbg_orchestration.rows import Column

from .codes import ExitCode
from .interrupts import until_interrupted
from .progress import Display
from .rows import WRITERS, Cells, Format, Writer
from .screen import Stop, out

BATCH = 1000
"""Rows that are held at once."""
PART = ".part"
"""What the name of a file ends with that has not all rows yet."""


class Sink:
    """Where streamed rows go: standard output, or a file, which has its name once all of them are in it.

    Parameters
    ----------
    form:
        How they are written.
    output:
        The file; None for standard output. What is no regular file (a pipe, a device) is written as it is.

    Raises
    ------
    Stop
        The file cannot be written.
    """

    def __init__(self, form: Format, output: Path | None) -> None:
        self.written = 0
        self._form = form
        self._writer: Writer | None = None
        self._output = output
        self._part = output
        self._file: IO[str] | None = None
        if output is None:
            return
        if output.is_file() or not output.exists():
            self._part = output.with_name(output.name + PART)
        try:
            assert self._part is not None
            self._file = self._part.open("w", encoding="utf-8", newline="")
        except OSError as error:
            raise Stop(ExitCode.REFUSED, f"{self._part} cannot be written: {error.strerror}") from error

    @property
    def place(self) -> str:
        """Where the rows are that were written, in words."""
        return "" if self._part is None else f" (in {self._part})"

    def write(self, columns: Sequence[Column], rows: Sequence[Cells]) -> None:
        """Write the next rows; raises ``OSError`` where that fails."""
        if self._writer is None:
            self._writer = WRITERS[self._form](columns, rows)
            self._put(self._writer.head())
        self._put(self._writer.rows(rows))
        self.written += len(rows)

    def end(self) -> None:
        """Write what stands behind the last row, and give the file its name; raises ``OSError``."""
        assert self._writer is not None
        self._put(self._writer.foot(self.written))
        if self._file is None:
            self._stdout().flush()
            return
        self._file.close()
        if self._part is not None and self._output is not None and self._part != self._output:
            self._part.replace(self._output)

    def abandon(self) -> None:
        """Leave what was written; a file that has no row in it goes."""
        if self._file is None or self._file.closed:
            return
        self._file.close()
        if self._part is not None and self._part != self._output and not self.written:
            self._part.unlink()

    def _put(self, lines: Iterable[str]) -> None:
        (self._file or self._stdout()).writelines(f"{line}\n" for line in lines)

    @staticmethod
    def _stdout() -> TextIO:
        return sys.stdout


async def follow(
    dsn: str, schema: str, job: Job, options: dict[str, Any], display: Display, sink: Sink
) -> Outcome | None:
    """Run a job and write its rows, each as it comes; returns its outcome, or None for one that was interrupted.

    Raises
    ------
    PgbgError
        As :meth:`Launcher.stream`; :class:`RowsGone` too where they cannot be written.
    Stop
        It was interrupted while its rows were read: it is committed.
    """
    async with Launcher(dsn, schema=schema) as launcher:
        stream = launcher.stream(job, as_text=True, observer=display.on_event, **options)

        async def write(rows: list[Cells]) -> None:
            # In a thread: whoever reads a pipe may take its time, and a signal is to be heard all the same.
            await asyncio.to_thread(sink.write, stream.columns, rows)

        async def copy() -> Outcome:
            rows: list[Cells] = []
            async with stream:
                display.close()  # its line must not stand among the rows
                async for row in stream:
                    rows.append(row)
                    if len(rows) == BATCH:
                        await write(rows)
                        rows = []
                await write(rows)
                sink.end()
            assert stream.outcome is not None
            return stream.outcome

        try:
            outcome = await until_interrupted(copy(), display, leave=options["on_cancel"] == "leave")
        except BrokenPipeError:
            # Nobody wants more of them; that it is committed is known.
            out.on_broken_pipe()
            return stream.outcome
        except OSError as error:
            raise _gone(job, f"its rows cannot be written{sink.place}: {error.strerror}", sink) from error
        except RowsGone as error:
            error.todo = f"{sink.written} rows were written{sink.place}. {error.todo or ''}".strip()
            raise
        finally:
            sink.abandon()
        if outcome is None and stream.outcome is not None:
            raise Stop(
                ExitCode.INTERRUPTED,
                f"the job is committed; {sink.written} of its rows were written{sink.place}, and the rest is lost",
            )
        return outcome


def _gone(job: Job, why: str, sink: Sink) -> PgbgError:
    return RowsGone(
        f"the job is committed, and {why}; the rest of them is lost",
        job_id=job.id,
        label=job.label,
        todo=f"{sink.written} rows were written. Rows that have to be read again are kept by --rows, or written to a "
        "table by the SQL.",
    )
