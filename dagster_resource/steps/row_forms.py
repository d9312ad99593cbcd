"""The forms in which a step gets rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Callable

    from pgbg_orchestration import Rows

Form = Literal["rows", "dicts", "arrow", "polars", "pandas"]
FORMS: dict[str, Callable[[Rows], Any]] = {
    "rows": lambda rows: rows,
    "dicts": lambda rows: rows.as_dicts(),
    "arrow": lambda rows: rows.to_arrow(),
    "polars": lambda rows: rows.to_polars(),
    "pandas": lambda rows: rows.to_pandas(),
}
