"""What happens when a run is terminated, or when one of Dagster's processes dies: seen on the processes themselves."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.conftest import Database, Running
from tests.dagster.processes import Dagster
from tests.servers.kinds import Server

pytestmark = [
    pytest.mark.real,
    pytest.mark.servers("real"),
    pytest.mark.processes,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.xdist_group("dagster"),
]

JOBS = ["plain_in_process", "plain_multiprocess", "stubborn_in_process", "stubborn_multiprocess"]
PATIENCE = 300.0  # seconds
LONG = {"ops": {"plain": {"config": {"seconds": 300.0}}}}


@pytest.fixture(scope="module")
def database(server: Server, running: Running) -> Iterator[Database]:
    databases = running.databases(server)
    made = Database(server, databases.create("schema", name=None))
    with made.connect() as connection:
        connection.execute("create table done (who text)")
    yield made
    databases.drop(made.name)


@pytest.fixture(scope="module")
def dagster(database: Database, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dagster]:
    made = Dagster(
        tmp_path_factory.mktemp("dagster"),
        Path(__file__).with_name("definitions.py"),
        {"PGBG_TEST_CONNINFO": database.conninfo},
    )
    try:
        yield made.start()
    finally:
        made.stop()


@pytest.fixture
def sql(database: Database) -> Iterator[psycopg.Connection[Any]]:
    with database.connect() as connection:
        connection.execute("truncate done")
        yield connection


def config(job: str, seconds: float) -> dict[str, Any]:
    return {"ops": {job.split("_", maxsplit=1)[0]: {"config": {"seconds": seconds}}}}


def until(condition: Callable[[], object], what: Callable[[], str] = lambda: "") -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(what())
        time.sleep(0.05)


def attempts(sql: psycopg.Connection[Any]) -> int:
    """How many launches there were of all jobs."""
    (number,) = sql.execute("select coalesce(sum(attempt), 0) from pgbg.jobs").fetchone() or (0,)
    return int(number)


def done(sql: psycopg.Connection[Any]) -> int:
    (number,) = sql.execute("select count(*) from done").fetchone() or (0,)
    return int(number)


@pytest.mark.parametrize("job", JOBS)
def test_terminated_while_its_worker_is_at_work(
    dagster: Dagster, database: Database, sql: psycopg.Connection[Any], job: str
) -> None:
    before = attempts(sql)
    run = dagster.launch(job, config(job, 300))
    until(database.workers, lambda: "\n".join(dagster.messages(run)))
    dagster.terminate(run)

    assert dagster.wait(run) == "CANCELED"
    assert database.workers() == []
    assert attempts(sql) - before == 1
    assert done(sql) == 0


@pytest.mark.chaos
@pytest.mark.parametrize("job", JOBS)
def test_terminated_at_any_moment(dagster: Dagster, database: Database, sql: psycopg.Connection[Any], job: str) -> None:
    chance = random.Random(job)
    for moment in [chance.uniform(0, 8) for _ in range(20)]:
        run = dagster.launch(job, config(job, 300))
        time.sleep(moment)
        dagster.terminate(run)

        assert dagster.wait(run) == "CANCELED", moment
        assert database.workers() == [], moment
        assert done(sql) == 0


@pytest.mark.parametrize("victim", ["step", "run"])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM], ids=["SIGKILL", "SIGTERM"])
def test_process_dies_and_the_retried_run_finds_the_worker(
    dagster: Dagster, database: Database, sql: psycopg.Connection[Any], victim: str, how: signal.Signals
) -> None:
    before = attempts(sql)
    job = "plain_multiprocess" if victim == "step" else "plain_in_process"
    run = dagster.launch(job, config(job, 25))
    until(database.workers, lambda: "\n".join(dagster.messages(run)))
    os.kill(dagster.pid_of(run, victim), how)

    assert dagster.wait(run) == "FAILURE"
    until(lambda: dagster.children(run), lambda: "the run is not retried")
    (retry,) = dagster.children(run)
    assert dagster.wait(retry) == "SUCCESS", "\n".join(dagster.messages(retry))
    assert done(sql) == 1
    assert attempts(sql) - before == 1


def test_thirty_jobs_in_one_step_with_few_slots(
    dagster: Dagster, database: Database, sql: psycopg.Connection[Any]
) -> None:
    run = dagster.launch("many_multiprocess", config("many", 0.2))

    assert dagster.wait(run) == "SUCCESS", "\n".join(dagster.messages(run))
    assert done(sql) == 30
