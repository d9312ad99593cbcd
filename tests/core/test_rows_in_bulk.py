"""Many rows of every built-in type, kept and streamed, against psycopg's own answer, value by value."""

from __future__ import annotations

import psycopg
import pytest

from pgbg_orchestration import Fetch, Job, Launcher, arun
from tests.core.kit import GENEROUS, Watched, count, within

pytestmark = pytest.mark.any_surface

VALUES = (
    "g % 2 = 0", "(g % 65536 - 32768)::int2", "g - 50000", "g * 92233720368547", "(g / 3.0)::float4", "g / 7.0::float8",
    "g / 7::numeric", "(g / 8.0)::numeric(20, 5)", "e'a\\t\\\\ \"q\" {x,y} ü 🐘 ' || g", "(g::text)::varchar(9)",
    "(g::text)::name", 'chr(33 + g % 90)::"char"', "decode(md5(g::text), 'hex')", "date '0044-03-15' + g * 20",
    "time '00:00:00.000001' + g * interval '7.5 s'", "timetz '12:00:00.5+05:30' + g * interval '1 s'",
    "timestamp '1700-01-01' + g * interval '1 day 1 us'",
    "timestamptz '1890-01-01 00:00+00' + g * interval '11 h 1 us'",
    "g * interval '1 mon -2 days 3.000001 s'", "md5(g::text)::uuid", "json_build_object('g', g)",
    "jsonb_build_array(g, g / 4.0, null)", "inet '10.0.0.0/8' + g", "set_masklen(inet '10.0.0.0' + g, 32)",
    "network(inet '10.0.0.0/8' + g)", "macaddr '08:00:2b:01:02:03'", "macaddr8 '08:00:2b:01:02:03:04:05'", "g::money",
    "g::bit(20)", "g::bit(20)::varbit", "point(g, g / 3.0)",
    "lseg(point(0, g), point(g, 0))", "box(point(0, g), point(g, 0))",
    "circle(point(g, 1), 2)", "path '((0,0),(1,1))'", "polygon '((0,0),(1,1),(2,0))'", "line '{1,2,3}'",
    "to_tsvector('simple', 'a b ' || g)", "plainto_tsquery('simple', 'a b')", "int4range(0, g)", "int8range(null, g)",
    "numrange(g, g + 0.5)", "tstzrange(timestamptz '2013-01-01 00:00+00', null)", "daterange(date '2013-01-01', null)",
    "int4multirange(int4range(0, g), int4range(g + 2, g + 5))", "array[g, null, -g]", "array['a,b', null, g::text, '']",
    "array[array[g, 1], array[2, g]]", "array[md5(g::text)::uuid]", "array[g / 7::numeric, null]", "array[to_jsonb(g)]",
    "g::oid", "pg_lsn '16/B374D848' + g", "(g::text)::xid8", "row(g, 'x y', null)",
)  # fmt: skip


def query(rows: int, values: tuple[str, ...] = VALUES) -> str:
    columns = ", ".join(
        f"case when (g + {number}) % 7 > 0 then {value} end as c{number}" for number, value in enumerate(values)
    )
    return f"select {columns} from generate_series(1, {rows}) as g"


def direct(db: Watched, text: str) -> list[tuple[object, ...]]:
    with psycopg.connect(db.conninfo) as conn:
        return conn.execute(text.encode()).fetchall()


def assert_same(got: list[tuple[object, ...]], wanted: list[tuple[object, ...]]) -> None:
    assert len(got) == len(wanted)
    if got == wanted:
        return
    for number, (row, other) in enumerate(zip(got, wanted, strict=True)):
        for value, a, b in zip(VALUES, row, other, strict=False):
            assert a == b, f"row {number}: {value}"


async def test_kept(db: Watched) -> None:
    text = query(count(5_000, 100_000))
    bounds = Fetch(max_rows=100_000, max_bytes=2**30)
    outcome = await within(arun(db.conninfo, Job(text, id="many", fetch=bounds)), 5 * GENEROUS)
    assert_same(outcome.rows, direct(db, text))


@pytest.mark.servers("real", "embedded")  # a stand-in's result knows no types with a modifier
async def test_streamed(db: Watched) -> None:
    text = query(count(5_000, 100_000), VALUES[:-1])  # a row of no named type cannot be read from a result
    async with Launcher(db.conninfo) as launcher:
        got = [row async for row in launcher.stream(Job(text, id="many"))]
    assert_same(got, direct(db, text))


@pytest.mark.since(postgres=17)
async def test_rows_of_a_merge(db: Watched) -> None:
    db.sql("insert into effects (job, n) values ('a', 1)")
    merge = """merge into effects as e using (values ('a'), ('b')) as v (job) on e.job = v.job
        when matched then update set n = 5 when not matched then insert (job, n) values (v.job, 7)
        returning merge_action(), e.job, e.n"""
    outcome = await within(arun(db.conninfo, Job(merge, id="merge", fetch=True)))
    assert sorted(outcome.rows) == [("INSERT", "b", 7), ("UPDATE", "a", 5)]
    assert (outcome.row_count, outcome.command_tag) == (2, "MERGE")
    assert sorted(await streamed(db, merge.replace("n = 5", "n = 6"))) == [("UPDATE", "a", 6), ("UPDATE", "b", 6)]


async def streamed(db: Watched, text: str) -> list[tuple[object, ...]]:
    async with Launcher(db.conninfo) as launcher:
        return [row async for row in launcher.stream(Job(text, id="streamed"))]
