"""What the tests of the core share: a database whose effects can be counted, launching processes, bounded waits."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar, cast

import psycopg
import pytest
from psycopg import sql

from pgbg_orchestration import errors
from pgbg_orchestration.outcome import Event
from tests.matrix import IN_THE_LONG_FORM, LONG

if TYPE_CHECKING:
    from tests.conftest import Database

T = TypeVar("T")
GENEROUS = 60.0
"""Seconds after which a wait of a test fails. Nothing is asserted about how long anything takes."""
APP = "pgbg_app"
"""The login that the tests run jobs as: pgbackground_role, the effects table, and nothing else."""
ROOT = Path(__file__).parents[2]


only_long = pytest.mark.skipif(not LONG, reason=f"{IN_THE_LONG_FORM}: takes a minute")
"""For a test with near relatives that always run."""


def count(short: int, full: int) -> int:
    """How often a test repeats: ``full`` with PGBG_LONG=1."""
    return full if LONG else short


def seeded(what: str) -> random.Random:
    """A random generator whose seed is printed and can be given in PGBG_SEED."""
    seed = int(os.environ.get("PGBG_SEED", "0")) or random.SystemRandom().randrange(1, 2**31)
    print(f"{what}: PGBG_SEED={seed}")
    return random.Random(seed)


async def eventually(look: Callable[[], T | Awaitable[T]], what: str, limit: float = GENEROUS) -> T:
    """Wait until ``look`` returns something true, and return it."""
    until = time.monotonic() + limit
    while True:
        value = look()
        value = await value if asyncio.iscoroutine(value) else value
        if value:
            return cast(T, value)
        assert time.monotonic() < until, f"waited {limit} s in vain: {what}"
        await asyncio.sleep(0.01)


async def within(awaitable: Awaitable[T], limit: float = GENEROUS) -> T:
    """Await with a generous bound, so that an endless wait fails its own test only."""
    async with asyncio.timeout(limit):
        return await awaitable


class Watched:
    """A database with a table ``effects`` that jobs write to, and an administrator's eye on it."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.server = database.server
        self.conninfo = database.conninfo_as(APP)
        self.admin_conninfo = database.conninfo
        self._admin: psycopg.Connection | None = None
        self.prepare()

    @property
    def admin(self) -> psycopg.Connection:
        """An autocommit connection of the superuser, opened anew when the server was stopped meanwhile."""
        if self._admin is None or self._admin.closed or self._admin.broken:
            self._admin = self.database.connect()
        return self._admin

    def close(self) -> None:
        if self._admin is not None:
            self._admin.close()

    def prepare(self) -> None:
        self.role(APP)
        self.sql(
            "create table effects (job text not null, n int not null default 1,"
            " pid int default pg_backend_pid(), who text default current_user)"
        )
        self.sql(f"grant select, insert, update, delete, truncate on effects to {APP}")

    def role(self, name: str, attributes: str = "login", grants: Sequence[str] = ("pgbackground_role",)) -> None:
        """Create a role unless the server has it, and grant roles to it."""
        if not self.value("select count(*) from pg_roles where rolname = %s", name):
            self.sql(f"create role {name} {attributes}")
        for grant in grants:
            self.sql(f"grant {grant} to {name}")

    def sql(self, text: str, *parameters: object) -> list[tuple[Any, ...]]:
        """Run SQL as the administrator."""
        cursor = self.admin.execute(text, parameters or None)
        return cursor.fetchall() if cursor.description else []

    def value(self, text: str, *parameters: object) -> Any:
        """The only value of a query of the administrator's."""
        return self.sql(text, *parameters)[0][0]

    def effects(self, job: str | None = None) -> int:
        """How many effects there are, of one job or of all."""
        return int(self.value("select count(*) from effects where %s::text is null or job = %s", job, job))

    def effects_by_job(self) -> dict[str, int]:
        return {str(job): int(number) for job, number in self.sql("select job, count(*) from effects group by job")}

    def receipts(self, status: str = "committed") -> set[str]:
        return {str(r[0]) for r in self.sql("select job_id from pgbg.receipt where status = %s", status)}

    def states(self) -> dict[str, str]:
        """The true state of every job, as the view ``pgbg.jobs`` tells it."""
        return {str(job): str(state) for job, state in self.sql("select job_id, state from pgbg.jobs")}

    def let_supervisors_die(self) -> None:
        """Take from supervisors that they hand a cancel on and go on, so that one can be made to die alone.

        A terminated one is told the same as a cancelled one; SIGKILL would take the whole server.
        """
        text = self.value("select pg_get_functiondef(oid) from pg_proc where proname = 'await_worker'")
        assert "exception when query_canceled then" in text
        self.sql(text.replace("exception when query_canceled then", "exception when SQLSTATE 'ZZ000' then"))

    def sessions(self, like: str = "%") -> list[tuple[Any, ...]]:
        """Client sessions in this database but the administrator's own: (pid, user, application, state, query)."""
        return self.sql(
            "select pid, usename, application_name, state, left(query, 60) from pg_stat_activity where datname = %s"
            " and backend_type = 'client backend' and application_name not like 'pg\\_background%%'"
            " and application_name like %s and pid not in (pg_backend_pid(), %s)",
            self.database.name,
            like,
            self.admin.info.backend_pid,
        )

    def workers(self) -> list[tuple[Any, ...]]:
        """Workers in this database: (pid, application, state, wait_event, query); not a stand-in's that only idle."""
        return self.sql(
            "select pid, application_name, state, wait_event, query from pg_stat_activity where datname = %s"
            " and (backend_type = 'pg_background' or application_name like 'pg\\_background%%' and state <> 'idle')",
            self.database.name,
        )

    def terminate(self, pids: Sequence[int]) -> None:
        self.sql("select pg_terminate_backend(p) from unnest(%s::int[]) p", list(pids))

    async def at_work(self, job_id: str) -> int:
        """Wait until a worker holds the job's lock, and return its pid."""
        query = "select running_pid from pgbg.jobs where job_id = %s and running_pid is not null"
        rows = await eventually(lambda: self.sql(query, job_id), f"a worker of {job_id} at work")
        return int(rows[0][0])

    def assert_nothing_left(self) -> None:
        """No worker runs in this database and nobody but us is connected to it."""
        until = time.monotonic() + 15
        while (left := [*self.workers(), *self.sessions()]) and time.monotonic() < until:
            time.sleep(0.05)
        assert not left, f"left behind: {left}"


