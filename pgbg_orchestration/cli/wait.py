"""``pgbg wait``: until jobs that others launched are where a script needs them."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from typing import Annotated

import typer
from rich.text import Text

from pgbg_orchestration import pace
from pgbg_orchestration.ledger.history import ENDED_BADLY, STATES, JobEntry
from pgbg_orchestration.ledger.ledger import Ledger

from .codes import ExitCode
from .jobs import print_table, ready_launcher, states
from .screen import Stop, ending, err, plain, print_json
from .shared_options import Dsn, Json, Owner, Schema, seconds_option

COMMITTED = "committed"
NONE = "none"
_BAD_ENDS = (
    # The worst first: what a script has to look at before all else.
    ("unknown", ExitCode.UNKNOWN),
    ("failed", ExitCode.FAILED),
    ("lost", ExitCode.FAILED),
    ("cancelled", ExitCode.CANCELLED),
)
# A job that is further on has been there.
_PASSED = {"waiting": frozenset({"running", COMMITTED}), "running": frozenset({COMMITTED})}


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is waited for.

    Attributes
    ----------
    job_id, owner, label, series, since:
        Which jobs, as `pgbg jobs` has them; of each series the newest generation counts.
    states:
        Where they are to be, each of them in one of these.
    fail_on:
        States that end the wait.
    may_come:
        Wait for the first of them to be launched too.
    """

    job_id: str | None
    owner: str | None
    label: str | None
    series: str | None
    since: datetime | None
    states: Sequence[str]
    fail_on: Sequence[str]
    may_come: bool


def wait(
    job_id: Annotated[
        str | None, typer.Argument(metavar="ID", show_default=False, help="The job's id, as pgbg jobs --ids shows it.")
    ] = None,
    label: Annotated[
        str | None, typer.Option("--label", metavar="PATTERN", help="All jobs of such labels; * and ? stand in.")
    ] = None,
    series: Annotated[
        str | None, typer.Option("--series", metavar="PATTERN", help="All jobs of such series; * and ? stand in.")
    ] = None,
    since: Annotated[
        float | None, seconds_option("--since", help="Only those launched since then, such as 2h.")
    ] = None,
    state: Annotated[
        list[str] | None,
        typer.Option("--state", "-s", metavar="STATE", help=f"Until each is so: {', '.join(STATES)}."),
    ] = None,
    fail_on: Annotated[
        list[str] | None,
        typer.Option(
            "--fail-on",
            metavar="STATE",
            show_default=",".join(ENDED_BADLY),
            help="States that end the wait; none: wait through the tries of whoever launches them.",
        ),
    ] = None,
    may_come: Annotated[
        bool, typer.Option("--may-come", help="Wait for them to be launched, too.", show_default=False)
    ] = False,
    timeout: Annotated[float | None, seconds_option("--timeout", help="Longest wait; the jobs go on.")] = None,
    dsn: Dsn = None,
    schema: Schema = "pgbg",
    owner: Owner = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
    json: Json = False,
) -> None:
    """Wait for jobs, whoever launched them, until all are committed, or in another --state.

    Of each series the newest job counts. Ends with 0 when all are there, and else with what became of the worst: 6 not
    known, 3 failed or lost, 4 cancelled; 15 when the --timeout passed, 12 when there is no such job.
    """
    with ending(json):
        if job_id is None and label is None and series is None:
            raise Stop(ExitCode.REFUSED, "which jobs: say an id, a --label or a --series", todo="pgbg jobs --ids")
        wanted = Wanted(
            job_id,
            owner,
            label,
            series,
            None if since is None else datetime.now(UTC) - timedelta(seconds=since),
            states(state) or (COMMITTED,),
            [] if fail_on == [NONE] else states(fail_on, "--fail-on") or list(ENDED_BADLY),
            may_come,
        )
        try:
            found, code = asyncio.run(_wait(dsn or "", schema, wanted, timeout, quiet=quiet or json))
        except KeyboardInterrupt:
            raise Stop(ExitCode.INTERRUPTED, "what was launched goes on") from None
        if json:
            print_json({"jobs": [asdict(entry) for entry in found], "exit_code": int(code)})
        elif found and not quiet:
            print_table(found, ids=False)
        if code is ExitCode.NO_SUCH_JOB:
            raise Stop(code, None if json else "no such job, or it is not this login's to see")
        if code is ExitCode.WAITED_IN_VAIN:
            raise Stop(code, None if json else "not there in time; what was launched goes on")
        raise Stop(code)


async def _wait(
    dsn: str, schema: str, wanted: Wanted, longest: float | None, *, quiet: bool
) -> tuple[list[JobEntry], ExitCode]:
    began = time.monotonic()
    states: dict[tuple[str, str], str] = {}
    async with ready_launcher(dsn, schema) as launcher:
        while True:
            found = await _look(launcher.ledger, wanted)
            if not quiet:
                _tell(found, states)
            code = judge(found, wanted)
            waited = time.monotonic() - began
            if code is not None:
                return found, code
            if longest is not None and waited >= longest:
                return found, ExitCode.WAITED_IN_VAIN
            # Many look so, each with a query of its own: not as often as a job's own launcher.
            pause = max(pace.poll(waited), pace.SOONEST * 10)
            await asyncio.sleep(pause if longest is None else min(pause, longest - waited))


async def _look(ledger: Ledger, wanted: Wanted) -> list[JobEntry]:
    found = await ledger.jobs(job_id=wanted.job_id, label=wanted.label, series=wanted.series, since=wanted.since)
    return newest([entry for entry in found if wanted.owner in (None, entry.owner)])


def newest(entries: Sequence[JobEntry]) -> list[JobEntry]:
    """Return the newest generation of each series, the order kept."""
    latest: dict[tuple[str, str], JobEntry] = {}
    for entry in entries:
        series = (entry.owner, entry.series or entry.job_id)
        known = latest.get(series)
        if known is None or (entry.generation or 0) > (known.generation or 0):
            latest[series] = entry
    return [entry for entry in entries if latest[entry.owner, entry.series or entry.job_id] is entry]


def judge(entries: Sequence[JobEntry], wanted: Wanted) -> ExitCode | None:
    """Return how a wait ends, or None while it goes on.

    Parameters
    ----------
    entries:
        The jobs that count, as they are now.
    wanted:
        What is waited for.
    """
    if not entries:
        return None if wanted.may_come else ExitCode.NO_SUCH_JOB
    there = frozenset(wanted.states).union(*(_PASSED.get(state, frozenset()) for state in wanted.states))
    away = {entry.state for entry in entries} - there
    for state, code in _BAD_ENDS:
        if state in away and state in wanted.fail_on:
            return code
    if COMMITTED in away:
        return ExitCode.ENDED_OTHERWISE
    return None if away else ExitCode.OK


def _tell(entries: Sequence[JobEntry], states: dict[tuple[str, str], str]) -> None:
    """Print a line for each job whose state is another than it was."""
    news = [entry for entry in entries if states.get((entry.owner, entry.job_id)) != entry.state]
    states.update({(entry.owner, entry.job_id): entry.state for entry in entries})
    counts = ", ".join(f"{number} {state}" for state, number in Counter(entry.state for entry in entries).items())
    stamp = f"{datetime.now().astimezone():%H:%M:%S} "
    for entry in news:
        of_all = f"  ({counts})" if len(entries) > 1 else ""
        name = plain(entry.label or entry.job_id)
        err.print(Text.assemble((stamp, "dim"), f"{name}: {entry.state}", (of_all, "dim")), soft_wrap=True)
