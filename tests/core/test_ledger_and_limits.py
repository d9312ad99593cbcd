"""What the ledger forgets and when, names that it refuses, connections that are too few, and roles in force."""

from __future__ import annotations

import asyncio
import gc
import re
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import psycopg
import pytest
from psycopg import sql

from pgbg_orchestration import Job, Launcher, Outcome, arun, errors
from pgbg_orchestration.doctor.examination import Status, examine
from pgbg_orchestration.ledger import install
from pgbg_orchestration.ledger.sighting import Key
from pgbg_orchestration.postgres import connection
from pgbg_orchestration.postgres.markers import marker
from pgbg_orchestration.postgres.pg_background import Extension
from pgbg_orchestration.postgres.session import LaunchingSession
from tests.conftest import Database
from tests.core.kit import APP, Watched, cancelled, effect, ended, eventually, slow, within
from tests.kit.proxy import TO_SERVER, Proxy

pytestmark = pytest.mark.any_surface

REAL = pytest.mark.servers("real", "embedded")
FUNCTIONS = Path(install.__file__).parent / "sql" / "functions"

# Forgetting -----------------------------------------------------------------------------------------------------------


async def prune(db: Watched, seconds: float) -> tuple[int, int]:
    async with Launcher(db.conninfo) as launcher:
        return await within(launcher.ledger.prune(timedelta(seconds=seconds)))


async def test_a_long_jobs_receipt_is_as_old_as_its_end(db: Watched) -> None:
    """It was written at the start; nobody saw its end, and the retry must find it."""
    job = Job(slow("j", 1.5), id="j")
    async with Launcher(db.conninfo) as launcher:
        task = asyncio.create_task(launcher.run(job, on_cancel="leave"))
        await db.at_work("j")
        assert isinstance(await cancelled(task), asyncio.CancelledError)
    await eventually(lambda: db.receipts() == {"j"}, "the commit")
    assert await prune(db, 1) == (0, 0)
    retried = await within(arun(db.conninfo, job))
    assert not retried.launched
    assert db.effects("j") == 1
    # Nobody has written its end down; it was found now, and counts from here.
    db.sql("update pgbg.job set launched_at = launched_at - interval '1 d'")
    assert await prune(db, 3600) == (0, 0)
    db.sql("update pgbg.receipt set found_at = found_at - interval '1 d'")
    assert await prune(db, 3600) == (1, 1)


async def test_a_recorded_end_counts(db: Watched) -> None:
    await within(arun(db.conninfo, Job(effect("j"), id="j")))
    db.sql("update pgbg.receipt set decided_at = decided_at - interval '1 d'")  # as if it had begun long before
    assert await prune(db, 3600) == (0, 0)
    db.sql("update pgbg.job set ended_at = ended_at - interval '1 d'")
    assert await prune(db, 3600) == (0, 0), "its line of the history is younger"
    db.sql("update pgbg.job set launched_at = launched_at - interval '1 d'")
    assert await prune(db, 3600) == (1, 1)


async def test_a_receipt_whose_history_tells_another_end(db: Watched) -> None:
    """Another attempt's failure was written down, and its launching process died before it could write the commit."""
    await within(arun(db.conninfo, Job(effect("j"), id="j")))
    db.sql("update pgbg.job set outcome = 'failed', launched_at = launched_at - interval '1 d',"
           " ended_at = ended_at - interval '1 d'")  # fmt: skip
    assert await prune(db, 3600) == (0, 0)
    assert db.receipts() == {"j"}


async def test_series_are_forgotten_with_their_last_job(db: Watched) -> None:
    async with Launcher(db.conninfo) as launcher:
        for generation in (1, 2):
            await within(launcher.run(Job("select 1", series="old", generation=generation)))
        await within(launcher.run(Job("select 1", series="new", generation=7)))
        db.sql(
            "update pgbg.job set launched_at = launched_at - interval '1 d', ended_at = ended_at - interval '1 d'"
            " where series = 'old'"
        )
        assert (await within(launcher.ledger.prune(timedelta(hours=1))))[1] == 2
        assert db.sql("select series, newest from pgbg.series") == [("new", 7)]
        assert (await within(launcher.run(Job("select 1", series="old", generation=1)))).launched


