"""What a step gets back for a job that committed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from dagster import AssetKey, MaterializeResult, MetadataValue

from pgbg_orchestration.outcome import Outcome

from .identity import Identity
from .metadata import page_of, sql_block
from .preview import preview_metadata
from .table_size import is_size_of_partition, is_size_of_table

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
    page:
        Address of the job's page; None where the resource names none (``web_url``).
    """

    sql: str = ""
    partition: str | None = None
    is_range: bool = False
    page: str | None = None

    @classmethod
    def of(
        cls, outcome: Outcome, sql: str, identity: Identity | None, *, web_url: str | None = None
    ) -> PgBackgroundOutcome:
        """Add to the core's outcome what Dagster knows of the job.

        Parameters
        ----------
        outcome:
            The core's.
        sql:
            The job's SQL as it was given.
        identity:
            The step that it belongs to; None for a job of somebody else's.
        web_url:
            Address of the jobs' page; None where there is none.

        Returns
        -------
        PgBackgroundOutcome
            Both together.
        """
        known = {field.name: getattr(outcome, field.name) for field in fields(Outcome)}
        partition = identity.partition if identity else None
        is_range = bool(identity and identity.is_range)
        page = page_of(web_url, outcome.job_id) if web_url else None
        return cls(**known, sql=sql, partition=partition, is_range=is_range, page=page)

    @property
    def duration(self) -> float | None:
        """Seconds from the worker's beginning to its end; None when one of the two is not known."""
        if self.started_at is None or self.finished_at is None:
            return None
        return max((self.finished_at - self.started_at).total_seconds(), 0.0)

    def metadata(self, *, preview: int = 0) -> dict[str, Any]:
        """Return the standard metadata of a materialization; what is not known is left out.

        Parameters
        ----------
        preview:
            How many of the job's rows to show; they have to be asked for (``fetch``). They are then what counts: with
            them come ``pgbg/preview``, ``dagster/column_schema`` and ``dagster/row_count``.

        Returns
        -------
        dict[str, Any]
            ``pgbg/job_id``, ``pgbg/label``, ``pgbg/sql``, ``pgbg/launched``, ``pgbg/proof``, ``pgbg/row_count``,
            ``pgbg/command_tag``, ``pgbg/worker_pid``, ``pgbg/attempt`` and ``pgbg/duration_seconds``, of whose numbers
            Dagster draws plots; ``pgbg/page``, a link, where the resource names a page; and
            ``dagster/row_count`` where it is the size of the table that the last statement filled, or
            ``dagster/partition_row_count`` where that statement put its rows into a table for a single partition.

        Raises
        ------
        NoRows
            A preview is wanted, and the job was not asked for rows.
        """
        metadata: dict[str, Any] = {
            "pgbg/job_id": self.job_id,
            "pgbg/label": self.label,
            "pgbg/launched": self.launched,
            "pgbg/proof": self.proof,
        }
        if self.sql:
            metadata["pgbg/sql"] = sql_block(self.sql)
        if self.page is not None:
            metadata["pgbg/page"] = MetadataValue.url(self.page)
        known = {
            "pgbg/row_count": self.row_count,
            "pgbg/command_tag": self.command_tag,
            "pgbg/worker_pid": self.worker_pid,
            "pgbg/attempt": self.attempt,
            "pgbg/duration_seconds": self.duration,
        }
        metadata |= {name: value for name, value in known.items() if value is not None}
        last = self.sql, self.command_tag, self.row_count
        shown = len(self.last) if preview else None
        if preview:
            metadata |= preview_metadata(self.last, preview)
        if self.partition is None:
            if shown is not None or is_size_of_table(*last):
                metadata["dagster/row_count"] = self.row_count if shown is None else shown
        # A range's materializations would each show the count of all.
        elif not self.is_range and (shown is not None or is_size_of_partition(*last)):
            metadata["dagster/partition_row_count"] = self.row_count if shown is None else shown
        return metadata

    def to_materialize_result(
        self,
        asset_key: CoercibleToAssetKey | None = None,
        *,
        metadata: Mapping[str, Any] | None = None,
        preview: int = 0,
        **options: Any,
    ) -> MaterializeResult[Any]:
        """Return the result of an asset whose work this job was.

        Parameters
        ----------
        asset_key:
            Needed in a step of several assets only.
        metadata:
            Further metadata; it wins over the standard one.
        preview:
            As :meth:`metadata` takes it.
        options:
            Further arguments of :class:`dagster.MaterializeResult`: ``check_results``, ``data_version``, ``tags``.

        Returns
        -------
        MaterializeResult
            With the standard metadata.
        """
        return MaterializeResult(
            asset_key=None if asset_key is None else AssetKey.from_coercible(asset_key),
            metadata={**self.metadata(preview=preview), **(metadata or {})},
            **options,
        )
