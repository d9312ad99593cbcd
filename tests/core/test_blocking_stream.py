"""Rows as they come, for blocking code: each once, with the proof of the commit, in bounded memory."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from typing import Any

import psycopg
import pytest

from pgbg_orchestration import Job, Launcher, errors
from pgbg_orchestration.blocking_stream import BATCH, BlockingStream
from pgbg_orchestration.driver import Talk
from pgbg_orchestration.stream import Stream
from tests.core.kit import Watched, count, effect, eventually

pytestmark = pytest.mark.any_surface

MANY = "select g, repeat('x', 1000) from generate_series(1, {}) as g"


class Interruption(BaseException):
    pass


def stream(db: Watched, sql: str, *, id: str = "j", **waiting: Any) -> BlockingStream:  # noqa: A002
    async def made(launcher: Launcher, _talk: Talk) -> Stream:
        return launcher.stream(Job(sql, id=id))

    return BlockingStream(lambda: Launcher(db.conninfo), made, **waiting)


def test_rows_columns_and_proof(db: Watched) -> None:
    rows = stream(db, f"{effect('a')}; select g, g / 2::numeric as half from generate_series(1, 2500) as g")
    assert (rows.outcome, rows.columns) == (None, ())
    read = []
    for row in rows:
        assert rows.outcome is not None
        assert db.effects("a") == 1  # committed before the first of them
        read.append(row)
    with psycopg.connect(db.conninfo) as conn:
        assert read == conn.execute("select g, g / 2::numeric from generate_series(1, 2500) as g").fetchall()
    assert [column.name for column in rows.columns] == ["g", "half"]
    assert rows.outcome is not None
    assert (rows.outcome.row_count, rows.outcome.proof) == (2500, "receipt")
    assert list(rows) == []


def test_no_rows(db: Watched) -> None:
    rows = stream(db, "select 1 where false")
    assert list(rows) == []
    assert rows.outcome is not None
    assert rows.outcome.row_count == 0


def test_a_job_that_fails(db: Watched) -> None:
    with pytest.raises(errors.WorkerError) as caught:
        list(stream(db, f"{effect('a')}; select 1 / (g - 2000) from generate_series(1, 2500) as g"))
    assert caught.value.sqlstate == "22012"
    assert db.effects("a") == 0


async def test_who_reads_slowly_is_waited_for(db: Watched) -> None:
    talks: list[Talk] = []

    async def made(launcher: Launcher, talk: Talk) -> Stream:
        talks.append(talk)
        return launcher.stream(Job(MANY.format(20 * BATCH), id="j"))

    rows = iter(BlockingStream(lambda: Launcher(db.conninfo), made))
    first = next(rows)
    # However long nobody asks for more, no more than the next batch waits.
    await eventually(lambda: talks[0].notes.qsize() == 1, "the next batch")
    assert [first[0], *(row[0] for row in rows)] == list(range(1, 20 * BATCH + 1))


@pytest.mark.parametrize("leave", ["break", "error"])
def test_whoever_stops_reading_leaves_nothing_open(db: Watched, leave: str) -> None:
    def reading() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name == "pgbg jobs"]

    with contextlib.suppress(ZeroDivisionError), stream(db, f"{effect('a')}; {MANY.format(20 * BATCH)}") as rows:
        for _ in rows:
            assert reading()
            if leave == "break":
                break
            1 / 0  # noqa: B018
    assert not reading()
    assert db.effects("a") == 1
    assert list(rows) == []


def test_one_that_is_closed_before_it_is_read_launches_nothing(db: Watched) -> None:
    with stream(db, f"{effect('a')}; select 1") as rows:
        pass
    assert (list(rows), rows.outcome, db.effects("a")) == ([], None, 0)


def test_an_interruption_before_the_commit_cancels_the_job(db: Watched) -> None:
    def look() -> None:
        if db.value("select count(*) from pg_locks where locktype = 'advisory'"):
            raise Interruption

    with pytest.raises(Interruption):
        list(stream(db, f"{effect('a')}; select 1 from pg_sleep(300)", look=look, interval=0.1))
    assert db.effects("a") == 0


@pytest.mark.servers("real", "embedded")
def test_memory_does_not_grow_with_the_rows(db: Watched) -> None:
    """Of ``pgbg run --stream``, whose peak is that of a thousandth of the rows, but for less than a quarter of them."""
    code = (
        "import resource, sys\n"
        "from pgbg_orchestration.cli import app\n"
        "try:\n    app()\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)\n"
    )

    def peak(rows: int) -> int:
        arguments = ["run", MANY.format(rows), "--stream", "--format", "csv", "--dsn", db.conninfo, "--id", str(rows)]
        ran = subprocess.run(
            [sys.executable, "-c", code, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            check=True,
        )  # fmt: skip
        return int(ran.stderr.splitlines()[-1])

    rows = count(100_000, 1_000_000)  # of a kilobyte
    assert peak(rows) - peak(100) < rows // 4  # both in kilobytes