async def test_a_generation_that_is_not_registered_supersedes_none(db: Watched) -> None:
    """Generation 2 was cancelled before anybody had run it; a call for it is refused, and leaves the others free."""
    async with Launcher(db.conninfo) as launcher:
        assert await within(launcher.cancel("s#2", series="s")) == "cancelled"
        with pytest.raises(errors.JobCancelled):
            await within(launcher.run(Job("select 1", series="s", generation=2)))
        assert db.sql("select series from pgbg.series") == []
        assert (await within(launcher.run(Job("select 1", series="s", generation=0)))).launched
        again = await within(launcher.run(Job("select 1", series="s", generation=2), retry_cancelled=True))
        assert again.launched
        with pytest.raises(errors.Superseded):
            await within(launcher.run(Job("select 1", id="s", series="s", generation=1)))


async def test_a_series_that_is_registered_while_it_is_forgotten(db: Watched) -> None:
    """prune waits for nobody, and a registration that meets it makes the series again."""
    await within(arun(db.conninfo, Job("select 1", series="s", generation=1)))
    db.sql("update pgbg.job set launched_at = launched_at - interval '1 d', ended_at = ended_at - interval '1 d'")
    with psycopg.connect(db.conninfo) as pruning, psycopg.connect(db.conninfo, autocommit=True) as busy:
        pruning.execute("select pgbg.prune('1 hour')")  # the series is gone, and nobody sees it yet
        task = asyncio.create_task(arun(db.conninfo, Job("select 1", id="t", series="s", generation=1)))
        await eventually(lambda: db.value("select count(*) from pg_locks where not granted"), "it waits for prune")
        pruning.commit()
        assert (await within(task)).launched
        assert db.sql("select series, newest from pgbg.series") == [("s", 1)]
        # Held by a registration, it is left alone.
        busy.execute("begin")
        busy.execute("select pgbg.register(null, 'u', 'u', 1, 'u', 'receipt', '\\x00', false, 'me')")
        assert await prune(db, 0) is not None
        busy.execute("commit")
    assert db.sql("select series from pgbg.series where series = 'u'") == [("u",)]


# Names ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["a\nselect 1", "a\rb", "a\tb", "a$$b", "a$pgbg$b", "", "x" * 64, "é" * 32, "pg_mine", "a\u2028b"],
    ids=["newline", "return", "tab", "dollars", "our quote", "empty", "long", "long in bytes", "reserved", "separator"],
)
@pytest.mark.parametrize("which", ["schema", "owner"])
def test_a_name_that_cannot_be_put_into_the_schema(extension_database: Database, which: str, name: str) -> None:
    names = {"schema": "s", "owner": "o", which: name}
    with pytest.raises(errors.InvalidJob, match="the name of the schema"):
        install.install(extension_database.conninfo, schema=names["schema"], owner=names["owner"])
    with pytest.raises(errors.InvalidJob, match="the name of the schema"):
        install.plan(0, schema=names["schema"], owner=names["owner"])


def test_a_name_that_looks_like_a_token(extension_database: Database) -> None:
    install.install(extension_database.conninfo, schema="s@owner@", owner="o@schema@")
    try:
        with extension_database.connect() as conn:
            assert conn.execute('select max(version) from "s@owner@".meta').fetchall() == [(install.VERSION,)]
    finally:
        install.uninstall(extension_database.conninfo, schema="s@owner@", owner="o@schema@")


def test_no_token_stands_in_a_comment() -> None:
    scripts = [*Path(install.__file__).parent.glob("sql/tables_*.sql"), *FUNCTIONS.glob("*.sql")]
    assert len(scripts) > len(install.FUNCTIONS)
    for script in scripts:
        comments = [line.partition("--")[2] for line in script.read_text(encoding="utf-8").splitlines()]
        assert not [comment for comment in comments if "@schema@" in comment or "@owner@" in comment]


