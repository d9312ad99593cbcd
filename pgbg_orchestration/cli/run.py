"""``pgbg run``: one job, watched until its outcome is certain."""

from __future__ import annotations

import asyncio
import re
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperCommand

from pgbg_orchestration import phrases
from pgbg_orchestration.errors import NOT_BY_THIS_CALL, JobCancelled, WorkerError
from pgbg_orchestration.job import Job, Kind
from pgbg_orchestration.launcher import Launcher
from pgbg_orchestration.outcome import Cause, Outcome
from pgbg_orchestration.rows import Fetch
from pgbg_orchestration.statements import files
from pgbg_orchestration.verdict import CANCELED

from . import rows as rows_of
from . import stream as stream_of
from .codes import ExitCode
from .interrupts import until_interrupted
from .progress import Display
from .rows import FormatOption, OutputOption
from .screen import Stop, ending, err, out, plain, print_json
from .shared_options import Dsn, Json, Owner, Schema, pairs, seconds_option

_COMMENT = re.compile(r"--[^=\s]*\s")
_GUARD = " "
_STDIN = Path("-")


class CommandWithSql(TyperCommand):
    """A command whose argument may be SQL that begins with a comment, which would be taken for an option."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the command line; a blank keeps such SQL from being an option, whose name has none."""
        valued = {name for option in self.params if not getattr(option, "is_flag", True) for name in option.opts}
        before = [None, *args]
        guarded = [
            _GUARD + arg if _COMMENT.match(arg) and previous not in valued else arg
            for previous, arg in zip(before, args, strict=False)
        ]
        return super().parse_args(ctx, guarded)


class OnSuperseded(StrEnum):
    """What to do with the worker of an older generation."""

    CANCEL = "cancel"
    WAIT = "wait"


_WHICH, _HOW, _WHEN = "Which work it is", "How the SQL runs", "Waiting and repeating"


