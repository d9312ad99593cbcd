"""The trigger of the sensor."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from airflow_provider import events
from airflow_provider.arguments import moment
from airflow_provider.watch import COMMITTED, ENDED_BADLY, Watch

from .base import ServerTrigger

if TYPE_CHECKING:
    from pgbg_orchestration import Launcher

POLL_INTERVAL = 5.0
"""Seconds between two looks of a deferred sensor where none is given."""


class PgBackgroundSensorTrigger(ServerTrigger):
    """Looks at jobs or at workers until they are as wanted, and fires one event.

    Parameters
    ----------
    job_id, label, worker_pid, worker_label, states, fail_on:
        As :class:`~airflow_provider.sensors.PgBackgroundSensor` takes them.
    since:
        Of jobs by label: the moment from which on they count, as ISO 8601 has it, with time zone; None for all.
    poll_interval:
        Seconds between two looks; None for ``POLL_INTERVAL``.
    deadline:
        The moment until which to wait, with time zone (its ISO 8601 text in Airflow's database).
    kwargs:
        As :class:`~airflow_provider.triggers.base.ServerTrigger` takes them.
    """

    arguments = (
        "job_id", "label", "worker_pid", "worker_label", "states", "fail_on", "since", "poll_interval", "deadline",
        *ServerTrigger.arguments,
    )  # fmt: skip

    def __init__(
        self,
        *,
        job_id: str | None = None,
        label: str | None = None,
        worker_pid: int | None = None,
        worker_label: str | None = None,
        states: Collection[str] = COMMITTED,
        fail_on: Collection[str] = ENDED_BADLY,
        since: str | None = None,
        poll_interval: float | None = None,
        deadline: datetime | str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.job_id = job_id
        self.label = label
        self.worker_pid = worker_pid
        self.worker_label = worker_label
        self.states = list(states)
        self.fail_on = list(fail_on)
        self.since = since
        self.poll_interval = poll_interval
        self.deadline = moment(deadline)

    async def work(self, launcher: Launcher) -> dict[str, Any]:
        """Look until it is as wanted, or the deadline has passed."""
        since = None if self.since is None else datetime.fromisoformat(self.since)
        watch = Watch(
            self.job_id, self.label, self.worker_pid, self.worker_label, self.states, self.fail_on, since, self.log.info
        )
        while (event := await watch.look(launcher.ledger)) is None:
            if self.deadline is not None and datetime.now(UTC) >= self.deadline:
                return {"status": events.TIMED_OUT, "seen": watch.seen}
            await asyncio.sleep(self.poll_interval or POLL_INTERVAL)
        return {"status": events.COMMITTED, **event}

    def result_of(self, payload: dict[str, Any]) -> Any:
        """Return what there is to tell of each job; None for a worker."""
        return payload["jobs"]