def test_each_function_is_defined_once_and_in_a_file_that_is_run() -> None:
    assert {script.stem for script in FUNCTIONS.iterdir()} == set(install.FUNCTIONS)
    text = "".join(script.read_text(encoding="utf-8") for script in FUNCTIONS.iterdir())
    defined = re.findall(r"^create or replace (?:function|procedure|view) @schema@\.(\w+)", text, re.MULTILINE)
    assert len(defined) == len(set(defined)) == len(re.findall(r"^create\b", text, re.MULTILINE))


async def test_keys_are_the_same_on_either_side(db: Watched) -> None:
    """A worker is given what the schema would work out itself."""
    for owner, job_id, series in [
        (APP, "j", "s"), ("Ünïcode 'role'", "ü\t\n%s", ""), ("", "", "日本"), ("a:b", "c:d", "x" * 5000)
    ]:  # fmt: skip
        key = Key(owner, job_id, series)
        found = db.sql(
            "select d.job, d.series, pgbg.lock_key('series', k.owner, d.series), pgbg.lock_key('job', k.owner, d.job),"
            " pgbg.marker(k.owner, k.job) from (values (%s, %s, %s)) as k (owner, job, series)"
            " cross join lateral (select pgbg.digest(k.job), pgbg.digest(k.series)) as d (job, series)",
            owner, job_id, series,
        )  # fmt: skip
        assert found == [(*key.digests, *key.locks, marker(owner, job_id))]


# Tasks that fail ------------------------------------------------------------------------------------------------------


async def test_a_polling_task_that_fails_leaves_nobody_waiting(
    db: Watched, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(self: LaunchingSession) -> None:
        raise RuntimeError("an error that nobody named")

    monkeypatch.setattr(LaunchingSession, "poll", broken)
    outcome = await within(arun(db.conninfo, Job(slow("j", 1), id="j")))
    assert outcome.proof == "receipt"
    assert db.effects("j") == 1
    assert "an error that nobody named" in caplog.text


@pytest.mark.parametrize(
    ("notify", "told"),
    [
        pytest.param("on", "could not forget a worker", id="a hint comes"),
        pytest.param("off", "the polling of a launching session failed", id="it is polled for"),
    ],
)
async def test_a_handle_that_cannot_be_forgotten(
    db: Watched, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, notify: str, told: str
) -> None:
    async def broken(*_: object) -> None:
        raise RuntimeError("an error that nobody named")

    async def nothing(*_: object) -> None: ...

    def deaf(*_: object) -> None: ...

    unheard: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: unheard.append(context))
    async with Launcher(db.conninfo) as launcher:
        if notify == "on":
            monkeypatch.setattr(LaunchingSession, "poll", nothing)  # which may come before the hint
        else:
            monkeypatch.setattr(LaunchingSession, "hear", deaf)  # a listener's first connection is a hint to all
        monkeypatch.setattr(Extension, "detach", broken)
        monkeypatch.setattr(Extension, "detach_many", broken)
        first = await within(launcher.run(Job(effect("j"), id="j", settings={"pgbg.notify": notify})))
        await eventually(lambda: told in caplog.text, "it is told")
        monkeypatch.undo()
        second = await within(launcher.run(Job(effect("k"), id="k")))
    gc.collect()
    assert (first.launched, second.launched, unheard) == (True, True, [])


# Servers that are away ------------------------------------------------------------------------------------------------


async def test_the_first_look_is_cut(db: Watched, proxy: Proxy) -> None:
    """Without an SQLSTATE: the network did it, and the question is asked again."""
    when = proxy.when(TO_SERVER, b"server_version_num", cut=True)
    assert (await within(arun(proxy.through(db.conninfo), Job(effect("j"), id="j")))).launched
    assert when.happened
    assert db.effects("j") == 1


async def test_a_server_that_is_away_from_the_start() -> None:
    with pytest.raises(errors.ServerUnreachable) as caught:
        await within(arun("host=127.0.0.1 port=1 connect_timeout=2", Job("select 1", id="j")))
    assert caught.value.data_state == errors.NOT_BY_THIS_CALL


