"""A server is taken from PostgreSQL 18 to 19 by pg_upgrade, with the package's schema and its history in it."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest

from pgbg_orchestration import Job, arun, errors
from pgbg_orchestration.ledger.install import install
from tests.core.kit import only_long, within
from tests.servers.experimental import Eighteen, RealNineteen
from tests.servers.kinds import KINDS
from tests.servers.real import RealServer

pytestmark = [pytest.mark.servers("standin_pg19", "real19"), only_long]


@pytest.fixture
def clusters(server_kind: str, server: object) -> Iterator[tuple[RealServer, RealServer]]:
    """One of 18 that runs and one of 19, in one tree; `server` skips the test where there is no such tree."""
    new = KINDS[server_kind].make()
    assert isinstance(new, RealServer)
    old = Eighteen(standin=not isinstance(new, RealNineteen), tree=new.tree)
    try:
        yield old.start(), new
    finally:
        old.remove()
        new.remove()


async def test_history_and_new_jobs(clusters: tuple[RealServer, RealServer]) -> None:
    old, new = clusters
    old.create_extension("postgres")
    install(old.conninfo(), owner="pgbg_owner")
    with old.connect() as session:
        session.execute("create table effects (what text)")
    work = {
        kind: Job(f"insert into effects values ('{kind}')", id=f"done {kind}", kind=kind)
        for kind in ("receipt", "supervised")
    }
    wrong = {kind: Job("select 1/0", id=f"wrong {kind}", kind=kind) for kind in work}
    before = {kind: await within(arun(old.conninfo(), job)) for kind, job in work.items()}
    for job in wrong.values():
        with pytest.raises(errors.WorkerError):
            await within(arun(old.conninfo(), job))
    rows = history(old.conninfo())

    new.take_over(old)

    assert history(new.conninfo()) == rows
    for kind, job in work.items():
        after = await within(arun(new.conninfo(), job))
        assert (after.launched, after.row_count, after.command_tag) == (False, 1, before[kind].command_tag)
    # What failed may be tried again; what is new runs.
    for kind, job in wrong.items():
        with pytest.raises(errors.WorkerError) as caught:
            await within(arun(new.conninfo(), job))
        assert caught.value.sqlstate == "22012", kind
    for kind in ("receipt", "supervised", "session"):
        fresh = Job(f"insert into effects values ('new {kind}')", id=f"new {kind}", kind=kind)
        assert (await within(arun(new.conninfo(), fresh))).launched
    with new.connect() as session:
        seen = session.execute("select what from effects order by what").fetchall()
    assert [what for (what,) in seen] == ["new receipt", "new session", "new supervised", "receipt", "supervised"]


def history(conninfo: str) -> list[tuple[object, ...]]:
    """All that the schema tells of jobs."""
    with psycopg.connect(conninfo) as session:
        return session.execute("select * from pgbg.jobs order by job_id, attempt").fetchall()
