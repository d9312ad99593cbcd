"""The lines of a view: made, chosen, arranged and put into words, without a server."""

from __future__ import annotations

from dataclasses import fields, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from pgbg_orchestration.ledger.board import Board, WorkerSeen
from pgbg_orchestration.ledger.history import Durations, JobEntry
from pgbg_orchestration.postgres.activity import Activity, Blocker, Command
from pgbg_orchestration.view.lines import Order, arranged, chosen, lines_of, orchestrator_of, wait_of
from pgbg_orchestration.view.states import BY_HAND, NOT_VISIBLE
from pgbg_orchestration.view.web.data import link_of, of_board
from pgbg_orchestration.view.web.metrics import exposition
from pgbg_orchestration.view.words import BLOCKERS_QUERY, facts_of, progress, usual_of

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)


def job(job_id: str, state: str = "running", **more: Any) -> JobEntry:
    known = {field.name: None for field in fields(JobEntry)}
    began = NOW - timedelta(seconds=more.pop("seconds", 10))
    given = {"owner": "etl", "job_id": job_id, "label": job_id, "state": state, "launched_at": began, **more}
    return JobEntry(**{**known, **given})


def worker(pid: int, **more: Any) -> WorkerSeen:
    seen = WorkerSeen(pid, "etl", f"pg_background:load:{pid}", NOW - timedelta(seconds=5), "active", "select 1", None)
    return replace(seen, **more)


def waiting(event_type: str, event: str, *blockers: Blocker) -> Activity:
    return Activity(1, "", event_type, event, 90.0 if blockers else None, blockers, None)


def board(*jobs: JobEntry, workers: tuple[WorkerSeen, ...] = ()) -> Board:
    return Board(NOW, "warehouse", "18.6", 64, 3, 0, 0, jobs, {seen.pid: seen for seen in workers})


def test_a_worker_of_a_job_is_no_line_of_its_own() -> None:
    lines = lines_of(board(job("a", running_pid=7), workers=(worker(7), worker(8))))

    assert [(line.state, line.pid) for line in lines] == [("running", 7), (BY_HAND, 8)]
    assert lines[1].label == "load"
    assert lines[1].job is None


def test_a_worker_of_another_login_is_not_called_launched_by_hand() -> None:
    """It may be of that login's job: who may not see its SQL cannot tell."""
    [line] = lines_of(board(workers=(worker(8, query=None, began_at=None),)))

    assert (line.state, line.label, line.by) == (NOT_VISIBLE, "load", "etl")
    assert line.is_at_work


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("pg_background:nightly:12", "nightly"),
        ("pg_background:a:b:12", "a:b"),
        ("etl batch", "etl batch"),
        ("", "(no label)"),
    ],
)
def test_the_label_of_a_worker_launched_by_hand(name: str, label: str) -> None:
    assert lines_of(board(workers=(worker(12, application_name=name),)))[0].label == label


def test_times() -> None:
    running, ended, waiting = lines_of(
        board(
            job("running", seconds=10),
            job("ended", "committed", seconds=100, ended_at=NOW - timedelta(seconds=40)),
            job("waiting", "waiting", seconds=3),
        )
    )

    assert (running.seconds, ended.seconds, waiting.seconds) == (10, 60, None)


def test_what_is_chosen() -> None:
    lines = lines_of(board(job("Load A"), job("load b", "failed"), job("x", series="airflow:flights/r/load/-1")))

    assert [line.label for line in chosen(lines, pattern="load")] == ["Load A", "load b", "x"]
    assert [line.label for line in chosen(lines, pattern="load ?")] == ["Load A", "load b"]
    assert [line.label for line in chosen(lines, pattern="load", states=frozenset({"failed"}))] == ["load b"]
    assert [line.label for line in chosen(lines, pattern="[")] == []


def test_what_is_at_work_comes_first_in_every_order() -> None:
    lines = lines_of(
        board(
            job("b", seconds=5),
            job("a", seconds=9),
            job("c", "committed", seconds=100, ended_at=NOW, row_count=7),
            job("0", "failed", seconds=50, ended_at=NOW),
        )
    )

    def order(by: Order, *, reverse: bool = False) -> str:
        return "".join(line.label for line in arranged(lines, by, reverse=reverse))

    assert order(Order.SINCE) == "abc0"
    assert order(Order.SINCE, reverse=True) == "ba0c"
    assert order(Order.LABEL) == "ab0c"
    assert order(Order.ROWS) == "abc0"
    assert order(Order.STATE) == "abc0"


RUN = "4f0a3c1e-7b52-4d6b-9a51-1f2e3d4c5b6a"


@pytest.mark.parametrize(
    ("series", "words"),
    [
        ("airflow:flights/scheduled__2026-01-01/load/-1", "Airflow flights.load"),
        ("airflow:flights/manual/with/slashes/load/3", "Airflow flights.load[3]"),
        ("airflow:odd", "airflow:odd"),
        ("dagster/asset/2026", "Dagster asset/2026"),
        ("nightly", ""),
        (None, ""),
    ],
)
def test_who_wants_it(series: str | None, words: str) -> None:
    assert orchestrator_of(series, "j") == words


def test_a_dagster_of_another_namespace_wants_it() -> None:
    assert orchestrator_of("books/sales", f"books/sales#{RUN}") == "Dagster books/sales"
    assert orchestrator_of("books/sales", "books/sales#2026-01-01") == ""


