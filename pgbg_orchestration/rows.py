"""Rows that a job was asked for: how many it may keep, and what came back, as the server wrote it and as Python has it.

A worker writes them in the transaction of the work itself, beside its receipt (docs/python.md): they are there exactly
when the job is committed, and every later reader gets the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from decimal import Decimal
from functools import cached_property
from importlib import import_module
from itertools import repeat
from typing import TYPE_CHECKING, Any, cast, overload

if TYPE_CHECKING:
    from psycopg.abc import Transformer

MEBIBYTE = 1024 * 1024
MOST_ROWS = 2**31 - 2


class NoRows(LookupError):
    """There are no rows to read: they were not asked for, the statement gives none, or they are pruned."""


@dataclass(frozen=True, slots=True)
class Fetch:
    """How many rows a job keeps.

    Parameters
    ----------
    max_rows:
        Rows of one statement at most. With one more the job fails before it commits (SQLSTATE PB005).
    max_bytes:
        Bytes of one statement's values at most, in the types' output form. Beyond them the job fails likewise.
    return_last:
        Keep the rows of the job's last statement. False: of each statement that gives rows.

    Raises
    ------
    ValueError
        A bound is no whole number from 1.
    """

    max_rows: int = 10_000
    max_bytes: int = 16 * MEBIBYTE
    return_last: bool = True

    def __post_init__(self) -> None:
        for name, most in (("max_rows", MOST_ROWS), ("max_bytes", 2**62)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
                raise ValueError(f"{name} must be a whole number from 1 to {most}, not {value!r}")
        if self.return_last not in (True, False):
            raise ValueError(f"return_last must be true or false, not {self.return_last!r}")

    @classmethod
    def of(cls, given: Fetch | Mapping[str, Any] | bool | None) -> Fetch | None:
        """Return what a user gave as ``Job.fetch``: True for the defaults, a mapping of the parameters, or a ``Fetch``.

        Raises
        ------
        ValueError
            It is none of these.
        """
        if given is None or given is False:
            return None
        if given is True:
            return cls()
        if isinstance(given, cls):
            return given
        if isinstance(given, Mapping):
            try:
                return cls(**given)
            except TypeError:
                known = ", ".join(asdict(cls()))
                raise ValueError(f"fetch has {sorted(map(str, given))}; it takes {known}") from None
        raise ValueError(f"fetch must be true, a mapping or a Fetch, not {type(given).__name__}")

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data, which ``Job.fetch`` takes too."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a result.

    Attributes
    ----------
    name:
        As the server gives it; ``?column?`` for one without a name.
    type_oid, typmod:
        The type and its modifier as a cursor's description has them: a domain is the type below it.
    type:
        The type as SQL has it, such as ``numeric(10,2)`` or a domain's own name.
    """

    name: str
    type_oid: int
    typmod: int
    type: str


class ByColumn(Sequence[tuple[str | None, ...]]):
    """Rows of cells that are held by column, as they are kept and as they are made values of.

    Parameters
    ----------
    columns:
        The cells of each column.
    number:
        How many rows there are.
    """

    __slots__ = ("columns", "number")

    def __init__(self, columns: Sequence[Sequence[str | None]], number: int) -> None:
        self.columns, self.number = columns, number

    def __len__(self) -> int:
        return self.number

    def __iter__(self) -> Iterator[tuple[str | None, ...]]:
        return zip(*self.columns, strict=True) if self.columns else repeat((), self.number)

    @overload
    def __getitem__(self, at: int) -> tuple[str | None, ...]: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[tuple[str | None, ...]]: ...
    def __getitem__(self, at: int | slice) -> tuple[str | None, ...] | Sequence[tuple[str | None, ...]]:
        if isinstance(at, slice):
            return ByColumn([cells[at] for cells in self.columns], len(range(self.number)[at]))
        row = range(self.number)[at]  # IndexError for what is not there
        return tuple(cells[row] for cells in self.columns)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and tuple(self) == tuple(other)

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        return repr(tuple(self))


