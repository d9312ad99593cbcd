"""What a sensor looks at: jobs of the ``jobs`` view, or workers that somebody launched by hand."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pgbg_orchestration.ledger.history import JobEntry
    from pgbg_orchestration.ledger.ledger import Ledger

COMMITTED = ("committed",)
ENDED_BADLY = ("cancelled", "failed", "lost", "unknown")
"""The states of :data:`pgbg_orchestration.ledger.history.ENDED_BADLY`, said again because a DAG file imports no core.
``tests/unit/test_entries.py`` holds that they are the same."""
NAMED = 10  # jobs or workers that a line of the log names


def moment_of(since: datetime | str) -> datetime:
    """Return the moment that a sensor's ``since`` says.

    Raises
    ------
    ValueError
        It is no moment, or has no time zone.
    """
    try:
        moment = since if isinstance(since, datetime) else datetime.fromisoformat(since.strip())
    except ValueError:
        raise ValueError(
            f"since must be a moment as ISO 8601 has it, such as {{{{ run_after }}}}, not {since!r}"
        ) from None
    if moment.tzinfo is None:
        raise ValueError(f"since has no time zone: {since}. Write it as 2013-01-01T00:00:00+00:00.")
    return datetime.fromtimestamp(moment.timestamp(), UTC)  # a plain one, whatever subclass it came as


@dataclass(slots=True)
class Watch:
    """One thing to wait for; the first attributes are :class:`~airflow_provider.sensors.PgBackgroundSensor`'s own.

    Attributes
    ----------
    since:
        Of jobs by label: the moment from which on they count by their registration; None for all that there are.
    log:
        Is told what is waited for and, whenever that changes, what matches.
    seen:
        What the last look saw, in words.
    """

    job_id: str | None = None
    label: str | None = None
    worker_pid: int | None = None
    worker_label: str | None = None
    states: Collection[str] = COMMITTED
    fail_on: Collection[str] = ENDED_BADLY
    since: datetime | None = None
    log: Callable[[str], None] | None = None
    seen: str = field(default="", init=False)

    @property
    def what(self) -> str:
        """What is waited for, in words."""
        if self.worker_pid is not None:
            return f"the end of the worker with pid {self.worker_pid}"
        if self.worker_label is not None:
            return f"the end of all workers labelled {self.worker_label!r}"
        states = " or ".join(self.states)
        if self.job_id is not None:
            return f"job {self.job_id} to be {states}"
        since = "" if self.since is None else f", registered since {self.since.isoformat(' ', 'seconds')},"
        return f"the newest job of each series labelled {self.label!r}{since} to be {states}"

    async def look(self, ledger: Ledger) -> dict[str, Any] | None:
        """Look once; returns what there is to tell, or None while it is not as wanted.

        Raises
        ------
        PgbgError
            A job ended in a state of ``fail_on``: with its own SQLSTATE and message.
        InvalidJob
            No worker of this database can have the label.
        """
        if self.worker_pid is not None or self.worker_label is not None:
            # Its launching session alone can tell how a worker ended.
            at_work = await self._at_work(ledger)
            self._say([f"{name} (pid {pid})" for pid, name in at_work], "no worker at work")
            return None if at_work else {"jobs": None}
        from pgbg_orchestration.ledger.history import error_of

        found = await ledger.jobs(job_id=self.job_id, label=self.label)
        before: list[JobEntry] = []
        if self.label is not None:
            found = _newest(found)
            before = [entry for entry in found if not self._counts(entry)]
            found = [entry for entry in found if self._counts(entry)]
        none = "no job"
        if before:
            none = f"no job (the newest before that: {_named(before[0])}; `since` says from when on they count)"
        self._say([_named(entry) for entry in found], none)
        for entry in found:
            if entry.state in self.fail_on and (error := error_of(entry)) is not None:
                raise error
        if found and all(entry.state in self.states for entry in found):
            return {"jobs": [_as_event(entry) for entry in found]}
        return None

    def _counts(self, entry: JobEntry) -> bool:
        # One that was cancelled before it was ever launched has a receipt and no registration.
        registered = entry.registered_at or entry.ended_at
        return self.since is None or registered is None or registered >= self.since

    def _say(self, matching: Sequence[str], none: str) -> None:
        more = f" and {len(matching) - NAMED} more" if len(matching) > NAMED else ""
        seen = f"{', '.join(matching[:NAMED])}{more}" or none
        if self.log is not None and seen != self.seen:
            self.log(f"Waiting for {self.what}. Now: {seen}.")
        self.seen = seen

    async def _at_work(self, ledger: Ledger) -> list[tuple[int, str]]:
        from pgbg_orchestration.postgres import activity

        label = self.worker_label
        if label is None:
            return await ledger.run(lambda conn: activity.workers(conn, pid=self.worker_pid))
        return await ledger.run(lambda conn: activity.workers_labelled(conn, label))


def _newest(found: Sequence[JobEntry]) -> list[JobEntry]:
    """Leave out older generations: a task that was cleared is waited for as it runs now, not as it was cancelled."""
    newest: dict[tuple[str, str | None], int] = {}
    for entry in found:
        key = (entry.owner, entry.series)
        newest[key] = max(newest.get(key, 0), entry.generation or 0)
    return [
        entry for entry in found if entry.series is None or (entry.generation or 0) >= newest[entry.owner, entry.series]
    ]


def _named(entry: JobEntry) -> str:
    return f"{entry.job_id} ({entry.state})"


def _as_event(entry: JobEntry) -> dict[str, Any]:
    names = ("job_id", "label", "state", "row_count", "command_tag", "launched_at", "ended_at")
    values = {name: getattr(entry, name) for name in names}
    return {name: value.isoformat() if isinstance(value, datetime) else value for name, value in values.items()}
