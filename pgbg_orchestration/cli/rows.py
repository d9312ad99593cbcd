"""A result's rows on the terminal, in a file or a pipe; ``pgbg result`` reads those that a job kept."""

from __future__ import annotations

import asyncio
import csv
import json
import math
from collections.abc import Callable, Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import IO, Annotated, Any, Protocol, TypeAlias

import typer
from psycopg import DataError, pq
from psycopg.adapt import Transformer
from rich.cells import cell_len

from pgbg_orchestration.rows import Column, NoRows, Rows

from .codes import ExitCode
from .jobs import ready_launcher
from .screen import Stop, ending, plain, print_json
from .shared_options import Dsn, Json, Owner, Schema

# int2, int4, int8, oid, float4, float8, money, numeric: what psql aligns to the right.
_NUMBERS = frozenset({21, 23, 20, 26, 700, 701, 790, 1700})


Cells: TypeAlias = Sequence[str | None]
"""A row as the server's texts."""


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
    with ending(json):
        try:
            found = asyncio.run(_read(dsn or "", schema, job_id, owner))
        except NoRows as error:
            raise Stop(ExitCode.NO_SUCH_JOB, str(error)) from error
        if json:
            print_json(as_json(found))
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
    lines = (line for rows in results for line in _lines(rows, form))
    if output is None:
        for line in lines:
            typer.echo(line)
        return
    try:
        with output.open("w", encoding="utf-8", newline="") as stream:
            stream.writelines(f"{line}\n" for line in lines)
    except OSError as error:
        raise Stop(ExitCode.REFUSED, f"{output} cannot be written: {error.strerror}") from error


def _lines(rows: Rows, form: Format) -> Iterator[str]:
    writer = WRITERS[form](rows.columns, rows.cells)
    yield from writer.head()
    yield from writer.rows(rows.cells)
    yield from writer.foot(len(rows.cells))


def as_json(results: Sequence[Rows]) -> list[dict[str, Any]]:
    """Return rows as plain data: of each statement its columns and rows."""
    return [
        {
            "statement": rows.statement,
            "columns": [{"name": column.name, "type": column.type} for column in rows.columns],
            "rows": _Values(rows.columns).of(rows.cells),
        }
        for rows in results
    ]


class Writer(Protocol):
    """Makes lines of rows, which may come a few at a time.

    Parameters
    ----------
    columns:
        Of the rows.
    sample:
        The first rows, or all of them: a table's columns are as wide as they are.
    """

    def __init__(self, columns: Sequence[Column], sample: Sequence[Cells]) -> None: ...

    def head(self) -> Iterator[str]:
        """Yield what stands before the rows."""

    def rows(self, cells: Sequence[Cells]) -> Iterator[str]:
        """Yield the lines of the next rows."""

    def foot(self, number: int) -> Iterator[str]:
        """Yield what stands behind that many rows."""


class _Table(Writer):
    """psql's aligned format; what could steer a terminal is masked. A value wider than the sample sticks out."""

    def __init__(self, columns: Sequence[Column], sample: Sequence[Cells]) -> None:
        self._columns = columns
        self._names = [plain(column.name) for column in columns]
        self._widths = [
            max(map(cell_len, [name, *(_shown(row[at]) for row in sample)])) for at, name in enumerate(self._names)
        ]

    def head(self) -> Iterator[str]:
        if self._names:
            yield "|".join(f" {_centred(name, width)} " for name, width in zip(self._names, self._widths, strict=True))
            yield "+".join("-" * (width + 2) for width in self._widths)

    def rows(self, cells: Sequence[Cells]) -> Iterator[str]:
        for row in cells:
            padded = [
                " " * (width - cell_len(cell)) + cell
                if column.type_oid in _NUMBERS
                else cell + " " * (width - cell_len(cell))
                for cell, width, column in zip(map(_shown, row), self._widths, self._columns, strict=True)
            ]
            yield "|".join(f" {cell} " for cell in padded).rstrip() if self._names else ""

    def foot(self, number: int) -> Iterator[str]:
        yield f"({number} row{'' if number == 1 else 's'})"
        yield ""


def _shown(cell: str | None) -> str:
    return "" if cell is None else plain(cell)


def _centred(text: str, width: int) -> str:
    space = width - cell_len(text)
    return " " * (space // 2) + text + " " * (space - space // 2)


class _Line:
    """A file for the csv module that keeps the line last written."""

    text = ""

    def write(self, text: str) -> int:
        self.text = text
        return len(text)


class _Csv(Writer):
    def __init__(self, columns: Sequence[Column], sample: Sequence[Cells]) -> None:
        self._columns = columns
        self._line = _Line()
        self._writer = csv.writer(_as_file(self._line), lineterminator="")

    def head(self) -> Iterator[str]:
        yield from self.rows([[column.name for column in self._columns]])

    def rows(self, cells: Sequence[Cells]) -> Iterator[str]:
        for row in cells:
            self._writer.writerow(["" if cell is None else cell for cell in row])
            yield self._line.text

    def foot(self, number: int) -> Iterator[str]:
        yield from ()


def _as_file(line: _Line) -> IO[str]:
    return line  # type: ignore[return-value]  # all that the csv module calls is write


class _Ndjson(Writer):
    def __init__(self, columns: Sequence[Column], sample: Sequence[Cells]) -> None:
        self._names = _unique([column.name for column in columns])
        self._values = _Values(columns)

    def head(self) -> Iterator[str]:
        yield from ()

    def rows(self, cells: Sequence[Cells]) -> Iterator[str]:
        for values in self._values.of(cells):
            yield json.dumps(dict(zip(self._names, values, strict=True)), ensure_ascii=False)

    def foot(self, number: int) -> Iterator[str]:
        yield from ()


class _Json(_Ndjson):
    """A list of objects; each but the last one is followed by a comma, so it is held back until another comes."""

    _before: str | None = None

    def rows(self, cells: Sequence[Cells]) -> Iterator[str]:
        for line in super().rows(cells):
            if self._before is not None:
                yield f"{self._before},"
            self._before = f"[{line}" if self._before is None else f" {line}"

    def foot(self, number: int) -> Iterator[str]:
        yield "[]" if self._before is None else f"{self._before}]"


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


class _Values:
    """Values for JSON of the server's texts; what JSON has nothing for stays text: no digit is lost."""

    def __init__(self, columns: Sequence[Column]) -> None:
        of_types = Transformer()
        self._loads = [of_types.get_loader(column.type_oid, pq.Format.TEXT).load for column in columns]

    def of(self, rows: Sequence[Cells]) -> list[list[Any]]:
        return [[*map(_value, self._loads, cells)] for cells in rows]


def _value(load: Callable[[bytes], Any], cell: str | None) -> Any:
    if cell is None:
        return None
    try:
        value = load(cell.encode())
    except DataError:
        return cell  # the timestamp "infinity" has no form in Python
    if isinstance(value, bool | int | str):
        return value
    if isinstance(value, list | dict):
        return value if _is_json(value) else cell
    return value if isinstance(value, float) and math.isfinite(value) else cell


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True


WRITERS: dict[Format, type[Writer]] = {
    Format.TABLE: _Table,
    Format.CSV: _Csv,
    Format.JSON: _Json,
    Format.NDJSON: _Ndjson,
}
