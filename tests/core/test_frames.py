"""Frames of a job's rows have right types, also where there are NULLs and no rows at all."""

from __future__ import annotations

from datetime import UTC, date, datetime
from decimal import Decimal

import pandas as pd
import polars as pl
import pyarrow as pa
import pytest

from pgbg_orchestration import Job, Outcome, arun
from tests.core.kit import Watched, within

pytestmark = pytest.mark.any_surface

QUERY = """
    select n::int2 as small, n as int, 9007199254740993 + n as big, n * 1.10::numeric(12, 2) as price,
        case n when 2 then null else n * 1e30::numeric / 3 end as exact, case n when 2 then null else n end as hole,
        n > 1 as yes, 'text ' || n as text, date '2013-01-01' + n as day,
        timestamp '2013-01-01 04:00' + n * interval '1 us' as local, timestamptz '2013-01-01 04:00+02' as moment,
        array[n, null] as list, jsonb_build_object('n', n) as doc, '\\x00ff'::bytea as bytes, n / 4.0::float8 as ratio,
        case n when 2 then null else gen_random_uuid() end as id, int4range(1, n) as range, null::int as nothing
    from generate_series(1, {}) as n
"""
CAST = "select q.*, q.price::numeric(12, 2) as cents from ({}) as q"


async def kept(db: Watched, rows: int) -> Outcome:
    return await within(arun(db.conninfo, Job(CAST.format(QUERY.format(rows)), id=f"rows-{rows}", fetch=True)))


async def test_arrow(db: Watched) -> None:
    outcome = await kept(db, 3)
    table = outcome.to_arrow()
    assert table.num_rows == 3
    kinds = {field.name: field.type for field in table.schema}
    assert kinds["small"] == pa.int16()
    assert kinds["int"] == kinds["hole"] == kinds["nothing"] == pa.int32()
    assert kinds["big"] == pa.int64()
    assert kinds["cents"] == pa.decimal128(12, 2)
    assert pa.types.is_decimal(kinds["exact"])
    assert kinds["yes"] == pa.bool_()
    assert kinds["day"] == pa.date32()
    assert kinds["local"] == pa.timestamp("us")
    assert kinds["moment"] == pa.timestamp("us", tz="UTC")
    assert kinds["bytes"] == pa.binary()
    assert kinds["list"] == pa.list_(pa.int32())
    assert kinds["id"] == kinds["range"] == kinds["doc"] == pa.string()
    assert table["hole"].to_pylist() == [1, None, 3]
    assert table["big"].to_pylist() == [9007199254740994, 9007199254740995, 9007199254740996]
    assert table["cents"].to_pylist() == [Decimal("1.10"), Decimal("2.20"), Decimal("3.30")]
    assert table["exact"].to_pylist() == [row["exact"] for row in outcome.as_dicts()]
    assert table["moment"].to_pylist() == [datetime(2013, 1, 1, 2, tzinfo=UTC)] * 3
    assert table["list"].to_pylist() == [[1, None], [2, None], [3, None]]
    assert table["range"].to_pylist()[2] == "[1,3)"
    assert table["doc"].to_pylist()[0] == '{"n": 1}'


async def test_an_array_of_several_dimensions_is_its_text(db: Watched) -> None:
    outcome = await within(arun(db.conninfo, Job("select array[[1, 2], [3, 4]] as m", id="m", fetch=True)))
    assert outcome.to_arrow()["m"].to_pylist() == ["{{1,2},{3,4}}"]


async def test_a_frame_without_rows_has_the_same_types(db: Watched) -> None:
    empty, three = (await kept(db, 0)).to_arrow(), (await kept(db, 3)).to_arrow()
    assert empty.num_rows == 0
    # How wide numbers without a scale are, their values tell.
    told = [name for name in three.schema.names if name not in ("exact", "price")]
    assert [empty.schema.field(name) for name in told] == [three.schema.field(name) for name in told]


async def test_polars(db: Watched) -> None:
    frame = (await kept(db, 3)).to_polars()
    assert frame.height == 3
    assert frame.schema["hole"] == pl.Int32
    assert frame.schema["cents"] == pl.Decimal(12, 2)
    assert frame.schema["moment"] == pl.Datetime("us", "UTC")
    assert frame.schema["list"] == pl.List(pl.Int32)
    assert frame["hole"].to_list() == [1, None, 3]
    assert frame["day"].to_list() == [date(2013, 1, 2), date(2013, 1, 3), date(2013, 1, 4)]


@pytest.mark.parametrize("rows", [0, 3])
async def test_pandas(db: Watched, rows: int) -> None:
    outcome = await kept(db, rows)
    frame = outcome.to_pandas()
    assert list(frame.columns) == [column.name for column in outcome.columns]
    assert len(frame) == rows
    kinds = frame.dtypes.astype(str).to_dict()
    assert (kinds["small"], kinds["int"], kinds["big"], kinds["hole"], kinds["yes"]) == (
        "Int16", "Int32", "Int64", "Int32", "boolean",
    )  # fmt: skip
    if rows:
        assert frame["hole"][1] is pd.NA
        assert frame["big"].tolist() == [9007199254740994, 9007199254740995, 9007199254740996]
        assert frame["cents"].tolist() == [Decimal("1.10"), Decimal("2.20"), Decimal("3.30")]
        assert frame["doc"].tolist() == [{"n": 1}, {"n": 2}, {"n": 3}]
        assert frame["moment"][0] == datetime(2013, 1, 1, 2, tzinfo=UTC)
