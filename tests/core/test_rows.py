"""Rows are as durable as the commit: there exactly when the receipt is, and back as psycopg gives them."""

from __future__ import annotations

import asyncio
import copy
import pickle
from typing import Any

import psycopg
import pytest
from psycopg import sql
from psycopg.abc import Buffer
from psycopg.adapt import Loader
from psycopg.pq import Format

from pgbg_orchestration import Column, Fetch, Job, Launcher, NoRows, Outcome, Rows, arun, errors
from tests.core.kit import APP, Watched, launching_process, within

pytestmark = pytest.mark.any_surface

TYPES = {
    "bool": "true::bool",
    "numeric": "12345678901234567890.123456789012345678901234567890::numeric",
    "numeric(10,2)": "1.50::numeric(10,2)",
    "nan": "'NaN'::numeric",
    "int2": "(-32768)::int2",
    "int8": "9223372036854775807::int8",
    "float4": "1.1::float4",
    "float8": "0.1::float8 + 0.2::float8",
    "infinite": "'-infinity'::float8",
    "text": "e'a\\n\\\\ \"q\" ''s'' {x,y} – ü 🐘'",
    "empty": "''",
    "null": "null::int",
    "char(n)": "'ab'::char(5)",
    '"char"': "'x'::\"char\"",
    "varchar": "'ab'::varchar(7)",
    "name": "'pg'::name",
    "bytea": "'\\x00ff5c'::bytea",
    "date": "date '0044-03-15'",
    "time": "time '23:59:59.123456'",
    "timetz": "timetz '12:00:00.5+05:30'",
    "timestamp": "timestamp '2013-01-01 04:00:00.000001'",
    "timestamptz": "timestamptz '1890-01-01 00:00:00 Europe/Berlin'",
    "interval": "interval '1 year 2 mons -3 days 04:05:06.789'",
    "uuid": "'a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11'::uuid",
    "json": "'{\"a\": [1, 2.50, null]}'::json",
    "jsonb": '\'{"b": 1, "a": "x"}\'::jsonb',
    "inet": "inet '192.168.0.1/24'",
    "host": "inet '192.168.0.1'",
    "cidr": "cidr '10.0.0.0/8'",
    "int[]": "array[1, null, 3]",
    "text[]": "array['a,b', '{c}', null, 'NULL', e'\\\\', '']",
    "int[][]": "array[[1, 2], [3, 4]]",
    "empty array": "'{}'::int[]",
    "timestamptz[]": "array[timestamptz '2013-01-01 04:00:00+00']",
    "int4range": "int4range(1, 5)",
    "numrange": "numrange(1.5, null, '(]')",
    "tstzrange": "tstzrange('2013-01-01 00:00+00', null, '[)')",
    "datemultirange": "'{[2013-01-01,2013-02-01)}'::datemultirange",
    "money": "12.5::money",
    "point": "point(1, 2)",
    "tsvector": "'a b'::tsvector",
    "bit": "b'101'::bit(3)",
    "void": "pg_sleep(0)",
    "record": "row(1, 'a', null)",
    "oid": "1::oid",
    "regclass": "'pg_class'::regclass",
    "enum": "'sad'::mood",
    "domain": "5::positive",
    "domain array": "array[5]::positive[]",
    "composite": "row(1, 'x y')::pair",
    "composite of nulls": "row(null, null)::pair",
}


@pytest.fixture
def made(db: Watched) -> Watched:
    db.sql("create type mood as enum ('sad', 'ok')")
    db.sql("create domain positive as int check (value > 0)")
    db.sql("create type pair as (a int, b text)")
    return db


def direct(db: Watched, query: str) -> tuple[list[tuple[str, int]], list[tuple[Any, ...]]]:
    """What psycopg gives for a query."""
    with psycopg.connect(db.conninfo) as conn:
        cursor = conn.execute(query.encode())
        return [(c.name, c.type_code) for c in cursor.description or ()], cursor.fetchall()


async def fetched(db: Watched, query: str, **options: Any) -> Outcome:
    return await within(arun(db.conninfo, Job(query, id="j", fetch=True, **options)))


