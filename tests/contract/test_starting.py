"""A worker that has yet to start when its launching session ends: it never runs."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable

import psycopg
import pytest

from tests.conftest import Database
from tests.servers.kinds import Server

GENEROUS = 60.0


def until(look: Callable[[], object], what: str) -> None:
    end = time.monotonic() + GENEROUS
    while not look():
        assert time.monotonic() < end, f"waited {GENEROUS} s in vain: {what}"
        time.sleep(0.02)


@pytest.mark.real  # a stand-in's worker is a connection that its launcher opens
def test_worker_that_was_registered_and_not_started_never_runs(
    own_server: Callable[..., Server], fresh_database: Callable[..., Database]
) -> None:
    """Its text is in shared memory that ends with its launcher. docs/durability.md rests on it."""
    server = own_server()
    database = fresh_database(server, "extension")
    call = database.function("launch")
    with database.connect() as observer:
        observer.execute("create table done ()")
        launcher = database.connect()
        pid = launcher.info.backend_pid
        ended: list[psycopg.Error] = []

        def launch() -> None:
            try:
                launcher.execute(f"select * from {call}('insert into done default values')".encode())
            except psycopg.Error as error:
                ended.append(error)

        def waits_for_start() -> bool:
            # BgWorkerStartup before PostgreSQL 17
            query = "select count(*) from pg_stat_activity where pid = %s and wait_event ilike 'BgWorkerStartup'"
            return observer.execute(query, (pid,)).fetchone() == (1,)

        def is_gone() -> bool:
            return observer.execute("select count(*) from pg_stat_activity where pid = %s", (pid,)).fetchone() == (0,)

        postmaster = server.pid()
        assert postmaster is not None
        os.kill(postmaster, signal.SIGSTOP)  # it starts no process meanwhile
        try:
            launching = threading.Thread(target=launch)
            launching.start()
            until(waits_for_start, "the launch call waits for the worker's start")
            observer.execute("select pg_terminate_backend(%s)", (pid,))
            until(is_gone, "the launching session has ended")
        finally:
            os.kill(postmaster, signal.SIGCONT)
        launching.join()
        assert [error.sqlstate for error in ended] == ["57P01"]
        launcher.close()
        # The postmaster starts it now, and it finds nothing to run. A worker started after it has an end to wait for.
        with database.connect() as second:
            handle = second.execute(f"select pid, cookie from {call}('select 1')".encode()).fetchone()
            second.execute(f"select * from {database.function('result')}(%s, %s) as (one int)".encode(), handle)
        until(lambda: "unable to map dynamic shared memory segment" in server.log(), "the worker's own end")
        assert observer.execute("select count(*) from done").fetchone() == (0,)
