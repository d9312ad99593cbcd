"""``pgbg top`` as a person uses it: keys pressed, the screen read."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import psycopg
import pytest
from textual.events import Key
from textual.widgets import Input, Static

from pgbg_orchestration import Job, Launcher, errors
from pgbg_orchestration.view.source import ServerSource
from pgbg_orchestration.view.table import COLUMNS, Table, texts_of
from pgbg_orchestration.view.top import Details, Question, Top
from tests.core.kit import GENEROUS, Watched, effect, slow, within

pytestmark = pytest.mark.servers("real")
LOCKED = "select exists (select from pg_locks where relation = 'effects'::regclass and mode = 'AccessExclusiveLock')"


def cells(app: Top, column: str) -> list[str]:
    """What stands in a column, from top to bottom."""
    table = app.screen_stack[0].query_one("#table", Table)
    at = COLUMNS.index(column)
    return [texts_of(line)[at] for line in table.lines]


async def shown(look: Callable[[], bool], what: str) -> None:
    """Wait until something stands on the screen."""
    until = time.monotonic() + GENEROUS
    while not look():
        assert time.monotonic() < until, f"not on the screen: {what}"
        await asyncio.sleep(0.05)


async def test_a_day_at_the_terminal(db: Watched) -> None:
    async with Launcher(db.conninfo) as launcher:
        await within(launcher.run(Job(effect("done"), id="done", label="facts")))
        with pytest.raises(errors.WorkerError):
            await within(launcher.run(Job("select 1/0", id="bad", label="bad")))
        running = asyncio.create_task(launcher.run(Job(slow("runs", 120), id="runs", label="nightly load")))
        pid = await db.at_work("runs")

        app = Top(ServerSource(launcher), every=0.2)
        async with app.run_test(size=(160, 30)) as pilot:
            await shown(lambda: len(cells(app, "LABEL")) == 3, "three jobs")
            assert cells(app, "LABEL")[0] == "nightly load"
            assert cells(app, "STATE")[0] == "▶ running"
            assert cells(app, "WORKER")[0] == str(pid)
            assert "22012" in "".join(cells(app, "WHAT"))
            assert f"of {db.value('show max_worker_processes')}" in str(
                app.screen_stack[0].query_one("#slots", Static).render()
            )

            # Typed at one go, as somebody in a hurry does: keys that are the view's own are letters there.
            for key in ("slash", *"fc/qs"):
                app.post_message(Key("slash" if key == "/" else key, "/" if key == "slash" else key))
            field = app.screen_stack[0].query_one("#pattern", Input)
            await shown(lambda: field.value == "fc/qs", "what was typed")
            await pilot.press("escape", "slash", *"fact", "enter")
            await shown(lambda: cells(app, "LABEL") == ["facts"], "what was looked for")
            await pilot.press("escape")
            await shown(lambda: len(cells(app, "LABEL")) == 3, "all again")

            # The cursor stays on the line that it was on.
            await pilot.press("ctrl+home", "enter")
            await pilot.pause()
            assert isinstance(app.screen, Details)
            text = " ".join(str(field.render()) for field in app.screen.query(Static))
            assert "pg_sleep(120)" in text
            usual = app.screen.query_one("#usual", Static)
            await shown(lambda: "1 job: 0 committed" in str(usual.render()), "the label's history")
            kept = app.screen.query_one("#kept", Static)
            await shown(lambda: "SQL as it was given" in str(kept.render()), "what the history keeps of it")
            assert slow("runs", 120) in str(kept.render())
            assert "▶ running" in str(kept.render())
            await pilot.press("escape")

            # "No" is what a hasty Enter says.
            await pilot.press("c")
            await pilot.pause()
            assert isinstance(app.screen, Question)
            await pilot.press("enter")
            await pilot.pause()
            assert db.workers()

            await pilot.press("c")
            await pilot.pause()
            await pilot.press("y")
            await shown(lambda: "⊘ cancelled" in cells(app, "STATE"), "the end of the job")
        with pytest.raises(errors.JobCancelled):
            await within(running)


async def test_to_the_job_that_is_in_the_way(db: Watched) -> None:
    async with Launcher(db.conninfo) as launcher:
        repair = Job("lock table effects; select pg_sleep(300)", id="repair", label="facts repair")
        blocking = asyncio.create_task(launcher.run(repair))
        await shown(lambda: db.value(LOCKED), "its lock")
        waiting = asyncio.create_task(launcher.run(Job(effect("load"), id="load", label="nightly load")))

        app = Top(ServerSource(launcher), every=0.2)
        async with app.run_test(size=(160, 30)) as pilot:
            await shown(lambda: "job facts repair of" in "".join(cells(app, "WAITS FOR")), "what is in the way")
            await pilot.press("slash", *"nightly", "enter")
            await shown(lambda: cells(app, "LABEL") == ["nightly load"], "the load alone")
            await pilot.press("b")
            await shown(lambda: len(cells(app, "LABEL")) == 2, "both")
            await pilot.press("c")
            await pilot.pause()
            assert isinstance(app.screen, Question)
            await pilot.press("y")
            await shown(lambda: "⊘ cancelled" in cells(app, "STATE"), "the end of the repair")
            await shown(lambda: "✓ committed" in cells(app, "STATE"), "the load goes on")
            assert "not visible to this login" in str(app.screen_stack[0].query_one("#where", Static).render())
        with pytest.raises(errors.JobCancelled):
            await within(blocking)
        assert (await within(waiting)).launched


async def test_a_server_that_goes_away_is_said_and_what_was_seen_stays(db: Watched) -> None:
    class Away:
        def __init__(self, source: ServerSource) -> None:
            self.source = source
            self.away = False

        async def board(self, **how):  # type: ignore[no-untyped-def]
            if self.away:
                raise psycopg.OperationalError("the server closed the connection")
            return await self.source.board(**how)

    async with Launcher(db.conninfo) as launcher:
        await within(launcher.run(Job(effect("done"), id="done", label="facts")))
        source = Away(ServerSource(launcher))
        app = Top(source, every=0.1)  # type: ignore[arg-type]
        async with app.run_test():
            await shown(lambda: cells(app, "LABEL") == ["facts"], "the job")
            source.away = True
            await shown(
                lambda: "closed the connection" in str(app.screen_stack[0].query_one("#trouble", Static).render()),
                "trouble",
            )
            assert cells(app, "LABEL") == ["facts"]
            source.away = False
            await shown(lambda: not str(app.screen_stack[0].query_one("#trouble", Static).render()), "that it is back")


async def test_a_look_that_takes_longer_than_a_tick_is_shown(db: Watched) -> None:
    class Slow:
        def __init__(self, source: ServerSource) -> None:
            self.source = source

        async def board(self, **how):  # type: ignore[no-untyped-def]
            await asyncio.sleep(0.5)
            return await self.source.board(**how)

    async with Launcher(db.conninfo) as launcher:
        await within(launcher.run(Job(effect("done"), id="done", label="facts")))
        app = Top(Slow(ServerSource(launcher)), every=0.05)  # type: ignore[arg-type]
        async with app.run_test():
            await shown(lambda: cells(app, "LABEL") == ["facts"], "the job")
            await within(launcher.run(Job(effect("more"), id="more", label="more")))
            app.look()
            await shown(lambda: len(cells(app, "LABEL")) == 2, "the second job")


async def test_a_look_that_comes_back_when_the_view_has_closed_shows_nothing(db: Watched) -> None:
    class Late:
        def __init__(self, source: ServerSource) -> None:
            self.source = source
            self.is_waiting = self.came_back = False

        async def board(self, **how):  # type: ignore[no-untyped-def]
            board = await self.source.board(**how)
            self.is_waiting = True
            while app.screen_stack:
                await asyncio.sleep(0)
            self.came_back = True
            return board

    async with Launcher(db.conninfo) as launcher:
        late = Late(ServerSource(launcher))
        app = Top(late)  # type: ignore[arg-type]
        async with app.run_test():
            await shown(lambda: late.is_waiting, "nothing yet: the look is under way")
    assert late.came_back


async def test_two_thousand_lines(db: Watched) -> None:
    db.sql(
        "insert into pgbg.job (owner, job_digest, job_id, series_digest, series, generation, label, kind, sql_digest,"
        " attempt, launched_by, launcher_pid, ended_at, outcome)"
        " select 'pgbg_app', pgbg.digest(i::text), i::text, pgbg.digest(i::text), i::text, 1, 'load ' || i, 'receipt',"
        " '', 1, 'host/1', 0, clock_timestamp(), 'failed' from generate_series(1, 2000) as i"
    )
    async with Launcher(db.conninfo) as launcher:
        app = Top(ServerSource(launcher), every=0.5)
        async with app.run_test(size=(160, 40)) as pilot:
            await shown(lambda: len(cells(app, "LABEL")) == 2000, "all of them")
            await pilot.press("s", "end")
            await pilot.press("slash", *"1999", "enter")
            await shown(lambda: cells(app, "LABEL") == ["load 1999"], "the one that was looked for")