async def test_every_type_comes_back_as_psycopg_gives_it(made: Watched) -> None:
    query = "select " + ", ".join(f'{value} as "{name.replace(chr(34), chr(34) * 2)}"' for name, value in TYPES.items())
    columns, rows = direct(made, query)

    outcome = await fetched(made, query)

    assert [(c.name, c.type_oid) for c in outcome.columns] == columns
    for name, got, wanted in zip(TYPES, outcome.rows[0], rows[0], strict=True):
        assert (type(got), repr(got) if wanted != wanted else got) == (
            type(wanted), repr(wanted) if wanted != wanted else wanted,
        ), name  # fmt: skip
    assert (outcome.row_count, outcome.command_tag) == (1, "SELECT")
    assert outcome.last.columns[2].type == "numeric(10,2)"
    assert next(c.type for c in outcome.columns if c.name == "domain") == "public.positive"


@pytest.mark.parametrize(
    "settings", [{"datestyle": "German, DMY"}, {"bytea_output": "escape"}, {"intervalstyle": "sql_standard"}],
    ids=str,
)  # fmt: skip
async def test_whatever_the_job_sets_its_rows_can_be_read(db: Watched, settings: dict[str, str]) -> None:
    query = (
        r"select date '2013-02-01', '\x00ff'::bytea, make_interval(days => -1, hours => 2),"
        " timestamptz '2013-02-01 00:00+00'"
    )

    assert (await fetched(db, query, settings=settings)).rows == direct(db, query)[1]


@pytest.mark.parametrize(
    "query",
    [
        "select 1, 2, 1 as a, 2 as a",
        "select",
        "select from generate_series(1, 3)",
        "select n from generate_series(1, 3) as n where false",
        "(select 1) union all (select 2) order by 1 desc -- the end",
        "values (1, 'a'), (2, null)",
        "table numbers",
        "with w as (select n from numbers) select n * 2 as d from w order by n",
        "select n from numbers order by n desc limit 2 offset 1",
        "select n from numbers order by n for update",
        "select 'it''s' as \"a \"\"b\"\"\", 'x%s' as \"%\"",
        "show work_mem",
        "explain (costs off) select 1",
        "explain (costs off, format json) select 1",
    ],
)  # fmt: skip
async def test_every_query_gives_its_rows(db: Watched, query: str) -> None:
    db.sql("create table numbers as select generate_series(1, 5) as n")
    db.sql(f"grant all on numbers to {APP}")
    columns, rows = direct(db, query)

    outcome = await fetched(db, query)

    assert [(c.name, c.type_oid) for c in outcome.columns] == columns
    assert outcome.rows == rows
    assert len(outcome.last) == outcome.row_count == len(rows)
    assert outcome.command_tag == {"show": "SHOW", "expl": "EXPLAIN"}.get(query[:4], "SELECT")


@pytest.mark.parametrize(
    ("query", "tag", "rows"),
    [
        ("insert into numbers values (6), (7) returning n, n", "INSERT", [(6, 6), (7, 7)]),
        ("update numbers set n = n + 10 where n > 4 returning n as new", "UPDATE", [(15,)]),
        ("delete from numbers where n = 9 returning *", "DELETE", []),
        ("with w as (select 8 as n) insert into numbers select n from w returning n", "INSERT", [(8,)]),
        ("with w as (delete from numbers where n = 1 returning n) select n from w", "SELECT", [(1,)]),
        (
            "with w as (delete from numbers where n = 2 returning n) insert into numbers select 102 from w returning n",
            "INSERT",
            [(102,)],
        ),
    ],
)  # fmt: skip
async def test_every_change_gives_its_rows_its_tag_and_its_count(
    db: Watched, query: str, tag: str, rows: list[tuple[int, ...]]
) -> None:
    db.sql("create table numbers as select generate_series(1, 5) as n")
    db.sql(f"grant all on numbers to {APP}")

    outcome = await fetched(db, query)

    assert (outcome.command_tag, outcome.row_count, outcome.rows) == (tag, len(rows), rows)
    assert db.states() == {"j": "committed"}
    again = await fetched(db, query)
    assert (again.launched, again.command_tag, again.row_count, again.rows) == (False, tag, len(rows), rows)


async def test_rows_of_what_the_statements_before_it_made(db: Watched) -> None:
    outcome = await fetched(
        db, "create temp table t (a int, b text); insert into t values (1, 'x'); select b, a from t"
    )

    assert (outcome.as_dicts(), outcome.row_count) == ([{"b": "x", "a": 1}], 1)


