"""What triggers do with their task: they ask for its state, store its XCom, and resume it no sooner than is sound."""

from __future__ import annotations

import asyncio
import importlib
import sys
from collections.abc import Coroutine
from typing import Any

from airflow_provider.compat import conf, in_thread

GOES_ON = ("deferred", "none", "queued", "restarting", "running", "scheduled", "up_for_reschedule", "up_for_retry")
"""States of a task that still wants its job, or whose next try deals with it. In all others a user ended it.

After a clear, and on a triggerer that was stalled and lost its triggers (airflow PR #73454), ``on_kill`` runs although
nobody killed anything, and finds one of these.
"""

SETTLE_SECONDS = conf.getint("workers", "min_heartbeat_interval", fallback=5) + 1.5
"""How long after its start a trigger may resume its task at the earliest.

The end of a process that deferred is noticed up to ``[workers] min_heartbeat_interval`` late (``_monitor_subprocess``
in ``supervisor.py`` waits for pipes that are closed already), and read by the scheduler in its next loop. One that
reads of it after the task was queued again takes it for the end of the process that resumed, and fails a task whose job
is committed ("finished with state success, but the task instance's state attribute is queued";
``process_executor_events`` in ``scheduler_job_runner.py``, which exempts tasks that are still ``scheduled``). Only jobs
of a few seconds meet that, and none that the trigger ends itself.
"""

KILL_SECONDS = 25.0
"""How long ``on_kill`` is waited for; Airflow gives it 30 s (``[triggerer] on_kill_timeout``)."""

_killing: set[asyncio.Task[None]] = set()


async def settle(began: float) -> None:
    """Wait until a trigger that began at this time of the loop's clock may fire."""
    await asyncio.sleep(max(began + SETTLE_SECONDS - asyncio.get_running_loop().time(), 0))


async def load_core() -> None:
    """Import what a trigger runs on, in a thread: for a first trigger that takes longer than a loop may stand still."""
    if "pgbg_orchestration.launcher" not in sys.modules:
        await asyncio.to_thread(importlib.import_module, "pgbg_orchestration.launcher")


async def state_of(ti: Any) -> str | None:
    """Return the state of a trigger's task instance; ``none`` before it is scheduled, None when it is gone."""
    if ti is None:
        return None
    from airflow.sdk.execution_time.task_runner import RuntimeTaskInstance

    mapped = ti.map_index is not None and ti.map_index >= 0
    states = await in_thread(
        RuntimeTaskInstance.get_task_states,
        dag_id=ti.dag_id,
        task_ids=[ti.task_id],
        run_ids=[ti.run_id],
        map_index=ti.map_index if mapped else None,
    )
    of_run = states.get(ti.run_id) or {}
    key = f"{ti.task_id}_{ti.map_index}" if mapped else ti.task_id
    if key not in of_run:
        return None
    return "none" if of_run[key] is None else str(of_run[key])


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
