"""A receipt is written, and claimed, by one statement where nothing is against it; where anything is, it is not."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import psycopg
import pytest

from pgbg_orchestration import Job, arun, errors
from pgbg_orchestration.ledger.sighting import Key
from pgbg_orchestration.postgres.markers import marker
from tests.core.kit import APP, Watched, effect, within

pytestmark = pytest.mark.any_surface

KEY = Key(APP, "j", "s")


@pytest.fixture
def worker(db: Watched) -> Iterator[psycopg.Connection]:
    """A session in the place of a worker's, in a transaction."""
    with psycopg.connect(db.conninfo) as connection:
        yield connection
        connection.rollback()


def write(worker: psycopg.Connection, key: Key = KEY) -> bool | None:
    """Write the receipt of attempt 1 of generation 1, as a worker does."""
    (job, series), locks = key.digests, key.locks
    values = (key.owner, key.job_id, 1, "label", 1, b"digest", job, series, *locks)
    row = worker.execute(f"select pgbg.try_begin({', '.join(['%s'] * len(values))})".encode(), values).fetchone()
    assert row is not None
    return row[0]  # type: ignore[no-any-return]


def claim(worker: psycopg.Connection) -> bool | None:
    """Claim it, as a supervisor does."""
    row = worker.execute("select pgbg.try_claim(%s, 'j', 's', 1, 'label', 1, 'digest')", (APP,)).fetchone()
    assert row is not None
    return row[0]  # type: ignore[no-any-return]


def registered(db: Watched) -> None:
    with psycopg.connect(db.conninfo, autocommit=True) as connection:
        connection.execute("select pgbg.register(null, 'j', 's', 1, 'label', 'receipt', 'digest', false, 'me')")


BOTH = pytest.mark.parametrize("begin", [write, claim])
Begin = Callable[[psycopg.Connection], bool | None]


@BOTH
def test_nothing_is_against_it(db: Watched, worker: psycopg.Connection, begin: Begin) -> None:
    registered(db)
    assert begin(worker) is True
    assert begin(worker) is None  # which has a receipt


NEWER = "update pgbg.series set newest = 2"
FORGOTTEN = "delete from pgbg.series"
CANCELLED = (
    f"insert into pgbg.receipt (owner, job_digest, status, job_id) values ('{APP}', pgbg.digest('j'), 'cancelled', 'j')"
)


@BOTH
@pytest.mark.parametrize("against", [NEWER, FORGOTTEN, CANCELLED], ids=["newer", "forgotten", "cancelled"])
def test_a_newer_generation_or_a_receipt(db: Watched, worker: psycopg.Connection, begin: Begin, against: str) -> None:
    registered(db)
    db.sql(against)
    assert begin(worker) is None


@BOTH
def test_another_isolation_level(db: Watched, worker: psycopg.Connection, begin: Begin) -> None:
    registered(db)
    worker.execute("set transaction isolation level repeatable read")
    assert begin(worker) is None


@pytest.mark.parametrize("number", [0, 1], ids=["series", "job"])
def test_a_lock_that_another_worker_holds(db: Watched, worker: psycopg.Connection, number: int) -> None:
    registered(db)
    db.sql("select pg_advisory_lock(%s)", KEY.locks[number])
    assert write(worker) is None
    assert worker.execute("select pgbg.try_lock(%s, 'j', 's')", (APP,)).fetchone() == (False,)
    db.sql("select pg_advisory_unlock_all()")
    assert worker.execute("select pgbg.try_lock(%s, 'j', 's')", (APP,)).fetchone() == (True,)
    assert write(worker) is True


def test_a_failure_that_nobody_was_told_of(db: Watched, worker: psycopg.Connection) -> None:
    """A supervisor that begins then would run the work again."""
    registered(db)
    db.sql("update pgbg.job set outcome = 'failed', reported_at = null")
    assert claim(worker) is None
    db.sql("update pgbg.job set reported_at = now()")
    assert claim(worker) is True


def test_the_worker_of_an_earlier_supervisor(db: Watched, worker: psycopg.Connection) -> None:
    registered(db)
    db.sql("select set_config('application_name', %s, false)", marker(APP, "j") + "label")
    assert claim(worker) is None
    db.sql("reset application_name")
    worker.rollback()  # a transaction sees the backends as they were when it first looked
    assert claim(worker) is True


@BOTH
def test_another_owner(db: Watched, enemy: psycopg.Connection, begin: Begin) -> None:
    registered(db)
    with pytest.raises(psycopg.errors.InsufficientPrivilege, match=APP):
        begin(enemy)
    assert db.receipts() == set()


async def test_what_is_refused_is_refused_by_begin_work(db: Watched) -> None:
    """It is not called where nothing is against the job."""
    definition = db.value("select pg_get_functiondef('pgbg.begin_work'::regproc)")
    db.sql(definition.replace("\nbegin\n", "\nbegin raise 'called';\n"))
    outcome = await within(arun(db.conninfo, Job(effect("j"), id="j", series="s")))
    assert (outcome.proof, outcome.row_count) == ("receipt", 1)
    assert (await within(arun(db.conninfo, Job(effect("j"), id="j again", series="s")))).launched
    with pytest.raises(errors.WorkerError, match="called"):
        await within(arun(db.conninfo, Job(effect("k"), id="k", isolation="repeatable read")))
    assert db.effects_by_job() == {"j": 2}
