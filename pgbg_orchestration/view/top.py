"""``pgbg top``: every job and every worker of a database, live in a terminal."""

from __future__ import annotations

from typing import ClassVar, TypeVar

import psycopg
from rich.text import Text
from textual import on, work
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.screen import ModalScreen
from textual.widget import Widget
from textual.widgets import Button, Footer, Input, Label, ProgressBar, Static

from pgbg_orchestration.errors import PgbgError
from pgbg_orchestration.ledger.board import Board

from .lines import Line, Order, arranged, chosen, line_of_job, lines_of
from .seen import known_of
from .source import Source
from .states import ALL_STATES
from .table import Table
from .words import facts_of

W = TypeVar("W", bound=Widget)
EVERY = 2.0  # seconds from one look to the next
MOST_ENDED = 2_000  # jobs that ended


class Details(ModalScreen[None]):
    """All that is known of a line: its fields, its error, and what its worker runs, as far as the login may see it."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,q,enter", "dismiss", "close")]

    def __init__(self, line: Line, source: Source) -> None:
        super().__init__()
        self._line = line
        self._source = source

    def compose(self) -> ComposeResult:
        """Lay the fields out, the SQL below them."""
        with VerticalScroll(id="details"):
            yield Static(Text(self._line.label, "bold"))
            for name, value in facts_of(self._line):
                yield Static(Text.assemble((f"{name:<18}", "dim"), value))
            yield Static(id="usual")
            yield Static(id="kept")
            worker = self._line.worker
            if worker is not None:
                yield Static(Text("\nwhat the worker runs", "dim"))
                yield Static(Text(worker.query if worker.query is not None else "not visible to this login"))
        yield Footer()

    def on_mount(self) -> None:
        """Ask for the label's history: it may take a moment, and what is known is shown meanwhile."""
        if self._line.job is not None:
            self.ask()

    @work
    async def ask(self) -> None:
        """Show how jobs of this label went so far, and what the history keeps of this one."""
        try:
            seen = await known_of(self._source, self._line)
        except (PgbgError, psycopg.Error) as error:
            self.query_one("#usual", Static).update(Text(f"what the history has of it is not known: {error}"))
            return
        lines = [Text.assemble((f"{name:<18}", "dim"), value) for name, value in seen.usually()]
        self.query_one("#usual", Static).update(Text("\n").join(lines))
        told = Text("\nattempts", "dim")
        for one in seen.tries():
            told.append(f"\n{one.number:>3}  {one.launched_at}  {one.how}", "not dim")
        told.append("\n\nSQL as it was given", "dim")
        told.append(f"\n{seen.statement or seen.why_no_statement}", "not dim")
        self.query_one("#kept", Static).update(told)