@dataclass(frozen=True)
class Rows:
    """The rows of one statement of a committed job.

    Attributes
    ----------
    columns:
        Its columns.
    cells:
        The values as the server writes them out; None for NULL.
    row_count, command_tag:
        The statement's own count and tag.
    statement:
        Its number in the job, from 1.
    """

    columns: tuple[Column, ...]
    cells: Sequence[tuple[str | None, ...]]
    row_count: int
    command_tag: str
    statement: int

    @cached_property
    def rows(self) -> list[tuple[Any, ...]]:
        """The values as psycopg gives them.

        Raises
        ------
        psycopg.DataError
            A value has no form in Python, such as the timestamp ``infinity``, as with psycopg.
        """
        from psycopg.adapt import Transformer

        of_types = Transformer()
        if not self.columns or not self.cells:
            return [() for _ in self.cells]
        loaded: list[Sequence[Any]] = []
        for column, cells in zip(self.columns, self._by_column(), strict=True):
            load = _loading(of_types, column.type_oid)
            if load is str:
                loaded.append(cells)
            elif None in cells:
                loaded.append([None if cell is None else load(cell) for cell in cells])
            else:
                loaded.append([*map(load, cast("list[str]", cells))])
        return list(zip(*loaded, strict=True))

    def _by_column(self) -> Sequence[Sequence[str | None]]:
        """Return the cells of each column; there are rows."""
        return self.cells.columns if isinstance(self.cells, ByColumn) else [*zip(*self.cells, strict=True)]

    def __len__(self) -> int:
        return len(self.cells)

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        return iter(self.rows)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "rows"}

    def as_dicts(self) -> list[dict[str, Any]]:
        """Return each row as a dict by column name.

        Raises
        ------
        ValueError
            Two columns have the same name, and one would be lost.
        """
        names = self._names()
        return [dict(zip(names, row, strict=True)) for row in self.rows]

    def to_arrow(self) -> Any:
        """Return a PyArrow table; numeric becomes a decimal, and json, uuid and what Arrow has no type for their text.

        A column's type is that of the column, whatever its values are, but for numeric without a scale: that is as wide
        as its values, and Arrow's null type without any; and for arrays of several dimensions, which become their text.

        Raises
        ------
        ModuleNotFoundError
            PyArrow is not installed.
        ValueError
            Two columns have the same name.
        """
        arrow = import_module("pyarrow")

        arrays = []
        names = self._names()
        for number, column in enumerate(self.columns):
            kind = _arrow_type(arrow, column)
            array = None
            if column.type_oid not in AS_TEXT:
                try:
                    array = arrow.array([row[number] for row in self.rows], type=kind)
                except (arrow.ArrowInvalid, arrow.ArrowTypeError, arrow.ArrowNotImplementedError):
                    if kind is not None and not arrow.types.is_list(kind):
                        raise  # else an array of several dimensions
            if array is None or (array.type == arrow.null() and column.type_oid != NUMERIC):
                array = arrow.array([row[number] for row in self.cells], type=arrow.string())
            arrays.append(array)
        return arrow.table(dict(zip(names, arrays, strict=True)))

    def to_polars(self) -> Any:
        """Return a Polars frame, made of :meth:`to_arrow`.

        Raises
        ------
        ModuleNotFoundError
            Polars or PyArrow is not installed.
        """
        return import_module("polars").from_arrow(self.to_arrow())

    def to_pandas(self) -> Any:
        """Return a pandas frame with Python's own objects where NumPy has no exact type.

        Raises
        ------
        ModuleNotFoundError
            Pandas is not installed.
        """
        frame = import_module("pandas").DataFrame(self.rows, columns=self._names())
        for name, column in zip(self._names(), self.columns, strict=True):
            # Else an int column with a NULL would be floats, and lose digits.
            if (kind := PANDAS_TYPES.get(column.type_oid)) is not None:
                frame[name] = frame[name].astype(kind)
        return frame

    def _names(self) -> list[str]:
        names = [column.name for column in self.columns]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two columns are named {', '.join(map(repr, twice))}: name them apart with AS")
        return names


