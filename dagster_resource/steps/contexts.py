"""The contexts that Dagster hands to code, and the step behind each of them."""

from __future__ import annotations

from typing import Any

from dagster import (
    DagsterTypeLoaderContext,
    HookContext,
    InitResourceContext,
    InputContext,
    OpExecutionContext,
    OutputContext,
    TypeCheckContext,
)

# They have a log too, and no step of their own that could be tried again, or none that they tell.
STRANGERS = (InitResourceContext, TypeCheckContext, DagsterTypeLoaderContext)


def of_step(context: Any) -> Any:
    """Return the context to ask about the step: the op's own, where code runs beside the op.

    Parameters
    ----------
    context:
        Of an asset, an op, an asset check, a sensor or a schedule, of a hook or an IO manager; or None. A hook's or an
        IO manager's that no step is behind (``load_asset_value``, one that was built by hand) counts as None.

    Raises
    ------
    TypeError
        It is none of these.
    """
    if isinstance(context, HookContext | InputContext | OutputContext):
        name = "_step_execution_context" if isinstance(context, HookContext) else "_step_context"
        step = getattr(context, name, None)  # their own properties raise where there is none
        return None if step is None else OpExecutionContext(step)
    context = getattr(context, "op_execution_context", context)
    if context is not None and (isinstance(context, STRANGERS) or not hasattr(context, "log")):
        raise TypeError(
            f"the context must be that of an asset, an op, a check, a hook, an IO manager, a sensor or a schedule, not "
            f"{type(context).__name__}: pass None for work that belongs to none of these"
        )
    return context


def place_of(context: Any) -> str | None:
    """Return where beside the step's own code the context belongs: what keeps its jobs apart from the step's."""
    if isinstance(context, HookContext):
        return f"hook/{context.hook_def.name}" if of_step(context) is not None else None
    if isinstance(context, OutputContext) and of_step(context) is not None:
        return f"output/{context.name}" + (f"/{context.mapping_key}" if context.mapping_key else "")
    if isinstance(context, InputContext) and of_step(context) is not None:
        return f"input/{context.name}"
    return None


def is_tried_again(context: Any) -> bool:
    """Tell whether Dagster runs this code again when it asks for that: not a hook."""
    return not isinstance(context, HookContext)
