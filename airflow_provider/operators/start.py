"""Tasks that begin in the triggerer: what a DAG file may ask for, and what Airflow is told of it.

A DAG file imports this, so it imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from airflow_provider import compat
from airflow_provider.arguments import JOB_FIELDS, LEAD, fetch_of, not_plain, pack
from airflow_provider.templates import take_apart

if TYPE_CHECKING:
    from airflow.sdk import BaseOperator
    from airflow.triggers.base import StartTriggerArgs

_WITHOUT = "Leave start_from_trigger out: the task then begins on a worker, for a moment, and waits in the triggerer."


def check(operator: BaseOperator, *, durable: bool, possible: bool) -> None:
    """Refuse a task that cannot soundly begin in the triggerer.

    Parameters
    ----------
    operator:
        The task.
    durable:
        Whether its automatic retries share a job.
    possible:
        Whether tasks of its kind can begin in the triggerer at all.

    Raises
    ------
    ValueError
        With the reason, and what to do.
    """
    name = f"{type(operator).__name__} {operator.task_id!r} cannot have start_from_trigger=True"
    if not compat.HERE.starts_from_triggers:
        raise ValueError(f"{name}: that needs Airflow 3.3 or newer. {_WITHOUT}")
    if not possible:
        raise ValueError(f"{name}: what it runs is put together on a worker. {_WITHOUT}")
    if getattr(operator, "_BaseOperator__from_mapped", False):
        check_mapped({"start_from_trigger": True, "task_id": operator.task_id})
    if operator.retries and durable:
        raise ValueError(
            f"{name} with retries={operator.retries}: in a triggerer nothing tells an automatic retry, which must not "
            "run committed SQL again, from a clear, which must. Set retries=0, or durable=False where it does no harm "
            f"to run committed SQL once more. {_WITHOUT}"
        )


def arguments_of(operator: BaseOperator, others: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of the trigger of a task that begins there: nothing but texts that Airflow may render.

    Parameters
    ----------
    operator:
        The task.
    others:
        What every trigger of it is given besides its job.

    Raises
    ------
    ValueError
        A parameter cannot be written as SQL, or be put together after rendering.
    """
    name = f"{type(operator).__name__} {operator.task_id!r} cannot have start_from_trigger=True"
    given = {field: getattr(operator, field) for field in JOB_FIELDS}
    try:
        fixed, given["parameters"], given["settings"] = take_apart(given["parameters"], given["settings"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error} {_WITHOUT}") from error
    if (fetch := fetch_of(given["fetch"])) is not None:
        given["fetch"] = pack("fetch", fetch)
    if not isinstance(given["sql"], str):
        given["sql"] = list(given["sql"])
    as_text = {field: str.__str__(value) if isinstance(value, str) else value for field, value in given.items()}
    arguments = {**as_text, "fixed": fixed, **others}
    for field, value in arguments.items():
        if strange := not_plain(value):
            raise ValueError(
                f"{name}: {field} is or holds {strange}, which Airflow cannot store for a trigger. {_WITHOUT}"
            )
    return arguments


def check_mapped(kwargs: Mapping[str, Any]) -> None:
    """Refuse mapped tasks that are to begin in the triggerer: Airflow has no such thing, and says nothing of it.

    Raises
    ------
    ValueError
        With what to do.
    """
    # Airflow looks for the defaults of a mapped task's own arguments on a worker only.
    defaults = [getattr(kwargs.get(owner), "default_args", None) or {} for owner in ("dag", "task_group")]
    given = {name: value for layer in (*defaults, kwargs) for name, value in layer.items()}
    if given.get("start_from_trigger"):
        raise ValueError(
            f"the mapped task {kwargs.get('task_id')!r} cannot have start_from_trigger=True: Airflow starts no mapped "
            f"task in a triggerer. {_WITHOUT}"
        )


def trigger_args(given: Mapping[str, Any], timeout: float | timedelta | None) -> StartTriggerArgs:
    """Return what Airflow's scheduler makes the trigger of.

    Parameters
    ----------
    given:
        The arguments of the trigger.
    timeout:
        Time for the job, in seconds or as a timedelta.
    """
    from airflow.triggers.base import StartTriggerArgs

    if timeout is not None and not isinstance(timeout, timedelta):
        timeout = timedelta(seconds=timeout)
    return StartTriggerArgs(
        trigger_cls="airflow_provider.triggers.PgBackgroundStartTrigger",
        trigger_kwargs=dict(given),
        next_method="execute_complete",
        # Airflow's clock begins with the try; the trigger's deadline comes a little before it.
        timeout=None if timeout is None else timeout + LEAD,
    )
