"""Row count and command tag: the same for all kinds of job, however many rows there are, whatever they come from."""

from __future__ import annotations

import pytest

from pgbg_orchestration import Job, Kind, arun, errors
from tests.core.kit import APP, Recorder, Watched, count, within

pytestmark = pytest.mark.servers("real", "embedded")

ROWS = 3_000
PREPARED = f"""
create table things (n int);
insert into things select generate_series(1, 9);
create materialized view things_seen as select * from things;
grant all on all tables in schema public to {APP};
grant create on schema public to {APP};
alter materialized view things_seen owner to {APP};
"""
STATEMENTS = [
    ("select n from things", "SELECT", 9),
    (f"select repeat('x', 100) from generate_series(1, {ROWS})", "SELECT", ROWS),
    ("select from things", "SELECT", 9),
    ("select pg_sleep(0)", "SELECT", 1),
    ("(select 1) union all (select 2)", "SELECT", 2),
    ("values (1), (2)", "SELECT", 2),
    ("table things", "SELECT", 9),
    ("with t as (select 1) select * from t", "SELECT", 1),
    ("insert into things values (1), (2)", "INSERT", 2),
    ("insert into things values (1), (2) returning n", "INSERT", 2),
    ("update things set n = n", "UPDATE", 9),
    ("delete from things where n > 4 returning *", "DELETE", 5),
    ("refresh materialized view things_seen", "REFRESH MATERIALIZED VIEW", 9),
    ("create table made as select * from things", "CREATE TABLE AS", 9),
    ("select * into made from things", "SELECT", 9),
    ("create table made (n int)", "CREATE TABLE", 0),
    ("show work_mem", "SHOW", 0),
    ("explain select 1", "EXPLAIN", 0),
    ("do $$ begin null; end $$", "DO", 0),
]


@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize(("sql", "tag", "rows"), STATEMENTS, ids=[sql[:40] for sql, *_ in STATEMENTS])
async def test_the_same_for_every_kind(db: Watched, kind: Kind, sql: str, tag: str, rows: int) -> None:
    db.sql(PREPARED)
    outcome = await within(arun(db.conninfo, Job(sql, id="j", kind=kind)))
    assert (outcome.command_tag, outcome.row_count) == (tag, rows)
    if kind is not Kind.SESSION:
        assert db.sql("select command_tag, row_count from pgbg.job") == [(tag, rows)]


@pytest.mark.parametrize("option", ["supervisor", "notices"])
@pytest.mark.parametrize(("sql", "tag", "rows"), STATEMENTS, ids=[sql[:40] for sql, *_ in STATEMENTS])
async def test_the_same_where_its_result_is_read(db: Watched, option: str, sql: str, tag: str, rows: int) -> None:
    """A supervisor reads it for the end, and a call that wants notices for those."""
    db.sql(PREPARED)
    outcome = await within(
        arun(db.conninfo, Job(sql, id="j"), supervisor=option == "supervisor", notices=option == "notices")
    )
    # A client is told no count of a refresh, and the handle, which has it, goes with the result.
    known = None if option == "notices" and tag.startswith("REFRESH") else rows
    assert (outcome.command_tag, outcome.row_count) == (tag, known)
    assert db.sql("select command_tag, row_count from pgbg.job") == [(tag, known)]


@pytest.mark.parametrize("kind", [Kind.RECEIPT, Kind.SUPERVISED])
@pytest.mark.parametrize(
    ("sql", "tag", "rows"),
    [
        ("declare c cursor for table things; fetch 5 from c", "FETCH", 5),
        ("prepare p as table things; execute p", "SELECT", 9),
        ("create table made as table things; select from made", "SELECT", 9),
        ("create table made as table things; create table more as table made", "CREATE TABLE AS", 9),
        (
            "create table made as table things; create materialized view more as table made",
            "CREATE MATERIALIZED VIEW",
            9,
        ),
    ],
    ids=["fetch", "execute", "no columns", "a table of a table", "a view of a table"],
)
async def test_a_last_statement_that_cannot_be_described(
    db: Watched, kind: Kind, sql: str, tag: str, rows: int
) -> None:
    db.sql(PREPARED)
    outcome = await within(arun(db.conninfo, Job(sql, id="j", kind=kind)))
    assert (outcome.command_tag, outcome.row_count) == (tag, rows)


@pytest.mark.parametrize("kind", Kind)
async def test_rows_that_nobody_reads_do_not_block(db: Watched, kind: Kind) -> None:
    rows, seen = count(20_000, 1_000_000), Recorder()
    sql = f"select repeat('x', 100) from generate_series(1, {rows})"
    outcome = await within(arun(db.conninfo, Job(sql, id="j", kind=kind), observer=seen))
    assert (outcome.command_tag, outcome.row_count) == ("SELECT", rows)
    assert "output_blocked" not in seen.kinds()


@pytest.mark.parametrize("last", ["insert into effects values ('j'), ('j')", "select generate_series(1, 2)"])
async def test_a_retry_is_an_attempt_of_its_own(db: Watched, last: str) -> None:
    """Whatever a first message found to be known of the job: launched by this call, counted, and in the history."""
    job = Job(f"insert into effects select 'j' where 1 / (select count(*) from effects) > 0; {last}", id="j")
    with pytest.raises(errors.WorkerError):
        await within(arun(db.conninfo, job))
    db.sql("insert into effects values ('there')")
    outcome = await within(arun(db.conninfo, job))
    assert (outcome.attempt, outcome.launched) == (2, True)
    assert (outcome.row_count, outcome.command_tag) == (2, last.split(maxsplit=1)[0].upper())
    told = db.sql("select state, attempt, row_count, command_tag from pgbg.jobs")
    assert told == [("committed", 2, 2, last.split(maxsplit=1)[0].upper())]
