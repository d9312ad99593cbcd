"""Orphans: jobs at work whose launcher is dead and whose task has ended without them, found without anybody asking.

Airflow tells nobody of a task that is marked in the seconds after its triggerer was killed: it deletes the trigger
(``Trigger.clean_unused``) before another triggerer may have it. So the triggers of a process look now and then for what
was left at work over their connection, whoever launched it; and so does a triggerer from its start on
(``triggerer_listener``).

What decides is the database's own word that the session is gone which registered the launch, and Airflow's word for the
state of the task: no clock of this machine. A triggerer that is stalled keeps its sessions, and one that was replaced
has tasks that go on.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeAlias
from weakref import WeakKeyDictionary

from pgbg_orchestration.series import AirflowTask, airflow_task_of_job

if TYPE_CHECKING:
    from pgbg_orchestration import Launcher
    from pgbg_orchestration.ledger.history import Orphan
    from pgbg_orchestration.postgres.connection import Conninfo

ORPHANS_SECONDS = 60.0
"""Between two looks of a process at one database."""

ENDED = frozenset({"failed", "removed", "skipped", "success", "upstream_failed"})
"""States of a task that wants no job any more. Any other goes on, or its next try deals with the worker; one that this
Airflow does not know may be another Airflow's."""

States: TypeAlias = Callable[[Collection[AirflowTask]], Awaitable[Mapping[AirflowTask, str]]]
"""Asks Airflow for the states of tasks; those that it does not know are left out."""

logger = logging.getLogger(__name__)


async def sweep(launcher: Launcher, states: States, mentioned: set[str]) -> None:
    """Cancel the workers of tasks that have ended, as ``cancel_on_kill`` says, and write to the log what was found.

    Two that do this at once do no harm: the second finds a job cancelled, or gone.

    Parameters
    ----------
    launcher:
        Over which.
    states:
        Asks for the tasks' states.
    mentioned:
        Ids of jobs that are to be left at work and of which the log has a line: changed.

    Raises
    ------
    Exception
        The server or Airflow does not answer; nothing was cancelled then. What fails of a single cancel is logged.
    """
    from pgbg_orchestration.ledger.install import VERSION

    facts = await launcher.facts()
    if facts.schema_version != VERSION:
        return  # nothing that this release launched is there
    found = await _unwanted(launcher, states)
    mentioned &= {orphan.job_id for orphan in found}
    for orphan, state in found.items():
        if orphan.when_orphaned == "leave" and orphan.job_id not in mentioned:
            mentioned.add(orphan.job_id)
            logger.warning("%s Its worker is left at work (cancel_on_kill=False).", _what(orphan, state))
    await asyncio.gather(
        *(_end(launcher, states, orphan) for orphan in found if orphan.when_orphaned == "cancel"),
    )


async def _unwanted(launcher: Launcher, states: States, job_id: str | None = None) -> dict[Orphan, str]:
    """Return the orphans whose tasks have ended, with the states of these."""
    orphans = await launcher.ledger.orphans(series="airflow:*", job_id=job_id)
    tasks = {
        orphan: task for orphan in orphans if (task := airflow_task_of_job(orphan.series, orphan.job_id)) is not None
    }
    known = await states(set(tasks.values())) if tasks else {}
    return {orphan: known[task] for orphan, task in tasks.items() if known.get(task) in ENDED}


async def _end(launcher: Launcher, states: States, orphan: Orphan) -> None:
    from pgbg_orchestration.outcome import Cause

    try:
        # Again, at the last moment: it may have been cleared, or ended, since.
        state = (await _unwanted(launcher, states, orphan.job_id)).get(orphan)
        if state is None:
            return
        end = await launcher.cancel(
            orphan.job_id,
            owner=orphan.owner,
            series=orphan.series,
            reason=f"the Airflow task is {state}, and the launcher {orphan.launched_by} is gone",
            cause=Cause.RUN_GONE,
        )
    except Exception as error:  # noqa: BLE001 - whatever it is, the next look tries it again
        logger.warning("The orphan %s could not be cancelled: %s", orphan.job_id, error)
    else:
        logger.warning("%s It is %s now.", _what(orphan, state), end)


def _what(orphan: Orphan, state: str) -> str:
    return (
        f"Job {orphan.job_id}, label {orphan.label!r}, was at work without anybody: its task is {state}, and its "
        f"launcher {orphan.launched_by} is gone."
    )


class Sweeper:
    """Looks for orphans in one database, at once and then every minute, as long as somebody holds it.

    Parameters
    ----------
    conninfo, schema:
        As :func:`pgbg_orchestration.launcher.shared_launcher` takes them.
    states:
        Asks for the tasks' states.
    """

    def __init__(self, conninfo: Conninfo, schema: str, states: States) -> None:
        self._conninfo = conninfo
        self._schema = schema
        self._states = states
        self._holders = 0
        self._next = 0.0  # of the loop's clock, which nobody can set
        self._looking = False
        self._told: set[str] = set()
        self._trouble = ""
        self._task: asyncio.Task[None] | None = None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep it looking. A look that is under way at the end of that is let end."""
        self._holders += 1
        if self._task is None or self._task.done() or self._task.cancelling():
            # In a context of its own: in a trigger's, all that is logged would go to that trigger's task.
            self._task = asyncio.get_running_loop().create_task(self._run(), context=contextvars.Context())
        try:
            yield
        finally:
            self._holders -= 1
            if not (self._holders or self._looking):
                self._task.cancel()

    async def _run(self) -> None:
        clock = asyncio.get_running_loop().time
        while self._holders:
            await asyncio.sleep(max(self._next - clock(), 0))
            self._next = clock() + ORPHANS_SECONDS
            self._looking = True
            try:
                await self._look()
                self._trouble = ""
            except Exception as error:  # noqa: BLE001 - no task may fail because of this
                # Once, and not each minute of an outage.
                level = logging.DEBUG if repr(error) == self._trouble else logging.WARNING
                self._trouble = repr(error)
                logger.log(level, "Orphans cannot be looked for now, which is tried again every minute: %r", error)
            finally:
                self._looking = False

    async def _look(self) -> None:
        from pgbg_orchestration.launcher import shared_launcher

        async with shared_launcher(self._conninfo, schema=self._schema) as launcher:
            await sweep(launcher, self._states, self._told)


_sweepers: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[tuple[Conninfo, str], Sweeper]] = WeakKeyDictionary()


@contextmanager
def sweeping(conninfo: Conninfo, schema: str, states: States) -> Iterator[None]:
    """Look for orphans while this lasts, together with all others of this event loop that do so in the same database.

    Parameters
    ----------
    conninfo, schema, states:
        As :class:`Sweeper` takes them; conninfos that are equal share one.
    """
    sweepers = _sweepers.setdefault(asyncio.get_running_loop(), {})
    sweeper = sweepers.setdefault((conninfo, schema), Sweeper(conninfo, schema, states))
    with sweeper.held():
        yield
