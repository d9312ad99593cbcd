"""``pgbg``, the command line: one module for each group of commands; it begins in ``__main__``."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from inspect import cleandoc
from typing import Annotated

import typer
from typer.core import TyperCommand

from . import doctor, history, jobs, rows, run, server, setup, views, wait
from .codes import AFTERWARDS, MEANINGS, ExitCode
from .screen import out

# Before 0.27 typer made one paragraph of lines, and lines of paragraphs.
_NEXT = "\n" if [int(part) for part in version("typer").split(".")[:2]] >= [0, 27] else "\n\n"
_EXIT_CODES = _NEXT.join(
    [
        "[bold]Exit codes[/bold]",
        *(f"[cyan]{code:>3}[/cyan]  {text.replace('`', '')}" for code, text in MEANINGS.items()),
        AFTERWARDS,
    ]
)

app = typer.Typer(
    name="pgbg",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,  # a connection string is among them
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=_EXIT_CODES,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        out.print(f"pgbg {version('pg-background-orchestration')}")
        raise typer.Exit(ExitCode.OK)


@app.callback()
def _pgbg(
    _: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Run SQL in PostgreSQL's background workers (pg_background), with an outcome that is certain.

    Connections are made as psql makes them: from --dsn, or from PGHOST, PGDATABASE, PGUSER, PGSERVICE, ~/.pgpass, …
    """


def _add(name: str, function: Callable[..., None], panel: str, kind: type[TyperCommand] = TyperCommand) -> None:
    # Typer keeps the line ends of a docstring's later paragraphs, whatever the terminal's width.
    paragraphs = cleandoc(function.__doc__ or "").split("\n\n")
    text = "\n\n".join(paragraph.replace("\n", " ") for paragraph in paragraphs)
    app.command(name, cls=kind, help=text, rich_help_panel=panel)(function)


_add("run", run.run, "Jobs", run.CommandWithSql)
_add("jobs", jobs.jobs, "Jobs")
_add("top", views.top, "Jobs")
_add("web", views.web, "Jobs")
_add("timeline", views.timeline, "Jobs")
_add("wait", wait.wait, "Jobs")
_add("result", rows.result, "Jobs")
_add("history", history.history, "Jobs")
_add("cancel", jobs.cancel, "Jobs")
_add("prune", jobs.prune, "Jobs")
_add("doctor", doctor.doctor, "Servers")
_add("install", setup.install, "Servers")
_add("uninstall", setup.uninstall, "Servers")
app.add_typer(server.app, name="server", rich_help_panel="Servers")
