"""Jobs whose launcher is dead, and what their caller said of that; and the schema's upgrade, which brought it."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from typing import Any

import psycopg
import pytest

from pgbg_orchestration import Job, Launcher, errors
from pgbg_orchestration.ledger import install
from pgbg_orchestration.ledger.history import Orphan
from pgbg_orchestration.ledger.ledger import Ledger
from pgbg_orchestration.walk.worker_sql import Work
from tests.conftest import Database
from tests.core import earlier_schemas
from tests.core.kit import APP, Watched, effect, ended, eventually, launching_process, slow, within


async def _orphans(db: Watched, **which: str) -> dict[str, Orphan]:
    async with Launcher(db.conninfo) as launcher:
        return {orphan.job_id: orphan for orphan in await within(launcher.ledger.orphans(**which))}


async def test_the_workers_of_a_killed_process(db: Watched) -> None:
    """Each with what its caller said; one of which nothing was said is nobody's to touch."""
    said = {"a:1": "cancel", "a:2": "leave", "a:3": None, "b:1": "cancel"}
    async with launching_process(db.conninfo) as child:
        for job_id, what in said.items():
            child.run({"sql": slow(job_id, 60), "id": job_id, "label": f"label of {job_id}"}, when_orphaned=what)
        await eventually(lambda: len(db.workers()) == 4, "all are at work")
        await eventually(lambda: set(db.states().values()) == {"running"}, "all are seen at work")
        assert await _orphans(db) == {}, "their launcher lives"
        child.signal(signal.SIGSTOP)
        assert await _orphans(db) == {}, "a launcher that is stalled keeps its sessions"
        child.signal(signal.SIGKILL)
        await eventually(lambda: db.sql("select job_id from pgbg.orphans(null)"), "their launcher is seen to be gone")

    found = await _orphans(db)
    assert {job_id: orphan.when_orphaned for job_id, orphan in found.items()} == {
        "a:1": "cancel",
        "a:2": "leave",
        "b:1": "cancel",
    }
    orphan = found["a:1"]
    assert (orphan.owner, orphan.label, orphan.series, orphan.state) == (APP, "label of a:1", "a:1", "running")
    assert orphan.launched_by
    assert set(await _orphans(db, series="a:*")) == {"a:1", "a:2"}
    assert set(await _orphans(db, job_id="a:2")) == {"a:2"}

    async with Launcher(db.conninfo) as launcher:
        for job_id in said:
            assert await within(launcher.cancel(job_id)) == "cancelled"
        assert await within(launcher.ledger.orphans()) == [], "what ended is nothing any more"
    assert db.effects() == 0


async def test_what_committed_while_nobody_was_there(db: Watched) -> None:
    """Nobody has written its outcome down; the receipt tells."""
    async with launching_process(db.conninfo) as child:
        child.run({"sql": slow("j", 1), "id": "j"}, when_orphaned="cancel")
        await eventually(lambda: db.states() == {"j": "running"}, "it is at work")
        child.signal(signal.SIGKILL)
        await eventually(lambda: db.states() == {"j": "committed"}, "it is committed")
    assert await _orphans(db) == {}


@pytest.mark.parametrize("kind", ["receipt", "supervised"])
async def test_every_kind_that_is_registered(db: Watched, kind: str) -> None:
    async with launching_process(db.conninfo) as child:
        child.run({"sql": "select pg_sleep(60)", "id": "j", "kind": kind}, when_orphaned="cancel")
        await eventually(lambda: db.states() == {"j": "running"}, "it is at work")
        child.signal(signal.SIGKILL)
        await eventually(lambda: db.sql("select job_id from pgbg.orphans(null)"), "it is an orphan")
    async with Launcher(db.conninfo) as launcher:
        assert await within(launcher.cancel("j")) == "cancelled"
    assert await _orphans(db) == {}


async def test_the_newest_launch_counts(db: Watched) -> None:
    """One that failed is launched again by somebody who says nothing."""
    async with Launcher(db.conninfo) as launcher:
        failing = launcher.run(Job("select 1/0", id="j"), when_orphaned="cancel")
        assert isinstance(await within(ended(failing)), errors.WorkerError)
        assert db.value("select when_orphaned from pgbg.job") == "cancel"
        await within(launcher.run(Job(effect("j"), id="j"), accept_changed_sql=True))
    assert db.value("select when_orphaned from pgbg.job") is None


async def test_only_what_the_login_may_see(db: Watched, enemy: psycopg.Connection) -> None:
    async with launching_process(db.conninfo) as child:
        child.run({"sql": slow("j", 60), "id": "j"}, when_orphaned="cancel")
        await eventually(lambda: db.states() == {"j": "running"}, "it is at work")
        child.signal(signal.SIGKILL)
        await eventually(lambda: db.sql("select job_id from pgbg.orphans(null)"), "it is an orphan")
    assert enemy.execute("select * from pgbg.orphans(null)").fetchall() == []
    async with Launcher(db.conninfo) as launcher:
        await within(launcher.cancel("j"))


