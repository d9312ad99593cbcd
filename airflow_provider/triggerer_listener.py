"""Looks for orphans from the start of a triggerer on, also where no trigger of this package runs in it.

A listener of Airflow's, which the plugin brings along. The databases are those of the connections that
``[pg_background] sweep_conn_ids`` names, with commas between them (``AIRFLOW__PG_BACKGROUND__SWEEP_CONN_IDS``):
``postgres_default`` where nothing is said, none where it is empty. This runs in the triggerer's main process, which has
Airflow's database.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Collection
from contextlib import ExitStack
from itertools import groupby
from operator import itemgetter
from threading import Thread
from typing import Any

from airflow.listeners import hookimpl

from pgbg_orchestration.series import AirflowTask

SECTION = "pg_background"
DEFAULT = "postgres_default"

logger = logging.getLogger(__name__)

_waiting: list[Any] = []
"""What is starting in this process: at most one of Airflow's jobs."""


def in_triggerer() -> bool:
    """Tell whether this process was started as a triggerer.

    Elsewhere there must be no listener: where there is one, Airflow refuses every DAG that has a task with
    ``end_from_trigger=True``, whatever it listens to (``DagBag.bag_dag``).
    """
    return sys.argv[1:2] == ["triggerer"]


def sweep_conn_ids() -> list[str]:
    """Return the ids of the connections in whose databases a triggerer looks for orphans from its start on."""
    from airflow.configuration import conf

    named = conf.get(SECTION, "sweep_conn_ids", fallback=DEFAULT)
    return [conn_id.strip() for conn_id in named.split(",") if conn_id.strip()]


@hookimpl
def on_starting(component: Any) -> None:
    """Have a triggerer look for orphans, once it has started the process that runs its triggers.

    Not before: that process is a fork of this one, and a fork beside a thread that is at work may take a lock along.
    """
    if not hasattr(component, "job_type") or not sweep_conn_ids():
        return  # a task's own process
    if not _waiting:
        os.register_at_fork(after_in_parent=_begin, after_in_child=_waiting.clear)
    _waiting[:] = [component]


def _begin() -> None:
    """Begin to look, where it is a triggerer that has forked: what it is was not known yet when it was starting."""
    if not _waiting:
        return
    component = _waiting.pop()
    if component.job_type == "TriggererJob":
        Thread(target=_look, args=(sweep_conn_ids(),), name="pg_background orphans", daemon=True).start()


def _look(conn_ids: list[str]) -> None:
    try:
        asyncio.run(look(conn_ids))
    except Exception:
        logger.exception("Orphans are not looked for any more until this triggerer starts anew")


async def look(conn_ids: Collection[str]) -> None:
    """Look for orphans over these connections, until it is cancelled."""
    from airflow_provider.hook import PgBackgroundHook
    from airflow_provider.sweep import Sweeper

    with ExitStack() as holding:
        for conn_id in conn_ids:
            if conn_id == DEFAULT and not await asyncio.to_thread(_is_there, conn_id):
                continue
            holding.enter_context(Sweeper(PgBackgroundHook(conn_id).aconninfo, "pgbg", states_of).held())
        await asyncio.Event().wait()


def _is_there(conn_id: str) -> bool:
    from airflow_provider.compat import AirflowNotFoundException
    from airflow_provider.hook import PgBackgroundHook

    try:
        PgBackgroundHook(conn_id).check()
    except AirflowNotFoundException:
        return False
    return True


async def states_of(tasks: Collection[AirflowTask]) -> dict[AirflowTask, str]:
    """Return the states of task instances, as Airflow's database has them; ``none`` before one is scheduled."""
    return await asyncio.to_thread(_states_of, tasks)


def _states_of(tasks: Collection[AirflowTask]) -> dict[AirflowTask, str]:
    from airflow.models.taskinstance import TaskInstance
    from airflow.utils.session import create_session
    from sqlalchemy import select

    found: dict[AirflowTask, str] = {}
    of_dag = itemgetter(0, 2)
    with create_session() as session:
        for (dag_id, task_id), some in groupby(sorted(tasks, key=of_dag), key=of_dag):
            keys = set(some)
            query = select(TaskInstance.run_id, TaskInstance.map_index, TaskInstance.state).where(
                TaskInstance.dag_id == dag_id,
                TaskInstance.task_id == task_id,
                TaskInstance.run_id.in_(sorted({key.run_id for key in keys})),
            )
            for run_id, map_index, state in session.execute(query):
                key = AirflowTask(dag_id, run_id, task_id, map_index)
                if key in keys:
                    found[key] = "none" if state is None else str(state)
    return found
