"""What triggers do with their task: they ask for its state, store its XCom, and resume it no sooner than is sound."""

from __future__ import annotations

import asyncio
import importlib
import sys
from collections.abc import Collection, Coroutine, Iterator
from itertools import groupby
from operator import itemgetter
from typing import Any

from airflow_provider.compat import conf, in_thread
from pgbg_orchestration.series import AirflowTask

GOES_ON = ("deferred", "none", "queued", "restarting", "running", "scheduled", "up_for_reschedule", "up_for_retry")
"""States of a task that still wants its job, or whose next try deals with it. In all others a user ended it.

After a clear, and on a triggerer that was stalled and lost its triggers (airflow PR #73454), ``on_kill`` runs although
nobody killed anything, and finds one of these.
"""

RESUME_SECONDS = conf.getint("workers", "min_heartbeat_interval", fallback=5) + 1.5
"""How long after its start a trigger may resume its task at the earliest.

The end of a process that deferred is noticed up to ``[workers] min_heartbeat_interval`` late (``_monitor_subprocess``
in ``supervisor.py`` waits for pipes that are closed already), and read by the scheduler in its next loop. One that
reads of it after the task was queued again takes it for the end of the process that resumed, and fails a task whose job
is committed ("finished with state success, but the task instance's state attribute is queued";
``process_executor_events`` in ``scheduler_job_runner.py``, which exempts tasks that are still ``scheduled``). Only jobs
of a few seconds meet that, and none that the trigger ends itself.
"""

RUNS_AT_ONCE = 50
"""How many runs one question for states names: they travel in the address of a request."""

KILL_SECONDS = 25.0
"""How long ``on_kill`` is waited for; Airflow gives it 30 s (``[triggerer] on_kill_timeout``)."""

_killing: set[asyncio.Task[None]] = set()


async def wait_to_resume(began: float) -> None:
    """Wait until a trigger that began at this time of the loop's clock may fire."""
    await asyncio.sleep(max(began + RESUME_SECONDS - asyncio.get_running_loop().time(), 0))


async def load_core() -> None:
    """Import what a trigger runs on, in a thread: for a first trigger that takes longer than a loop may stand still."""
    if "pgbg_orchestration.launcher" not in sys.modules:
        await asyncio.to_thread(importlib.import_module, "pgbg_orchestration.launcher")


async def state_of(ti: Any) -> str | None:
    """Return the state of a trigger's task instance; ``none`` before it is scheduled, None when it is gone."""
    if ti is None:
        return None
    key = AirflowTask(ti.dag_id, ti.run_id, ti.task_id, -1 if ti.map_index is None else ti.map_index)
    return (await states_of([key])).get(key)


async def states_of(tasks: Collection[AirflowTask]) -> dict[AirflowTask, str]:
    """Return the states of task instances; ``none`` before one is scheduled. Those that are gone are left out."""
    from airflow.sdk.execution_time.task_runner import RuntimeTaskInstance

    found: dict[AirflowTask, str] = {}
    of_dag = itemgetter(0, 2)
    # In one answer `load_1` may be a task, or number 1 of a task `load`: so one question for each task of a DAG.
    for (dag_id, task_id), some in groupby(sorted(tasks, key=of_dag), key=of_dag):
        keys = list(some)
        indexes = {key.map_index for key in keys}
        only = indexes.pop() if len(indexes) == 1 else -1
        for runs in _in_parts(sorted({key.run_id for key in keys})):
            states = await in_thread(
                RuntimeTaskInstance.get_task_states,
                dag_id=dag_id,
                task_ids=[task_id],
                run_ids=runs,
                map_index=only if only >= 0 else None,
            )
            for key in keys:
                name = key.task_id if key.map_index < 0 else f"{key.task_id}_{key.map_index}"
                of_run = states.get(key.run_id) or {}
                if name in of_run:
                    found[key] = "none" if of_run[name] is None else str(of_run[name])
    return found


def _in_parts(runs: list[str]) -> Iterator[list[str]]:
    for begin in range(0, len(runs), RUNS_AT_ONCE):
        yield runs[begin : begin + RUNS_AT_ONCE]


async def push_xcom(ti: Any, value: Any) -> None:
    """Store a task's return value as a worker does; what a ``TaskSuccessEvent`` takes along Airflow encodes twice.

    Raises
    ------
    Exception
        Whatever Airflow, or the user's own XCom backend, raises.
    """
    from airflow.sdk.execution_time.xcom import XCom

    # In a thread: a backend may talk to an object store.
    await in_thread(
        XCom.set,
        XCom.XCOM_RETURN_KEY,
        value,
        dag_id=ti.dag_id,
        task_id=ti.task_id,
        run_id=ti.run_id,
        map_index=-1 if ti.map_index is None else ti.map_index,
    )


async def to_its_end(work: Coroutine[Any, Any, None]) -> None:
    """Run what ``on_kill`` has to do to its end, however often Airflow cancels it.

    A triggerer cancels a trigger anew with each of its syncs, about once a second, until it is gone: an ``on_kill``
    that takes longer is ended in the middle, without a word (``cancelling_triggers`` in ``triggerer_job_runner.py``).
    """
    loop = asyncio.get_running_loop()
    until = loop.time() + KILL_SECONDS
    task = loop.create_task(work)
    _killing.add(task)  # the loop itself keeps no task alive
    task.add_done_callback(_killing.discard)
    while not task.done() and loop.time() < until:
        try:
            await asyncio.wait({task}, timeout=until - loop.time())
        except asyncio.CancelledError:
            continue
    if task.done():
        task.result()
