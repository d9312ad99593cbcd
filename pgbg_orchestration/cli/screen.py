"""What all commands print alike: errors, JSON, times and durations, and text that comes from elsewhere."""

from __future__ import annotations

import json as jsonlib
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from datetime import UTC, datetime, timedelta
from enum import Enum
from typing import Any, NoReturn

import psycopg
import typer
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from pgbg_orchestration.errors import PgbgError
from pgbg_orchestration.postgres.connection import what_to_check

from .codes import ExitCode, code_for


class Screen(Console):
    """A console that falls silent when nobody reads it any more: that ends no command in the middle of its work."""

    def on_broken_pipe(self) -> None:
        """Write to nothing from now on, what the interpreter flushes at its end included."""
        self.quiet = True
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, self.file.fileno())
        os.close(nothing)


# They find sys.stdout and sys.stderr when they print, so tests and pipes get what is theirs.
out = Screen(highlight=False)
err = Screen(stderr=True, highlight=False)

# The core's advice is for callers in Python.
_AS_OPTIONS = {
    "retry_cancelled=True, or a new generation": "--retry-cancelled, or a new --generation",
    "accept_changed_sql=True": "--accept-changed-sql",
    "settings={'default_transaction_read_only': 'off'}": "--set default_transaction_read_only=off",
    "verify_sql": "--verify-sql",
    "queue_size=": "--queue-size ",
    "isolation=": "--isolation ",
    "role=": "--role ",
}
_KIND = re.compile(r"kind='(\w+)'")


class Stop(Exception):
    """End a command with an exit code and, unless it is None, a message of the command line's own."""

    def __init__(self, code: ExitCode, message: str | None = None, *, todo: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.todo = todo


@contextmanager
def ending(json: bool, *, of_job: bool = False) -> Iterator[None]:
    """Print what ends a command, for people or for machines, and end with its exit code.

    Parameters
    ----------
    json:
        For machines.
    of_job:
        The command runs one job: say what state its data are in.
    """
    try:
        yield
    except Stop as stop:
        if stop.message is not None:
            _end(json, stop.code, {"error": stop.code.name.lower(), "message": stop.message, "todo": stop.todo})
        raise typer.Exit(stop.code) from None
    except PgbgError as error:
        _end(json, code_for(error), _fields_of(error, of_job))
    except psycopg.OperationalError as error:
        if error.sqlstate and error.sqlstate[:2] not in ("08", "28", "57"):
            _end(json, ExitCode.NOT_READY, _fields_of_server(error))
        _end(json, ExitCode.UNREACHABLE, {**_fields_of_server(error), "todo": what_to_check(error)})
    except psycopg.Error as error:
        _end(json, ExitCode.NOT_READY, _fields_of_server(error))


def _fields_of(error: PgbgError, of_job: bool) -> dict[str, Any]:
    todo = error.todo
    for python, option in _AS_OPTIONS.items():
        todo = todo.replace(python, option) if todo else todo
    todo = _KIND.sub(r"--kind \1", todo) if todo else todo
    return {
        **error.to_dict(),
        "data_state": error.data_state if of_job else None,
        "todo": todo,
        "details": error.details(),
    }


def _fields_of_server(error: psycopg.Error) -> dict[str, Any]:
    return {
        "error": type(error).__name__,
        "message": error.diag.message_primary or str(error).strip(),
        "sqlstate": error.sqlstate,
        "details": [f"{n}: {v}" for n, v in (("DETAIL", error.diag.message_detail),) if v],
        "todo": error.diag.message_hint,
    }


def _end(json: bool, code: ExitCode, found: dict[str, Any]) -> NoReturn:
    if json:
        print_json({**{k: v for k, v in found.items() if k != "details"}, "exit_code": int(code)})
        raise typer.Exit(code)
    style = "bold yellow" if code in (ExitCode.CANCELLED, ExitCode.INTERRUPTED) else "bold red"
    sign = {ExitCode.CANCELLED: "⊘", ExitCode.INTERRUPTED: "…"}.get(code, "✗")
    head = (f"{sign} {_WORDS.get(code, 'refused')}  ", style)
    message = plain(" ".join(found["message"].split()))
    if found.get("label"):
        err.print(Text.assemble(head, (plain(found["label"]), "bold")), soft_wrap=True)
        _print_lines([message] if not found.get("details") else [])
    else:
        err.print(Text.assemble(head, message), soft_wrap=True)
    _print_lines(found.get("details") or ())
    _print_lines([found["data_state"]] if found.get("data_state") else (), "dim")
    if found.get("todo"):
        print_todo(err, found["todo"])
    raise typer.Exit(code)


def _print_lines(lines: Iterable[str], style: str = "") -> None:
    for line in lines:
        err.print(Padding(Text(plain(line, keep_lines=True), style), (0, 0, 0, 2), expand=False))


_WORDS = {
    ExitCode.FAILED: "failed",
    ExitCode.CANCELLED: "cancelled",
    ExitCode.DEADLINE: "too slow",
    ExitCode.UNKNOWN: "not known",
    ExitCode.NO_SLOT: "no slot",
    ExitCode.UNREACHABLE: "unreachable",
    ExitCode.NOT_READY: "not ready",
    ExitCode.STILL_RUNNING: "still running",
    ExitCode.NO_SUCH_JOB: "not found",
    ExitCode.INTERRUPTED: "left",
}


def print_todo(console: Console, todo: str, indent: int = 2) -> None:
    """Print what to do next; never wrapped, so that a line of SQL can be copied whole."""
    console.print(Text(f"{' ' * indent}→ {plain(todo, keep_lines=True)}", "cyan"), soft_wrap=True)


def print_json(value: Any) -> None:
    """Print one JSON document on standard output."""
    typer.echo(jsonlib.dumps(value, default=_jsonable, ensure_ascii=False, indent=2))


def _jsonable(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, Enum):
        return value.value
    return str(value)


def plain(text: object, *, keep_lines: bool = False) -> str:
    """Return text that comes from elsewhere without what could steer a terminal or break a line."""
    return "".join(_shown(char, keep_lines) for char in str(text))


def _shown(char: str, keep_lines: bool) -> str:
    if char == "\n":
        return "\n" if keep_lines else "␤"
    if char == "\t":
        return " "
    return "·" if unicodedata.category(char).startswith("C") else char


def ago(moment: datetime | None) -> str:
    """Return how long ago a moment was, in one unit."""
    if moment is None:
        return ""
    seconds = (datetime.now(UTC) - moment).total_seconds()
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{int(seconds // size)} {unit} ago"
    return f"{max(int(seconds), 0)} s ago"
