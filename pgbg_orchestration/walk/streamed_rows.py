"""The rows of a streamed job: a session of the job's own launches it, and gives them to the reader as they come."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Any

import psycopg
from psycopg import sql

from pgbg_orchestration.errors import InvalidJob
from pgbg_orchestration.job import Job, Kind
from pgbg_orchestration.postgres import describe
from pgbg_orchestration.postgres.handles import HandleSession
from pgbg_orchestration.postgres.session import LaunchingSession
from pgbg_orchestration.rows import Column

from .worker_sql import Work


@dataclass
class Feed:
    """The rows of one job's last statement, for whoever streams them.

    Attributes
    ----------
    as_text:
        Whether values come as the server's texts.
    columns, definition:
        The columns, and their column definition list for the server.
    session, rows:
        The session that the rows are read from, and the rows, once the job is committed; it is closed with them.
    """

    as_text: bool = False
    columns: tuple[Column, ...] = ()
    definition: sql.Composable = field(default_factory=lambda: sql.SQL(""))
    session: HandleSession | None = None
    rows: AsyncGenerator[tuple[Any, ...], None] | None = None

    async def close(self) -> None:
        """Read no further, and close the session."""
        rows, self.rows = self.rows, None
        session, self.session = self.session, None
        if session is not None:
            await session.close()
        if rows is not None:
            await rows.aclose()


def check(job: Job) -> None:
    """Refuse a job whose rows cannot be streamed.

    Raises
    ------
    InvalidJob
        It keeps its rows, or it is supervised.
    """
    why = None
    if job.fetch is not None:
        why = "a job either keeps its rows (fetch) or streams them"
    elif job.kind is Kind.SUPERVISED:
        why = "the rows of a supervised job cannot be streamed: its supervisor alone has its worker's output"
    if why is not None:
        raise InvalidJob(why, job_id=job.id, label=job.label)


async def prepare(
    open_session: Callable[[], Awaitable[LaunchingSession]], work: Work, feed: Feed
) -> tuple[Work, LaunchingSession]:
    """Return the work, bound so that its rows are sent, and the session that launches it and reads them.

    Raises
    ------
    InvalidJob
        Its last statement gives no rows that can be read, or none that the server knows before the job has run.
    """
    named = {"job_id": work.key.job_id, "label": work.label}
    session = await open_session()
    try:
        feed.columns = tuple(await session.describe_named(work.statements[-1].text, work.meaning()))
    except describe.UnreadableResult as error:
        await session.close()
        raise InvalidJob(f"the last statement gives nothing that can be streamed: {error}", **named) from None
    except psycopg.Error as error:
        await session.close()
        raise InvalidJob(
            f"what the last statement gives cannot be told before the job has run: {work.server_text(error)}",
            sqlstate=error.sqlstate,
            todo="What only the statements before it make cannot be streamed; fetch keeps such rows.",
            **named,
        ) from None
    except BaseException:
        await session.close()
        raise
    if not feed.columns:
        await session.close()
        raise InvalidJob("the last statement gives no rows", **named)
    feed.definition = describe.definition_of([column.type for column in feed.columns])
    return replace(work, is_streamed=True), session
