"""The runbook: every command and query of docs/operations.md, as a login with no more rights than jobs need.

Another job blocks the nightly load, one sleeps, and there is something to alert on.
"""

from __future__ import annotations

import asyncio
import functools
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psycopg
import pytest

from pgbg_orchestration import Job, arun, errors
from pgbg_orchestration.embedded.server import EmbeddedServer
from pgbg_orchestration.ledger.install import install

from . import snippets

PAGE = Path(__file__).resolve().parents[2] / "docs" / "operations.md"
METRICS = PAGE.parents[1] / "pgbg_orchestration" / "view" / "web" / "metrics.py"
SECONDS = 60
LOCKED = "select from pg_locks where relation = 'loaded'::regclass and mode = 'AccessExclusiveLock' and granted"
RUNNING = "select from pgbg.jobs where job_id = '{}' and state = 'running'"
WAITING = """
insert into pgbg.job (owner, job_digest, job_id, series_digest, series, generation, label, kind, sql_digest, attempt,
    launched_by, launcher_pid, launched_at)
values ('ops_jobs', pgbg.digest('waits'), 'waits', pgbg.digest('waits'), 'waits', 1, 'waits', 'receipt', '', 1,
    'host/1', {}, now() - interval '20 min')
"""


@pytest.fixture(scope="module")
def server() -> Iterator[EmbeddedServer]:
    with EmbeddedServer() as started:
        started.create_database("ops")
        install(started.conninfo("ops"))
        yield started


def shell(command: str, conninfo: str) -> tuple[int, str]:
    program, *arguments = command.split(maxsplit=2)
    assert program == "pgbg"
    given = f'{sys.executable} -m pgbg_orchestration {arguments[0]} --dsn "$DSN" {" ".join(arguments[1:])}'
    done = subprocess.run(
        ["sh", "-c", given], env={**os.environ, "DSN": conninfo}, capture_output=True, text=True, timeout=SECONDS
    )
    return done.returncode, " ".join((done.stdout + done.stderr).split())


def query(text: str, conninfo: str) -> list[tuple[Any, ...]]:
    with psycopg.connect(conninfo, autocommit=True) as connection:
        return connection.execute(text.encode()).fetchall()


async def until(seen: Callable[[], object]) -> None:
    async with asyncio.timeout(SECONDS):
        while not seen():
            await asyncio.sleep(0.05)


async def test_every_answer(server: EmbeddedServer) -> None:
    conninfo = server.conninfo("ops", "ops_jobs")
    with ExitStack() as stack:
        admin = stack.enter_context(server.connect("ops"))
        admin.execute("create role ops_jobs login in role pgbackground_role")
        admin.execute("create table loaded (i int)")
        admin.execute("grant all on loaded to ops_jobs")
        launcher = stack.enter_context(psycopg.connect(conninfo))  # of a job that waits: it has to be there

        await arun(conninfo, Job("insert into loaded values (2)", id="nightly/2", label="nightly load"))
        await arun(conninfo, Job("select 1", id="export/1", label="nightly export"))
        with pytest.raises(errors.WorkerError):
            await arun(conninfo, Job("select 1/0", id="bad/1", label="bad"))
        admin.execute(WAITING.format(launcher.info.backend_pid).encode())

        def start(sql: str, job_id: str, label: str) -> asyncio.Task[Any]:
            return asyncio.create_task(arun(conninfo, Job(sql, id=job_id, label=label)))

        repair = start("lock table loaded; select pg_sleep(600)", "repair/1", "facts repair")
        await until(lambda: query(LOCKED, conninfo))
        load = start("insert into loaded values (1)", "nightly/1", "nightly load")
        rewrite = start("select pg_sleep(600)", "rewrite/1", "nightly rewrite")
        export = start("select pg_sleep(600)", "export/2", "nightly export")
        for job_id in ("rewrite/1", "export/2", "nightly/1"):
            await until(functools.partial(query, RUNNING.format(job_id), conninfo))
        await until(lambda: query("select from pg_stat_activity where wait_event_type = 'Lock'", conninfo))
        admin.execute("update pgbg.job set launched_at = now() - interval '1 h' where job_id = 'export/2'")

        told: list[Any] = []
        for snippet in snippets.of(PAGE):
            if snippet.language == "sql":
                told.append(await asyncio.to_thread(query, snippet.text, conninfo))
            elif snippet.language == "sh":
                told += [await asyncio.to_thread(shell, command, conninfo) for command in snippet.commands]

        (
            listed,
            workers,
            ids,
            known,
            waits,
            cancelled,
            shown,
            goes_on,
            stopped,
            orphan,
            slots,
            history,
            lost,
            doctor,
            sizes,
            pruned,
            failed,
            slow,
            waiting,
            old,
        ) = told
        assert listed[0] == 0
        assert "nightly load" in listed[1]
        assert any("nightly load" in worker[-1] and "insert into loaded" in worker[-1] for worker in workers)
        assert "nightly/1" in ids[1]
        assert "waits for lock: job facts repair of ops_jobs (pid" in known[1]
        assert "blocked by repair/1 of ops_jobs, launched by" in known[1]
        [of_load] = [line for line in waits if line[0] == "nightly/1"]
        assert (of_load[2], of_load[8], of_load[9]) == ("Lock", "repair/1", "ops_jobs")
        assert cancelled[0] == 0, cancelled
        assert "⊘ cancelled" in shown[1]
        assert goes_on[0] == 0, goes_on
        assert [(line[0], *line[2:]) for line in stopped] == [("rewrite/1", True, "cancelled")]
        assert orphan[0] == 0, orphan
        assert slots[0][0] > 0
        assert (history[0], "nightly load" in history[1]) == (0, True)
        assert lost[0] == 0
        assert doctor[0] in (0, 14), doctor[1]  # a test server has settings to warn of
        assert {"job", "receipt", "series"} <= {name for name, *_ in sizes}
        assert pruned[0] == 0, pruned
        assert [line[:3] for line in failed] == [("bad", "bad/1", "22012")]
        assert [line[:2] for line in slow] == [("nightly export", "export/2")]
        assert [line[:2] for line in waiting] == [("waits", "waits")]
        assert old == []
        # As it will be in six hours.
        [of_old] = [snippet.text for snippet in snippets.of(PAGE) if "xact_start <" in snippet.text]
        sooner = of_old.replace("interval '6 hours'", "interval '0'")
        assert [line[:2] for line in query(sooner, conninfo)] == [("nightly export", "export/2")]

        assert (await load).launched
        assert (await asyncio.to_thread(shell, "pgbg cancel export/2", conninfo))[0] == 0
        for ended in (repair, rewrite, export):
            with pytest.raises(errors.JobCancelled):
                await ended


def test_the_rules_for_prometheus_ask_for_what_the_page_tells() -> None:
    [text] = [snippet.text for snippet in snippets.of(PAGE) if snippet.language == "yaml"]
    told = set(re.findall(r'"(pgbg_\w+)"', METRICS.read_text()))

    asked = re.findall(r"^ +expr: (.+)$", text, re.MULTILINE)

    assert len(asked) == text.count("alert:") > 0
    assert {name for rule in asked for name in re.findall(r"pgbg_\w+", rule)} <= told
