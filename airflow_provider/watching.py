"""What a sensor looks at: jobs of the ``jobs`` view, or workers that somebody launched by hand."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from psycopg import AsyncConnection

    from pgbg_orchestration.ledger.history import JobEntry
    from pgbg_orchestration.ledger.ledger import Ledger

COMMITTED = ("committed",)
ENDED_BADLY = ("cancelled", "failed", "lost", "unknown")
PREFIX = "pg_background:"
"""What pg_background, from 1.10 on, calls a worker: this, its label and a process id, cut off after 63 bytes."""

# A worker of another login shows its name, and its type to `pg_read_all_stats` alone: what is hidden may be a worker.
# Of a name that was cut off the beginning alone can be compared.
WORKERS = """
    select 1 from pg_catalog.pg_stat_activity as a
    where case when %(pid)s::int is not null
        then a.pid = %(pid)s and (coalesce(a.backend_type = 'pg_background', true)
            or starts_with(a.application_name, 'pg_background:'))
        else a.application_name like %(name)s or octet_length(a.application_name) > 59
            and (starts_with(a.application_name, %(start)s) or starts_with(%(start)s, a.application_name))
        end
    limit 1
"""


@dataclass(frozen=True, slots=True)
class Watch:
    """One thing to wait for; the attributes are as :class:`~airflow_provider.sensors.PgBackgroundSensor` takes them."""

    job_id: str | None = None
    label: str | None = None
    worker_pid: int | None = None
    worker_label: str | None = None
    states: Collection[str] = COMMITTED
    fail_on: Collection[str] = ENDED_BADLY

    async def look(self, ledger: Ledger) -> dict[str, Any] | None:
        """Look once; returns what there is to tell, or None while it is not as wanted.

        Raises
        ------
        PgbgError
            A job ended in a state of ``fail_on``: with its own SQLSTATE and message.
        """
        if self.worker_pid is not None or self.worker_label is not None:
            # Its launching session alone can tell how a worker ended.
            return None if await self._is_at_work(ledger) else {"jobs": None}
        from pgbg_orchestration.ledger.history import error_of

        found = await ledger.jobs(job_id=self.job_id, label=self.label)
        if self.label is not None:
            found = _newest(found)
        for entry in found:
            if entry.state in self.fail_on and (error := error_of(entry)) is not None:
                raise error
        if found and all(entry.state in self.states for entry in found):
            return {"jobs": [_told(entry) for entry in found]}
        return None

    async def _is_at_work(self, ledger: Ledger) -> bool:
        names = _names(self.worker_label or "")

        async def ask(conn: AsyncConnection[Any]) -> bool:
            cursor = await conn.execute(WORKERS, {"pid": self.worker_pid, **names})
            return await cursor.fetchone() is not None

        return await ledger.run(ask)


def _names(label: str) -> dict[str, str]:
    """Return what a worker of this label is called: a pattern, and the name's beginning up to the first wildcard."""
    escaped = label.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")
    return {
        "name": PREFIX.replace("_", "\\_") + escaped.replace("*", "%").replace("?", "_") + ":%",
        "start": PREFIX + re.split(r"[*?]", label)[0],
    }


def _newest(found: Sequence[JobEntry]) -> list[JobEntry]:
    """Leave out older generations: a task that was cleared is waited for as it runs now, not as it was cancelled."""
    newest: dict[tuple[str, str | None], int] = {}
    for entry in found:
        key = (entry.owner, entry.series)
        newest[key] = max(newest.get(key, 0), entry.generation or 0)
    return [
        entry for entry in found if entry.series is None or (entry.generation or 0) >= newest[entry.owner, entry.series]
    ]


def _told(entry: JobEntry) -> dict[str, Any]:
    names = ("job_id", "label", "state", "row_count", "command_tag", "launched_at", "ended_at")
    values = {name: getattr(entry, name) for name in names}
    return {name: value.isoformat() if isinstance(value, datetime) else value for name, value in values.items()}