def run(
    sql: Annotated[
        str | None, typer.Argument(metavar="SQL", show_default=False, help="The statements; - or nothing: stdin.")
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            "--file",
            "-f",
            metavar="FILE",
            help="Read the SQL from a file, in UTF-8; - is standard input.",
        ),
    ] = None,
    dsn: Dsn = None,
    schema: Schema = "pgbg",
    id_: Annotated[
        str | None,
        typer.Option(
            "--id",
            metavar="ID",
            help="Says which work it is: run again with the same id, it is attached to and never commits twice.",
            show_default="a random one",
            rich_help_panel=_WHICH,
        ),
    ] = None,
    label: Annotated[
        str | None, typer.Option(metavar="TEXT", help="What people see, 64 bytes at most.", rich_help_panel=_WHICH)
    ] = None,
    series: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Jobs of one series never run at once.", rich_help_panel=_WHICH),
    ] = None,
    generation: Annotated[
        int | None,
        typer.Option(min=0, help="Which run of its series; a newer one ends older ones.", rich_help_panel=_WHICH),
    ] = None,
    owner: Owner = None,
    param: Annotated[
        list[str] | None,
        typer.Option(
            "--param", "-p", metavar="NAME=VALUE", help="Fills %(NAME)s in the SQL, quoted.", rich_help_panel=_HOW
        ),
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="NAME=VALUE", help="A server setting, such as work_mem=256MB.", rich_help_panel=_HOW
        ),
    ] = None,
    role: Annotated[
        str | None, typer.Option(metavar="ROLE", help="Role that the SQL runs as.", rich_help_panel=_HOW)
    ] = None,
    isolation: Annotated[
        str | None,
        typer.Option(metavar="LEVEL", help="read-committed, repeatable-read or serializable.", rich_help_panel=_HOW),
    ] = None,
    kind: Annotated[
        Kind | None,
        typer.Option(help="How the outcome is made certain.", show_default="what the SQL needs", rich_help_panel=_HOW),
    ] = None,
    verify_sql: Annotated[
        str | None,
        typer.Option(metavar="QUERY", help="True when the work is done; decides unknown ends.", rich_help_panel=_HOW),
    ] = None,
    drop_invalid_index: Annotated[
        bool,
        typer.Option(
            "--drop-invalid-index",
            help="First drop the invalid index that an earlier CREATE INDEX CONCURRENTLY left.",
            rich_help_panel=_HOW,
        ),
    ] = False,
    redact_details: Annotated[
        bool, typer.Option("--redact-details", help="Keep no text of the server's errors.", rich_help_panel=_HOW)
    ] = False,
    queue_size: Annotated[
        int | None, typer.Option(metavar="BYTES", help="The worker's output queue.", rich_help_panel=_HOW)
    ] = None,
    timeout: Annotated[
        float | None,
        seconds_option("--timeout", help="Time for all of it, waiting included; then cancel.", rich_help_panel=_WHEN),
    ] = None,
    slot_timeout: Annotated[
        float | None,
        seconds_option("--slot-timeout", help="Longest wait for a worker slot.", rich_help_panel=_WHEN),
    ] = None,
    on_superseded: Annotated[
        OnSuperseded,
        typer.Option(help="An older generation at work: cancel it, or wait.", rich_help_panel=_WHEN),
    ] = OnSuperseded.CANCEL,
    rows: Annotated[
        bool,
        typer.Option("--rows", help="Keep the last statement's rows beside the receipt, and print them."),
    ] = False,
    each: Annotated[
        bool,
        typer.Option("--each", help="Keep and print the rows of each statement that gives any, not of the last only."),
    ] = False,
    form: FormatOption = None,
    output: OutputOption = None,
    max_rows: Annotated[
        int | None, typer.Option(min=1, help="Rows to keep at most; with more the job fails.", show_default="10000")
    ] = None,
    max_bytes: Annotated[
        int | None,
        typer.Option(min=1, help="Bytes of rows to keep at most; with more the job fails.", show_default="16777216"),
    ] = None,
    stream: Annotated[
        bool,
        typer.Option("--stream", help="Write the last statement's rows as they come, once; they are not kept."),
    ] = False,
    notices: Annotated[
        bool,
        typer.Option("--notices", help="Show what the SQL raises, as it is raised.", rich_help_panel=_WHEN),
    ] = False,
    retry_cancelled: Annotated[
        bool, typer.Option("--retry-cancelled", help="Run it though it was cancelled before.", rich_help_panel=_WHEN)
    ] = False,
    accept_changed_sql: Annotated[
        bool,
        typer.Option("--accept-changed-sql", help="Let the id stand for other SQL than before.", rich_help_panel=_WHEN),
    ] = False,
    leave: Annotated[
        bool, typer.Option("--leave", help="On Ctrl-C let the worker go on.", rich_help_panel=_WHEN)
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress display.")] = False,
    json: Json = False,
) -> None:
    """Run SQL in a background worker and wait until its outcome is certain.

    All statements run in one transaction and see each other's rows. Ctrl-C (and SIGTERM) cancels the worker, waits
    until that is decided, and says how: cancelled (exit code 4), or too late and committed (0). With --leave the
    worker goes on (130); the same command with the same --id attaches to it.
    """
    with ending(json, of_job=True):
        text = _read_sql(sql, file)
        job = Job(
            text,
            id=id_,
            label=label,
            series=series,
            generation=generation,
            owner=owner,
            parameters=pairs(param, "--param") if param else None,
            settings=pairs(setting or (), "--set"),
            role=role,
            isolation=isolation.replace("-", " ") if isolation else None,
            kind=kind,
            verify_sql=verify_sql,
            drop_invalid_index=drop_invalid_index,
            redact_details=redact_details,
            queue_size=queue_size,
            timeout=timeout,
            fetch=None
            if stream
            else _fetch(rows or each or form is not None or output is not None, max_rows, max_bytes, each=each),
        )
        if stream:
            _check_stream(rows or each, max_rows, max_bytes, json, output)
        options = {
            "slot_timeout": slot_timeout,
            "on_superseded": on_superseded.value,
            "notices": notices,
            "retry_cancelled": retry_cancelled,
            "accept_changed_sql": accept_changed_sql,
            "on_cancel": "leave" if leave else "cancel",
        }
        if stream:
            sink = stream_of.Sink(form or rows_of.Format.TABLE, output)
            with Display(job, silent=quiet) as display:
                outcome = asyncio.run(_stream(dsn or "", schema, job, options, display, sink))
            if json:
                print_json(outcome.to_dict())
            else:
                _show(outcome, err if output is None else out)
            return
        with Display(job, silent=quiet) as display:
            outcome = asyncio.run(_follow(dsn or "", schema, job, options, display))
        if json:
            kept = {"results": rows_of.as_json(outcome.results)} if job.fetch else {}
            print_json({**outcome.to_dict(), **kept})
            return
        if job.fetch:
            rows_of.write(outcome.results, form or rows_of.Format.TABLE, output)
        # What a program reads from standard output is rows, and nothing else.
        _show(outcome, err if job.fetch and output is None else out)


