"""What the doctor looks at, and what each of its checks returns."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from psycopg import AsyncConnection
from psycopg.rows import dict_row

from pgbg_orchestration.errors import ExtensionMissing, ExtensionTooOld
from pgbg_orchestration.ledger.readiness import ServerFacts
from pgbg_orchestration.postgres.pg_background import Extension
from pgbg_orchestration.statements import named

QUERIES = named.queries(__package__, "queries.sql")


class Status(StrEnum):
    """How a finding is to be taken."""

    OK = "ok"
    WARNING = "warning"
    FAILS = "fails"
    HIDDEN = "not visible"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the doctor's: what was looked at, how it is, and what to do about it.

    Attributes
    ----------
    group, name:
        What was looked at, such as ``workers`` and ``worker slots``.
    status:
        ``fails`` keeps jobs from running; ``warning`` will hurt some; ``not visible`` could not be looked at.
    text:
        What was found, in one or two sentences.
    todo:
        The line to run or the thing to do.
    """

    group: str
    name: str
    status: Status
    text: str
    todo: str | None = None


@dataclass(frozen=True, slots=True)
class Patient:
    """What the checks look at."""

    conn: AsyncConnection[Any]
    facts: ServerFacts
    schema: str
    settings: dict[str, str | None]
    standin: bool

    async def one(self, query: str, *arguments: object) -> dict[str, Any]:
        """Return the row of a query of ``queries.sql``, by its name; empty where there is none."""
        row = await (await self.conn.cursor(row_factory=dict_row).execute(QUERIES[query], arguments)).fetchone()
        return row or {}

    @property
    def extension(self) -> Extension | None:
        try:
            return self.facts.extension
        except (ExtensionMissing, ExtensionTooOld):
            return None