@pytest.mark.parametrize(
    "query", ["create temp table made (n int)", "insert into effects values ('j', 1)", "select 1 into temp t"]
)
async def test_a_statement_that_gives_no_rows_keeps_none(db: Watched, query: str) -> None:
    outcome = await fetched(db, query)

    assert outcome.results == ()
    for ask in (lambda: outcome.rows, lambda: outcome.columns, outcome.as_dicts):
        with pytest.raises(NoRows):
            ask()
    async with Launcher(db.conninfo) as launcher:
        with pytest.raises(NoRows):
            await launcher.rows("j")
        with pytest.raises(NoRows):
            await launcher.rows("never run")


@pytest.mark.parametrize(
    ("call", "n"),
    [("call twice(4, null, null)", 8), ("/* first */ call twice(words => null, mood => null, n => 5)", 10)],
)
async def test_a_call_gives_the_row_of_its_output(db: Watched, call: str, n: int) -> None:
    db.sql("create type mood as enum ('glad', 'sad')")
    db.sql(
        "create procedure twice(inout n int, out mood mood, out words text[]) language plpgsql as"
        " $$ begin n := 2 * n; mood := 'glad'; words := array['a', 'b']; end $$"
    )
    # In which the type has another name.
    outcome = await fetched(db, f"set local search_path to pg_catalog; {call.replace('call ', 'call public.')}")

    assert [(c.name, c.type) for c in outcome.columns] == [("n", "integer"), ("mood", "mood"), ("words", "text[]")]
    assert outcome.rows == [(n, "glad", ["a", "b"])]
    assert (outcome.command_tag, outcome.row_count) == ("CALL", 1)


@pytest.mark.parametrize(
    ("query", "word"),
    [
        ("declare c cursor for select 1; fetch all from c", "FETCH"),
        ('prepare "p" (int) as select $1; execute P (1)', "EXECUTE"),
    ],
)
async def test_rows_that_nothing_can_take_from_a_statement_are_refused(db: Watched, query: str, word: str) -> None:
    with pytest.raises(errors.InvalidJob, match=f"statement 2 is {word}, whose rows cannot be kept"):
        await fetched(db, query)

    assert db.sql("select count(*) from pgbg.jobs") == [(0,)], "nothing was launched"


@pytest.mark.parametrize("query", ["prepare p (int) as {}; execute p (1)", "call nothing(1)"])
async def test_an_execute_and_a_call_that_give_no_rows_run(db: Watched, query: str) -> None:
    insert = "insert into effects values ('j', $1)"
    db.sql(f"create procedure nothing(n int) language sql as $$ {insert} $$")

    assert (await fetched(db, query.format(insert))).results == ()
    assert db.value("select count(*) from effects") == 1


@pytest.mark.parametrize(("given", "seen"), [({}, "32MB"), ({"temp_buffers": "64MB"}, "64MB")])
async def test_the_rows_have_room_in_memory(db: Watched, given: dict[str, str], seen: str) -> None:
    assert (await fetched(db, "show temp_buffers", settings=given)).rows == [(seen,)]


async def test_of_each_statement_on_request(db: Watched) -> None:
    fetch = Fetch(return_last=False)
    sql_ = ["select 1 as a", "create temp table t as select 2 as b", "table t", "insert into t values (3)"]
    outcome = await within(arun(db.conninfo, Job(sql_, id="j", fetch=fetch)))

    assert [(r.statement, r.columns[0].name, r.rows) for r in outcome.results] == [(1, "a", [(1,)]), (3, "b", [(2,)])]
    assert (outcome.command_tag, outcome.row_count) == ("INSERT", 1)


