"""The table of ``pgbg top``, without a server: where its cursor is, and what is drawn."""

from __future__ import annotations

from collections.abc import Sequence

from textual import on
from textual.app import App, ComposeResult

from pgbg_orchestration.view.lines import Line, lines_of
from pgbg_orchestration.view.table import COLUMNS, WIDEST, Table

from .test_lines import board, job


class Showing(App[None]):
    """A table and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.asked_for: list[str] = []

    def compose(self) -> ComposeResult:
        yield Table(id="table")

    def on_mount(self) -> None:
        self.table.focus()

    @property
    def table(self) -> Table:
        return self.query_one("#table", Table)

    @on(Table.Selected)
    def _selected(self, event: Table.Selected) -> None:
        self.asked_for.append(event.line.label)

    def under_cursor(self) -> str | None:
        line = self.table.under_cursor
        return line.label if line is not None else None

    def on_the_screen(self) -> list[str]:
        return [self.table.render_line(y).text for y in range(self.table.size.height)]


def lines(*names: str) -> Sequence[Line]:
    return lines_of(board(*(job(name) for name in names)))


def many(number: int) -> Sequence[Line]:
    return lines(*(f"load {n:04}" for n in range(number)))


async def test_the_cursor_stays_on_its_line() -> None:
    app = Showing()
    async with app.run_test(size=(120, 20)) as pilot:
        app.table.show(lines("a", "b", "c"))
        await pilot.press("down")
        assert app.under_cursor() == "b"

        app.table.show(lines("x", "y", "b", "a"))
        assert app.under_cursor() == "b"
        app.table.show(lines("x", "y", "z"))
        assert app.under_cursor() == "z"
        app.table.show([])
        assert app.under_cursor() is None
        await pilot.press("enter", "down", "end")
        assert app.asked_for == []


async def test_keys_and_clicks() -> None:
    app = Showing()
    async with app.run_test(size=(120, 21)) as pilot:
        app.table.show(many(2000))
        await pilot.pause()
        await pilot.press("end")
        assert app.under_cursor() == "load 1999"
        assert "load 1999" in app.on_the_screen()[-1]
        await pilot.press("home", "pagedown", "down", "up")
        assert app.under_cursor() == f"load {app.table.size.height - 1:04}"
        assert app.table.go_to("etl/load 0700")
        assert any("load 0700" in line for line in app.on_the_screen())
        assert not app.table.go_to("etl/none")

        await pilot.press("home", "enter")
        await pilot.click(Table, offset=(5, 4))
        assert (app.under_cursor(), app.asked_for) == ("load 0003", ["load 0000"])
        await pilot.click(Table, offset=(5, 4))
        await pilot.click(Table, offset=(5, 0))
        await pilot.pause()
        assert app.asked_for == ["load 0000", "load 0003"]


async def test_what_is_drawn() -> None:
    app = Showing()
    async with app.run_test(size=(400, 10)) as pilot:
        shown = lines_of(board(job("[b]load[/b]", row_count=1234, sqlstate="22012", message="x" * 200)))
        app.table.show(shown)
        await pilot.pause()
        head, line, *rest = app.on_the_screen()
        assert head.split() == " ".join(COLUMNS).split()
        # A label is text, whatever is in it; what is too long for its column is cut.
        assert "[b]load[/b]" in line
        assert head.index("ROWS") + len("ROWS") == line.index("1,234") + len("1,234")
        assert f"22012 {'x' * (WIDEST - 7)}… " in line
        assert not "".join(rest).strip()


async def test_only_what_is_on_the_screen_is_drawn() -> None:
    app = Showing()
    async with app.run_test(size=(120, 20)) as pilot:
        draw = app.table.render_line
        drawn: list[int] = []

        def noted(y: int) -> object:
            drawn.append(y)
            return draw(y)

        app.table.render_line = noted  # type: ignore[method-assign, assignment]
        app.table.show(many(2000))
        await pilot.pause()
        assert set(drawn) <= set(range(20))
