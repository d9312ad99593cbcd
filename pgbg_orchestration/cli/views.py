"""``pgbg top``, ``pgbg web`` and ``pgbg timeline``: what runs now, and what ran, to look at."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import sys
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated

import typer

from .codes import ExitCode
from .jobs import ready_launcher
from .screen import Stop, ending, err
from .shared_options import Dsn, Schema, seconds_option

if TYPE_CHECKING:
    from starlette.requests import Request

    from pgbg_orchestration.ledger.history import JobEntry
    from pgbg_orchestration.view.source import Source

MOST_JOBS = 5_000


def top(
    dsn: Dsn = None,
    schema: Schema = "pgbg",
    every: Annotated[float, seconds_option("--every", show_default="2s", help="From one look to the next.")] = 2.0,
) -> None:
    """Watch every job and every worker of the database, live."""
    with ending(False):
        with _extra("top", "textual"):
            from pgbg_orchestration.view.top import Top
        if not sys.stdout.isatty():
            raise Stop(ExitCode.REFUSED, "top needs a terminal", todo="pgbg jobs prints a list")

        async def watch() -> None:
            async with _source(dsn or "", schema) as source:
                await Top(source, every=every).run_async()

        asyncio.run(watch())


def web(
    dsn: Dsn = None,
    schema: Schema = "pgbg",
    host: Annotated[str, typer.Option("--host", help="Where to listen; it asks nobody for a password.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0: one that is free.")] = 8474,
    allow_cancel: Annotated[
        bool, typer.Option("--allow-cancel", help="Let whoever reaches the page cancel jobs, as this login.")
    ] = False,
    show_sql: Annotated[
        bool, typer.Option("--sql/--no-sql", help="Show a job's SQL on its page, without values of parameters.")
    ] = True,
    show_rows: Annotated[
        bool, typer.Option("--rows", help="Show on a job's page the first of the rows that it kept.")
    ] = False,
    airflow_url: Annotated[str | None, typer.Option("--airflow-url", metavar="URL", help="Jobs link to it.")] = None,
    dagster_url: Annotated[str | None, typer.Option("--dagster-url", metavar="URL", help="Jobs link to it.")] = None,
) -> None:
    """Serve a page that shows jobs and workers as they run, and a timeline of what ran.

    Whoever reaches it sees what this login sees: it listens on this machine only, unless --host says otherwise.
    """
    with ending(False):
        with _extra("web", "starlette", "uvicorn", "plotly"):
            import uvicorn

            from pgbg_orchestration.view.web.app import build_app

        async def anybody(_: Request, __: JobEntry) -> None:
            """Whoever reaches the page may: the option says so."""

        async def shown(_: Request, __: JobEntry) -> bool:
            return True

        named = {"airflow": airflow_url, "dagster": dagster_url}
        app = build_app(
            lambda: _source(dsn or "", schema),
            may_cancel=anybody if allow_cancel else None,
            may_see_sql=shown if show_sql else None,
            may_see_rows=shown if show_rows else None,
            links={name: url for name, url in named.items() if url},
            hosts=("localhost", "127.0.0.1", "[::1]") if _is_loopback(host) else ("*",),
        )
        if not _is_loopback(host):
            err.print(f"anybody who reaches {host} sees these jobs", style="bold yellow")
        asyncio.run(_ask_once(dsn or "", schema))
        uvicorn.run(app, host=host, port=port, log_level="warning", access_log=False)


def timeline(
    dsn: Dsn = None,
    schema: Schema = "pgbg",
    since: Annotated[
        float, seconds_option("--since", unit=True, show_default="1d", help="How far back, such as 6h or 7d.")
    ] = 86400.0,
    label: Annotated[str | None, typer.Option("--label", metavar="PATTERN", help="Label; * and ? stand in.")] = None,
) -> None:
    """Print the page as one HTML file that needs no network: pgbg timeline > file.html."""
    with ending(False):
        with _extra("web", "starlette", "plotly"):
            from pgbg_orchestration.view.timeline import file_of
        if sys.stdout.isatty():
            raise Stop(ExitCode.REFUSED, "timeline prints a file of 5 MB", todo="pgbg timeline > timeline.html")

        async def drawn() -> str:
            async with _source(dsn or "", schema) as source:
                start = datetime.now(UTC) - timedelta(seconds=since)
                jobs = await source.history(since=start, label=label, limit=MOST_JOBS + 1)
                return file_of(await source.board(), jobs[:MOST_JOBS], more=len(jobs) > MOST_JOBS)

        typer.echo(asyncio.run(drawn()))


@contextlib.asynccontextmanager
async def _source(dsn: str, schema: str) -> AsyncIterator[Source]:
    from pgbg_orchestration.view.source import ServerSource

    async with ready_launcher(dsn, schema) as launcher:
        yield ServerSource(launcher)


async def _ask_once(dsn: str, schema: str) -> None:
    """Tell at once, and not behind a page, that a server is away or not ready."""
    async with _source(dsn, schema) as source:
        await source.board(most_ended=0)


@contextlib.contextmanager
def _extra(name: str, *modules: str) -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in modules:
            raise
        raise Stop(
            ExitCode.REFUSED,
            f"this needs {error.name}, which is not installed",
            todo=f'pip install "pg-background-orchestration[{name}]"',
        ) from error


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
