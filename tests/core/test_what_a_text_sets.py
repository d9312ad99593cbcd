"""``SET`` in a job's text, and both timeouts at once, on the server: what is promised is what happens."""

from __future__ import annotations

import pytest

from pgbg_orchestration import Job, arun, errors
from tests.core.kit import Watched, within

pytestmark = pytest.mark.any_surface

SLOW = "select pg_catalog.pg_sleep(60)"


@pytest.mark.parametrize("kind", ["receipt", "supervised", "session"])
@pytest.mark.parametrize("timeout", [None, 50], ids=["alone", "beside a job's timeout"])
async def test_a_statement_timeout_holds(db: Watched, kind: str, timeout: float | None) -> None:
    job = Job(SLOW, id="slow", kind=kind, settings={"statement_timeout": "200ms"}, timeout=timeout)
    with pytest.raises(errors.WorkerError) as caught:
        await within(arun(db.conninfo, job))
    assert caught.value.sqlstate == "57014"
    assert "its statement_timeout is 0.2 s" in (caught.value.todo or "")


async def test_a_logins_own_statement_timeout_holds_beside_a_jobs(db: Watched) -> None:
    db.sql(f"alter role pgbg_app in database {db.database.name} set statement_timeout = '200ms'")
    with pytest.raises(errors.WorkerError) as caught:
        await within(arun(db.conninfo, Job(SLOW, id="slow", timeout=50)))
    assert caught.value.sqlstate == "57014"
    assert "its statement_timeout is 0.2 s" in (caught.value.todo or "")


@pytest.mark.parametrize("how", ["set", "set local"])
async def test_a_timeout_in_the_text_of_one_statement_bounds_it(db: Watched, how: str) -> None:
    with pytest.raises(errors.WorkerError) as caught:
        await within(arun(db.conninfo, Job(f"{how} statement_timeout = '200ms'; {SLOW}", id="slow")))
    assert caught.value.sqlstate == "57014"


async def test_a_text_lifts_the_logins_timeout(db: Watched) -> None:
    db.sql(f"alter role pgbg_app in database {db.database.name} set statement_timeout = '300ms'")
    sql = "set statement_timeout = 0; select pg_sleep(0.4); insert into effects values ('lifted')"
    await within(arun(db.conninfo, Job(sql, id="lifted")))
    assert db.effects("lifted") == 1


async def test_a_timeout_that_is_bound_later_is_refused_then(db: Watched) -> None:
    job = Job("set statement_timeout = %s; select 1; select 2", parameters=["3s"])
    with pytest.raises(errors.InvalidJob, match="bounds the whole job"):
        await within(arun(db.conninfo, job))
    await within(arun(db.conninfo, Job("set statement_timeout = %s; select 1; select 2", parameters=["0"])))


async def test_byte_order_marks_and_items_of_no_statement(db: Watched) -> None:
    bom = "\ufeff"
    sql = [
        f"{bom}insert into effects values (%s, 1)",
        "",
        "-- later",
        " ; ",
        f"-- appended\n{bom}insert into effects values (%s, 2)",
    ]
    await within(arun(db.conninfo, Job(sql, id="list", parameters=["marked"])))
    await within(arun(db.conninfo, Job(f"{bom}update effects set n = n + 1;\n{bom}-- end\n", id="text")))
    assert db.sql("select n from effects where job = 'marked' order by n") == [(2,), (3,)]
