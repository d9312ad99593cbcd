"""The runbook: every command and query of docs/operations.md, with a job at work that waits for a lock."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from pgbg_orchestration import Job, arun, errors
from pgbg_orchestration.embedded.server import EmbeddedServer
from pgbg_orchestration.ledger.install import install

from . import snippets

PAGE = Path(__file__).resolve().parents[2] / "docs" / "operations.md"
SECONDS = 60


@pytest.fixture(scope="module")
def conninfo() -> Iterator[str]:
    with EmbeddedServer() as server:
        server.create_database("ops")
        install(server.conninfo("ops"))
        yield server.conninfo("ops")


def shell(command: str, conninfo: str) -> tuple[int, str]:
    program, *arguments = command.split(maxsplit=2)
    assert program == "pgbg"
    given = f'{sys.executable} -m pgbg_orchestration {arguments[0]} --dsn "$DSN" {" ".join(arguments[1:])}'
    done = subprocess.run(
        ["sh", "-c", given], env={**os.environ, "DSN": conninfo}, capture_output=True, text=True, timeout=SECONDS
    )
    return done.returncode, done.stdout + done.stderr


def query(text: str, conninfo: str) -> list[tuple[Any, ...]]:
    with psycopg.connect(conninfo, autocommit=True) as connection:
        return connection.execute(text.encode()).fetchall()


async def test_every_answer(conninfo: str) -> None:
    with psycopg.connect(conninfo) as holder:
        holder.execute("create table loaded (i int)")
        holder.commit()
        await arun(conninfo, Job("insert into loaded values (2)", id="nightly/2", label="nightly load"))
        holder.execute("lock table loaded")
        job = asyncio.create_task(
            arun(conninfo, Job("insert into loaded values (1)", id="nightly/1", label="nightly load"))
        )
        rewrite = asyncio.create_task(
            arun(conninfo, Job("select pg_sleep(600)", id="rewrite/1", label="nightly rewrite"))
        )
        async with asyncio.timeout(SECONDS):
            while not query("select from pgbg.jobs where job_id = 'rewrite/1' and state = 'running'", conninfo):
                await asyncio.sleep(0.05)
            while not query("select from pgbg.jobs where job_id = 'nightly/1' and state = 'running'", conninfo):
                await asyncio.sleep(0.05)
            while not query("select from pg_stat_activity where wait_event_type = 'Lock'", conninfo):
                await asyncio.sleep(0.05)

        told: list[Any] = []
        for snippet in snippets.of(PAGE):
            if snippet.language == "sql":
                told.append(await asyncio.to_thread(query, snippet.text, conninfo))
            else:
                told += [await asyncio.to_thread(shell, command, conninfo) for command in snippet.commands]

        (
            listed,
            workers,
            waits,
            cancelled,
            shown,
            stopped,
            waited,
            slots,
            history,
            lost,
            doctor,
            sizes,
            pruned,
            *alerts,
        ) = told
        assert listed[0] == 0
        assert "nightly load" in listed[1]
        assert any("nightly load" in worker[-1] and "insert into loaded" in worker[-1] for worker in workers)
        seen = {line[0]: (line[2], line[4]) for line in waits}
        assert seen["nightly/1"] == ("Lock", holder.info.backend_pid)
        assert cancelled[0] == 0, cancelled
        assert "cancelled" in shown[1]
        assert [(line[0], *line[2:]) for line in stopped] == [("rewrite/1", True, "cancelled")]
        assert waited[0] == 0, waited
        assert slots[0][0] > 0
        assert (history[0], "nightly load" in history[1]) == (0, True)
        assert lost[0] == 0
        assert doctor[0] in (0, 14), doctor[1]  # a test server has settings to warn of
        assert {"job", "receipt", "series"} <= {name for name, *_ in sizes}
        assert pruned[0] == 0, pruned
        assert alerts == [[], [], []]
        for ended in (job, rewrite):
            with pytest.raises(errors.JobCancelled):
                await ended
