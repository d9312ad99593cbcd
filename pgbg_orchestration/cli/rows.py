"""A result's rows on the terminal, in a file or a pipe; ``pgbg result`` reads those that a job kept."""

from __future__ import annotations

import asyncio
import csv
import json
import math
from collections.abc import Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import IO, Annotated, Any

import typer
from rich.cells import cell_len

from pgbg_orchestration.rows import NoRows, Rows

from .codes import ExitCode
from .jobs import ready_launcher
from .options import Dsn, Json, Owner, Schema
from .screen import Stop, plain, print_json, reporting

# int2, int4, int8, oid, float4, float8, money, numeric: what psql aligns to the right.
_NUMBERS = frozenset({21, 23, 20, 26, 700, 701, 790, 1700})


class Format(StrEnum):
    """How rows are written."""

    TABLE = "table"
    CSV = "csv"
    JSON = "json"
    NDJSON = "ndjson"


FormatOption = Annotated[
    Format | None, typer.Option("--format", help="How the rows are written.", show_default="table", metavar="FORMAT")
]
OutputOption = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the rows into a file.", dir_okay=False)
]


def result(
    job_id: Annotated[str, typer.Argument(metavar="ID", show_default=False, help="The job's id.")],
    form: FormatOption = None,
    output: OutputOption = None,
    dsn: Dsn = None,
    schema: Schema = "pgbg",
    owner: Owner = None,
    json: Json = False,
) -> None:
    """Read the rows that a committed job kept, as often as you like, until they are pruned; the SQL does not run again.

    A job keeps rows when it is asked to: pgbg run --rows, or fetch= in Python.
    """
    with reporting(json):
        try:
            found = asyncio.run(_read(dsn or "", schema, job_id, owner))
        except NoRows as error:
            raise Stop(ExitCode.NO_SUCH_JOB, str(error)) from error
        if json:
            print_json(told(found))
        else:
            write(found, form or Format.TABLE, output)


async def _read(dsn: str, schema: str, job_id: str, owner: str | None) -> tuple[Rows, ...]:
    async with ready_launcher(dsn, schema) as launcher:
        return await launcher.rows(job_id, owner=owner)


def write(results: Sequence[Rows], form: Format, output: Path | None) -> None:
    """Write rows to a file, or to standard output.

    Raises
    ------
    Stop
        The file cannot be written.
    """
    lines = (line for rows in results for line in _LINES[form](rows))
    if output is None:
        for line in lines:
            typer.echo(line)
        return
    try:
        with output.open("w", encoding="utf-8", newline="") as stream:
            stream.writelines(f"{line}\n" for line in lines)
    except OSError as error:
        raise Stop(ExitCode.REFUSED, f"{output} cannot be written: {error.strerror}") from error


def told(results: Sequence[Rows]) -> list[dict[str, Any]]:
    """Return rows as plain data: of each statement its columns and rows."""
    return [
        {
            "statement": rows.statement,
            "columns": [{"name": column.name, "type": column.type} for column in rows.columns],
            "rows": [[*map(_value, row, cells)] for row, cells in zip(rows.rows, rows.cells, strict=True)],
        }
        for rows in results
    ]


def _table(rows: Rows) -> Iterator[str]:
    """Yield the lines of psql's aligned format; what could steer a terminal is masked."""
    cells = [["" if cell is None else plain(cell) for cell in row] for row in rows.cells]
    names = [plain(column.name) for column in rows.columns]
    widths = [max(map(cell_len, [name, *(row[at] for row in cells)])) for at, name in enumerate(names)]
    if names:
        yield "|".join(f" {_centred(name, width)} " for name, width in zip(names, widths, strict=True))
        yield "+".join("-" * (width + 2) for width in widths)
    for row in cells:
        padded = [
            " " * (width - cell_len(cell)) + cell
            if column.type_oid in _NUMBERS
            else cell + " " * (width - cell_len(cell))
            for cell, width, column in zip(row, widths, rows.columns, strict=True)
        ]
        yield "|".join(f" {cell} " for cell in padded).rstrip() if names else ""
    yield f"({len(cells)} row{'' if len(cells) == 1 else 's'})"
    yield ""


def _centred(text: str, width: int) -> str:
    space = width - cell_len(text)
    return " " * (space // 2) + text + " " * (space - space // 2)


class _Line:
    """A file for the csv module that keeps the line last written."""

    text = ""

    def write(self, text: str) -> int:
        self.text = text
        return len(text)


def _csv(rows: Rows) -> Iterator[str]:
    line = _Line()
    writer = csv.writer(_as_file(line), lineterminator="")
    for row in [[column.name for column in rows.columns], *rows.cells]:
        writer.writerow(["" if cell is None else cell for cell in row])
        yield line.text


def _as_file(line: _Line) -> IO[str]:
    return line  # type: ignore[return-value]  # all that the csv module calls is write


def _ndjson(rows: Rows) -> Iterator[str]:
    names = _unique([column.name for column in rows.columns])
    for row, cells in zip(rows.rows, rows.cells, strict=True):
        values = map(_value, row, cells)
        yield json.dumps(dict(zip(names, values, strict=True)), ensure_ascii=False)


def _json(rows: Rows) -> Iterator[str]:
    yield "[" + ",\n ".join(_ndjson(rows)) + "]"


def _unique(names: Sequence[str]) -> list[str]:
    """Return the names, with a number behind those that come again: an object has each key once."""
    found: list[str] = []
    for name in names:
        number, chosen = 1, name
        while chosen in found:
            number += 1
            chosen = f"{name}_{number}"
        found.append(chosen)
    return found


def _value(value: Any, cell: str | None) -> Any:
    """Return what JSON has for a value, and for all others the server's text: no digit is lost."""
    if value is None or isinstance(value, bool | int | str | dict | list):
        return value if not isinstance(value, list | dict) or _is_json(value) else cell
    return value if isinstance(value, float) and math.isfinite(value) else cell


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True


_LINES = {Format.TABLE: _table, Format.CSV: _csv, Format.JSON: _json, Format.NDJSON: _ndjson}
