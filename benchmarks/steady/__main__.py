"""Steady load through what waits for jobs: ``python -m benchmarks.steady --through daemon --minutes 30``.

A few hundred long jobs are at work at any time, while others end each second: most commit, some fail, some are
cancelled. Through a triggerer they are waited for by Airflow's triggers in one process; through a Dagster daemon they
are submitted, and their ends reported by a sensor. The server is restarted at once now and then. Told at fixed
intervals, and written as Markdown: what the processes hold, what the server holds for them, and the rows of the
history. In the end all jobs end and the history is pruned, so that whatever is left then is no job's.
"""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path

from . import daemon, submitter, triggerer
from .watch import as_markdown

FORMS = {"triggerer": triggerer, "daemon": daemon}


def parser() -> argparse.ArgumentParser:
    """Return the command's options."""
    made = argparse.ArgumentParser(prog="benchmarks.steady", description=__doc__)
    made.add_argument("--through", choices=FORMS, default="triggerer", help="what waits for the jobs")
    made.add_argument("--minutes", type=float, default=60, help="how long jobs are begun")
    made.add_argument("--waiting", type=int, default=300, help="long jobs at any time")
    made.add_argument("--long", type=float, nargs=2, default=(60, 300), help="seconds that they take, from and to")
    made.add_argument("--rate", type=float, default=2, help="short jobs begun in a second")
    made.add_argument("--restart", type=float, default=10, help="minutes between restarts of the server; 0 for none")
    made.add_argument("--every", type=float, default=60, help="seconds between samples")
    made.add_argument("--ticks", type=float, default=30, help="seconds between two ticks of the daemon's sensors")
    made.add_argument("--write", type=Path, help="a file for the table and the plot as Markdown")
    made.add_argument("--process", action="store_true", help=argparse.SUPPRESS)
    return made


def main() -> None:
    """Watch a steady load, or be it."""
    given = parser().parse_args()
    if given.process and given.through == "triggerer":
        asyncio.run(triggerer.Load(given.waiting, given.rate, given.long).run(given.every))
        return
    if given.process:
        submitter.Load(given.waiting, given.rate, given.long).run()
        return
    form = FORMS[given.through]
    samples = form.watch(given)
    if given.write:
        given.write.write_text(as_markdown(samples, form.COLUMNS, form.PLOT, form.LINES), encoding="utf-8")


if __name__ == "__main__":
    main()
