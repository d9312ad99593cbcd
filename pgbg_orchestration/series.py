"""How the jobs of Airflow's tasks and of Dagster's steps are named: the integrations write it, the views read it."""

from __future__ import annotations

import re
from os.path import commonprefix
from typing import NamedTuple

DAGSTER_NAMESPACE = "dagster"
"""What the series of a Dagster step begins with, unless its resource says otherwise."""


class AirflowTask(NamedTuple):
    """What Airflow knows a task instance by; the map index is -1 where it was not mapped."""

    dag_id: str
    run_id: str
    task_id: str
    map_index: int


# Of the three, a run's id alone may have slashes in it.
_AIRFLOW = re.compile(r"airflow:([^/]+)/(.+)/([^/]+)/(-?[0-9]+)", re.DOTALL)
_NUMBER = re.compile(r"#[^/]+")
_DAGSTER_RUN = re.compile(r"#([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})(?:/|$)")


def of_airflow_task(dag_id: str, run_id: str, task_id: str, map_index: int | None = None) -> str:
    """Return the series of a task instance; ``map_index`` is None, or below 0, where it was not mapped."""
    return f"airflow:{dag_id}/{run_id}/{task_id}/{-1 if map_index is None else map_index}"


def airflow_task(series: str) -> AirflowTask | None:
    """Return the task instance of a series that :func:`of_airflow_task` made; None for any other series."""
    match = _AIRFLOW.fullmatch(series)
    if match is None:
        return None
    dag_id, run_id, task_id, map_index = match.groups()
    return AirflowTask(dag_id, run_id, task_id, int(map_index))


def airflow_task_of_job(series: str, job_id: str) -> AirflowTask | None:
    """Return the task instance that a job belongs to; None where its series and its id are not those of a task's job.

    The job of a batch has its name behind both.
    """
    whole = commonprefix((series, job_id))  # noqa: RUF071 - where the one goes on with the name, the other has a `#`
    name = series[len(whole) :]
    number = job_id[len(whole) :].removesuffix(name)
    return airflow_task(whole) if job_id.endswith(name) and _NUMBER.fullmatch(number) else None


def dagster_job_id(series: str, run_id: str) -> str:
    """Return the id of a Dagster step's job; ``run_id`` is of the run that first wanted it, or of a new generation."""
    return f"{series}#{run_id}"


def dagster_run(job_id: str) -> str | None:
    """Return the id of the Dagster run that first wanted a job; None for a job of no run."""
    match = _DAGSTER_RUN.search(job_id)
    return match[1] if match else None
