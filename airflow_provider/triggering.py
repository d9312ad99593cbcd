"""What all triggers need of Airflow: a connection that they share, and the state of their task."""

from __future__ import annotations

import asyncio
import importlib
import sys
import time
from collections.abc import Coroutine
from typing import Any

from .hook import PgBackgroundHook

CONNECTION_SECONDS = 60.0
"""How long a resolved connection is used for further triggers of the same process.

Jobs share launching sessions by equal connection strings, and a token (IAM) differs from one call to the next.
"""

GOES_ON = ("deferred", "none", "queued", "restarting", "running", "scheduled", "up_for_reschedule", "up_for_retry")
"""States of a task that still wants its job, or whose next try deals with it. In all others a user ended it.

After a clear, and on a triggerer that was stalled and lost its triggers (airflow PR #73454), ``on_kill`` runs although
nobody killed anything, and finds one of these.
"""

SETTLE_SECONDS = 6.5
"""How long after its start a trigger may resume its task at the earliest.

The end of a process that deferred is noticed up to 5 s late (``MIN_HEARTBEAT_INTERVAL`` in ``supervisor.py``: it waits
for pipes that are closed already). A scheduler that reads of it after the task was queued again takes it for the end of
the process that resumed, and fails a task whose job is committed ("finished with state success, but the task
instance's state attribute is queued"; ``process_executor_events`` in ``scheduler_job_runner.py``). Only jobs of a few
seconds meet that, and none that the trigger ends itself.
"""

KILL_SECONDS = 25.0
"""How long ``on_kill`` is waited for; Airflow gives it 30 s (``[triggerer] on_kill_timeout``)."""

_killing: set[asyncio.Task[None]] = set()

_conninfos: dict[tuple[str, str | None, str | None], tuple[float, asyncio.Task[str]]] = {}


async def settle(began: float) -> None:
    """Wait until a trigger that began at this time of the loop's clock may fire."""
    await asyncio.sleep(max(began + SETTLE_SECONDS - asyncio.get_running_loop().time(), 0))


async def load_core() -> None:
    """Import what a trigger runs on, in a thread: for a first trigger that takes longer than a loop may stand still."""
    if "pgbg_orchestration.running" not in sys.modules:
        await asyncio.to_thread(importlib.import_module, "pgbg_orchestration.running")


async def shared_conninfo(conn_id: str, database: str | None, endpoint: str | None) -> str:
    """Return the libpq connection string of an Airflow connection; triggers of one process get the same one.

    Raises
    ------
    AirflowNotFoundException, InvalidJob
        As :meth:`PgBackgroundHook.conninfo`.
    """
    key = (conn_id, database, endpoint)
    loop = asyncio.get_running_loop()
    until, finding = _conninfos.get(key, (0.0, None))
    if finding is None or until < time.monotonic() or finding.get_loop() is not loop or _failed(finding):
        hook = PgBackgroundHook(conn_id, database=database, endpoint=endpoint)
        finding = loop.create_task(hook.aconninfo())
        _conninfos[key] = (time.monotonic() + CONNECTION_SECONDS, finding)
    # Others wait for the same answer: a trigger that is cancelled takes it from nobody.
    return await asyncio.shield(finding)


def _failed(finding: asyncio.Task[str]) -> bool:
    return finding.done() and (finding.cancelled() or finding.exception() is not None)


async def state_of(ti: Any) -> str | None:
    """Return the state of a trigger's task instance; ``none`` before it is scheduled, None when it is gone."""
    if ti is None:
        return None
    from airflow.sdk.execution_time.task_runner import RuntimeTaskInstance

    mapped = ti.map_index is not None and ti.map_index >= 0
    states = await asyncio.to_thread(
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
