"""What happens when a run is terminated, or when one of Dagster's processes dies: seen on the processes themselves.

Whatever a test waits for is an event (a lock that is held, a line in a log, a gate that the test opens itself), never a
time; runs that have nothing to do with one another go side by side.
"""

from __future__ import annotations

import os
import signal
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pytest
from dagster import AssetKey, DagsterInstance

from dagster_resource import PgBackgroundResource
from pgbg_orchestration.embedded.databases import Databases
from tests.conftest import Database, Running
from tests.core.kit import count, only_long, seeded
from tests.dagster.processes import Dagster, until
from tests.matrix import LONG
from tests.servers.kinds import Server

T = TypeVar("T")

pytestmark = [
    pytest.mark.real,
    pytest.mark.servers("real"),
    pytest.mark.processes,
    pytest.mark.slow,
    pytest.mark.timeout(3600 if count(0, 1) else 900),
]

JOBS = ["plain_in_process", "stubborn_multiprocess", "plain_multiprocess", "stubborn_in_process"]
STAGES = ["run", "step", "registered", "at work"]
EXTERNALS = count(20, 200)


@pytest.fixture(scope="module")
def databases(server: Server, server_real_8: Server, running: Running) -> Iterator[tuple[Database, Database]]:
    """A database on a server with room, and one on a server with eight worker slots."""
    made = []
    for where in (server, server_real_8):
        maker = running.databases(server) if where is server else Databases(where)
        database = Database(where, maker.create("schema", name=None))
        with database.connect() as connection:
            connection.execute("create table done (who text); create table gate (who text)")
        made.append((maker, database))
    yield made[0][1], made[1][1]
    for maker, database in made:
        maker.drop(database.name)


@pytest.fixture(scope="module")
def database(databases: tuple[Database, Database]) -> Database:
    return databases[0]


@pytest.fixture(scope="module")
def dagster(databases: tuple[Database, Database], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dagster]:
    roomy, narrow = databases
    made = Dagster(
        tmp_path_factory.mktemp("dagster"),
        Path(__file__).with_name("definitions.py"),
        {
            "PGBG_TEST_CONNINFO": roomy.conninfo,
            "PGBG_TEST_CONNINFO_8": narrow.conninfo,
            "PGBG_TEST_EXTERNALS": str(EXTERNALS),
        },
    )
    try:
        yield made.start()
    finally:
        made.stop()


@dataclass
class Work:
    """A run of a job that works until its gate is opened, and what the database knows of it."""

    dagster: Dagster
    database: Database
    job: str
    who: str = field(default_factory=lambda: uuid.uuid4().hex)
    run: str = ""

    def launch(self, **config: bool) -> Work:
        asset = self.job.split("_", maxsplit=1)[0]
        self.run = self.dagster.launch(self.job, {"ops": {asset: {"config": {"who": self.who, **config}}}})
        return self

    def ask(self, query: str) -> int:
        with self.database.connect() as connection:
            (number,) = connection.execute(query.encode(), {"who": self.who}).fetchone() or (0,)
        return int(number)

    @property
    def effects(self) -> int:
        """How often its work was committed."""
        return self.ask("select count(*) from done where who = %(who)s")

    @property
    def launches(self) -> int:
        """How often a worker was launched for it."""
        return self.ask("select coalesce(sum(attempt), 0) from pgbg.jobs where series like '%%/' || %(who)s")

    @property
    def at_work(self) -> bool:
        """Whether its worker has begun: one that was launched and has not is lost with its session."""
        return bool(
            self.ask("select count(*) from pgbg.jobs where series like '%%/' || %(who)s and running_pid is not null")
        )

    def has_reached(self, stage: str) -> bool:
        """Whether it has come as far as one of STAGES."""
        match stage:
            case "run":  # Dagster terminates no run that is STARTING
                return self.dagster.status(self.run) == "STARTED"
            case "step":
                return any("Started execution of step" in line for line in self.dagster.messages(self.run))
            case "registered":
                return self.launches > 0
        return self.at_work

    def wait_for_worker(self) -> None:
        until(lambda: self.at_work, lambda: self.dagster.story(self.run))

    def open_gate(self) -> None:
        with self.database.connect() as connection:
            connection.execute("insert into gate values (%s)", (self.who,))


def side_by_side(function: Callable[[T], object], cases: Sequence[T]) -> None:
    """Call the function for each case in a thread of its own; raises all of their errors."""
    with ThreadPoolExecutor(len(cases)) as threads:
        ends = [(case, threads.submit(function, case)) for case in cases]
    errors = []
    for case, end in ends:
        if (error := end.exception()) is not None:
            error.add_note(f"case {case}")
            errors.append(error)
    if errors:
        raise BaseExceptionGroup("some cases failed", errors)


# A user terminates a run ----------------------------------------------------------------------------------------------