def _read_sql(sql: str | None, file: Path | None) -> str:
    if sql is not None and file is not None:
        raise Stop(ExitCode.REFUSED, "SQL was given twice: as an argument and by --file")
    if sql is not None and sql != "-":
        return sql.removeprefix(_GUARD)
    try:
        if file is not None and file != _STDIN:
            return files.read(file)
        if sql is None and file is None and sys.stdin.isatty():
            raise Stop(ExitCode.REFUSED, "no SQL", todo="pgbg run 'select 1', or -f FILE, or on standard input")
        return files.decode(sys.stdin.buffer.read())
    except files.UnreadableSql as error:
        raise Stop(ExitCode.REFUSED, str(error)) from error
    except OSError as error:
        raise Stop(ExitCode.REFUSED, f"{file or 'standard input'} cannot be read: {error.strerror}") from error


async def _follow(dsn: str, schema: str, job: Job, options: dict[str, Any], display: Display) -> Outcome:
    async with Launcher(dsn, schema=schema) as launcher:
        work = launcher.run(job, observer=display.on_event, **options)
        outcome = await until_interrupted(work, display, leave=options["on_cancel"] == "leave")
        return outcome or _interrupted(job, options, display)


async def _stream(
    dsn: str, schema: str, job: Job, options: dict[str, Any], display: Display, sink: stream_of.Sink
) -> Outcome:
    outcome = await stream_of.follow(dsn, schema, job, options, display, sink)
    if outcome is not None:
        return outcome
    _interrupted(job, options, display)
    raise Stop(ExitCode.INTERRUPTED, "the job is committed; none of its rows were read, and they are lost")


def _interrupted(job: Job, options: dict[str, Any], display: Display) -> Outcome:
    if options["on_cancel"] == "leave":
        raise Stop(
            ExitCode.INTERRUPTED,
            "its worker, if there is one, goes on",
            todo=f"pgbg jobs --id '{job.id}', or the same command again with --id '{job.id}'",
        )
    return _decided(job, display)


def _decided(job: Job, display: Display) -> Outcome:
    """Say how a job ended whose wait was interrupted; the core has waited until it was decided, and told the display.

    Raises
    ------
    JobCancelled
        It is cancelled.
    PgbgError
        Its worker does not end, or nobody knows.
    """
    decision = display.decision
    if isinstance(decision, Outcome):
        display.say("the interrupt came too late: it is committed")
        return decision
    if decision is None:
        raise JobCancelled(
            "interrupted before anything was launched",
            job_id=job.id,
            label=job.label,
            data_state=NOT_BY_THIS_CALL,  # it was not looked at either
        )
    ours = isinstance(decision, JobCancelled) and decision.cause is Cause.INTERRUPTED
    unmarked = job.kind is Kind.SESSION and isinstance(decision, WorkerError) and decision.sqlstate == CANCELED
    if not (ours or unmarked):
        raise decision
    raise JobCancelled(
        "cancelled by the interrupt",
        cause=Cause.INTERRUPTED,
        todo="To run it all the same: --retry-cancelled." if ours else None,
        job_id=job.id,
        label=job.label,
        data_state=decision.data_state if ours else None,
    )


def _fetch(wanted: bool, max_rows: int | None, max_bytes: int | None, *, each: bool = False) -> Fetch | None:
    bounds = {"max_rows": max_rows, "max_bytes": max_bytes, "return_last": False if each else None}
    given = {name: value for name, value in bounds.items() if value is not None}
    return Fetch.of(given or True) if wanted or given else None


def _check_stream(rows: bool, max_rows: int | None, max_bytes: int | None, json: bool, output: Path | None) -> None:
    """Refuse what does not go with streamed rows."""
    if rows or max_rows is not None or max_bytes is not None:
        raise Stop(
            ExitCode.REFUSED,
            "rows are either kept (--rows, --each, --max-rows, --max-bytes) or streamed (--stream)",
            todo="Leave one of them out.",
        )
    if json and output is None:
        raise Stop(
            ExitCode.REFUSED,
            "--json prints one document on standard output, where the streamed rows would stand too",
            todo="Write the rows into a file (-o FILE), or as JSON (--format json).",
        )


def _show(outcome: Outcome, console: Console) -> None:
    parts = [
        *phrases.summary(outcome),
        *([f"worker {outcome.worker_pid}"] if outcome.worker_pid else []),
        *([f"attempt {outcome.attempt}"] if outcome.attempt else []),
    ]
    console.print(Text.assemble(("✓ committed  ", "bold green"), (plain(outcome.label), "bold")), soft_wrap=True)
    console.print(Text("  " + " · ".join(parts)), soft_wrap=True)
    if outcome.job_id != outcome.label:
        console.print(Text(f"  id {plain(outcome.job_id)}", "dim"), soft_wrap=True)
    if not outcome.launched:
        console.print(Text("  by an earlier or another launch; it did not run again", "dim"))
