"""``pgbg server``: an embedded PostgreSQL of one's own, to try the package with."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, cast

import typer
from rich.table import Table
from rich.text import Text

from pgbg_orchestration.embedded.binaries import NoPostgresError
from pgbg_orchestration.embedded.cache import default_data_directory
from pgbg_orchestration.embedded.extension import RealExtensionUnavailableError
from pgbg_orchestration.embedded.server import EmbeddedServer, EmbeddedServerError, ExtensionChoice
from pgbg_orchestration.embedded.standin import StandinUnavailableError, Surface
from pgbg_orchestration.embedded.status import PORT, SUPERUSER, ServerStatus
from pgbg_orchestration.embedded.status import status as status_of

from .codes import ExitCode
from .screen import Stop, ending, out, plain, print_json
from .shared_options import Json

app = typer.Typer(
    help="An embedded PostgreSQL server of your own, to try the package with. Never for data that you must keep.",
    no_args_is_help=True,
)

DataDir = Annotated[
    Path | None,
    typer.Option(
        "--data-dir",
        metavar="DIR",
        envvar="PGBG_DATA_DIR",
        show_default="the usual place for a user's data",
        help="PostgreSQL's data directory.",
    ),
]
Database = Annotated[str, typer.Option("--dbname", "-d", metavar="NAME", help="Database to connect to.")]


@contextmanager
def _serving(json: bool) -> Iterator[None]:
    with ending(json):
        try:
            yield
        except (EmbeddedServerError, NoPostgresError, RealExtensionUnavailableError, StandinUnavailableError) as error:
            raise Stop(ExitCode.NOT_READY, str(error)) from error


def _running(data_dir: Path | None) -> ServerStatus:
    directory = data_dir or default_data_directory()
    found = status_of(directory)
    if found is None:
        raise Stop(ExitCode.UNREACHABLE, f"no server runs on {directory}", todo="pgbg server start")
    return found


@app.command()
def start(
    data_dir: DataDir = None,
    extension: Annotated[
        str, typer.Option(metavar="auto|real|stand-in", help="Which pg_background; auto prefers the real one.")
    ] = "auto",
    surface: Annotated[str, typer.Option(metavar="2.0|1.9", help="What a stand-in offers.")] = "2.0",
    max_worker_processes: Annotated[int, typer.Option(min=1, help="PostgreSQL's setting of that name.")] = 64,
    json: Json = False,
) -> None:
    """Start the server, or say where it runs already. It stays when this command ends."""
    with _serving(json):
        try:
            server = EmbeddedServer(
                data_dir or default_data_directory(),
                max_worker_processes=max_worker_processes,
                extension=cast(ExtensionChoice, extension),  # checked there
                surface=cast(Surface, surface),
            )
        except ValueError as error:
            raise Stop(ExitCode.REFUSED, str(error)) from error
        server.start()
        _show(_running(server.data_dir), json, server.why_standin)


@app.command()
def stop(data_dir: DataDir = None, json: Json = False) -> None:
    """Stop the server; its data stay."""
    with _serving(json):
        found = _running(data_dir)
        EmbeddedServer(found.data_dir).stop()
        if json:
            print_json({"data_dir": found.data_dir, "stopped": True})
        else:
            out.print(Text.assemble(("✓ ", "green"), f"stopped; its data stay in {found.data_dir}"), soft_wrap=True)


@app.command()
def status(data_dir: DataDir = None, json: Json = False) -> None:
    """Say whether the server runs, with which extension, and how to reach it (exit code 8: it does not run)."""
    with _serving(json):
        _show(_running(data_dir), json)


@app.command()
def conninfo(data_dir: DataDir = None, dbname: Database = "postgres", json: Json = False) -> None:
    """Print a connection string for --dsn: pgbg jobs --dsn "$(pgbg server conninfo)"."""
    with _serving(json):
        text = _running(data_dir).conninfo(dbname)
        if json:
            print_json({"conninfo": text})
        else:
            typer.echo(text)


@app.command()
def connect(data_dir: DataDir = None, dbname: Database = "postgres") -> None:
    """Open psql on the server."""
    with _serving(json=False):
        found = _running(data_dir)
        beside = EmbeddedServer(found.data_dir).binaries.directory / "psql"
        psql = str(beside) if beside.exists() else shutil.which("psql")
        if psql is None:
            text = "there is no psql on this machine"
            raise Stop(ExitCode.NOT_READY, text, todo=f"Connect with another client: {found.conninfo(dbname)}")
        os.execv(psql, [psql, found.conninfo(dbname)])  # noqa: S606  (psql takes this process's place and terminal)


def _show(found: ServerStatus, json: bool, why_standin: str | None = None) -> None:
    conninfo = found.conninfo()
    if json:
        fields = {"data_dir": found.data_dir, "pid": found.pid, "extension": found.extension, "surface": found.surface}
        print_json({"running": True, **fields, "conninfo": conninfo, "why_standin": why_standin})
        return
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    out.print(Text.assemble(("✓ ", "green"), ("running", "bold"), f", pid {found.pid}"))
    grid.add_row("  pg_background", found.extension)
    if why_standin:
        grid.add_row("", Text(f"not the real one: {plain(why_standin)}", "yellow"))
    grid.add_row("  data", str(found.data_dir))
    out.print(grid)
    for line in (
        f"export PGHOST={found.socket_dir} PGPORT={PORT} PGUSER={SUPERUSER} PGDATABASE=postgres",
        "pgbg install && pgbg doctor",
    ):
        out.print(Text(f"  → {line}", "cyan"), soft_wrap=True)
