"""SQL files are read in one way by every surface: UTF-8 whatever the locale, and no byte-order mark."""

from __future__ import annotations

import codecs
from pathlib import Path

import pytest

from pgbg_orchestration import Job
from pgbg_orchestration.errors import InvalidJob
from pgbg_orchestration.statements import files, split

SQL = "select 'é'"


@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
def test_a_file(tmp_path: Path, mark: bytes) -> None:
    path = tmp_path / "job.sql"
    path.write_bytes(mark + SQL.encode())
    assert files.read(path) == SQL


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (SQL.encode("latin-1"), "not UTF-8: byte 8"),
        (codecs.BOM_UTF16_LE + SQL.encode("utf-16-le"), "UTF-16"),
        (codecs.BOM_UTF16_BE + SQL.encode("utf-16-be"), "UTF-16"),
        (codecs.BOM_UTF32_LE + SQL.encode("utf-32-le"), "UTF-32"),
    ],
)
def test_another_encoding_is_named(tmp_path: Path, data: bytes, told: str) -> None:
    path = tmp_path / "job.sql"
    path.write_bytes(data)
    with pytest.raises(files.UnreadableSql, match=told) as caught:
        files.read(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "text", ["\ufeffselect 1", "\ufeff\n select 1", "-- a\n\ufeffselect 1", "\ufeff;\ufeff select 1;\ufeff"]
)
def test_marks_are_blanks_before_a_statement(text: str) -> None:
    (statement,) = split(text)
    assert statement.keywords == ("SELECT",)
    assert "\ufeff" not in statement.text


def test_a_mark_inside_of_a_statement_stays() -> None:
    (statement,) = split("select '\ufeff', \"\ufeff\"")
    assert statement.text.count("\ufeff") == 2


def test_the_same_job_with_and_without_a_mark() -> None:
    marked, plain = (Job(mark + "select 1", id="j", verify_sql=mark + "select true") for mark in ("\ufeff", ""))
    assert [s.text for s in marked.split()] == [s.text for s in plain.split()]
    assert marked.verify_sql == plain.verify_sql


@pytest.mark.parametrize("nothing", ["", "  \n", ";", "-- later", "/* ; */", "\ufeff", "\ufeff-- x\n;"])
def test_what_holds_no_statement_is_left_out_of_a_list_as_of_a_text(nothing: str) -> None:
    assert Job([nothing, "select 1", nothing]).sql == ("select 1",)
    assert len(Job(f"{nothing}\n;select 1;\n{nothing}").split()) == 1
    for sql in (nothing, [nothing], [nothing, nothing]):
        with pytest.raises(InvalidJob, match="holds no statement"):
            Job(sql)
    with pytest.raises(InvalidJob, match="holds no statement"):
        Job([])


def test_an_item_that_is_no_text_is_named() -> None:
    with pytest.raises(InvalidJob, match="sql statement 2 must be text, not NoneType"):
        Job(["select 1", None])  # type: ignore[list-item]
