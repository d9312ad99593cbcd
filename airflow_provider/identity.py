"""Which job a task instance stands for, in every try, on every machine, after every restart, and its arguments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

FIRST_RUN = "pgbg_first_run"
"""Key in the task state store: the second in which this task instance's first try began."""

_CLEARS = 10_000  # generations of one task instance before they would run into those of a later one


@dataclass(frozen=True, slots=True)
class Identity:
    """A task instance's place in the ledger.

    Attributes
    ----------
    series:
        The same for all that this task instance of this DAG run ever does; two workers of one series never run at once.
    generation:
        Which wanted run of it this is: automatic retries keep it, a clear starts a later one.
    job_id:
        Names the job: the same id never commits twice.
    map_index:
        Which of the tasks that one was mapped to; None for one that was not.
    """

    series: str
    generation: int
    job_id: str
    map_index: int | None = None


def _series(ti: Any) -> str:
    from pgbg_orchestration.series import of_airflow_task  # the core is for whoever runs a task, not for a DAG's parse

    return of_airflow_task(ti.dag_id, ti.run_id, ti.task_id, ti.map_index)


def mapped_index(ti: Any) -> int | None:
    """Return the map index of a task instance; None where it was not mapped, for which Airflow has -1."""
    return None if ti.map_index is None or ti.map_index < 0 else int(ti.map_index)


def identify(context: Mapping[str, Any], *, durable: bool = True) -> Identity:
    """Return the identity of the task instance that is executing.

    ``max_tries`` stays over automatic retries and grows with each clear (``clear_task_instances`` in
    ``airflow/models/taskinstance.py``). A DAG run that was deleted and made again under the same run id starts over at
    the same number, and its SQL has to run again: so the second of the first try counts too. Airflow keeps that in the
    task state store, over retries and clears, and deletes it with the DAG run.

    Parameters
    ----------
    context:
        Airflow's context of the running task, on a worker: the store cannot be asked in a triggerer.
    durable:
        Whether the tries of one generation share a job. Otherwise each try is a job of its own.
    """
    ti = context["ti"]
    store = context.get("task_state_store")
    first = int(datetime.now(UTC).timestamp())
    if store is not None:
        # An error here fails the try: another identity than the last try's could commit the same work twice.
        known = store.get(FIRST_RUN)
        if known is None:
            from airflow.sdk.execution_time.context import NEVER_EXPIRE

            store.set(FIRST_RUN, first, retention=NEVER_EXPIRE)
        else:
            first = int(known)
    else:
        first = 0
    series = _series(ti)
    number = ti.max_tries if durable else ti.try_number
    name = f"{first}.{number}" if durable else f"{first}.try{number}"
    return Identity(series, first * _CLEARS + number, f"{series}#{name}", mapped_index(ti))


def identify_try(ti: Any) -> Identity:
    """Return the identity of a try that began in the triggerer: each try is a job of its own.

    There nothing tells an automatic retry from a clear: the task instance has no ``max_tries`` of its own
    (``create_runtime_ti`` in ``triggerer_job_runner.py`` fills ``retries`` in), and the store cannot be asked. Its id
    is new for each try and begins with the time (UUID version 7), so it is later than that of any try before, in a run
    that was made again as well.

    Parameters
    ----------
    ti:
        The trigger's task instance.
    """
    series = _series(ti)
    milliseconds = ti.id.int >> 80
    return Identity(series, milliseconds * _CLEARS // 1000 + ti.try_number, f"{series}#{ti.id}", mapped_index(ti))
