"""Options that several commands share, and how their values are read."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated, Any

import psycopg
import typer
from psycopg.conninfo import conninfo_to_dict

_UNITS = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400, "w": 604800}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]*)\Z")


def _dsn(value: str) -> str:
    if not value.strip():
        # Most likely "$(pgbg server conninfo)" of a server that does not run: never fall back to another one.
        raise typer.BadParameter("the connection string is empty")
    try:
        conninfo_to_dict(value)
    except psycopg.ProgrammingError:
        # Without libpq's own words: they quote the string, and a password may be in it.
        raise typer.BadParameter("not a connection string ('host=… dbname=…') nor a URI ('postgresql://…')") from None
    return value


def _seconds(value: str | float) -> float:
    if not isinstance(value, str):
        return value  # a default
    match = _DURATION.match(value.strip().lower())
    if match is None or match[2] not in ("", *_UNITS):
        raise typer.BadParameter(f"{value!r} is no duration: say 90, 90s, 15m, 2h, 7d or 4w")
    return float(match[1]) * _UNITS.get(match[2], 1)


def _seconds_with_unit(value: str | float) -> float:
    if isinstance(value, str) and value.strip()[-1:].isdigit():
        raise typer.BadParameter(f"{value!r} has no unit: say 90d, 12w or 36h")
    return _seconds(value)


def pairs(values: Iterable[str], option: str) -> dict[str, str]:
    """Return ``NAME=VALUE`` options as a mapping.

    Raises
    ------
    typer.BadParameter
        One has no ``=``, or a name comes twice.
    """
    found: dict[str, str] = {}
    for value in values:
        name, equals, text = value.partition("=")
        if not equals or not name.strip():
            raise typer.BadParameter(f"{value!r} must be NAME=VALUE", param_hint=option)
        if name in found:
            raise typer.BadParameter(f"{name!r} is given twice", param_hint=option)
        found[name] = text
    return found


Dsn = Annotated[
    str | None,
    typer.Option(
        "--dsn",
        metavar="CONNINFO",
        parser=_dsn,
        show_default="PGHOST, PGDATABASE, PGSERVICE, … as psql takes them",
        help="libpq connection string or URI. Keep passwords out of it: ~/.pgpass or PGPASSWORD.",
    ),
]
Schema = Annotated[str, typer.Option("--schema", metavar="NAME", help="The package's own schema.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document for machines.")]
Owner = Annotated[
    str | None,
    typer.Option("--owner", metavar="ROLE", show_default="the login", help="Role that owns the job's receipt."),
]


def seconds_option(*names: str, unit: bool = False, **more: Any) -> Any:
    """Return an option that takes a duration, read as seconds; ``unit``: a bare number is refused."""
    return typer.Option(*names, metavar="DURATION", parser=_seconds_with_unit if unit else _seconds, **more)