class Recorder:
    """An observer that keeps the events."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def __call__(self, event: Event) -> None:
        self.events.append(event)

    def kinds(self) -> list[str]:
        return [event.kind for event in self.events]


class Child:
    """A launching process (:mod:`tests.core.child`)."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self._answers: dict[str, asyncio.Future[dict[str, Any]]] = {}
        self._number = 0
        self._reading = asyncio.create_task(self._read())

    @classmethod
    async def start(cls, conninfo: str, fault: str | None = None) -> Self:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        if fault:
            environment["PGBG_FAULT"] = fault
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.core.child", conninfo,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, env=environment, limit=2**26,
        )  # fmt: skip
        child = cls(process)
        await within(child._answer("ready"))
        return child

    def _answer(self, tag: str) -> asyncio.Future[dict[str, Any]]:
        return self._answers.setdefault(tag, asyncio.get_running_loop().create_future())

    async def _read(self) -> None:
        assert self.process.stdout is not None
        while line := await self.process.stdout.readline():
            answer = json.loads(line)
            self._answer(answer["tag"]).set_result(answer)

    def order(self, op: str, **order: Any) -> tuple[str, asyncio.Future[dict[str, Any]]]:
        """Send an order; returns its tag and its answer to come."""
        self._number += 1
        tag = str(self._number)
        answer = self._answer(tag)
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"tag": tag, "op": op, **order}).encode() + b"\n")
        return tag, answer

    def run(self, job: dict[str, Any], **options: Any) -> asyncio.Future[dict[str, Any]]:
        return self.order("run", job=job, options=options)[1]

    def cancel(self, job_id: str) -> asyncio.Future[dict[str, Any]]:
        return self.order("cancel", job_id=job_id)[1]

    async def killed(self) -> None:
        """Wait until SIGKILL has ended it."""
        assert await within(self.process.wait()) == -signal.SIGKILL

    async def stopped(self) -> None:
        """Wait until SIGSTOP holds it."""
        await eventually(lambda: _state(self.process.pid) == "T", "the launching process is stopped")

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    async def close(self) -> None:
        """End it: stdin's end, or SIGKILL when it does not react."""
        if self.process.returncode is None:
            self.signal(signal.SIGCONT)
            assert self.process.stdin is not None
            self.process.stdin.close()
            try:
                await within(self.process.wait(), 20)
            except TimeoutError:
                self.process.kill()
                await self.process.wait()
        await self._reading
        # asyncio closes a subprocess's transport in a callback; the loop must live to see it.
        await asyncio.sleep(0)


def _state(pid: int) -> str:
    listing = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return listing.stdout.strip()[:1]


@asynccontextmanager
async def launching_process(conninfo: str, fault: str | None = None) -> AsyncIterator[Child]:
    child = await Child.start(conninfo, fault)
    try:
        yield child
    finally:
        await child.close()


async def cancelled(task: asyncio.Task[T]) -> T | BaseException:
    """Cancel a task and return how it ended."""
    task.cancel()
    return await ended(task)


async def ended(task: Awaitable[T]) -> T | BaseException:
    """Await a task; its end, whichever it is, is the value."""
    with contextlib.suppress(asyncio.CancelledError):
        try:
            return await within(task)
        except errors.PgbgError as error:
            return error
    return asyncio.CancelledError()


def effect(job: str, n: int = 1) -> str:
    """SQL that leaves one effect of a job."""
    return sql.SQL("insert into effects (job, n) values ({}, {})").format(job, n).as_string(None)


def slow(job: str, seconds: float) -> str:
    """SQL that leaves one effect at its start and takes a while."""
    return f"{effect(job)}; select pg_sleep({seconds})"