def assert_canceled(work: Work) -> None:
    """The run ended as CANCELED, its worker is gone, and nothing is or was launched again."""
    assert work.dagster.wait(work.run) == "CANCELED", work.dagster.story(work.run)
    until(lambda: not work.at_work, lambda: f"its worker lives on\n{work.dagster.story(work.run)}")
    assert work.launches <= 1, work.dagster.story(work.run)
    assert work.effects == 0
    assert work.dagster.runs("dagster/parent_run_id", work.run) == []


def test_terminated_at_any_moment(dagster: Dagster, database: Database) -> None:
    chance = seeded("terminated at any moment")
    met: Counter[str] = Counter()

    def terminate(case: tuple[str, str, float, bool]) -> None:
        job, stage, delay, rows = case
        work = Work(dagster, database, job).launch(rows=rows)
        until(lambda: work.has_reached(stage), lambda: dagster.story(work.run))
        time.sleep(delay)
        met["at work" if work.at_work else "being launched" if work.launches else "not launched yet"] += 1
        dagster.terminate(work.run)
        assert_canceled(work)

    # At a push two kinds of run are terminated at work, and the two others at any moment.
    at_work, at_any_moment = (JOBS, JOBS) if LONG else (JOBS[:2], JOBS[2:])
    side_by_side(terminate, [(job, "at work", 0.0, False) for job in at_work])
    assert met == {"at work": len(at_work)}
    for _ in range(count(1, 20)):
        side_by_side(
            terminate,
            [(job, chance.choice(STAGES), chance.uniform(0, 0.7), chance.random() < 0.5) for job in at_any_moment],
        )
    until(lambda: database.workers() == [], lambda: str(database.workers()))
    print(f"terminated: {dict(met)}")


# A process dies, and nobody asked for it ------------------------------------------------------------------------------


def assert_retry_attaches(work: Work) -> str:
    """The run fails and is run again; that run, whose id is returned, attaches to the worker, which commits once."""
    dagster = work.dagster
    assert dagster.wait(work.run) == "FAILURE", dagster.story(work.run)
    retry = dagster.retry_of(work.run)
    until(
        lambda: any("attached to the worker" in line for line in dagster.messages(retry)), lambda: dagster.story(retry)
    )
    assert work.effects == 0
    work.open_gate()
    assert dagster.wait(retry) == "SUCCESS", dagster.story(retry)
    assert work.effects == 1
    assert work.launches == 1
    return retry


def test_a_process_dies_and_the_retried_run_finds_the_worker(dagster: Dagster, database: Database) -> None:
    def die(case: tuple[str, signal.Signals]) -> None:
        victim, how = case
        work = Work(dagster, database, "plain_multiprocess" if victim == "step" else "plain_in_process").launch()
        work.wait_for_worker()
        os.kill(dagster.pid_of_step(work.run) if victim == "step" else dagster.pid_of_run(work.run), how)
        assert_retry_attaches(work)

    deaths = [("step", signal.SIGKILL), ("run", signal.SIGTERM)]
    if LONG:
        deaths += [("step", signal.SIGTERM), ("run", signal.SIGKILL)]
    side_by_side(die, deaths)


def kept_rows(work: Work) -> tuple[int, int, list[str]]:
    """How many receipts and sets of rows there are of its job, and the values of the second column."""
    with work.database.connect() as connection:
        found = connection.execute(
            "select count(r.job_digest), count(s.job_digest) from pgbg.job j"
            " join pgbg.receipt r using (owner, job_digest) left join pgbg.row_set s using (owner, job_digest)"
            " where j.series like '%%/' || %s",
            (work.who,),
        ).fetchone()
        chunks = connection.execute(
            "select c.cells[c.row_count + 1 : 2 * c.row_count] from pgbg.job j join pgbg.row_chunk c"
            " using (owner, job_digest) where j.series like '%%/' || %s order by c.chunk",
            (work.who,),
        ).fetchall()
    assert found is not None
    return *found, [value for (values,) in chunks for value in values]


