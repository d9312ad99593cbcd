"""Tasks that end in the triggerer: which ones have nothing left to be done on a worker once their SQL is committed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from airflow.sdk import BaseOperator


def ends_in_trigger(operator: BaseOperator, wanted: bool | None) -> bool:
    """Tell whether the trigger of a task ends it, when all went well.

    A worker alone makes asset events, calls ``on_success_callback`` (a DAG processor that is told of a success calls
    none, ``_execute_task_callbacks`` in ``processor.py``), and tells Airflow how many tasks to make of an XCom.

    Parameters
    ----------
    operator:
        The task.
    wanted:
        What the user says: True leaves out listeners, ``post_execute`` and a subclass's own ``execute_complete``. With
        None the task is ended where there are none of them.
    """
    if wanted is False or operator.outlets or operator.on_success_callback or _has_parts_in_xcom(operator):
        return False
    return wanted is True or not (_is_extended(operator) or is_listened_to())


def _has_parts_in_xcom(operator: Any) -> bool:
    if not operator.do_xcom_push:
        return False
    mapped_over = operator.has_dag() and next(operator.iter_mapped_dependants(), None) is not None
    return bool(operator.multiple_outputs or getattr(operator, "returns_dag_result", False) or mapped_over)


def _is_extended(operator: Any) -> bool:
    from airflow.sdk import BaseOperator

    kind = type(operator)
    return (
        operator._post_execute_hook is not None  # noqa: SLF001 - Airflow keeps the argument `post_execute` there
        or kind.post_execute is not BaseOperator.post_execute
        or kind.execute_complete.__module__.partition(".")[0] != __name__.partition(".")[0]
    )


def is_listened_to() -> bool:
    """Tell whether a listener, such as OpenLineage's, is told of tasks that end on a worker."""
    from airflow_provider.compat import get_listener_manager

    listening = get_listener_manager().hook.on_task_instance_success.get_hookimpls()
    # Airflow's own example, which is there where `load_examples` is on, only prints.
    return any(
        not implementation.function.__module__.startswith("airflow.example_dags.") for implementation in listening
    )