async def test_what_cannot_be_said(db: Watched) -> None:
    async with Launcher(db.conninfo) as launcher:
        with pytest.raises(errors.InvalidJob, match="when_orphaned"):
            await launcher.run(Job("select 1"), when_orphaned="forget")  # type: ignore[arg-type]


# The upgrade that brought this ---------------------------------------------------------------------------------------


def _shape(database: Database) -> list[list[tuple[object, ...]]]:
    """What a schema is made of: its tables' columns and its functions, and who may use them."""
    queries = (
        """select attrelid::regclass::text, attname, format_type(atttypid, atttypmod), attnotnull
           from pg_attribute a join pg_class c on c.oid = a.attrelid
           where c.relnamespace = 'pgbg'::regnamespace and attnum > 0 order by 1, 2""",
        """select c.oid::regclass::text, c.relkind, c.relacl::text, obj_description(c.oid, 'pg_class')
           from pg_class c where c.relnamespace = 'pgbg'::regnamespace order by 1""",
        """select conrelid::regclass::text, conname, pg_get_constraintdef(oid)
           from pg_constraint where connamespace = 'pgbg'::regnamespace order by 1, 2""",
        """select oid::regprocedure::text, proacl::text, md5(pg_get_functiondef(oid))
           from pg_proc where pronamespace = 'pgbg'::regnamespace order by 1""",
        "select version from pgbg.meta order by 1",
        "select checksum from pgbg.meta order by version desc limit 1",
    )
    with database.connect() as conn:
        return [conn.execute(query.encode()).fetchall() for query in queries]


@pytest.mark.parametrize("version", range(1, earlier_schemas.NEWEST + 1))
def test_an_upgraded_schema_is_a_new_one(extension_database: Database, database: Database, version: int) -> None:
    earlier_schemas.install(extension_database.conninfo, version)
    script = install.install(extension_database.conninfo)
    assert (script.from_version, script.to_version) == (version, install.VERSION)
    assert install.install(extension_database.conninfo).text == ""
    for upgraded, new in zip(_shape(extension_database), _shape(database), strict=True):
        assert upgraded == new


class _Before:
    """What processes of earlier versions do otherwise."""

    def registering_of_1(self, key: Any, quote: Any, **named: Any) -> str:
        given = (
            key.owner, key.job_id, key.series, named["generation"], named["label"], str(named["kind"]),
            named["sql_digest"], named["accept_changed_sql"], "host/1", True,
        )  # fmt: skip
        return f"pgbg.register({', '.join(map(quote, given))})"

    def arguments(self: Work) -> tuple[str, str, str]:  # type: ignore[misc]
        """Those of a worker up to version 5."""
        key = json.dumps([self.key.owner, self.key.job_id, self.key.series])
        return f"{key[:-1]}, ", f", {json.dumps(self.label)}, ", f', "{self.sql_digest.hex()}"]'


@pytest.mark.parametrize("version", [1, 5, earlier_schemas.NEWEST])
async def test_a_process_of_before_goes_on(
    extension_database: Database, monkeypatch: pytest.MonkeyPatch, version: int
) -> None:
    """It has a job at work while the schema is upgraded, and launches another afterwards."""
    of_before = extension_database
    earlier_schemas.install(of_before.conninfo, version)
    with of_before.connect() as admin:
        admin.execute("create table done (what text)")
    sql = "insert into done values ('{}')"
    upgrade = "import sys; from pgbg_orchestration.ledger import install; install.install(sys.argv[1])"

    with monkeypatch.context() as before:
        before.setattr(install, "VERSION", version)
        before.setattr(Work, "arguments", _Before.arguments)
        if version == 1:
            before.setattr(Ledger, "registering", _Before.registering_of_1)
        async with Launcher(of_before.conninfo) as launcher:
            with of_before.connect() as holder, holder.transaction():
                holder.execute("lock table done in share mode")
                running = asyncio.create_task(launcher.run(Job(sql.format("first"), id="first")))
                await eventually(of_before.workers, "it is at work")
                process = await asyncio.create_subprocess_exec(sys.executable, "-c", upgrade, of_before.conninfo)
                assert await within(process.wait()) == 0
                assert not running.done()
            assert (await within(running)).proof == "receipt"
            assert (await within(launcher.run(Job(sql.format("second"), id="second")))).launched
    async with Launcher(of_before.conninfo) as launcher:
        third = await within(launcher.run(Job(sql.format("third"), id="third"), when_orphaned="leave"))
        assert third.launched
        assert not (await within(launcher.run(Job(sql.format("first"), id="first")))).launched

    with of_before.connect() as admin:
        assert admin.execute("select count(*) from done").fetchone() == (3,)
        assert admin.execute("select job_id, when_orphaned from pgbg.job order by 1").fetchall() == [
            ("first", None),
            ("second", None),
            ("third", "leave"),
        ]