@only_long
def test_a_step_that_asked_for_rows_is_killed_and_its_retry_has_them(dagster: Dagster, database: Database) -> None:
    """At work, and once it had them: the SQL ran once, and the rows are there exactly when the receipt is."""

    def die(stalls: bool) -> None:
        work = Work(dagster, database, "fetching_multiprocess").launch(stalls=stalls)
        work.wait_for_worker()
        assert kept_rows(work) == (0, 0, [])
        if stalls:
            work.open_gate()
            until((dagster.home / f"fetched-{work.who}").exists, lambda: dagster.story(work.run))
            assert kept_rows(work)[:2] == (1, 1)
        os.kill(dagster.pid_of_step(work.run), signal.SIGKILL)
        if stalls:
            assert dagster.wait(work.run) == "FAILURE", dagster.story(work.run)
            retry = dagster.retry_of(work.run)
            assert dagster.wait(retry) == "SUCCESS", dagster.story(retry)
            assert (work.effects, work.launches) == (1, 1)
        else:
            retry = assert_retry_attaches(work)
        with dagster.instance() as instance:
            (event,) = (
                record.asset_materialization
                for record in instance.fetch_materializations(AssetKey("fetching"), limit=10).records
                if record.run_id == retry
            )
        assert event is not None
        told: Any = event.metadata["rows"].value
        receipts, sets, values = kept_rows(work)
        assert (receipts, sets) == (1, 1)
        assert [row[0] for row in told] == [*range(1, 1001)]
        assert [row[1] for row in told] == values
        assert len({row[2] for row in told}) == 1

    side_by_side(die, [False, True])


@only_long
def test_a_run_dies_while_the_daemon_is_dead(dagster: Dagster, database: Database) -> None:
    undisturbed, killed = (Work(dagster, database, "plain_in_process").launch() for _ in range(2))
    undisturbed.wait_for_worker()
    killed.wait_for_worker()
    dagster.kill_daemon()
    os.kill(dagster.pid_of_run(killed.run), signal.SIGKILL)
    undisturbed.open_gate()
    assert dagster.wait(undisturbed.run) == "SUCCESS", dagster.story(undisturbed.run)
    assert (undisturbed.effects, undisturbed.launches) == (1, 1)

    assert killed.at_work
    dagster.start_daemon()
    assert_retry_attaches(killed)


# Many jobs and many partitions ----------------------------------------------------------------------------------------


def test_thirty_jobs_in_one_step_on_a_server_with_eight_slots(
    dagster: Dagster, databases: tuple[Database, Database]
) -> None:
    work = Work(dagster, databases[1], "many_multiprocess").launch()

    assert dagster.wait(work.run) == "SUCCESS", dagster.story(work.run)
    assert work.effects == 30


def test_a_range_is_backfilled_by_a_single_run(dagster: Dagster, database: Database) -> None:
    days = [f"2013-01-{day:02}" for day in range(3, 13)]
    # The daemon looks for backfills every half a minute.
    backfill = dagster.backfill("days", days)
    until(lambda: dagster.runs("dagster/backfill", backfill), dagster.log)
    (run,) = dagster.runs("dagster/backfill", backfill)

    assert dagster.wait(run) == "SUCCESS", dagster.story(run)
    assert dagster.runs("dagster/backfill", backfill) == [run]
    with database.connect() as connection:
        assert connection.execute("select who from done where who = any(%s) order by 1", (days,)).fetchall() == [
            (day,) for day in days
        ]
        jobs = "select job_id, attempt from pgbg.jobs where job_id like 'dagster/days/%'"
        assert connection.execute(jobs).fetchall() == [(f"dagster/days/{days[0]}...{days[-1]}#{run}", 1)]
    with dagster.instance() as instance:
        assert instance.get_materialized_partitions(AssetKey("days")) == set(days)


# Jobs that nobody waits for -------------------------------------------------------------------------------------------


def test_submitted_jobs_are_reported_once_each_though_the_daemon_dies_in_the_middle(
    dagster: Dagster, database: Database
) -> None:
    pg = PgBackgroundResource(conninfo=database.conninfo)
    names = [f"external_{number}" for number in range(EXTERNALS)]
    late = Work(dagster, database, "none")  # the last ten end only after the daemon's death

    def submit(number: int) -> None:
        gated = number >= EXTERNALS - 10
        wait = "do $$ begin while not exists (select from gate where who = current_setting('test.who')) loop "
        wait += "perform pg_sleep(0.05); end loop; end $$"
        pg.submit(
            None, wait if gated else "select 1", asset_key=names[number], key="1", settings={"test.who": late.who}
        )

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(submit, range(EXTERNALS)))
    with dagster.instance() as instance:
        dagster.start_sensor("pg_background_sensor")
        until(lambda: len(materialized(instance, names)) >= EXTERNALS // 10, dagster.log)
        dagster.kill_daemon()
        late.open_gate()
        until(lambda: not late.ask("select count(*) from pgbg.jobs where state = 'running'"), dagster.log)
        assert len(materialized(instance, names)) <= EXTERNALS - 10

        dagster.start_daemon()
        until(lambda: len(materialized(instance, names)) == EXTERNALS, dagster.log)
        # The sensor has ended when a tick has found nothing more.
        assert materialized(instance, names) == Counter(dict.fromkeys(names, 1))


def materialized(instance: DagsterInstance, names: Sequence[str]) -> Counter[str]:
    """How often each asset was materialized."""
    found = {name: instance.fetch_materializations(AssetKey(name), limit=10).records for name in names}
    return Counter({name: len(records) for name, records in found.items() if records})
