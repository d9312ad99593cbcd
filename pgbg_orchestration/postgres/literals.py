"""A job's parameters as literals: what psycopg writes for each, made without a connection, so that it travels as text.

A process that launches a job for another one (a triggerer) then needs neither the value's type nor whatever the value's
own process registered with psycopg, and the same literal reaches the server from everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from decimal import Decimal
from typing import Any

import psycopg
from psycopg import abc
from psycopg.abc import AdaptContext, Buffer
from psycopg.adapt import AdaptersMap, Dumper, PyFormat, Transformer
from psycopg.types.json import JsonDumper
from psycopg.types.numeric import DecimalDumper

from pgbg_orchestration.errors import InvalidJob

_BYTEA = psycopg.adapters.types["bytea"].oid
_INTERVAL = psycopg.adapters.types["interval"].oid


@dataclass(frozen=True, slots=True)
class Literal:
    """A parameter that is an SQL literal already; :func:`register` teaches a cursor to take it as it is."""

    text: str = field(repr=False)  # it may be a secret


def literals_of(
    parameters: Sequence[Any] | Mapping[str, Any],
    sql: str | Sequence[str] | None = None,
    *,
    job_id: str | None = None,
    label: str | None = None,
) -> list[str] | dict[str, str]:
    """Return the literal of each parameter: by its name, or in their order.

    They are those of ``psycopg.ClientCursor.mogrify``, and beyond it: a dict is a ``json`` where nothing else is
    registered for it, a ``pendulum`` duration keeps its microseconds, an interval of mixed signs means the same
    whatever ``IntervalStyle`` the server reads it with, and a NaN with a sign is NaN.

    Parameters
    ----------
    parameters:
        As :class:`pgbg_orchestration.Job` takes them.
    sql:
        What they are for: of a named one that it does not use nothing is asked, as psycopg does.
    job_id, label:
        Whose they are, for an error.

    Raises
    ------
    InvalidJob
        One of them cannot be written as SQL: its name or position and its type, never its value.
    """
    transformer = Transformer(_Adapters())

    def write(name: str, value: object) -> str:
        try:
            return _literal(transformer, value)
        except UnicodeError:
            why = "it cannot be written as UTF-8"
        except (psycopg.Error, TypeError) as error:
            why = str(error)  # psycopg's and json's own are about types
        except (ValueError, ArithmeticError, RecursionError, AttributeError, LookupError) as error:
            why = type(error).__name__  # whose text may quote the value
        raise InvalidJob(
            f"the parameter {name}, of type {type(value).__name__}, cannot be written as SQL: {why}",
            job_id=job_id,
            label=label,
            todo="Pass it as text and cast it in the SQL.",
        )

    if isinstance(parameters, Mapping):
        texts = [sql] if isinstance(sql, str) else sql
        return {
            name: write(repr(name), value) if texts is None or any(f"%({name})" in text for text in texts) else "NULL"
            for name, value in parameters.items()
            if isinstance(name, str)
        }
    return [write(str(number), value) for number, value in enumerate(parameters, 1)]


def bound(literals: Sequence[str] | Mapping[str, str]) -> list[Literal] | dict[str, Literal]:
    """Return parameters of literals, as :func:`literals_of` made them."""
    if isinstance(literals, Mapping):
        return {name: Literal(text) for name, text in literals.items()}
    return [Literal(text) for text in literals]


def register(context: AdaptContext) -> None:
    """Let a cursor bind :class:`Literal`, and what :func:`literals_of` writes beyond psycopg."""
    adapters = context.adapters
    adapters.register_dumper(Literal, _LiteralDumper)
    adapters.register_dumper("pendulum.duration.Duration", _DurationDumper)
    adapters.register_dumper("pendulum.interval.Interval", _IntervalDumper)
    try:
        adapters.get_dumper(dict, PyFormat.TEXT)
    except psycopg.ProgrammingError:
        adapters.register_dumper(dict, JsonDumper)


class _Adapters:
    """psycopg's adapters as they are now (a DAG file may have registered its own), and ours."""

    connection = None

    def __init__(self) -> None:
        self.adapters = AdaptersMap(psycopg.adapters)
        for kind in (bytes, bytearray, memoryview):
            if _is_psycopgs(self.adapters.get_dumper(kind, PyFormat.TEXT)):
                self.adapters.register_dumper(kind, _BytesDumper)
        if _is_psycopgs(self.adapters.get_dumper(timedelta, PyFormat.TEXT)):
            self.adapters.register_dumper(timedelta, _TimedeltaDumper)
        if _is_psycopgs(self.adapters.get_dumper(Decimal, PyFormat.TEXT)):
            self.adapters.register_dumper(Decimal, _DecimalDumper)
        register(self)


