"""What the contract tests say to the extension: its functions by their 2.0 names, on any surface."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import psycopg
from psycopg import sql
from psycopg.rows import dict_row

from pgbg_orchestration.postgres.pg_background import DEFAULT_QUEUE_BYTES, LIST_COLUMNS_1_9, Extension

PATIENCE = 30.0
"""Seconds after which a condition that has to come true counts as never coming. No test asserts a time."""

T = TypeVar("T")
Row = dict[str, Any]


class Handle(NamedTuple):
    """A worker's handle."""

    pid: int
    cookie: int


def eventually(look: Callable[[], T], what: str) -> T:
    """Look again and again until the answer is true, and return it; fail when it never is."""
    deadline = time.monotonic() + PATIENCE
    while not (found := look()):
        assert time.monotonic() < deadline, f"never came: {what}"
        time.sleep(0.005)
    return found


class Background:
    """One session that launches workers."""

    def __init__(self, connection: psycopg.Connection, extension: Extension) -> None:
        self.connection = connection
        self.extension = extension

    @property
    def v2_0(self) -> bool:
        """True on the surface of 2.0."""
        return not self.extension.v2_names

    def execute(self, text: str, parameters: Sequence[object] = ()) -> list[Row]:
        """Run a statement in the launching session itself."""
        cursor = self.connection.cursor(row_factory=dict_row).execute(text.encode(), parameters or None)
        return cursor.fetchall() if cursor.description else []

    def value(self, text: str, parameters: Sequence[object] = ()) -> Any:
        """Run a statement in the launching session itself, and return its one value."""
        return next(iter(self.execute(text, parameters)[0].values()))

    def call(self, function: str, *arguments: object) -> list[Row]:
        """Call one of the extension's functions by its 2.0 name."""
        query = sql.SQL("select * from {}({})").format(
            self.extension.name(function), sql.SQL(", ").join([sql.Placeholder()] * len(arguments))
        )
        return self.connection.cursor(row_factory=dict_row).execute(query, arguments).fetchall()

    def launch(
        self, text: str, *, label: str | None = "contract", queue_size: int = DEFAULT_QUEUE_BYTES, submit: bool = False
    ) -> Handle:
        """Launch a worker."""
        (row,) = self.call("submit" if submit else "launch", text, queue_size, label)
        return Handle(row["pid"], row["cookie"])

    def info(self, handle: Handle) -> Row:
        """What result_info says."""
        return self.call("result_info", *handle)[0]

    def error(self, handle: Handle) -> Row:
        """What error_info says."""
        return self.call("error_info", *handle)[0]

    def ended(self, handle: Handle) -> Row:
        """Poll result_info until the worker is completed; return what it says then."""
        return eventually(lambda: (found := self.info(handle))["completed"] and found, f"the end of {handle}")

    def run(self, text: str, **options: Any) -> Row:
        """Launch, await the end, detach; return what result_info and error_info said, in one."""
        handle = self.launch(text, **options)
        found = {**self.ended(handle), **self.error(handle)}
        self.detach(handle)
        return found

    def result(self, handle: Handle, columns: str = "tag text") -> list[tuple[Any, ...]]:
        """Read a worker's result to its end."""
        query = sql.SQL("select * from {}(%s, %s) as r({})").format(self.extension.name("result"), sql.SQL(columns))
        return self.connection.execute(query, handle).fetchall()

    def fetch(self, text: str, columns: str = "tag text", **options: Any) -> list[tuple[Any, ...]]:
        """Launch, and read the result."""
        return self.result(self.launch(text, **options), columns)

    def detach(self, handle: Handle) -> None:
        """Forget a handle."""
        self.call("detach", *handle)

    def cancel(self, handle: Handle) -> None:
        """Cancel by the extension's own function, once the worker is seen at work."""
        self.seen_at_work(handle)
        self.call("cancel", *handle)

    def wait(self, handle: Handle, milliseconds: int) -> bool:
        """Wait in the server, bounded."""
        name = self.extension.name("wait")
        if not self.v2_0:
            name = sql.Identifier(self.extension.schema, "pg_background_wait_v2_timeout")
        row = self.connection.execute(sql.SQL("select {}(%s, %s, %s)").format(name), (*handle, milliseconds)).fetchone()
        assert row is not None
        return bool(row[0])

    def list(self) -> list[Row]:
        """The session's workers, as the extension lists them."""
        if self.v2_0:
            query = sql.SQL("select * from {}").format(sql.Identifier(self.extension.schema, "pg_background_list"))
        else:
            query = sql.SQL("select * from {}() as l({})").format(
                self.extension.name("list"), sql.SQL(LIST_COLUMNS_1_9)
            )
        return self.connection.cursor(row_factory=dict_row).execute(query).fetchall()

    def activity(self, handle: Handle) -> Row | None:
        """The worker in pg_stat_activity; None when it is gone."""
        rows = self.execute("select * from pg_stat_activity where pid = %s", (handle.pid,))
        return rows[0] if rows else None

    def seen_at_work(self, handle: Handle) -> None:
        """Await the worker's query in pg_stat_activity."""
        eventually(
            lambda: (found := self.activity(handle)) and found["state"] == "active" and found["query"], "a query"
        )

    def blocked(self, handle: Handle) -> None:
        """Await that the worker waits for someone to read its output."""
        waits = ("MessageQueuePutMessage", "ClientWrite")  # the real worker's, the stand-in's
        eventually(lambda: (found := self.activity(handle)) and found["wait_event"] in waits, "a full queue")

    def ended_or_blocked(self, handle: Handle) -> None:
        """Await that the worker ended, or waits for someone to read its output."""
        waits = ("MessageQueuePutMessage", "ClientWrite")
        eventually(
            lambda: (
                self.info(handle)["completed"] or ((found := self.activity(handle)) and found["wait_event"] in waits)
            ),
            "an end, or a full queue",
        )

    def gone(self, handle: Handle) -> None:
        """Await that no worker of that pid is at work any more."""
        eventually(lambda: (found := self.activity(handle)) is None or found["state"] == "idle", "the worker's end")