@pytest.mark.parametrize(
    ("fetch", "query", "seen"),
    [
        ({"max_rows": 10}, "select generate_series(1, 11)", "11 rows"),
        ({"max_rows": 10}, "insert into effects select 'j', generate_series(1, 20) returning n", "20 rows"),
        ({"max_bytes": 1000}, "select repeat('x', 600) from generate_series(1, 2)", "1200 bytes"),
        ({"max_rows": 1}, "select from generate_series(1, 2)", "2 rows"),
    ],
)  # fmt: skip
async def test_beyond_a_bound_the_job_fails_before_it_commits(
    db: Watched, fetch: dict[str, int], query: str, seen: str
) -> None:
    with pytest.raises(errors.WorkerError) as caught:
        await within(arun(db.conninfo, Job(f"insert into effects values ('j', 0); {query}", id="j", fetch=fetch)))

    assert caught.value.sqlstate == "PB005"
    (bound,) = fetch
    assert str(fetch[bound]) in (caught.value.fields.message or "")
    assert seen in (caught.value.fields.detail or "")
    assert bound in (caught.value.fields.hint or "")
    assert db.effects() == 0
    assert db.sql("select count(*) from pgbg.row_chunk") == [(0,)]


async def test_a_bound_is_met_exactly(db: Watched) -> None:
    fetch = Fetch(max_rows=10, max_bytes=100)
    outcome = await within(
        arun(db.conninfo, Job("select repeat('x', 10) from generate_series(1, 10)", id="j", fetch=fetch))
    )
    assert len(outcome.rows) == 10


async def test_many_rows_in_order(db: Watched) -> None:
    query = "select n, repeat('ü', 50) from generate_series(1, 25000) as n order by n desc"
    outcome = await within(arun(db.conninfo, Job(query, id="j", fetch={"max_rows": 25_000})))

    assert [n for n, _ in outcome.rows] == [*range(25_000, 0, -1)]


async def test_a_retry_and_another_process_read_the_same_rows(db: Watched) -> None:
    """The SQL is never run twice for them."""
    query = "insert into effects values ('j', 1) returning job, clock_timestamp()"
    first = await fetched(db, query)
    async with Launcher(db.conninfo) as launcher:
        again = await within(launcher.run(Job(query, id="j", fetch=True)))
        asked_later = await launcher.rows("j")

    assert (again.launched, again.rows, asked_later) == (False, first.rows, first.results)
    assert db.effects() == 1
    assert pickle.loads(pickle.dumps(first)) == copy.deepcopy(first) == first
    assert "results" not in first.to_dict()


@pytest.mark.parametrize("point", ["after_launch", "after_end", "before_record"])
async def test_the_rows_are_there_exactly_when_the_receipt_is(db: Watched, point: str) -> None:
    job = {"sql": "insert into effects values ('j', 1); select pg_sleep(0.2); select 42 as answer", "id": "j"}
    async with launching_process(db.conninfo, f"{point}:kill") as child:
        child.run({**job, "fetch": True})
        await child.killed()
    outcome = await within(arun(db.conninfo, Job(**job, fetch=True)))  # type: ignore[arg-type]

    assert (outcome.rows, outcome.row_count, outcome.command_tag) == ([(42,)], 1, "SELECT")
    assert db.effects() == 1
    assert db.sql("select count(*) from pgbg.receipt r join pgbg.row_set using (owner, job_digest)") == [(1,)]


async def test_a_job_that_fails_leaves_no_rows(db: Watched) -> None:
    with pytest.raises(errors.WorkerError, match="division by zero"):
        await within(arun(db.conninfo, Job("select 1; select 1/0", id="j", fetch=Fetch(return_last=False))))
    assert db.sql("select (select count(*) from pgbg.row_set), (select count(*) from pgbg.row_chunk)") == [(0, 0)]


async def test_rows_go_with_their_receipt(db: Watched) -> None:
    await fetched(db, "select 1")
    db.sql("delete from pgbg.receipt")
    assert db.sql("select (select count(*) from pgbg.row_set), (select count(*) from pgbg.row_chunk)") == [(0, 0)]


