"""``pgbg jobs``, ``pgbg cancel`` and ``pgbg prune``: what all sessions' jobs do, and did."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pgbg_orchestration.job import Kind
from pgbg_orchestration.launcher import Launcher
from pgbg_orchestration.ledger import readiness
from pgbg_orchestration.ledger.history import STATES, JobEntry
from pgbg_orchestration.phrases import duration
from pgbg_orchestration.view.states import SIGNS, STYLES

from .codes import ExitCode
from .screen import Stop, ago, ending, err, out, plain, print_json
from .shared_options import Dsn, Json, Owner, Schema, seconds_option

if TYPE_CHECKING:
    from pgbg_orchestration.view.seen import JobSeen

ROOMY = 110  # columns of a terminal that shows the columns which matter less
RETRY_HORIZON = 7 * 86400.0  # seconds; see docs/cli.md
NOT_ENDED = ("running", "waiting")


@contextlib.asynccontextmanager
async def ready_launcher(dsn: str, schema: str) -> AsyncIterator[Launcher]:
    """Give a launcher for a server that has the schema; asked for once, so that a dead server is told at once."""
    async with Launcher(dsn, schema=schema) as launcher:
        readiness.require(await launcher.facts(), schema, receipts=True, read_write=True)
        yield launcher


def states(values: list[str] | None, option: str = "--state") -> list[str]:
    """Return the states that an option names, which comes several times or with commas.

    Raises
    ------
    typer.BadParameter
        One of them is no state.
    """
    wanted = [state for value in values or () for state in value.split(",")]
    for state in wanted:
        if state not in STATES:
            raise typer.BadParameter(f"{state!r} is none of {', '.join(STATES)}", param_hint=option)
    return wanted


def jobs(
    dsn: Dsn = None,
    schema: Schema = "pgbg",
    state: Annotated[
        list[str] | None, typer.Option("--state", "-s", metavar="STATE", help=f"Only these: {', '.join(STATES)}.")
    ] = None,
    label: Annotated[str | None, typer.Option("--label", metavar="PATTERN", help="Label; * and ? stand in.")] = None,
    series: Annotated[str | None, typer.Option("--series", metavar="PATTERN", help="Series; * and ? stand in.")] = None,
    id_: Annotated[
        str | None, typer.Option("--id", metavar="ID", help="One job, with all that is known of it.")
    ] = None,
    ids: Annotated[bool, typer.Option("--ids", help="Show ids in the place of labels.")] = False,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="At most so many, newest first.")] = 50,
    json: Json = False,
) -> None:
    """List the jobs of all sessions with their true state, newest first."""
    with ending(json):
        filters: Any = {"states": states(state), "label": label, "series": series, "limit": limit + 1}
        if id_ is not None:
            _tell_of_one(asyncio.run(_look_at(dsn or "", schema, id_, filters)), id_, json=json)
            return
        found = asyncio.run(_list(dsn or "", schema, filters))
        more, found = len(found) > limit, found[:limit]
        if json:
            print_json([asdict(entry) for entry in found])
        elif not found:
            err.print(Text("no jobs that this login may see", "dim"))
        else:
            print_table(found, ids=ids)
            if more:
                err.print(Text(f"only the newest {limit}: more with --limit", "dim"))


async def _list(dsn: str, schema: str, filters: Mapping[str, Any]) -> list[JobEntry]:
    async with ready_launcher(dsn, schema) as launcher:
        return await launcher.ledger.jobs(**filters)


async def _look_at(dsn: str, schema: str, job_id: str, filters: Mapping[str, Any]) -> list[JobSeen]:
    from pgbg_orchestration.view.seen import seen_now
    from pgbg_orchestration.view.source import ServerSource

    async with ready_launcher(dsn, schema) as launcher:
        source = ServerSource(launcher)
        return [await seen_now(source, entry) for entry in await launcher.ledger.jobs(job_id=job_id, **filters)]


def _tell_of_one(found: Sequence[JobSeen], job_id: str, *, json: bool) -> None:
    """Tell all that is known of the job of an id: several, where several roles have one."""
    if not found:
        raise Stop(ExitCode.NO_SUCH_JOB, f"no job with the id {job_id!r}, or it is not this login's to see")
    if json:
        print_json([_as_json(seen) for seen in found])
        return
    for seen in found:
        _show_one(seen)


def print_table(entries: Sequence[JobEntry], *, ids: bool) -> None:
    """Print jobs, a line for each."""
    # Into a pipe or a file goes all of it, however long the lines get; an id is for copying, and is never cut.
    fits = out.is_terminal and not ids
    roomy = not fits or out.width >= ROOMY
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0), pad_edge=False, expand=fits)
    table.add_column("STATE", no_wrap=True, width=11)
    table.add_column("ID" if ids else "LABEL", no_wrap=True, overflow="ellipsis", ratio=3)
    table.add_column("LAUNCHED", justify="right", no_wrap=True, min_width=8)
    table.add_column("TOOK", justify="right", no_wrap=True, min_width=6)
    table.add_column("ROWS", justify="right", no_wrap=True, min_width=5)
    if roomy:
        table.add_column("TRY", justify="right", no_wrap=True, width=3)
        table.add_column("BY", no_wrap=True, overflow="ellipsis", max_width=24 if fits else None)
    table.add_column("WHAT", no_wrap=True, overflow="ellipsis", ratio=4 if roomy else 2)
    for entry in entries:
        table.add_row(
            _state(entry),
            Text(plain(entry.job_id if ids else entry.label or entry.job_id)),
            ago(entry.launched_at),
            _took(entry),
            "" if entry.row_count is None else f"{entry.row_count:,}",
            *([Text(str(entry.attempt or "")), Text(plain(entry.launched_by or ""), "dim")] if roomy else []),
            _what(entry),
        )
    (out if fits else Console(width=10_000, highlight=False)).print(table, crop=False)


def _state(entry: JobEntry) -> Text:
    return Text(f"{SIGNS[entry.state]} {entry.state}", STYLES[entry.state])


def _took(entry: JobEntry) -> str:
    if entry.launched_at is None or entry.state in ("lost", "waiting"):
        return ""
    end = datetime.now(UTC) if entry.state == "running" else entry.ended_at
    return duration(max((end - entry.launched_at).total_seconds(), 0)) if end else ""


def _what(entry: JobEntry) -> Text:
    if entry.state == "running":
        return Text(f"worker {entry.running_pid}")
    if entry.state in ("failed", "lost", "unknown") and entry.sqlstate:
        return Text(plain(f"{entry.sqlstate} {entry.message or ''}"), "red")
    if entry.state == "cancelled":
        return Text(plain(f"by {entry.cancelled_by}: {entry.reason}" if entry.cancelled_by else entry.reason or ""))
    return Text(plain(entry.command_tag or ""))


def _as_json(seen: JobSeen) -> dict[str, Any]:
    assert seen.line.job is not None
    detail = asdict(seen.detail) if seen.detail is not None else {"statement": None, "past_attempts": [], "kept": {}}
    return {**asdict(seen.line.job), "waits_for": seen.line.waits_for, **detail}


def _show_one(seen: JobSeen) -> None:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in seen.facts():
        grid.add_row(name, Text(plain(value), STYLES[seen.line.state] if name == "state" else ""))
    for one in seen.tries():
        ended = f", ended {one.ended_at}" if one.ended_at else ""
        by = f"{one.launched_by}{f', worker {one.pid}' if one.pid else ''}"
        grid.add_row(
            f"attempt {one.number}", Text(f"{plain(one.how)}\nlaunched {one.launched_at}{ended}, by {plain(by)}")
        )
    grid.add_row(
        "SQL", Text(plain(seen.statement, keep_lines=True)) if seen.statement else Text(seen.why_no_statement, "dim")
    )
    out.print(grid)


def cancel(
    job_id: Annotated[
        str | None, typer.Argument(metavar="ID", show_default=False, help="The job's id, as pgbg jobs --ids shows it.")
    ] = None,
    label: Annotated[
        str | None,
        typer.Option("--label", metavar="PATTERN", help="The one job not ended with this label; * and ? stand in."),
    ] = None,
    dsn: Dsn = None,
    schema: Schema = "pgbg",
    owner: Owner = None,
    reason: Annotated[str, typer.Option("--reason", help="Goes into the receipt.")] = "pgbg cancel",
    json: Json = False,
) -> None:
    """Cancel a job, for good, whoever launched it: its worker is ended, and one that starts later is refused.

    Says how it was decided: cancelled, or too late and committed (exit code 11).
    """
    with ending(json):
        if (job_id is None) == (label is None):
            raise Stop(ExitCode.REFUSED, "which job: say its id, or its --label", todo="pgbg jobs --ids")
        decided, entry = asyncio.run(_cancel(dsn or "", schema, job_id, label, owner, reason))
        shown = (plain(entry.label or entry.job_id), "bold")
        if json:
            print_json({"job_id": entry.job_id, "owner": entry.owner, "label": entry.label, "decided": decided})
        elif decided == "cancelled":
            of_it = "nothing of it" if entry.kind == Kind.RECEIPT else "nothing but what it committed by itself"
            text = f"{of_it} is committed; it runs again with run --retry-cancelled only"
            out.print(Text.assemble(("⊘ cancelled  ", "yellow"), shown, f"\n  {text}"))
        else:
            out.print(Text.assemble(("✓ too late, committed  ", "yellow"), shown))
        raise Stop(ExitCode.OK if decided == "cancelled" else ExitCode.TOO_LATE)


async def _cancel(
    dsn: str, schema: str, job_id: str | None, label: str | None, owner: str | None, reason: str
) -> tuple[str, JobEntry]:
    async with ready_launcher(dsn, schema) as launcher:
        of_state = () if label is None else NOT_ENDED
        found = await launcher.ledger.jobs(job_id=job_id, label=label, states=of_state)
        found = [entry for entry in found if owner in (None, entry.owner)]
        if not found:
            # A mark for an id that was mistyped would cancel nothing, and say that it did.
            wanted = f"the id {job_id!r}" if label is None else f"the label {label!r} is running or waiting"
            raise Stop(ExitCode.NO_SUCH_JOB, f"no job with {wanted}, or it is not this login's to see")
        if len(found) > 1:
            several = ", ".join(entry.owner if label is None else entry.job_id for entry in found)
            if label is None:
                raise Stop(ExitCode.REFUSED, f"several roles have a job with this id: {several}", todo="Say --owner.")
            raise Stop(ExitCode.REFUSED, f"several jobs have such a label: {several}", todo="Say the id of one.")
        [entry] = found
        return await launcher.cancel(entry.job_id, owner=entry.owner, series=entry.series, reason=reason), entry


def prune(
    older_than: Annotated[
        float, seconds_option("--older-than", unit=True, help="Forget what ended longer ago, such as 90d.")
    ],
    dsn: Dsn = None,
    schema: Schema = "pgbg",
    retry_horizon: Annotated[
        float,
        seconds_option(
            "--retry-horizon", unit=True, show_default="7d", help="The longest time after which a retry may still come."
        ),
    ] = RETRY_HORIZON,
    json: Json = False,
) -> None:
    """Forget old receipts and history.

    A retry that comes after its job's receipt is gone runs the job again. So nothing younger than the retry horizon
    can be pruned: lower --retry-horizon when you know that no retry comes as late as that.
    """
    with ending(json):
        if older_than < retry_horizon:
            raise Stop(
                ExitCode.REFUSED,
                f"--older-than is below the retry horizon of {retry_horizon / 86400:g} days: a job that is retried "
                "after its receipt is gone runs again",
                todo="Prune later, or lower --retry-horizon when no retry can come as late as that.",
            )
        receipts, history = asyncio.run(_prune(dsn or "", schema, older_than))
        if json:
            print_json({"receipts": receipts, "jobs": history})
        else:
            out.print(
                Text.assemble(("✓ ", "green"), f"forgot {receipts:,} receipts and {history:,} jobs of the history")
            )


async def _prune(dsn: str, schema: str, older_than: float) -> tuple[int, int]:
    async with ready_launcher(dsn, schema) as launcher:
        return await launcher.ledger.prune(timedelta(seconds=older_than))
