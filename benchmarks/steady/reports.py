"""What became of submitted jobs: as the database has it, and as Dagster was told."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import psycopg

from .watch import SHORT

if TYPE_CHECKING:
    from dagster import DagsterInstance

ASSETS = ("waits", *SHORT)
SENSOR = "pg_background_sensor"
STATES = "select job_id, series, state from pgbg.jobs"


class Jobs:
    """What the database says of all jobs."""

    def __init__(self, conninfo: str) -> None:
        with psycopg.connect(conninfo, autocommit=True) as admin:
            rows: list[tuple[Any, ...]] = admin.execute(STATES.encode()).fetchall()
        self.at_work = sum(state in ("running", "waiting") for _, _, state in rows)
        self.ends = {
            job_id: state
            for job_id, series, state in rows
            if (series or "").startswith("dagster/external/") and state not in ("running", "waiting")
        }
        self.orphans = Counter(state for _, series, state in rows if (series or "").startswith("dagster/orphan/"))


def not_once(ends: Mapping[str, str], materializations: Mapping[str, int], checks: Mapping[str, int]) -> list[str]:
    """Tell of each job whose end was not reported once, as what it was.

    Parameters
    ----------
    ends:
        The states of all jobs that have ended.
    materializations, checks:
        How often a job was reported as committed, and by a failed check.
    """
    wrong = []
    for job_id in sorted({*ends, *materializations, *checks}):
        state = ends.get(job_id)
        told = (materializations.get(job_id, 0), checks.get(job_id, 0))
        if state is None or told != ((1, 0) if state == "committed" else (0, 1)):
            what = state or "no job that has ended"
            wrong.append(f"{job_id} is {what}: {told[0]} materializations, {told[1]} failed checks")
    return wrong


class Reports:
    """The ends of jobs that the sensor has reported, by job: read on from where it was read to.

    Parameters
    ----------
    instance:
        Dagster's storage.
    """

    def __init__(self, instance: DagsterInstance) -> None:
        self._instance = instance
        self._read: dict[tuple[str, str], int] = {}
        self.materializations: Counter[str] = Counter()
        self.checks: Counter[str] = Counter()

    def read(self) -> None:
        """Read what has been reported since."""
        for asset in ASSETS:
            self._read_materializations(asset)
            self._read_checks(asset)

    @property
    def cursor(self) -> int:
        """How many bytes a tick leaves to the next."""
        found = [state for state in self._instance.all_instigator_state() if state.instigator_name == SENSOR]
        return sum(len(getattr(state.instigator_data, "cursor", None) or "") for state in found)

    def failed_ticks(self) -> list[str]:
        """Return the errors of ticks, of whatever sensor."""
        from dagster._core.scheduler.instigation import TickStatus

        return [
            f"{state.instigator_name}: {tick.error.message if tick.error else ''}".strip()
            for state in self._instance.all_instigator_state()
            for tick in self._instance.get_ticks(
                state.instigator_origin_id, state.selector_id, statuses=[TickStatus.FAILURE]
            )
        ]

    def _read_materializations(self, asset: str) -> None:
        from dagster import AssetKey, AssetRecordsFilter

        while True:
            after = self._read.get(("materializations", asset), 0)
            found = self._instance.fetch_materializations(
                AssetRecordsFilter(asset_key=AssetKey(asset), after_storage_id=after), limit=1000, ascending=True
            ).records
            for record in found:
                self._read["materializations", asset] = record.storage_id
                assert record.asset_materialization is not None
                self.materializations[str(record.asset_materialization.metadata["pgbg/job_id"].value)] += 1
            if not found:
                return

    def _read_checks(self, asset: str) -> None:
        from dagster import AssetCheckKey, AssetKey

        from dagster_resource.external.asset_jobs import JOB_CHECK

        last, before = self._read.get(("checks", asset), 0), None
        while True:  # the newest ones come first
            found = self._instance.event_log_storage.get_asset_check_execution_history(
                AssetCheckKey(AssetKey(asset), JOB_CHECK), limit=100, cursor=before
            )
            for record in found:
                if record.id <= last:
                    return
                self._read["checks", asset] = max(record.id, self._read.get(("checks", asset), 0))
                assert record.event is not None
                evaluation = record.event.asset_check_evaluation
                if evaluation is not None and not evaluation.passed:
                    self.checks[str(evaluation.metadata["pgbg/job_id"].value)] += 1
                before = record.id
            if not found:
                return
