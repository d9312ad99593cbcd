"""The web app: one page, its data as JSON, and, where it is allowed, one action."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pgbg_orchestration.errors import PgbgError
from pgbg_orchestration.ledger.history import JobEntry
from pgbg_orchestration.view.seen import seen_now
from pgbg_orchestration.view.source import Source

from . import data
from .assets import asset, text_of

MOST_JOBS = 5_000  # of the timeline
MOST_ENDED = 500  # of the table: jobs that ended a short while ago
LONGEST = 31 * 24.0  # hours of the timeline
ASKED = "x-pgbg-action"
"""A header that a form of another site cannot send; a script of another site has to ask first, and is refused."""

POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        # The charting library sizes its elements by style attributes.
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'self'",
    )
)
HEADERS = (
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
)

SeeGuard = Callable[[Request], Awaitable[None]]
"""Lets a request pass, or raises ``HTTPException``."""
CancelGuard = Callable[[Request, JobEntry], Awaitable[None]]
"""Lets a request cancel a job, or raises ``HTTPException``."""
DetailGuard = Callable[[Request, JobEntry], Awaitable[bool]]
"""Tells whether a request may see a part of a job."""


class _Hardened:
    """Adds the headers that keep other sites out."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def hardened(message: Message) -> None:
            if message["type"] == "http.response.start":
                given = {name for name, _ in message["headers"]}
                message["headers"] = [*message["headers"], *(pair for pair in HEADERS if pair[0] not in given)]
            await send(message)

        await self._app(scope, receive, hardened)


class _Opened:
    """A source that is opened when it is first asked for: a mounted app is told of no startup."""

    def __init__(self, open_source: Callable[[], AbstractAsyncContextManager[Source]]) -> None:
        self._open = open_source
        self._opening = asyncio.Lock()
        self._stack = AsyncExitStack()
        self._source: Source | None = None

    async def get(self) -> Source:
        async with self._opening:
            if self._source is None:
                self._source = await self._stack.enter_async_context(self._open())
            return self._source

    async def close(self) -> None:
        self._source = None
        await self._stack.aclose()


def build_app(
    open_source: Callable[[], AbstractAsyncContextManager[Source]],
    *,
    may_see: SeeGuard | None = None,
    may_cancel: CancelGuard | None = None,
    may_see_sql: DetailGuard | None = None,
    may_see_rows: DetailGuard | None = None,
    links: data.Links | None = None,
    hosts: Sequence[str] = ("*",),
) -> Starlette:
    """Build the app.

    Parameters
    ----------
    open_source:
        Opens what the page looks at, when the first request asks for it; it is closed with the app.
    may_see:
        Asked before each request; None: whoever reaches the app may see it.
    may_cancel:
        Asked, besides, before a job is cancelled; None: nobody may, and the page has no button for it.
    may_see_sql, may_see_rows:
        Asked, besides, before a job's page tells its SQL, and the first of the rows that it kept; None: nobody may see
        them. Parameters' values are never in that SQL.
    links:
        Base addresses of orchestrators' UIs, by ``airflow`` and ``dagster``.
    hosts:
        The names that a browser may reach the app under; a page of another name that points here is refused.
    """
    known_links = links or {}
    opened = _Opened(open_source)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        await opened.close()

    async def seen(request: Request) -> Source:
        if may_see is not None:
            await may_see(request)
        return await opened.get()

    async def page(request: Request) -> Response:
        await seen(request)
        return Response(text_of("page.html"), media_type="text/html")

    async def static(request: Request) -> Response:
        await seen(request)
        return asset(request.path_params["name"])

    async def board(request: Request) -> Response:
        found = data.of_board(await (await seen(request)).board(most_ended=MOST_ENDED), known_links)
        return JSONResponse({**found, "may_cancel": may_cancel is not None})

    async def scraped(request: Request) -> Response:
        from . import metrics

        found = await (await seen(request)).board()
        return Response(metrics.exposition(found), media_type=metrics.CONTENT_TYPE)

    async def timeline(request: Request) -> Response:
        source = await seen(request)
        since = datetime.now(UTC) - timedelta(hours=_hours(request))
        entries = await source.history(
            since=since, label=request.query_params.get("label") or None, limit=MOST_JOBS + 1
        )
        return JSONResponse(
            {
                "since": since.isoformat(),
                "jobs": data.of_history(entries[:MOST_JOBS]),
                "more": len(entries) > MOST_JOBS,
            }
        )

    async def job(request: Request) -> Response:
        source = await seen(request)
        owner, job_id = request.query_params.get("owner"), request.query_params.get("id", "")
        entry = await source.job(owner or None, job_id)
        if entry is None:
            raise HTTPException(404, "no such job, or it is not this login's to see")
        shows_sql = may_see_sql is not None and await may_see_sql(request, entry)
        shows_rows = may_see_rows is not None and await may_see_rows(request, entry)
        rows = await source.first_rows(entry) if shows_rows else None
        seen_job = await seen_now(source, entry)
        answer = data.of_job(seen_job, known_links, shows_sql=shows_sql, first_rows=rows)
        answer["can_cancel"] = answer["can_cancel"] and await _allows(may_cancel, request, entry)
        return JSONResponse(answer)

    async def cancel(request: Request) -> Response:
        source = await seen(request)
        if may_cancel is None:
            raise HTTPException(403, "this page is read-only")
        if request.headers.get(ASKED) != "cancel":
            raise HTTPException(403, f"the header {ASKED} is missing")
        wanted: Any = await request.json()
        if not isinstance(wanted, dict) or not all(isinstance(wanted.get(name), str) for name in ("owner", "job_id")):
            raise HTTPException(400, "owner and job_id are wanted")
        entry = await source.job(wanted["owner"], wanted["job_id"])
        if entry is None:
            raise HTTPException(404, "no such job, or it is not this login's to see")
        await may_cancel(request, entry)
        return JSONResponse({"decided": await source.cancel(entry)})

    return Starlette(
        routes=[
            Route("/", page),
            Route("/static/{name}", static),
            Route("/metrics", scraped),
            Route("/api/board", board),
            Route("/api/timeline", timeline),
            Route("/api/job", job),
            Route("/api/cancel", cancel, methods=["POST"]),
        ],
        lifespan=lifespan,
        middleware=[Middleware(_Hardened), Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))],
        exception_handlers={
            HTTPException: _refused,
            PgbgError: _troubled,
            psycopg.Error: _troubled,
        },
    )


async def _allows(guard: CancelGuard | None, request: Request, job: JobEntry) -> bool:
    """Tell whether whoever asks may cancel a job: the page has no button that would be refused."""
    if guard is None:
        return False
    try:
        await guard(request, job)
    except HTTPException:
        return False
    return True


def _hours(request: Request) -> float:
    try:
        hours = float(request.query_params.get("hours", "24"))
    except ValueError as error:
        raise HTTPException(400, "hours is no number") from error
    if not 0 < hours <= LONGEST:
        raise HTTPException(400, f"hours has to be above 0, and {LONGEST:g} at most")
    return hours


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code, headers=error.headers)


async def _troubled(_: Request, error: Exception) -> Response:
    # An error of the package's never has a parameter or a secret in it; of the server's only its own first line.
    text = "the server is out of reach"
    if isinstance(error, PgbgError):
        text = error.message
    elif isinstance(error, psycopg.Error) and error.diag.message_primary:
        text = error.diag.message_primary
    return JSONResponse({"error": text}, 503)
