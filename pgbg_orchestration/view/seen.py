"""All that is known of one job, gathered once: the terminal, the page and the command line tell the same of it."""

from __future__ import annotations

from dataclasses import dataclass

from pgbg_orchestration.ledger.history import Durations, JobDetail, JobEntry

from .lines import Line, line_of_job, lines_of
from .source import Source
from .words import Try, facts_of, tries_of, usual_of


@dataclass(frozen=True, slots=True)
class JobSeen:
    """A job with what the history keeps of it.

    Attributes
    ----------
    line:
        Its line, with its worker where that is seen.
    usual:
        How jobs of its label went so far; None where none has ended.
    detail:
        Its SQL and its earlier attempts; None where the login may not ask for them.
    """

    line: Line
    usual: Durations | None
    detail: JobDetail | None

    def facts(self) -> list[tuple[str, str]]:
        """Return names and values: the job's own, then how jobs of its label go."""
        return facts_of(self.line) + self.usually()

    def usually(self) -> list[tuple[str, str]]:
        """Return how jobs of its label went so far, and how long this one may take still."""
        return usual_of(self.line, self.usual)

    def tries(self) -> list[Try]:
        """Return its attempts, the first one first."""
        assert self.line.job is not None
        return tries_of(self.line.job, self.detail)

    @property
    def statement(self) -> str | None:
        """Its SQL as it was given, without the values of its parameters."""
        return self.detail.statement if self.detail is not None else None

    @property
    def why_no_statement(self) -> str:
        """Why there is no SQL to be shown; empty where there is."""
        if self.detail is None:
            return "This login may not ask for the SQL: GRANT EXECUTE ON FUNCTION job_detail of the package's schema."
        if self.detail.statement is None:
            return (
                "Its SQL is not kept: pgbg.keep_sql is off, the job hides details, or an older version registered it."
            )
        return ""


async def seen_now(source: Source, entry: JobEntry) -> JobSeen:
    """Look at a job: at its worker, if it is at work, and at what the history keeps of it.

    Raises
    ------
    PgbgError
        The server is out of reach, or not ready.
    """
    key = line_of_job(entry).key
    at_work = [line for line in lines_of(await source.board(most_ended=0)) if line.key == key]
    return await known_of(source, at_work[0] if at_work else line_of_job(entry))


async def known_of(source: Source, line: Line) -> JobSeen:
    """Ask what the history keeps of the job of a line.

    Raises
    ------
    PgbgError
        As :func:`seen_now`.
    """
    assert line.job is not None
    return JobSeen(line, await source.usual(line.label), await source.detail(line.job))
