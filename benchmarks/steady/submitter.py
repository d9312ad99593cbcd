"""The process that submits the jobs of the Dagster daemon's load, each for a partition of one of four external assets.

Now and then it leaves an orphan besides: a job of a run that is gone, for the sweep.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count
from typing import TYPE_CHECKING

import psycopg

from .watch import SHORT

if TYPE_CHECKING:
    from dagster import DagsterInstance

THREADS = 8  # a job that is launched takes one until its worker is at work
ORPHAN_SECONDS = 60.0
FAULT = "fault"  # what is told of an error that nobody expected begins so
AT_WORK = """
select count(*) from pgbg.find_jobs(
    p_series => 'dagster/external/waits%', p_since => now() - interval '10 minutes', p_states => '{running,waiting}')
"""


class Load:
    """Jobs submitted by several threads of one process, until its standard input ends.

    Parameters
    ----------
    waiting:
        How many long jobs are at work at any time.
    rate:
        Short jobs begun in a second.
    long:
        How many seconds a long job takes at least and at most.
    """

    def __init__(self, waiting: int, rate: float, long: Sequence[float]) -> None:
        from dagster_resource import PgBackgroundResource

        self._waiting = waiting
        self._rate = rate
        self._long = long
        self._conninfo = os.environ["PGBG_STEADY_CONNINFO"]
        self._pg = PgBackgroundResource(conninfo=self._conninfo)
        self._numbers = count(1)
        self._told: Counter[str] = Counter()
        self._telling = threading.Lock()
        self._stopped = threading.Event()

    def run(self) -> None:
        """Keep the load up; print a line when it has begun, and what was submitted when it has ended."""
        from dagster import DagsterInstance

        threading.Thread(target=self._read, daemon=True).start()
        with DagsterInstance.get() as instance, ThreadPoolExecutor(THREADS) as threads:
            asyncio.run(self._orphan(instance))
            print("begun", flush=True)
            orphan_at = time.monotonic() + ORPHAN_SECONDS
            kinds, weights = list(SHORT), list(SHORT.values())
            running: set[Future[None]] = set()
            long: set[Future[None]] = set()
            while not self._stopped.wait(1 / self._rate):
                running.add(threads.submit(self._submit, instance, random.choices(kinds, weights)[0]))
                long = {future for future in long if not future.done()}
                for _ in range(self._missing() - len(long)):
                    long.add(threads.submit(self._submit, instance, "waits"))
                running |= long
                if time.monotonic() > orphan_at:
                    orphan_at += ORPHAN_SECONDS
                    running.add(threads.submit(asyncio.run, self._orphan(instance)))
                for future in [future for future in running if future.done()]:
                    running.remove(future)
                    self._collect(future)
        for future in running:
            self._collect(future)
        print(json.dumps(self._told), flush=True)

    def _collect(self, future: Future[None]) -> None:
        # The load goes on: whoever watches it reads of the error in the end.
        if error := future.exception():
            traceback.print_exception(error)
            self._tell(f"{FAULT}: {type(error).__name__}")

    def _tell(self, what: str) -> None:
        with self._telling:
            self._told[what] += 1

    def _read(self) -> None:
        sys.stdin.read()
        self._stopped.set()

    def _missing(self) -> int:
        """Return how many long jobs are to be submitted."""
        try:
            with psycopg.connect(self._conninfo, autocommit=True) as conn:
                row = conn.execute(AT_WORK.encode()).fetchone()
        except psycopg.OperationalError:
            return 0  # the server is being restarted: it is asked again at once
        assert row is not None
        return self._waiting - int(row[0])

    def _submit(self, instance: DagsterInstance, kind: str) -> None:
        from dagster import build_sensor_context

        from dagster_resource import PgBackgroundFailure

        sql = {
            "waits": f"select pg_sleep({random.uniform(*self._long)})",
            "commits": "select 1",
            "fails": "select pg_sleep(1); select 1/0",
            "cancelled": "select pg_sleep(600)",
        }[kind]
        number = str(next(self._numbers))
        context = build_sensor_context(instance)
        context.log.setLevel(logging.WARNING)
        try:
            job_id = self._pg.submit(context, sql, asset_key=kind, partition_key=number, key=number)
        except PgBackgroundFailure as failure:
            # It failed before it was seen at work, or the server was restarted: the sensor reports what became of it.
            self._tell(f"{kind}: {type(failure.error).__name__}")
            return
        self._tell(kind)
        if kind == "cancelled":
            time.sleep(1)
            asyncio.run(self._cancel(job_id))

    async def _cancel(self, job_id: str) -> None:
        from pgbg_orchestration.errors import ServerUnreachable

        async with self._pg.launcher() as launcher:
            try:
                await launcher.cancel(job_id, reason="nobody wants it any more")
            except ServerUnreachable:
                self._tell("cancelled: not so, the server is being restarted")  # which ends the job

    async def _orphan(self, instance: DagsterInstance) -> None:
        """Leave a job at work as a step leaves it whose process was killed, of a run that is CANCELED."""
        from dagster import DagsterRun, DagsterRunStatus

        from pgbg_orchestration import Job, Launcher
        from pgbg_orchestration.errors import ServerUnreachable

        run = instance.add_run(DagsterRun(job_name="gone", status=DagsterRunStatus.CANCELED))
        series = f"dagster/orphan/{next(self._numbers)}"
        job_id = f"{series}#{run.run_id}"
        async with Launcher(self._conninfo) as launcher:
            job = Job("select pg_sleep(600)", id=job_id, series=series)
            running = asyncio.create_task(launcher.run(job, on_cancel="leave"))
            try:
                while not (await launcher.look(job_id, series=series)).holds_this_job:
                    await asyncio.sleep(0.1)
                    if running.done():
                        running.result()
            except ServerUnreachable:
                self._tell("orphan: ServerUnreachable")
            else:
                self._tell("orphan")
            finally:
                running.cancel()
                await asyncio.wait([running])
