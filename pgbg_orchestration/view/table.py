"""The table of ``pgbg top``: of thousands of lines those are drawn that are on the screen, and no more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from rich.cells import cell_len
from rich.text import Text
from textual import events
from textual.binding import Binding, BindingType
from textual.geometry import Size
from textual.message import Message
from textual.scroll_view import ScrollView
from textual.strip import Strip

from .lines import Line
from .states import SIGNS, STYLES
from .words import progress, took

COLUMNS = (
    "STATE", "LABEL", "TIME", "PROGRESS", "WAITS FOR", "ROWS", "TRY", "WANTED BY", "LAUNCHED BY", "WORKER", "WHAT",
)  # fmt: skip
NUMBERS = frozenset({"TIME", "ROWS", "TRY", "WORKER"})
WIDEST = 80  # of a column; a job's details have all of it


def texts_of(line: Line) -> tuple[str, ...]:
    """Return what stands in the cells of a line, one for each of ``COLUMNS``."""
    tag = line.job.command_tag if line.job is not None else None
    what = f"{line.sqlstate} {line.message or ''}" if line.sqlstate else tag or ""
    return (
        f"{SIGNS[line.state]} {line.state}",
        line.label,
        took(line.seconds),
        progress(line),
        line.waits_for,
        "" if line.rows is None else f"{line.rows:,}",
        str(line.attempt or ""),
        line.by_orchestrator,
        line.by,
        str(line.pid or ""),
        " ".join(what.split()),
    )


def _styles_of(line: Line) -> tuple[str, ...]:
    return (STYLES[line.state], "", "", "green", "yellow", "", "", "", "dim", "", "red" if line.sqlstate else "")


class Table(ScrollView, can_focus=True):
    """Lines below each other, with a cursor that stays on its line when others come and go."""

    COMPONENT_CLASSES: ClassVar[set[str]] = {"table--head", "table--cursor", "table--even"}
    DEFAULT_CSS = """
    Table { background: $surface; color: $foreground; }
    Table > .table--head { text-style: bold; background: $panel; color: $foreground; }
    Table > .table--even { background: $surface-lighten-1 50%; }
    Table > .table--cursor { background: $primary; color: $text; text-style: bold; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "select", "details"),
        Binding("up", "move(-1)", show=False),
        Binding("down", "move(1)", show=False),
        Binding("pageup", "page(-1)", show=False),
        Binding("pagedown", "page(1)", show=False),
        Binding("home,ctrl+home", "go(0)", show=False),
        Binding("end,ctrl+end", "go(-1)", show=False),
    ]

    class Selected(Message):
        """Somebody wants to know all of a line."""

        def __init__(self, line: Line) -> None:
            super().__init__()
            self.line = line

    def __init__(self, *, id: str) -> None:  # noqa: A002 - Textual's word
        super().__init__(id=id)
        self.lines: Sequence[Line] = ()
        self._cursor = 0
        self._widths = [len(name) for name in COLUMNS]

    @property
    def under_cursor(self) -> Line | None:
        """The line that the cursor is on."""
        return self.lines[self._cursor] if self.lines else None

    def show(self, lines: Sequence[Line]) -> None:
        """Show other lines, or the same ones as they are now."""
        under, was_seen = self.under_cursor, self._is_seen(self._cursor)
        self.lines = lines
        at = next((index for index, line in enumerate(lines) if under is not None and line.key == under.key), None)
        self._cursor = min(self._cursor, max(len(lines) - 1, 0)) if at is None else at
        rows = [COLUMNS, *map(texts_of, lines)]
        self._widths = [min(max(map(cell_len, column)), WIDEST) for column in zip(*rows, strict=True)]
        self.virtual_size = Size(sum(width + 2 for width in self._widths), len(lines) + 1)
        if was_seen:
            self._see_cursor()
        self.refresh()

    def go_to(self, key: str) -> bool:
        """Put the cursor on a line; returns whether it is there."""
        found = [index for index, line in enumerate(self.lines) if line.key == key]
        if found:
            self._put(found[0])
        return bool(found)

    def render_line(self, y: int) -> Strip:
        """Draw a line of the screen: the head stays at the top."""
        left, top = self.scroll_offset
        index = top + y - 1
        if y == 0:
            style = self.get_component_rich_style("table--head")
            cells = [Text(name) for name in COLUMNS]
        elif index < len(self.lines):
            line = self.lines[index]
            style = self.rich_style
            if index == self._cursor:
                style = self.get_component_rich_style("table--cursor")
            elif index % 2:
                style = self.get_component_rich_style("table--even")
            cells = [Text(text, how) for text, how in zip(texts_of(line), _styles_of(line), strict=True)]
        else:
            return Strip.blank(self.size.width, self.rich_style)
        row = Text(end="", no_wrap=True)
        for cell, name, width in zip(cells, COLUMNS, self._widths, strict=True):
            cell.truncate(width, overflow="ellipsis")
            cell.align("right" if name in NUMBERS else "left", width)
            row.append(" ").append_text(cell).append(" ")
        drawn = Strip(row.render(self.app.console)).apply_style(style)
        return drawn.crop_extend(left, left + self.size.width, style)

    # The cursor ---------------------------------------------------------------------------------------------------

    @property
    def _page(self) -> int:
        return max(self.scrollable_content_region.height - 1, 1)

    def _is_seen(self, index: int) -> bool:
        return self.scroll_offset.y <= index < self.scroll_offset.y + self._page

    def _see_cursor(self) -> None:
        top = self.scroll_offset.y
        if self._cursor < top:
            self.scroll_to(y=self._cursor, animate=False)
        elif self._cursor >= top + self._page:
            self.scroll_to(y=self._cursor - self._page + 1, animate=False)

    def _put(self, index: int) -> None:
        self._cursor = max(min(index, len(self.lines) - 1), 0)
        self._see_cursor()
        self.refresh()

    def action_move(self, by: int) -> None:
        """Go up or down."""
        self._put(self._cursor + by)

    def action_page(self, by: int) -> None:
        """Go up or down by what fits on the screen."""
        self._put(self._cursor + by * self._page)

    def action_go(self, index: int) -> None:
        """Go to the first line, or with -1 to the last."""
        self._put(index if index >= 0 else len(self.lines) + index)

    def action_select(self) -> None:
        """Ask for all that is known of the line under the cursor."""
        if (line := self.under_cursor) is not None:
            self.post_message(self.Selected(line))

    def on_click(self, event: events.Click) -> None:
        """Put the cursor where somebody clicks; a click on the line that has it opens that."""
        offset = event.get_content_offset(self)
        if offset is None or offset.y == 0:
            return
        index = self.scroll_offset.y + offset.y - 1
        if index == self._cursor:
            self.action_select()
        elif index < len(self.lines):
            self._put(index)
