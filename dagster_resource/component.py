"""Assets from YAML: SQL that stands in ``defs.yaml``, or in a file beside it."""

# No `from __future__ import annotations` here: Dagster builds its schema from the annotations themselves.

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, cast

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
    ResolutionContext,
    Resolvable,
    Resolver,
    Scaffolder,
    ScaffoldRequest,
    scaffold_component,
    scaffold_with,
)
from dagster.components.resolved.core_models import (
    AssetSpecKwargs,
    MultiRunBackfillPolicyModel,
    SingleRunBackfillPolicyModel,
    resolve_backfill_policy,
)
from dagster_shared.record import record

from .assets import KINDS, partition_parameters, pg_background_asset, pg_background_asset_check
from .steps.sql import JobOptions, Sql


def about(description: str) -> Resolver:
    """Return what makes Dagster's tools show this of a field: they overlook the description of a pydantic one."""
    resolver: Resolver = Resolver.default(description=description)
    return resolver


def told_text(description: str) -> Resolver:
    """Do what :func:`about` does, for a text that may be digits: a template makes a number of those."""

    def as_text(context: ResolutionContext, value: Any) -> str | None:
        resolved = context.resolve_value(value)
        return None if resolved is None else str(resolved)

    return Resolver(as_text, model_field_type=str | int | float, inject_before_resolve=False, description=description)


class SqlCheck(Model, Resolvable):
    """A check of the asset, asked in a worker of its own."""

    name: Annotated[str, told_text("Name of the check.")]
    sql: Annotated[str | None, about("The query.")] = None
    sql_file: Annotated[str | None, about("A file with the query, beside defs.yaml.")] = None
    expect: Annotated[
        Literal["no_rows", "true"],
        about("What the query must return: no row, or true in every column of at least one row."),
    ] = "no_rows"
    blocking: Annotated[bool, about("Whether a failure keeps downstream assets from running.")] = False
    severity: Annotated[Literal["ERROR", "WARN"], about("Of a check that does not hold.")] = "ERROR"
    description: Annotated[str | None, told_text("Shown by Dagster.")] = None


class SqlJob(Model, Resolvable):
    """Options of the job behind an asset."""

    label: Annotated[str | None, told_text("What a person sees on the worker; 64 bytes at most.")] = None
    kind: Annotated[
        Literal["receipt", "session", "supervised"] | None,
        about("How the outcome is made certain. Default: as the statement needs it."),
    ] = None
    timeout: Annotated[float | None, about("Seconds until the worker is cancelled.")] = None
    role: Annotated[str | None, about("Role that the SQL runs as.")] = None
    settings: Annotated[dict[str, str | int | float | bool] | None, about("Server settings, such as work_mem.")] = None
    isolation: Annotated[
        str | None, about("read committed, repeatable read or serializable. Default: what the login has.")
    ] = None
    queue_size: Annotated[int | None, about("Bytes of the worker's output queue.")] = None
    verify_sql: Annotated[str | None, about("A query that returns true when the work is done.")] = None
    drop_invalid_index: Annotated[
        bool | None, about("Before CREATE INDEX CONCURRENTLY, drop the invalid index that an earlier build left.")
    ] = None
    redact_details: Annotated[bool | None, about("Keep of the server's errors no text that may quote data.")] = None
    fetch: Annotated[
        bool | dict[str, int | bool] | None,
        about("Keep the last statement's rows beside the receipt: true, or the bounds max_rows and max_bytes."),
    ] = None


@record(checked=False)  # its checks would look for the names of the inherited annotations in this module
class SqlAsset(AssetSpecKwargs):
    """An asset, with all that Dagster knows of one, and its SQL."""

    sql: Annotated[str | None, about("The statements, which run in one transaction.")] = None
    sql_file: Annotated[str | None, about("A file with the statements, beside defs.yaml.")] = None
    pool: Annotated[str | None, about("Dagster's pool whose slot the step takes.")] = None
    backfill_policy: Annotated[
        BackfillPolicy | None,
        Resolver(
            resolve_backfill_policy,
            model_field_type=SingleRunBackfillPolicyModel | MultiRunBackfillPolicyModel,
            description="Whether a backfill is one run, which has a range of partitions, or several.",
        ),
    ] = None
    job: Annotated[SqlJob | None, about("Options of the job.")] = None
    preview: Annotated[
        int | None, about("How many of the last statement's rows to show in the metadata; they are kept for that.")
    ] = None
    notices: Annotated[
        bool | None, about("Write what the SQL raises (RAISE NOTICE) into the log, as it is raised.")
    ] = None
    checks: Annotated[Sequence[SqlCheck], about("Queries that are to hold, each a check of the asset.")] = ()


# It can be run any number of times, as an asset's SQL should.
FIRST_SQL = "drop table if exists my_table; create table my_table as select 1 as n"


class SqlScaffolder(Scaffolder[Any]):
    """Writes the ``defs.yaml`` of ``dg scaffold defs``, with an asset to begin with."""

    def scaffold(self, request: ScaffoldRequest[Any]) -> None:
        """Write it."""
        scaffold_component(request, {"assets": [{"key": "my_table", "sql": FIRST_SQL}]})


@scaffold_with(SqlScaffolder)
class PgBackgroundSqlComponent(Component, Resolvable, Model):
    """Assets whose SQL runs in PostgreSQL's background workers.

    In the SQL, ``%(partition_keys)s``, ``%(partition_key)s``, ``%(partition_start)s`` and ``%(partition_end)s`` stand
    for the partition's values; in the SQL of an asset with partitions a percent sign is written twice.
    """

    assets: Annotated[Sequence[SqlAsset], about("The assets.")]
    resource_key: Annotated[str, about("Key of the PgBackgroundResource.")] = "pg"

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
            output_required=not entry.skippable,
            code_version=None if entry.code_version is None else str(entry.code_version),  # "3" has become 3 by now
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
    "deps", "description", "metadata", "group_name", "owners", "tags", "automation_condition",
    "partitions_def", "freshness_policy", "pool", "backfill_policy", "preview", "notices",
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
    from pgbg_orchestration.statements import files  # its patterns cost time, which is not paid at import

    return files.read(folder / file) if file is not None else str(sql)
