"""What a step gets back for a job that committed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from dagster import AssetKey, MaterializeResult

from pgbg_orchestration.outcome import Outcome

from . import metadata as standard
from .identity import Identity

if TYPE_CHECKING:
    from dagster._core.definitions.events import CoercibleToAssetKey


@dataclass(frozen=True, slots=True)
class PgBackgroundOutcome(Outcome):
    """How a job that committed ended, and what Dagster shows of it.

    Attributes
    ----------
    sql:
        The job's SQL as it was given: with its placeholders, without the values bound to them.
    partition:
        The step's partition key, or range of keys; None without partitions.
    is_range:
        Whether the partition is a range of more than one key.
    """

    sql: str = ""
    partition: str | None = None
    is_range: bool = False

    @classmethod
    def of(cls, outcome: Outcome, sql: str, identity: Identity | None) -> PgBackgroundOutcome:
        """Add to the core's outcome what Dagster knows of the job."""
        known = {field.name: getattr(outcome, field.name) for field in fields(Outcome)}
        partition = identity.partition if identity else None
        return cls(**known, sql=sql, partition=partition, is_range=bool(identity and identity.is_range))

    @property
    def duration(self) -> float | None:
        """Seconds from the worker's beginning to its end; None when one of the two is not known."""
        if self.started_at is None or self.finished_at is None:
            return None
        return max((self.finished_at - self.started_at).total_seconds(), 0.0)

    def metadata(self) -> dict[str, Any]:
        """Return the standard metadata: row count, SQL, label, job id, worker pid, duration."""
        return standard.of_outcome(self)

    def to_materialize_result(
        self,
        asset_key: CoercibleToAssetKey | None = None,
        *,
        metadata: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> MaterializeResult[Any]:
        """Return the result of an asset whose work this job was.

        Parameters
        ----------
        asset_key:
            Needed in a step of several assets only.
        metadata:
            Further metadata; it wins over the standard one.
        options:
            Further arguments of :class:`dagster.MaterializeResult`: ``check_results``, ``data_version``, ``tags``.
        """
        return MaterializeResult(
            asset_key=None if asset_key is None else AssetKey.from_coercible(asset_key),
            metadata={**self.metadata(), **(metadata or {})},
            **options,
        )