async def test_nobody_else_reads_or_forges_them(db: Watched) -> None:
    await fetched(db, "select 1")
    with psycopg.connect(db.conninfo, autocommit=True) as conn:
        for table in ("row_set", "row_chunk"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                conn.execute(sql.SQL("select from {}").format(sql.Identifier("pgbg", table)))
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            conn.execute("select pgbg.kept_rows('postgres', 'j')")
        for call in (
            "pgbg.keep_chunk(null, 'j', 9, 0, 1, array[['x']], 1, 1, 9, 9)", "pgbg.keep_set(null, 'j', 9, '[]', 'X')",
        ):  # fmt: skip
            with pytest.raises(psycopg.errors.InsufficientPrivilege, match="writes the receipt"):
                conn.execute(f"select {call}".encode())


async def test_as_the_jobs_role(db: Watched) -> None:
    db.sql("create role reporting nologin")
    try:
        db.sql(f"grant reporting to {APP}")
        db.sql("create table secret as select 7 as n")
        db.sql("grant select on secret to reporting")
        fetch = Fetch(return_last=False)
        job = Job(["select n from secret", "select current_user::text"], id="j", role="reporting", fetch=fetch)
        outcome = await within(arun(db.conninfo, job))
        assert [r.rows for r in outcome.results] == [[(7,)], [("reporting",)]]
    finally:
        db.sql("drop owned by reporting")
        db.sql("drop role reporting")


async def test_without_temporary_it_is_refused_before_anything_is_launched(db: Watched) -> None:
    database = db.sql("select quote_ident(current_database())")[0][0]
    db.sql(f"revoke temporary on database {database} from public")
    with pytest.raises(errors.NoPrivilege, match="temporary table") as caught:
        await fetched(db, "insert into effects values ('j', 1) returning n")
    assert "GRANT TEMPORARY ON DATABASE" in (caught.value.todo or "")
    assert db.effects() == 0
    assert (await fetched(db, "insert into effects values ('j', 1)")).results == ()


@pytest.mark.parametrize("fetch", [{"max_rows": 0}, {"rows": 1}, {"max_bytes": 1.5}, {"max_rows": True}, "yes", 7])
def test_what_fetch_cannot_be_is_refused(fetch: Any) -> None:
    with pytest.raises(errors.InvalidJob):
        Job("select 1", fetch=fetch)


@pytest.mark.parametrize("kind", ["session", "supervised"])
def test_other_kinds_keep_no_rows(kind: str) -> None:
    with pytest.raises(errors.InvalidJob, match="keeps no rows"):
        Job("select 1", kind=kind, fetch=True)


def test_the_json_form_of_fetch_is_fetch() -> None:
    assert Job("select 1", fetch=Fetch(max_rows=5).to_dict()).fetch == Fetch(max_rows=5)
    assert Job("select 1", fetch=True).fetch == Fetch()
    assert Job("select 1", fetch=False).fetch is None


def test_two_columns_of_a_name_are_no_dict() -> None:
    column = Column("a", 23, -1, "integer")
    rows = Rows((column, column), (("1", "2"),), 1, "SELECT", 1)
    assert rows.rows == [(1, 2)]
    with pytest.raises(ValueError, match="'a'"):
        rows.as_dicts()


async def test_cells_are_a_sequence_of_rows(db: Watched) -> None:
    await fetched(db, "select n, nullif(n, 2) from generate_series(1, 3) as n")
    async with Launcher(db.conninfo) as launcher:
        (rows,) = await launcher.rows("j")
    wanted = (("1", "1"), ("2", None), ("3", "3"))
    assert (tuple(rows.cells), len(rows), rows.cells[-1], rows.cells[1]) == (wanted, 3, ("3", "3"), ("2", None))
    assert rows.cells == wanted
    assert rows.cells[1:] == wanted[1:]
    assert hash(rows.cells) == hash(wanted)
    assert pickle.loads(pickle.dumps(rows)) == rows
    with pytest.raises(IndexError):
        rows.cells[len(rows)]


def test_a_loader_of_ones_own_is_used() -> None:
    class Doubled(Loader):
        def load(self, data: Buffer) -> str:
            return 2 * bytes(data).decode()

    before = psycopg.adapters.get_loader(23, Format.TEXT)
    assert before is not None
    psycopg.adapters.register_loader("int4", Doubled)
    try:
        assert Rows((Column("a", 23, -1, "integer"),), (("1",), (None,)), 2, "SELECT", 1).rows == [("11",), (None,)]
    finally:
        psycopg.adapters.register_loader("int4", before)


async def test_many_jobs_at_once_keep_their_own(db: Watched) -> None:
    async with Launcher(db.conninfo) as launcher:
        jobs = [Job(f"select {n} from generate_series(1, {n})", id=f"j{n}", fetch=True) for n in range(1, 9)]
        outcomes = await within(asyncio.gather(*(launcher.run(job) for job in jobs)))
    assert [outcome.rows for outcome in outcomes] == [[(n,)] * n for n in range(1, 9)]