def test_whom_it_waits_for() -> None:
    ann, nobody = Blocker(4, "ann", "psql", "idle in transaction", "select 1", 90.0), Blocker(5)

    def words(*blockers: Blocker) -> str:
        return wait_of(worker(1, activity=waiting("Lock", "relation", *blockers)))

    assert wait_of(worker(1)) == ""
    assert wait_of(worker(1, activity=waiting("IO", "DataFileRead"))) == "IO: DataFileRead"
    assert words(ann) == "lock: pid 4 of ann (psql), for 1:30 min"
    assert words(nobody, ann) == "lock: pid 5 and 1 more, for 1:30 min"
    assert words(Blocker(0)) == "lock: a prepared transaction, for 1:30 min"
    # Another login's worker: its label is all that is to be seen of its job.
    theirs = Blocker(6, "bob", "pg_background:load:6")
    assert words(theirs) == "lock: worker load of bob (pid 6), for 1:30 min"


def test_the_job_that_is_in_the_way() -> None:
    held = waiting("Lock", "relation", Blocker(8, "etl", "pg_background:repair:8", "active", "lock table facts", 90.0))
    repair = job("repair", running_pid=8, series="airflow:upkeep/r/repair/-1", launched_by="host/1")
    seen = board(job("load", running_pid=7), repair, workers=(worker(7, activity=held), worker(8)))

    load = next(line for line in lines_of(seen) if line.label == "load")

    assert load.waits_for == "lock: job repair of etl (pid 8), for 1:30 min"
    assert load.blocker is repair
    told = facts_of(load)
    assert [name for name, _ in told[:3]] == ["state", "waits for", "blocked by"]
    assert dict(told)["blocked by"] == "repair of etl, launched by host/1, wanted by Airflow upkeep.repair"
    [shown] = [line for line in of_board(seen, {})["lines"] if line["label"] == "load"]
    assert shown["blocker"] == {"owner": "etl", "job_id": "repair", "label": "repair"}


def test_how_far_it_is() -> None:
    command = Command("CREATE INDEX", "building index: scanning table", 30, 100)
    at = Activity(7, "", None, None, None, (), command)
    [line] = lines_of(board(job("a", running_pid=7), workers=(worker(7, activity=at),)))

    assert (line.progress, line.percent) == ("CREATE INDEX: building index: scanning table", 30)
    assert progress(line) == "███░░░░░░░ 30 % CREATE INDEX: building index: scanning table"


def test_the_page_shows_no_sql_of_a_worker() -> None:
    secret = "insert into card values ('4711')"
    at = waiting("Lock", "relation", Blocker(4, "ann", "psql", "active", secret, 1.0))
    seen = board(job("a", running_pid=7), workers=(worker(7, query=secret, activity=at),))

    assert "4711" not in str(of_board(seen, {}))
    assert (BLOCKERS_QUERY, secret) in facts_of(lines_of(seen)[0])


@pytest.mark.parametrize(
    ("series", "job_id", "address"),
    [
        (
            "airflow:flights/scheduled__2026-01-01T00:00:00+00:00/load/-1",
            "x",
            "https://airflow.example.com/dags/flights/runs/scheduled__2026-01-01T00%3A00%3A00%2B00%3A00/tasks/load",
        ),
        ("airflow:flights/r/load/2", "x", "https://airflow.example.com/dags/flights/runs/r/tasks/load/mapped/2"),
        ("dagster/asset", f"dagster/asset#{RUN}", f"https://dagster.example.com/runs/{RUN}"),
        ("books/asset/part", f"books/asset/part#{RUN}/1", f"https://dagster.example.com/runs/{RUN}"),
        ("dagster/submitted/x", "dagster/submitted/x#a-key", None),
        ("nightly", "nightly#1", None),
        ("airflow:odd", "x", None),
    ],
)
def test_links(series: str, job_id: str, address: str | None) -> None:
    links = {"airflow": "https://airflow.example.com/", "dagster": "https://dagster.example.com"}

    assert link_of(series, job_id, links) == address
    assert link_of(series, job_id, {}) is None


def test_what_prometheus_scrapes() -> None:
    blocked = worker(7, activity=waiting("Lock", "relation", Blocker(4)))
    seen = board(
        job("load/2026-01-01", running_pid=7, seconds=30),
        job("load/2026-01-02", seconds=10),
        job("index", "failed", ended_at=NOW),
        workers=(blocked, worker(8)),
    )

    numbers = [line for line in exposition(seen).decode().splitlines() if not line.startswith("#")]

    assert numbers == [
        "pgbg_worker_slots 64.0",
        "pgbg_worker_slots_used 3.0",
        'pgbg_jobs{label_prefix="load",state="by hand"} 1.0',
        'pgbg_jobs{label_prefix="load",state="running"} 2.0',
        'pgbg_recent_jobs{label_prefix="index",state="failed"} 1.0',
        'pgbg_longest_seconds{state="running"} 30.0',
        'pgbg_longest_seconds{state="by hand"} 5.0',
        "pgbg_blocked_workers 1.0",
    ]


def durations(median: float | None, p95: float | None) -> Durations:
    return Durations("load", 10, 7, 1, 2, {"40001": 2}, median, p95, p95, median, median, NOW, NOW)


def test_how_long_it_may_take_still() -> None:
    [running] = lines_of(board(job("load", seconds=10)))

    def still(median: float | None, p95: float | None) -> str | None:
        return dict(usual_of(running, durations(median, p95))).get("may take still")

    assert usual_of(running, None) == []
    assert dict(usual_of(running, durations(None, None))) == {
        "label so far": "10 jobs: 7 committed, 2 failed, 1 cancelled",
        "failed with": "40001 (2)",
    }
    assert still(30, 70) == "20.0 s by the median, 1:00 min by the slow ones"
    assert still(5, 70) == "0 ms by the median, 1:00 min by the slow ones"
    assert still(5, 10) == "no telling: it has run longer than 95 of 100"
    assert still(None, None) is None
