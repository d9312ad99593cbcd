"""What Dagster shows of a job's rows: the first of them as a table, and the columns with their types."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dagster import MetadataValue, TableColumn, TableSchema

if TYPE_CHECKING:
    from pgbg_orchestration import Rows

CELL = 100
"""Characters of a value that are shown; every materialization keeps its own copy in the event log."""
# What would end a cell, or be read as Markdown or HTML.
ESCAPES = {letter: f"&#{ord(letter)};" for letter in "&<>\\|*_`"}


def preview_metadata(rows: Rows, limit: int) -> dict[str, Any]:
    """Return the metadata that shows a result.

    Parameters
    ----------
    rows:
        The result.
    limit:
        How many of its rows are shown.
    """
    columns = [TableColumn(name=column.name, type=column.type) for column in rows.columns]
    return {
        "pgbg/preview": MetadataValue.md(as_markdown(rows, limit)),
        "dagster/column_schema": MetadataValue.table_schema(TableSchema(columns=columns)),
    }


def as_markdown(rows: Rows, limit: int) -> str:
    """Return the first rows as a Markdown table, with a line that tells of the others."""
    names = [_cell(column.name) for column in rows.columns]
    lines = [_line(names), _line(["---"] * len(names))] if names else []
    lines += [_line([_cell(cell) for cell in row]) for row in rows.cells[:limit]] if names else []
    if (others := len(rows) - limit) > 0 or not names:
        lines += ["", f"… {others} more rows" if names else f"{len(rows)} rows without columns"]
    return "\n".join(lines)


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(text: str | None) -> str:
    if text is None:
        return "*NULL*"
    shown = text if len(text) <= CELL else f"{text[:CELL]}…"
    shown = "".join(ESCAPES.get(letter, letter) for letter in shown)
    return "<br>".join(shown.splitlines())
