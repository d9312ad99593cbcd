"""Assets and asset checks that are nothing but SQL: the function returns it, a worker runs it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast, get_type_hints, overload

from dagster import (
    AssetCheckExecutionContext,
    AssetCheckResult,
    AssetChecksDefinition,
    AssetCheckSeverity,
    AssetExecutionContext,
    AssetsDefinition,
    MaterializeResult,
    asset,
    asset_check,
)

from .steps.sql import JobOptions, Sql, SqlLike

if TYPE_CHECKING:
    from dagster._core.definitions.events import CoercibleToAssetKey

    from .resource import PgBackgroundResource
    from .steps.expectation import Expectation

SqlFunction = Callable[..., SqlLike]
KINDS = {"postgres", "sql"}


@overload
def pg_background_asset(fn: SqlFunction) -> AssetsDefinition: ...


@overload
def pg_background_asset(
    *, resource_key: str = ..., job: JobOptions | None = ..., preview: int = ..., notices: bool = ..., **options: Any
) -> Callable[[SqlFunction], AssetsDefinition]: ...


def pg_background_asset(
    fn: SqlFunction | None = None,
    *,
    resource_key: str = "pg",
    job: JobOptions | None = None,
    preview: int = 0,
    notices: bool = False,
    **options: Any,
) -> AssetsDefinition | Callable[[SqlFunction], AssetsDefinition]:
    """Make an asset of a function that returns SQL, or SQL and parameters; a worker runs it.

    The function may take a ``context``, a ``config``, other resources and upstream assets, as that of any asset. Each
    partition, or range of partitions, is a job of its own; :func:`partition_parameters` has the values for its SQL.

    Parameters
    ----------
    fn:
        The function, where the decorator stands without parentheses.
    resource_key:
        Key of the :class:`PgBackgroundResource`.
    job:
        Options of the job, as :class:`JobOptions` names them: ``label``, ``timeout`` (seconds), ``role``, …
    preview:
        How many of the last statement's rows to show in the metadata; the job keeps its rows for that (``fetch``).
    notices:
        Write what the SQL raises to the log, as :meth:`PgBackgroundResource.run` has it.
    options:
        Further arguments of :func:`dagster.asset`. Leave out ``retry_policy``: errors that are worth another try are
        retried without one.

    Returns
    -------
    AssetsDefinition
        The asset; with parentheses, the decorator that makes it.

    Raises
    ------
    TypeError
        The function is asynchronous or a generator.

    Examples
    --------
    >>> @pg_background_asset(deps=["flights"])  # doctest: +SKIP
    ... def delays() -> str:
    ...     return "refresh materialized view delays"
    """

    def decorate(function: SqlFunction) -> AssetsDefinition:
        def execute(context: AssetExecutionContext, given: SqlLike) -> MaterializeResult[Any]:
            pg: PgBackgroundResource = getattr(context.resources, resource_key)
            wanted = Sql.of(given, job)
            if preview:
                wanted = replace(wanted, options=JobOptions(**{"fetch": True, **wanted.options}))
            return pg.run(context, wanted, notices=notices).to_materialize_result(preview=preview)

        wrapped = _wrap(function, execute, AssetExecutionContext, MaterializeResult)
        required = {resource_key, *options.pop("required_resource_keys", ())}
        made = asset(**{"kinds": KINDS, **options}, required_resource_keys=required)(wrapped)
        return cast("AssetsDefinition", made)

    return decorate if fn is None else decorate(fn)


def pg_background_asset_check(
    *,
    asset: CoercibleToAssetKey | AssetsDefinition,
    resource_key: str = "pg",
    expect: Expectation = "no_rows",
    severity: AssetCheckSeverity = AssetCheckSeverity.ERROR,
    job: JobOptions | None = None,
    **options: Any,
) -> Callable[[SqlFunction], AssetChecksDefinition]:
    """Make an asset check of a function that returns a query, or a query and parameters; a worker runs it.

    Parameters
    ----------
    asset:
        The asset that is checked.
    resource_key:
        Key of the :class:`PgBackgroundResource`.
    expect:
        ``no_rows``: the query finds what is wrong, so it must return no row. ``true``: it must return at least one
        row, and true in every column of every row.
    severity:
        Of a check that does not hold.
    job:
        Options of the job.
    options:
        Further arguments of :func:`dagster.asset_check`, such as ``blocking=True``.

    Returns
    -------
    Callable
        The decorator that makes an :class:`dagster.AssetChecksDefinition`.

    Raises
    ------
    TypeError
        The function is asynchronous or a generator.

    Examples
    --------
    >>> @pg_background_asset_check(asset="flights")  # doctest: +SKIP
    ... def every_flight_has_a_carrier() -> str:
    ...     return "select from flights where carrier is null"
    """

    def decorate(function: SqlFunction) -> AssetChecksDefinition:
        def execute(context: AssetCheckExecutionContext, given: SqlLike) -> AssetCheckResult:
            # AssetCheckExecutionContext hands out no resources of its own.
            pg: PgBackgroundResource = getattr(context.op_execution_context.resources, resource_key)
            return pg.check(context, Sql.of(given, job), expect=expect, severity=severity)

        wrapped = _wrap(function, execute, AssetCheckExecutionContext, AssetCheckResult)
        required = {resource_key, *options.pop("required_resource_keys", ())}
        return asset_check(asset=asset, required_resource_keys=required, **options)(wrapped)

    return decorate


def partition_parameters(context: AssetExecutionContext) -> Mapping[str, Any]:
    """Return the values that a partition's SQL needs, for ``%(name)s`` placeholders.

    They are right for a single partition and for a backfill of a range in one run.

    Parameters
    ----------
    context:
        The context of an asset.

    Returns
    -------
    Mapping[str, Any]
        ``partition_keys`` (a list: ``= any(%(partition_keys)s)``); of partitions by time also ``partition_start`` and
        ``partition_end``, the end not included; of a single partition also ``partition_key``.
    """
    if not (context.has_partition_key or context.has_partition_key_range):
        return {}
    keys = list(context.partition_keys)
    values: dict[str, Any] = {"partition_keys": keys}
    if len(keys) == 1:
        values["partition_key"] = keys[0]
    from dagster import TimeWindowPartitionsDefinition

    definition = context.assets_def.partitions_def
    if isinstance(definition, TimeWindowPartitionsDefinition):
        window = context.partition_time_window
        values |= {"partition_start": window.start, "partition_end": window.end}
    return values


def _wrap(function: SqlFunction, execute: Callable[..., Any], context_type: type, returns: type) -> Callable[..., Any]:
    """Return a function of the same parameters that Dagster can take for its own, with a context in front."""
    if inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(function):
        raise TypeError(f"{function.__name__} must return its SQL: no async function and no generator")
    hints = get_type_hints(function, include_extras=True)
    parameters = [
        parameter.replace(annotation=hints.get(name, parameter.annotation))
        for name, parameter in inspect.signature(function).parameters.items()
    ]
    wants_context = bool(parameters) and parameters[0].name in ("context", "_context", "_")
    if wants_context:
        parameters = parameters[1:]
    front = inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=context_type)

    @functools.wraps(function)
    def wrapped(context: Any, *args: Any, **kwargs: Any) -> Any:
        given = function(context, *args, **kwargs) if wants_context else function(*args, **kwargs)
        return execute(context, given)

    del wrapped.__wrapped__  # Dagster would look through it and find the wrong signature
    signature = inspect.Signature([front, *parameters], return_annotation=returns)
    wrapped.__signature__ = signature  # type: ignore[attr-defined]
    wrapped.__annotations__ = {
        name: parameter.annotation
        for name, parameter in signature.parameters.items()
        if parameter.annotation is not inspect.Parameter.empty
    } | {"return": returns}
    return wrapped