class Results:
    """What an outcome knows of its job's rows; ``results`` has them by statement, the rest is about the last."""

    __slots__ = ()
    results: tuple[Rows, ...]

    @property
    def last(self) -> Rows:
        """The rows of the last statement.

        Raises
        ------
        NoRows
            None are kept.
        """
        if not self.results:
            raise NoRows(
                "no rows are kept of this job: they were not asked for by the launch that committed (Job(fetch=True)), "
                "or its last statement gives none"
            )
        return self.results[-1]

    @property
    def rows(self) -> list[tuple[Any, ...]]:
        """The last statement's rows, as psycopg gives them; raises as :attr:`last`."""
        return self.last.rows

    @property
    def columns(self) -> tuple[Column, ...]:
        """The last statement's columns; raises as :attr:`last`."""
        return self.last.columns

    def as_dicts(self) -> list[dict[str, Any]]:
        """Return the last statement's rows by column name, as :meth:`Rows.as_dicts`."""
        return self.last.as_dicts()

    def to_arrow(self) -> Any:
        """Return the last statement's rows as :meth:`Rows.to_arrow`."""
        return self.last.to_arrow()

    def to_polars(self) -> Any:
        """Return the last statement's rows as :meth:`Rows.to_polars`."""
        return self.last.to_polars()

    def to_pandas(self) -> Any:
        """Return the last statement's rows as :meth:`Rows.to_pandas`."""
        return self.last.to_pandas()


# What psycopg's own loaders of text make of a value, by their names: in bulk a call of theirs for each costs more than
# all else that is done for it.
_AS_PSYCOPG: Mapping[str, Callable[[str], Any]] = {
    "TextLoader": str, "IntLoader": int, "FloatLoader": float, "NumericLoader": Decimal
}  # fmt: skip


def _loading(of_types: Transformer, oid: int) -> Callable[[str], Any]:
    """Return what makes a value of the server's text; ``str`` where that is the value."""
    from psycopg import pq

    loader = of_types.get_loader(oid, pq.Format.TEXT)
    kind = type(loader)
    if kind.__module__.partition(".")[0] in ("psycopg", "psycopg_binary", "psycopg_c") and kind.__name__ in _AS_PSYCOPG:
        return _AS_PSYCOPG[kind.__name__]
    load = loader.load
    return lambda cell: load(cell.encode())


# By type oid (src/include/catalog/pg_type.dat).
NUMERIC = 1700
AS_TEXT = {114, 3802, 2950}  # json and jsonb, whose values have a type each, and uuid
# Of an array type, its element's.
ARRAYS = {
    1000: 16, 1016: 20, 1005: 21, 1007: 23, 1009: 25, 1021: 700, 1022: 701, 1015: 1043, 1001: 17, 1182: 1082,
    1183: 1083, 1115: 1114, 1185: 1184,
}  # fmt: skip
PANDAS_TYPES = {16: "boolean", 20: "Int64", 21: "Int16", 23: "Int32"}


def _arrow_type(arrow: Any, column: Column) -> Any:
    """Return the exact Arrow type of a column; None where its values have to tell it."""
    simple = {
        16: arrow.bool_(), 20: arrow.int64(), 21: arrow.int16(), 23: arrow.int32(), 25: arrow.string(),
        700: arrow.float32(), 701: arrow.float64(), 1042: arrow.string(), 1043: arrow.string(), 17: arrow.binary(),
        1082: arrow.date32(), 1083: arrow.time64("us"), 1114: arrow.timestamp("us"),
        1184: arrow.timestamp("us", tz="UTC"), 1186: arrow.duration("us"), 26: arrow.int64(),
    }  # fmt: skip
    if (element := ARRAYS.get(column.type_oid)) is not None:
        return arrow.list_(simple[element])
    if column.type_oid == NUMERIC and column.typmod >= 0:
        # typmod holds precision and scale (numeric.c); Arrow's wider decimal has 76 digits.
        precision, scale = (column.typmod - 4) >> 16, (column.typmod - 4) & 0x7FF
        if 0 <= scale <= precision <= 76:
            return arrow.decimal128(precision, scale) if precision <= 38 else arrow.decimal256(precision, scale)
    return simple.get(column.type_oid)