def _is_psycopgs(dumper: type) -> bool:
    return dumper.__module__.split(".")[0] in ("psycopg", "psycopg_binary", "psycopg_c")


def _literal(transformer: abc.Transformer, value: object) -> str:
    dumper = transformer.get_dumper(value, PyFormat.TEXT)
    literal = bytes(transformer.as_literal(value))
    # Without a connection libpq escapes by the encoding of whichever one was used last in this process.
    if (literal[-1:] != b"'" and b"'::" not in literal) or not _quotes_by_libpq(dumper):
        return literal.decode()
    text = dumper.dump(value)
    if text is None:
        return literal.decode()
    return (_quoted(bytes(text)) + literal[literal.rindex(b"'") + 1 :]).decode()


def _quotes_by_libpq(dumper: object) -> bool:
    # Of the class that has it: psycopg's Python and its C implementation each have a base of their own.
    owner = next(kind for kind in type(dumper).__mro__ if "quote" in vars(kind))
    return owner.__name__ in ("Dumper", "CDumper") and _is_psycopgs(owner)


def _quoted(text: bytes) -> bytes:
    doubled = text.replace(b"'", b"''")
    if b"\\" not in text:
        return b"'" + doubled + b"'"
    return b" E'" + doubled.replace(b"\\", b"\\\\") + b"'"


class _LiteralDumper(Dumper):
    def dump(self, obj: Literal) -> Buffer:
        raise TypeError("a literal is bound by itself, not in a list")

    def quote(self, obj: Literal) -> Buffer:
        encoding = self.connection.info.encoding if self.connection is not None else "utf-8"
        return obj.text.encode(encoding)


class _BytesDumper(Dumper):
    """In hexadecimal digits, as a connection to any server of today writes them."""

    oid = _BYTEA

    def dump(self, obj: Buffer) -> Buffer:
        return b"\\x" + bytes(obj).hex().encode()

    def quote(self, obj: Buffer) -> Buffer:
        return b"'\\x" + bytes(obj).hex().encode() + b"'"


class _DecimalDumper(DecimalDumper):
    """Without the sign of a NaN, which Python has and PostgreSQL has not: psycopg's literal of one is no SQL."""

    def dump(self, obj: Decimal) -> Buffer | None:
        return b"NaN" if obj.is_nan() else super().dump(obj)

    def quote(self, obj: Decimal) -> Buffer:
        return b"'NaN'::numeric" if obj.is_nan() else super().quote(obj)


class _TimedeltaDumper(Dumper):
    oid = _INTERVAL

    def dump(self, obj: timedelta) -> Buffer:
        if obj.days < 0 and (obj.seconds or obj.microseconds):
            # Under IntervalStyle `sql_standard` a sign at the beginning would be that of all fields.
            return f"{obj.days} day +{obj.seconds} second +{obj.microseconds} microsecond".encode()
        return str(obj).replace(",", "").encode()


class _DurationDumper(_TimedeltaDumper):
    """Of ``pendulum.Duration``, whose own text loses microseconds; its years and months stay what they are."""

    def dump(self, obj: Any) -> Buffer:
        rest = obj.as_timedelta() - timedelta(days=obj.years * 365 + obj.months * 30)
        parts = [f"{number:+d} {unit}" for number, unit in ((obj.years, "year"), (obj.months, "month")) if number]
        if not parts:
            return super().dump(rest)
        return " ".join(
            [*parts, f"{rest.days:+d} day +{rest.seconds} second +{rest.microseconds} microsecond"]
        ).encode()


class _IntervalDumper(_TimedeltaDumper):
    """Of ``pendulum.Interval``: the time between its ends."""

    def dump(self, obj: Any) -> Buffer:
        return super().dump(obj.as_timedelta())