@REAL
async def test_a_server_without_ssl(db: Watched) -> None:
    conninfo = db.database.conninfo_as(APP, sslmode="require")
    if db.server.conninfo().split("host=")[1].startswith("/"):
        with pytest.raises(errors.ServerUnreachable):  # libpq itself refuses SSL over a Unix socket
            await within(arun("host=127.0.0.1 port=1 sslmode=require connect_timeout=2", Job("select 1")))
        return
    with pytest.raises(errors.InvalidJob, match="asks for SSL") as caught:
        await within(arun(conninfo, Job("select 1", id="j")))
    assert caught.value.sqlstate is None


# Connections ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def limited(db: Watched) -> Iterator[str]:
    """A login with a connection limit to be set."""
    db.role("pgbg_limited", "login", ["pgbackground_role"])
    db.sql("grant insert on effects to pgbg_limited")
    yield "pgbg_limited"
    db.sql("drop owned by pgbg_limited")
    db.sql("drop role pgbg_limited")


@REAL
@pytest.mark.parametrize("of", ["role", "database"])
async def test_too_few_connections(db: Watched, limited: str, of: str) -> None:
    altered = f"role {limited}" if of == "role" else f"database {db.database.name}"
    conninfo = db.database.conninfo_as(limited)
    db.sql(f"alter {altered} connection limit 2")
    try:
        with pytest.raises(errors.ServerUnreachable, match=r"may have 2 connections .* need 3 at least") as caught:
            await within(arun(conninfo, Job(effect("j"), id="j")))
        assert caught.value.sqlstate == "53300"
        assert f"ALTER {of.upper()}" in (caught.value.todo or "")
        assert caught.value.data_state == errors.NOT_BY_THIS_CALL
        found = {finding.name: finding for finding in await examine(conninfo)}["connections"]
        assert found.status is Status.FAILS
        db.sql(
            (found.todo or "").replace("8;", "3" if of == "role" else "5")
        )  # the administrator is in the database too
        outcomes = await within(one_process_with_few(conninfo, db))
        assert all(isinstance(outcome, Outcome) for outcome in outcomes)
    finally:
        db.sql(f"alter {altered} connection limit -1")
    assert {f.name: f for f in await examine(conninfo)}["connections"].status is Status.OK


@pytest.mark.parametrize("listing", ["jobs", "orphans", "durations", "detail", "first_rows"])
async def test_what_lists_many_jobs_keeps_no_look_waiting(db: Watched, listing: str) -> None:
    """It has a line of its own; each session's last query tells what went over which."""
    async with Launcher(db.conninfo) as launcher:
        ledger = launcher.ledger
        of_job = {"detail": (APP, "j"), "first_rows": (APP, "j", 1)}.get(listing, ())
        await within(getattr(ledger, listing)(*of_job))
        await within(ledger.look(Key(APP, "j")))
        last = "select application_name from pg_stat_activity where application_name like 'pgbg: %%' and usename = %s"
        assert {name for (name,) in db.sql(last, APP)} == {"pgbg: listing", "pgbg: looking"}
        await within(ledger.run(lambda conn: conn.execute("select 'what writes nothing'")))
        asked = (
            "select application_name from pg_stat_activity where query like 'select ''what writes%%' and usename = %s"
        )
        assert db.sql(asked, APP) == [("pgbg: looking",)]


async def one_process_with_few(conninfo: str, db: Watched) -> list[object]:
    async with Launcher(conninfo) as launcher:
        jobs = [Job(slow(f"j{n}", 0.2), id=f"j{n}") for n in range(8)]
        ends = await asyncio.gather(*(ended(launcher.run(job)) for job in jobs))
        assert len(db.sessions("pgbg: %")) <= 4
        return list(ends)


def test_a_timeout_has_words() -> None:
    assert connection.words(TimeoutError()) == "TimeoutError"


# Roles in force -------------------------------------------------------------------------------------------------------


