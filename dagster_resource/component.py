"""Assets from YAML: SQL that stands in ``defs.yaml``, or in a file beside it."""

# No `from __future__ import annotations` here: Dagster builds its schema from the annotations themselves.

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, cast

from dagster import (
    AssetChecksDefinition,
    AssetCheckSeverity,
    AssetExecutionContext,
    AssetKey,
    AssetsDefinition,
    BackfillPolicy,
    Component,
    ComponentLoadContext,
    Definitions,
    Model,
    Resolvable,
    Resolver,
)
from dagster.components.resolved.core_models import (
    AssetSpecKwargs,
    MultiRunBackfillPolicyModel,
    SingleRunBackfillPolicyModel,
    resolve_backfill_policy,
)
from dagster_shared.record import record
from pydantic import Field

from .assets import KINDS, partition_parameters, pg_background_asset, pg_background_asset_check
from .jobs import JobOptions, Sql


class SqlCheck(Model, Resolvable):
    """A check of the asset, asked in a worker of its own."""

    name: str
    sql: str | None = Field(default=None, description="The query.")
    sql_file: str | None = Field(default=None, description="A file with the query, beside defs.yaml.")
    expect: Literal["no_rows", "true"] = Field(default="no_rows", description="What the query must return.")
    blocking: bool = Field(default=False, description="Whether a failure keeps downstream assets from running.")
    severity: Literal["ERROR", "WARN"] = "ERROR"
    description: str | None = None


class SqlJob(Model, Resolvable):
    """Options of the job behind an asset."""

    label: str | None = Field(default=None, description="What a person sees on the worker; 64 bytes at most.")
    kind: Literal["receipt", "session", "supervised"] | None = Field(
        default=None, description="How the outcome is made certain. Default: as the statement needs it."
    )
    timeout: float | None = Field(default=None, description="Seconds until the worker is cancelled.")
    role: str | None = Field(default=None, description="Role that the SQL runs as.")
    settings: dict[str, str] | None = Field(default=None, description="Server settings, such as work_mem.")
    isolation: str | None = Field(
        default=None, description="read committed, repeatable read or serializable. Default: what the login has."
    )
    queue_size: int | None = Field(default=None, description="Bytes of the worker's output queue.")
    verify_sql: str | None = Field(default=None, description="A query that returns true when the work is done.")
    drop_invalid_index: bool | None = Field(
        default=None,
        description="Before CREATE INDEX CONCURRENTLY, drop the invalid index that an earlier build left.",
    )
    redact_details: bool | None = Field(
        default=None, description="Keep of the server's errors no text that may quote data."
    )


@record(checked=False)  # its checks would look for the names of the inherited annotations in this module
class SqlAsset(AssetSpecKwargs):
    """An asset, with all that Dagster knows of one, and its SQL."""

    sql: str | None = None
    sql_file: str | None = None
    pool: str | None = None
    backfill_policy: Annotated[
        BackfillPolicy | None,
        Resolver(resolve_backfill_policy, model_field_type=SingleRunBackfillPolicyModel | MultiRunBackfillPolicyModel),
    ] = None
    job: SqlJob | None = None
    checks: Sequence[SqlCheck] = ()


class PgBackgroundSqlComponent(Component, Resolvable, Model):
    """Assets whose SQL runs in PostgreSQL's background workers.

    In the SQL, ``%(partition_keys)s``, ``%(partition_key)s``, ``%(partition_start)s`` and ``%(partition_end)s`` stand
    for the partition's values; in the SQL of an asset with partitions a percent sign is written twice.
    """

    assets: Sequence[SqlAsset]
    resource_key: str = Field(default="pg", description="Key of the PgBackgroundResource.")

    def build_defs(self, context: ComponentLoadContext) -> Definitions:
        """Make the assets and their checks.

        Parameters
        ----------
        context:
            Of the component: says in which folder the SQL files are.

        Returns
        -------
        Definitions
            The assets and their checks; the resource is the project's own.

        Raises
        ------
        ValueError
            An entry has both ``sql`` and ``sql_file``, or neither.
        """
        assets = [self._asset(entry, context.path) for entry in self.assets]
        checks = [self._check(entry.key, check, context.path) for entry in self.assets for check in entry.checks]
        return Definitions(assets=assets, asset_checks=checks)

    def _asset(self, entry: SqlAsset, folder: Path) -> AssetsDefinition:
        text = _read(entry.sql, entry.sql_file, folder, f"asset {entry.key.to_user_string()}")

        def sql(context: AssetExecutionContext) -> Sql:
            return Sql(text, partition_parameters(context) or None)

        job = entry.job.model_dump(exclude_none=True) if entry.job else {}
        given = {name: getattr(entry, name) for name in PASSED_ON}
        return pg_background_asset(
            key=entry.key,
            resource_key=self.resource_key,
            job=cast("JobOptions", job),
            kinds=set(entry.kinds) if entry.kinds else KINDS,
            **{name: value for name, value in given.items() if value is not None},
        )(sql)

    def _check(self, key: AssetKey, check: SqlCheck, folder: Path) -> AssetChecksDefinition:
        text = _read(check.sql, check.sql_file, folder, f"check {check.name} of asset {key.to_user_string()}")

        def query() -> str:
            return text

        return pg_background_asset_check(
            asset=key,
            name=check.name,
            description=check.description,
            resource_key=self.resource_key,
            expect=check.expect,
            blocking=check.blocking,
            severity=AssetCheckSeverity(check.severity),
        )(query)


PASSED_ON = (
    "deps", "description", "metadata", "group_name", "code_version", "owners", "tags", "automation_condition",
    "partitions_def", "pool", "backfill_policy",
)  # fmt: skip


def _read(sql: str | None, file: str | None, folder: Path, what: str) -> str:
    """Return the SQL, wherever it stands.

    Raises
    ------
    ValueError
        It stands in both places, or in none.
    """
    if (sql is None) == (file is None):
        raise ValueError(f"{what}: give either sql or sql_file")
    return (folder / file).read_text() if file is not None else str(sql)