class Question(ModalScreen[bool]):
    """Asks whether to cancel."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,n", "answer(False)", "no"),
        Binding("y", "answer(True)", "yes"),
    ]

    def __init__(self, line: Line) -> None:
        super().__init__()
        self._line = line

    def compose(self) -> ComposeResult:
        """Ask, with the answer that changes nothing in front."""
        line = self._line
        what = "job" if line.job is not None else "worker, which no job is known of,"
        with Vertical(id="question"):
            yield Label(Text.assemble(f"Cancel the {what} ", (line.label, "bold"), f" (pid {line.pid or '–'})?"))
            yield Label(
                Text(
                    "A job is cancelled for good: a worker of it that starts later is refused."
                    if line.job is not None
                    else "Its statement is cancelled; who launched it may launch it again.",
                    "dim",
                )
            )
            with Horizontal():
                yield Button("No", id="no", variant="primary")
                yield Button("Yes, cancel", id="yes", variant="error")
        yield Footer()

    @on(Button.Pressed)
    def _pressed(self, event: Button.Pressed) -> None:
        self.dismiss(event.button.id == "yes")

    def action_answer(self, answer: bool) -> None:
        """Close with an answer."""
        self.dismiss(answer)


class Top(App[None]):
    """The live view.

    Parameters
    ----------
    source:
        Where it looks.
    every:
        Seconds from one look to the next.
    """

    TITLE = "pgbg top"
    CSS = """
    #head { height: 1; }
    #where { width: 1fr; }
    #slots { width: auto; }
    #gauge { width: 24; margin: 0 1; }
    #pattern { display: none; height: 3; }
    #pattern.open { display: block; }
    #trouble { height: auto; color: $error; }
    #table { height: 1fr; }
    #details { border: round $primary; padding: 1 2; margin: 2 6; background: $surface; }
    Question { align: center middle; }
    #question { width: 72; height: auto; border: round $error; padding: 1 2; background: $surface; }
    #question Label { width: 100%; }
    #question Horizontal { height: auto; margin-top: 1; }
    #question Button { margin-right: 2; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        # With priority, so that the field has the focus at once: of "/queue" typed quickly the table would take the q.
        Binding("slash", "find", "find", priority=True),
        Binding("f", "next_state", "state"),
        Binding("s", "next_order", "sort"),
        Binding("r", "reverse", "reverse"),
        Binding("b", "blocker", "blocker"),
        Binding("c", "cancel", "cancel"),
        Binding("space", "pause", "pause"),
        Binding("escape", "clear", "all", show=False),
        Binding("q", "quit", "quit"),
    ]

    def __init__(self, source: Source, *, every: float = EVERY) -> None:
        super().__init__()
        self._source = source
        self._every = every
        self._board: Board | None = None
        self._lines: list[Line] = []
        self._pattern = ""
        self._state: str | None = None
        self._order = Order.SINCE
        self._reversed = False
        self._paused = False
        self._is_looking = False
        self._looks_again = False

    def compose(self) -> ComposeResult:
        """Lay out the head, the table and the keys."""
        with Horizontal(id="head"):
            yield Static(id="where")
            yield Static(id="slots")
            yield ProgressBar(id="gauge", show_eta=False, show_percentage=False)
        yield Input(id="pattern", placeholder="part of a label or series; * and ? stand in")
        yield Static(id="trouble")
        yield Table(id="table")
        yield Footer()

    def on_mount(self) -> None:
        """Look, and go on looking."""
        self.set_interval(self._every, self._tick)
        self.look()
        self._below("#table", Table).focus()

    def _below(self, selector: str, kind: type[W]) -> W:
        """Return a widget of the view itself, also while a question or a job's details lie upon it."""
        return self.screen_stack[0].query_one(selector, kind)

    def _tick(self) -> None:
        if not self._paused and not self._is_looking:
            self.look()

    @work
    async def look(self) -> None:
        """Look once and show it. Where that fails, the trouble is shown, and the lines of the last look stay.

        One look at a time, and none is broken off for the next one: where a look takes longer than a tick, none would
        ever be shown.
        """
        if self._is_looking:
            self._looks_again = True
            return
        self._is_looking = True
        try:
            await self._look()
            while self._looks_again:
                self._looks_again = False
                await self._look()
        finally:
            self._is_looking = False

    async def _look(self) -> None:
        try:
            board, trouble = await self._source.board(most_ended=MOST_ENDED), ""
        except (PgbgError, psycopg.Error) as error:
            board, trouble = None, str(error)
        # Closed meanwhile, the view loses its widgets first, then its screens, and this look last.
        if not any(screen.query("#trouble") for screen in self.screen_stack[:1]):
            return
        self._say(trouble, trouble=bool(trouble))
        if board is not None:
            self._board, self._lines = board, lines_of(board)
            self.show()

    def show(self) -> None:
        """Put what was seen last on the screen."""
        if self._board is None:
            return
        states = frozenset({self._state}) if self._state else frozenset[str]()
        lines = arranged(chosen(self._lines, pattern=self._pattern, states=states), self._order, reverse=self._reversed)
        with self.batch_update():
            self._below("#table", Table).show(lines)
            self._show_head(self._board, len(lines))

    def _show_head(self, board: Board, count: int) -> None:
        chosen_by = [f"sorted by {self._order}{' reversed' if self._reversed else ''}"]
        chosen_by += [f"state {self._state}"] if self._state else []
        chosen_by += [f"like {self._pattern!r}"] if self._pattern else []
        chosen_by += [f"{board.ended_left_out:,} that ended are left out"] if board.ended_left_out else []
        chosen_by += [f"{board.not_visible:,} processes are not visible to this login"] if board.not_visible else []
        chosen_by += ["PAUSED"] if self._paused else []
        waiting = sum(job.state == "waiting" for job in board.jobs)
        where = f"{board.database} on PostgreSQL {board.server_version} · {count} lines · {' · '.join(chosen_by)}"
        self._below("#where", Static).update(Text(where))
        # A process that the login may not see can hold a slot too.
        least = "≥ " if board.not_visible else ""
        slots = f"slots {least}{board.slots_used} of {board.slots}, {waiting} waiting"
        self._below("#slots", Static).update(Text(slots, "bold red" if board.slots_used >= board.slots else ""))
        self._below("#gauge", ProgressBar).update(total=board.slots, progress=board.slots_used)

    def _say(self, text: str, *, trouble: bool = False) -> None:
        self._below("#trouble", Static).update(Text(f"✗ {text}" if trouble else text))

    # Keys ---------------------------------------------------------------------------------------------------------

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Tell whether an action is there now: a slash is a letter where one types, and nothing in a question."""
        if action == "find":
            return len(self.screen_stack) == 1 and not isinstance(self.focused, Input)
        return super().check_action(action, parameters)

    def action_find(self) -> None:
        """Open the line in which a pattern is typed."""
        field = self._below("#pattern", Input)
        field.add_class("open")
        # At once, and not by focus() after the next message.
        self.screen.set_focus(field)

    @on(Input.Changed)
    def _changed(self, event: Input.Changed) -> None:
        self._pattern = event.value
        self.show()

    @on(Input.Submitted)
    def _submitted(self) -> None:
        self._below("#pattern", Input).remove_class("open")
        self._below("#table", Table).focus()

    def action_clear(self) -> None:
        """Show all lines again."""
        field = self._below("#pattern", Input)
        field.value = ""
        field.remove_class("open")
        self._pattern, self._state = "", None
        self._below("#table", Table).focus()
        self.show()

    def action_next_state(self) -> None:
        """Show the lines of the next state only, and all after the last."""
        states: list[str | None] = [None, *ALL_STATES]
        self._state = states[(states.index(self._state) + 1) % len(states)]
        self.show()

    def action_next_order(self) -> None:
        """Sort by the next thing."""
        orders = list(Order)
        self._order = orders[(orders.index(self._order) + 1) % len(orders)]
        self.show()

    def action_reverse(self) -> None:
        """Sort the other way round."""
        self._reversed = not self._reversed
        self.show()

    def action_pause(self) -> None:
        """Stand still, or go on."""
        self._paused = not self._paused
        self.show()

    @on(Table.Selected)
    def _selected(self, event: Table.Selected) -> None:
        self.push_screen(Details(event.line, self._source))

    def action_blocker(self) -> None:
        """Go to the job that the one under the cursor waits for."""
        line = self._below("#table", Table).under_cursor
        if line is None or line.blocker is None:
            self.notify("It waits for no job that this login sees.", severity="warning")
            return
        key, table = line_of_job(line.blocker).key, self._below("#table", Table)
        if not table.go_to(key):
            self.action_clear()
            table.go_to(key)

    @work
    async def action_cancel(self) -> None:
        """Ask, and cancel what the cursor is on."""
        line = self._below("#table", Table).under_cursor
        if line is None or not line.is_at_work:
            self.notify("It has ended: there is nothing to cancel.", severity="warning")
            return
        if not await self.push_screen_wait(Question(line)):
            return
        self.notify(f"Cancelling {line.label} …")
        try:
            said = await self._cancel(line)
        except (PgbgError, psycopg.Error) as error:
            self.notify(str(error), title="Not cancelled", severity="error", timeout=20)
            return
        self.notify(said, timeout=20)
        self.look()

    async def _cancel(self, line: Line) -> str:
        if line.job is not None:
            if await self._source.cancel(line.job) == "cancelled":
                return f"{line.label}: cancelled, and its worker has ended."
            return f"{line.label}: too late, it is committed."
        assert line.worker is not None
        if await self._source.cancel_worker(line.worker):
            return f"{line.label}: its worker was asked to cancel its statement."
        return f"{line.label}: its worker has ended, or is not this login's to cancel."