@REAL
@pytest.mark.parametrize("kind", ["receipt", "supervised", "session"])
async def test_a_role_that_alter_role_puts_in_force(db: Watched, kind: str) -> None:
    db.role("pgbg_owner_of_data", "nologin", [])
    db.role("pgbg_switching", "login", ["pgbackground_role", "pgbg_owner_of_data"])
    db.sql("grant insert on effects to pgbg_owner_of_data")
    db.sql("alter role pgbg_switching set role = 'pgbg_owner_of_data'")
    conninfo = db.database.conninfo_as("pgbg_switching")
    try:
        found = {finding.name: finding for finding in await examine(conninfo)}
        assert "with the role pgbg_owner_of_data in force" in found["reached"].text
        assert found["role membership"].status is Status.FAILS
        assert 'TO "pgbg_owner_of_data"' in (found["role membership"].todo or "")
        assert "functions" not in found or "EXECUTE" not in found["functions"].text
        with pytest.raises(errors.NoPrivilege, match="the role 'pgbg_owner_of_data', which is in force") as caught:
            await within(arun(conninfo, Job(effect("j"), id="j", kind=kind)))
        db.sql(caught.value.todo or "")
        outcome = await within(arun(conninfo, Job(effect("j"), id="j", kind=kind)))
        assert outcome.launched
        assert db.sql("select who from effects") == [("pgbg_owner_of_data",)]
        assert {f.name: f for f in await examine(conninfo)}["role membership"].status is Status.OK
    finally:
        db.sql("drop owned by pgbg_owner_of_data, pgbg_switching")
        db.sql("drop role pgbg_switching; drop role pgbg_owner_of_data")


# Encodings ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def ascii_db(db: Watched) -> Iterator[str]:
    """A database of the encoding SQL_ASCII, whose texts may hold any bytes."""
    name = f"{db.database.name}_ascii"
    db.sql(sql.SQL("create database {} template template0 encoding 'SQL_ASCII' locale 'C'").format(
        sql.Identifier(name)).as_string(None))  # fmt: skip
    with psycopg.connect(db.server.conninfo(name), autocommit=True) as conn:
        conn.execute("create extension pg_background")
    install.install(db.server.conninfo(name))
    yield name
    until = time.monotonic() + 30
    while db.value("select count(*) from pg_stat_activity where datname = %s", name) and time.monotonic() < until:
        time.sleep(0.05)
    db.sql(sql.SQL("drop database {}").format(sql.Identifier(name)).as_string(None))


@REAL
@pytest.mark.parametrize("kind", ["receipt", "supervised", "session"])
async def test_an_error_with_a_byte_that_is_no_text(db: Watched, ascii_db: str, kind: str) -> None:
    conninfo = db.server.conninfo(ascii_db, APP)
    raising = "do $$begin raise exception 'a%b', chr(228) using detail = chr(255), hint = 'plain é'; end$$"
    end = await ended(arun(conninfo, Job(raising, id="j", kind=kind)))
    assert isinstance(end, errors.WorkerError)
    assert end.sqlstate == "P0001"
    assert end.fields.message == r"a\xe4b"
    assert end.fields.detail == r"\xff"
    assert end.fields.hint == "plain é"
    if kind != "session":
        async with Launcher(conninfo) as launcher:
            (entry,) = await within(launcher.ledger.jobs())
        assert (entry.state, entry.message, entry.detail) == ("failed", r"a\xe4b", r"\xff")


@REAL
async def test_kept_rows_with_a_byte_that_is_no_text(db: Watched, ascii_db: str) -> None:
    """The job is committed, and that is said; nobody is told to look for a broken schema."""
    conninfo = db.server.conninfo(ascii_db, APP)
    end = await ended(arun(conninfo, Job("select chr(228) as letter", id="j", fetch=True)))
    assert isinstance(end, errors.RowsGone)
    assert (end.sqlstate, end.data_state) == ("22021", errors.RowsGone.data_state)
    as_bytes = Job("select convert_to(chr(228), 'SQL_ASCII') as letter, 'é' as text", id="k", fetch=True)
    outcome = await within(arun(conninfo, as_bytes))
    assert list(outcome.rows) == [(b"\xe4", "é")]
    async with Launcher(conninfo) as launcher:
        assert {entry.state for entry in await within(launcher.ledger.jobs())} == {"committed"}
        with pytest.raises(errors.RowsGone):
            await within(launcher.rows("j"))
