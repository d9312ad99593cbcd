"""What the server shows of workers at work: how far a command is, what it waits for, and who blocks it.

Everything is read in one query for all workers, from ``pg_stat_activity`` and the ``pg_stat_progress_*`` views
(PostgreSQL manual, 27.4 "Progress Reporting"). What the login may not see comes as None.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg import AsyncConnection, sql
from psycopg.rows import dict_row

from pgbg_orchestration.errors import InvalidJob
from pgbg_orchestration.labels import LabelPattern

from .catalog import QUERIES

# Where two views show the same command, the first counts: since 19 "cluster" is another name of "repack".
VIEWS = ("repack", "create_index", "vacuum", "analyze", "cluster", "copy")

# For each view: a word of the phase's name, and the counters of what is done and of how many. The first line that fits
# and has a total counts. By phase, because the counters of an earlier phase keep their values.
COUNTERS: Mapping[str, Sequence[tuple[str, str, str]]] = {
    "create_index": (
        ("waiting for", "lockers_done", "lockers_total"),
        ("loading tuples", "tuples_done", "tuples_total"),
        ("scanning", "blocks_done", "blocks_total"),
        ("", "partitions_done", "partitions_total"),
    ),
    "vacuum": (
        ("vacuuming heap", "heap_blks_vacuumed", "heap_blks_total"),
        ("indexes", "indexes_processed", "indexes_total"),
        ("scanning heap", "heap_blks_scanned", "heap_blks_total"),
    ),
    "analyze": (
        ("extended statistics", "ext_stats_computed", "ext_stats_total"),
        ("", "sample_blks_scanned", "sample_blks_total"),
        ("", "child_tables_done", "child_tables_total"),
    ),
    "cluster": (("scanning heap", "heap_blks_scanned", "heap_blks_total"),),
    "repack": (("scanning heap", "heap_blks_scanned", "heap_blks_total"),),
    "copy": (("", "bytes_processed", "bytes_total"),),
}


@dataclass(frozen=True, slots=True)
class Blocker:
    """A session that holds the lock that a worker waits for, or waits for it before that worker.

    A pid of 0 is a prepared transaction. ``seconds``: how long its transaction is open.
    """

    pid: int
    user_name: str | None = None
    application: str | None = None
    state: str | None = None
    query: str | None = None
    seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Command:
    """A command that reports its progress: its name, its phase, and how much of the phase is done."""

    name: str
    phase: str | None
    done: int | None = None
    total: int | None = None

    @property
    def percent(self) -> int | None:
        """How much of the phase is done; None where it counts nothing."""
        if not self.total or self.done is None:
            return None
        return min(100 * self.done // self.total, 100)


@dataclass(frozen=True, slots=True)
class Activity:
    """What one worker is at. ``waited`` is in seconds."""

    pid: int
    name: str | None
    wait_event_type: str | None
    wait_event: str | None
    waited: float | None
    blockers: tuple[Blocker, ...]
    command: Command | None


async def views_of(conn: AsyncConnection[Any]) -> tuple[str, ...]:
    """Return which of the progress views this server has."""
    cursor = await conn.execute(QUERIES["progress_views"], ([*VIEWS],))
    return tuple(name for (name,) in await cursor.fetchall())


async def waiting_for(conn: AsyncConnection[Any], events: Sequence[str]) -> set[int]:
    """Return the processes that wait for one of these, as far as the login sees them."""
    query = "select a.pid from pg_catalog.pg_stat_activity as a where a.wait_event = any(%s)"
    return {pid for (pid,) in await (await conn.execute(query, ([*events],))).fetchall()}


async def workers(conn: AsyncConnection[Any], *, pid: int | None = None) -> list[tuple[int, str]]:
    """Return pid and name of every worker that shows its label, or of the one of a pid, whoever launched it."""
    return await (await conn.execute(QUERIES["workers"], {"pid": pid})).fetchall()


async def workers_labelled(conn: AsyncConnection[Any], label: str) -> list[tuple[int, str]]:
    """Return pid and name of every worker that was launched under a label, whoever launched it.

    Raises
    ------
    InvalidJob
        No worker of this database can have the label: its encoding lacks a character.
    """
    pattern = LabelPattern(label, server_version=conn.info.server_version)
    encoding = conn.info.parameter_status("server_encoding")
    if encoding != "UTF8":
        try:
            row = await (await conn.execute(QUERIES["encoded"], (pattern.texts(),))).fetchone()
        except psycopg.errors.UntranslatableCharacter as error:
            raise InvalidJob(
                f"no worker of this database can have the label {label!r}: its encoding, {encoding},"
                " lacks a character of it",
                sqlstate=error.sqlstate,
            ) from error
        assert row is not None  # it is one aggregate
        texts = [bytes(part) for part in row[0]]
        pattern = LabelPattern(pattern.label, texts, server_version=pattern.server_version)
    return [(pid, name) for pid, name in await workers(conn) if pattern.fits(name, pid)]


async def look(
    conn: AsyncConnection[Any], views: Sequence[str], pids: Sequence[int], names: Sequence[str] = ()
) -> list[Activity]:
    """Return what workers are at, by one query.

    Parameters
    ----------
    conn:
        A connection to their database.
    views:
        As :func:`views_of` returns them.
    pids, names:
        Their process ids, and what the ``application_name`` begins with of those whose process id is not known.

    Raises
    ------
    psycopg.Error
        The server refuses.
    """
    query = query_for(views, sql.SQL("a.pid = any(%(pids)s) or a.application_name ^@ any(%(names)s)"))
    cursor = await conn.cursor(row_factory=dict_row).execute(query, {"pids": [*pids], "names": [*names]})
    return [activity_of(row) for row in await cursor.fetchall()]


def query_for(views: Sequence[str], which: sql.Composable) -> sql.Composed:
    """Return the query whose rows :func:`activity_of` reads.

    Parameters
    ----------
    views:
        As :func:`views_of` returns them.
    which:
        A condition on the rows of ``pg_stat_activity as a``.
    """
    commands = sql.SQL(" union all ").join(
        sql.SQL(
            "select {}::text as command, pg_catalog.to_jsonb(p) as counters from {} as p where p.pid = a.pid"
        ).format(sql.Literal(view), sql.Identifier("pg_catalog", f"pg_stat_progress_{view}"))
        for view in views
    )
    return sql.SQL(QUERIES["activity"]).format(commands=commands, which=which)


def activity_of(row: Mapping[str, Any]) -> Activity:
    """Read a row of :func:`query_for`'s query."""
    commands = row["commands"] or {}
    name = next((view for view in VIEWS if view in commands), None)
    return Activity(
        pid=row["pid"],
        name=row["application_name"],
        wait_event_type=row["wait_event_type"],
        wait_event=row["wait_event"],
        waited=row["waited"],
        blockers=tuple(Blocker(**blocker) for blocker in row["blockers"] or ()),
        command=None if name is None else command_of(name, commands[name]),
    )


def command_of(view: str, counters: Mapping[str, Any]) -> Command:
    """Read a row of ``pg_stat_progress_<view>``."""
    name = str(counters.get("command") or view.replace("_", " ")).upper()
    phase = counters.get("phase")
    for word, done, total in COUNTERS[view]:
        if word in (phase or "") and counters.get(total):
            return Command(name, phase, counters.get(done), counters[total])
    return Command(name, phase)
