"""pg_background's functions by their names on every version: all that runs jobs calls them through this module.

1.9 and 1.10 have ``pg_background_*_v2`` names, 2.0 has unsuffixed ones. On 1.9 an unsuffixed
``pg_background_launch(text, int)`` exists too, with another meaning, so the version decides and never the presence
of a name. The extension is relocatable: every call is qualified with the schema that ``pg_extension`` tells.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from typing import Any, LiteralString, NamedTuple, cast

from psycopg import AsyncConnection, capabilities, errors, sql
from psycopg.rows import dict_row, scalar_row, tuple_row
from psycopg.types.string import TextLoader

from pgbg_orchestration.outcome import ErrorFields

OLDEST = (1, 9)
ROLE = "pgbackground_role"
DEFAULT_QUEUE_BYTES = 64 * 1024
ROWS_AT_ONCE = 500  # that a client has in memory of a result that it reads as it comes
MAX_TRACKED = 1000  # the most that pg_background.max_workers takes
NO_HANDLE = ("42704", "55000")  # not attached to this session; or another worker of that pid ("cookie mismatch")
NO_SLOT = ("53000", "53400", "53100")  # server's worker slots, this session's table, /dev/shm

ERROR_FIELDS = (
    "sqlstate", "message", "detail", "hint", "context", "schema_name", "table_name", "column_name", "constraint_name",
)  # fmt: skip

OUTPUT_WAITS = ("MessageQueuePutMessage", "ClientWrite")
"""What a worker waits for whose output nobody reads: the extension's own, and a stand-in's."""

# name in 2.0 → name in 1.9 and 1.10, where it is not the 2.0 name with "_v2"
RENAMED = {"report_progress": "pg_background_progress", "grant_privileges": "grant_pg_background_privileges"}
LIST_COLUMNS_1_9 = (
    "pid int4, cookie int8, launched_at timestamptz, user_id oid, queue_size int4, state text, sql_preview text, "
    "last_error text, consumed bool, label text"
)


class Handle(NamedTuple):
    """What a launch gives: valid in the session that launched, and nowhere else.

    The pid can be garbage when the worker ends before its launcher wakes: never signal it.
    """

    pid: int
    cookie: int


@dataclass(frozen=True, slots=True)
class ResultInfo:
    """What ``result_info`` says. The times are known on 2.0 only. None of it is proof of a commit."""

    completed: bool
    has_error: bool
    row_count: int | None = None
    command_tag: str | None = None
    started_at: datetime | None = None
    finished_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Progress:
    """What the worker's SQL last reported of its progress: percent, and a text."""

    percent: int | None
    message: str | None


@cache
def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())


@dataclass(frozen=True)
class Extension:
    """pg_background as it is installed in one database."""

    version: str
    schema: str
    _queries: dict[str, sql.Composed] = field(default_factory=dict, compare=False, repr=False)
    _ready: dict[str, bytes] = field(default_factory=dict, compare=False, repr=False)  # composed once: polls are many
    _texts: dict[str, str] = field(default_factory=dict, compare=False, repr=False)

    @property
    def numbers(self) -> tuple[int, ...]:
        """The version as numbers, such as ``(1, 10)``."""
        return _numbers(self.version)

    @property
    def v2_names(self) -> bool:
        return self.numbers < (2, 0)

    def name(self, function: str) -> sql.Identifier:
        """Return the qualified name here of the function that 2.0 calls ``pg_background_<function>``."""
        if not self.v2_names:
            return sql.Identifier(self.schema, f"pg_background_{function}")
        return sql.Identifier(self.schema, RENAMED.get(function, f"pg_background_{function}_v2"))

    def text(self, function: str) -> str:
        """Return that name as SQL text."""
        if function not in self._texts:
            self._texts[function] = self.name(function).as_string(None)
        return self._texts[function]

    @property
    def _wait_name(self) -> sql.Identifier:
        return sql.Identifier(self.schema, "pg_background_wait_v2_timeout") if self.v2_names else self.name("wait")

    @property
    def _info_columns(self) -> LiteralString:
        if self.v2_names:
            return "r.row_count, r.command_tag, r.completed, r.has_error"
        # As numbers, which no DateStyle of the login's changes.
        return (
            "r.row_count, r.command_tag, r.completed, r.has_error,"
            " extract(epoch from r.started_at)::float8 as started_at,"
            " extract(epoch from r.finished_at)::float8 as finished_at"
        )

    def query(self, text: LiteralString, **functions: str) -> sql.Composed:
        """Return ``text`` with each ``{placeholder}`` replaced by the qualified name of its function."""
        if text not in self._queries:
            self._queries[text] = sql.SQL(text).format(**{k: self.name(v) for k, v in functions.items()})
        return self._queries[text]

    async def launch(
        self, conn: AsyncConnection[Any], text: str, *, label: str, queue_size: int | None = None, submit: bool = False
    ) -> Handle:
        """Launch ``text`` in a worker and return its handle; with ``submit`` its result can never be read.

        For those who call the extension themselves (docs/python.md). A job's worker is launched by
        :mod:`.launch_message`, which tells whether it may have been launched when that fails.
        """
        # FROM, since "select (launch(...)).*" calls the function once for each column: two workers.
        query = sql.SQL("select pid, cookie from {}(%s, %s, %s)").format(self.name("submit" if submit else "launch"))
        cursor = await conn.cursor(row_factory=tuple_row).execute(
            query, (text, queue_size or DEFAULT_QUEUE_BYTES, label)
        )
        row = await cursor.fetchone()
        if row is None or row[0] is None:
            raise errors.InternalError_("the launch call gave no handle")
        return Handle(*row[:2])

    async def result_infos(
        self, conn: AsyncConnection[Any], handles: Iterable[Handle]
    ) -> dict[Handle, ResultInfo | None]:
        """Return what the session knows of its handles, in one query; None where a handle is not known any more."""
        return await self._infos(conn, list(handles), ended=False)

    async def ends(self, conn: AsyncConnection[Any], handles: Iterable[Handle]) -> dict[Handle, ResultInfo | None]:
        """Return what :meth:`result_infos` does, of those alone that are completed, or not known any more."""
        return await self._infos(conn, list(handles), ended=True)

    async def _infos(
        self, conn: AsyncConnection[Any], wanted: Sequence[Handle], *, ended: bool
    ) -> dict[Handle, ResultInfo | None]:
        text = "ends" if ended else "infos"
        if text not in self._ready:
            composed = sql.SQL(
                "select h.pid, h.cookie, {columns} from unnest(%s::int4[], %s::int8[]) as h (pid, cookie)"
                " cross join lateral {f}(h.pid, h.cookie) as r{where}"
            ).format(
                columns=sql.SQL(self._info_columns),
                f=self.name("result_info"),
                where=sql.SQL(" where r.completed" if ended else ""),
            )
            self._ready[text] = composed.as_bytes(None)
        try:
            cursor = await conn.cursor(row_factory=dict_row).execute(
                self._ready[text], ([h.pid for h in wanted], [h.cookie for h in wanted])
            )
            rows = await cursor.fetchall()
        except (errors.UndefinedObject, errors.ObjectNotInPrerequisiteState, errors.InsufficientPrivilege):
            # One bad handle fails the whole query: ask for each alone.
            if len(wanted) == 1:
                return {wanted[0]: None}
            infos: dict[Handle, ResultInfo | None] = {}
            for handle in wanted:
                infos.update(await self._infos(conn, [handle], ended=ended))
            return infos
        return {Handle(row.pop("pid"), row.pop("cookie")): _result_info(row) for row in rows}

    async def ended(self, conn: AsyncConnection[Any], setting: str) -> tuple[str | None, int, list[Handle]]:
        """Return a setting of the session, how many workers it tracks, and which of them are at work no more.

        A tenth of what ``result_info`` of as many handles costs, and less exact: a worker that has completed its work
        counts as running until its process has ended.
        """
        if setting not in self._ready:
            tracked: sql.Composable = sql.Identifier(self.schema, "pg_background_list")
            if self.numbers < (1, 10):
                tracked = sql.SQL("{}() as l({})").format(self.name("list"), sql.SQL(LIST_COLUMNS_1_9))
            composed = sql.SQL(
                "select pg_catalog.current_setting({}, true), count(*),"
                " array_agg(pid) filter (where state <> 'running'), array_agg(cookie) filter (where state <> 'running')"
                " from {}"
            ).format(setting, tracked)
            self._ready[setting] = composed.as_bytes(None)
        cursor = await conn.cursor(row_factory=tuple_row).execute(self._ready[setting])
        value, number, pids, cookies = await cursor.fetchone() or (None, 0, None, None)
        return value, number, [Handle(*pair) for pair in zip(pids or (), cookies or (), strict=True)]

    async def error_info(self, conn: AsyncConnection[Any], handle: Handle) -> ErrorFields | None:
        """Return the worker's error, or None without one, or where the handle is not known any more."""
        names = ERROR_FIELDS[:5] if self.v2_names else ERROR_FIELDS
        row = await self._texts_of(conn, "error_info", names, handle)
        return ErrorFields(**row) if row and row["sqlstate"] else None

    async def progress(self, conn: AsyncConnection[Any], handles: Sequence[Handle]) -> dict[Handle, Progress]:
        """Return what workers' SQL reported of its progress; without those that reported none or are not known."""
        # As bytes: the extension cuts a long message within a character.
        raw = conn.info.parameter_status("server_encoding") in ("UTF8", "SQL_ASCII")
        message = "pg_catalog.convert_to(r.progress_msg, pg_catalog.getdatabaseencoding())" if raw else "r.progress_msg"
        query = sql.SQL(
            "select h.pid, h.cookie, r.progress_pct, {message}"
            " from unnest(%s::int4[], %s::int8[]) as h (pid, cookie) cross join lateral {f}(h.pid, h.cookie) as r"
            " where r.progress_pct is not null"
        ).format(message=sql.SQL(message), f=self.name("get_progress"))
        try:
            cursor = await conn.cursor(row_factory=tuple_row).execute(
                query, ([h.pid for h in handles], [h.cookie for h in handles])
            )
            return {
                Handle(pid, cookie): Progress(
                    percent, message.decode(errors="backslashreplace") if isinstance(message, bytes) else message
                )
                for pid, cookie, percent, message in await cursor.fetchall()
            }
        except (errors.UndefinedObject, errors.ObjectNotInPrerequisiteState, errors.InsufficientPrivilege):
            # As in _infos.
            if len(handles) <= 1:
                return {}
        reports: dict[Handle, Progress] = {}
        for handle in handles:
            reports |= await self.progress(conn, [handle])
        return reports

    async def _texts_of(
        self, conn: AsyncConnection[Any], function: str, names: Sequence[str], handle: Handle
    ) -> dict[str, Any] | None:
        """Return columns of what a function says of a handle, or None where the handle is not known any more.

        In a database of the encoding SQL_ASCII a worker's text can hold any bytes, and the server refuses to send those
        that are no UTF-8 (22021). There the bytes are asked for, and escaped here.
        """
        any_bytes = conn.info.parameter_status("server_encoding") == "SQL_ASCII"
        columns = [
            sql.SQL("pg_catalog.convert_to({0}, 'SQL_ASCII') as {0}" if any_bytes else "{}").format(
                sql.Identifier(name)
            )
            for name in names
        ]
        query = sql.SQL("select {} from {}(%s, %s)").format(sql.SQL(", ").join(columns), self.name(function))
        try:
            cursor = await conn.cursor(row_factory=dict_row).execute(query, handle)
            row = await cursor.fetchone()
        except (errors.UndefinedObject, errors.ObjectNotInPrerequisiteState):
            return None
        if row is not None and any_bytes:
            texts = {
                name: bytes(row[name]).decode(errors="backslashreplace") for name in names if row[name] is not None
            }
            row.update(texts)
        return row

    async def result(
        self, conn: AsyncConnection[Any], handle: Handle, columns: sql.Composable | None = None
    ) -> list[tuple[Any, ...]]:
        """Read a worker's result to its end, which comes after its commit; blocks this session until then.

        Parameters
        ----------
        columns:
            Column definition list; it must match the result exactly. Default: one text column, which is what a
            statement without rows gives (its command tag).

        Raises
        ------
        psycopg.Error
            The worker's own error; 08006 when the worker is gone without a report (this connection is fine);
            42804 when the columns do not match (the work may be committed all the same).
        """
        head = self.query("select * from {f}(%s, %s) as ", f="result")
        query = head + sql.SQL("r(") + (columns or sql.SQL("tag text")) + sql.SQL(")")
        cursor = await conn.cursor(row_factory=tuple_row).execute(query, handle)
        return await cursor.fetchall()

    def rows(
        self, conn: AsyncConnection[Any], handle: Handle, columns: sql.Composable, as_text: Iterable[int] = ()
    ) -> AsyncGenerator[tuple[Any, ...], None]:
        """Return a worker's rows, read a few at a time; raises as :meth:`result`.

        The first comes after the worker's end: the server collects all of them (in a file, beyond ``work_mem``) before
        it sends one. Values of the types ``as_text`` (by their oids) are the texts that the server sends.
        """
        query = self.query("select * from {f}(%s, %s) as ", f="result") + sql.SQL("r(") + columns + sql.SQL(")")
        size = ROWS_AT_ONCE if capabilities.has_stream_chunked() else 1
        cursor = conn.cursor(row_factory=tuple_row)
        for oid in as_text:
            cursor.adapters.register_loader(oid, TextLoader)
        return cast(AsyncGenerator[tuple[Any, ...], None], cursor.stream(query, handle, size=size))

    async def drain(
        self, conn: AsyncConnection[Any], handle: Handle, columns: sql.Composable | None, *, padded: bool = False
    ) -> tuple[int | None, str | None]:
        """Read a worker's result to its end and throw the rows away; returns row count and command tag.

        Parameters
        ----------
        columns:
            As :meth:`result` takes them. The tag returned is None then.
        padded:
            Count and tag are wanted of the last statement but one.

        Raises
        ------
        psycopg.Error
            As :meth:`result`.
        """
        if columns is None:
            tags = [str(tag) for (tag,) in await self.result(conn, handle)][: -1 if padded else None]
            words = tags[-1].split() if tags else []
            count = int(words[-1]) if len(words) > 1 and words[-1].isdigit() else 0  # as result_info has it
            return count, " ".join(word for word in words if not word.isdigit()) or None
        head = self.query("select count(*) from {f}(%s, %s) as ", f="result")
        query = head + sql.SQL("r(") + columns + sql.SQL(")")
        cursor = await conn.cursor(row_factory=scalar_row).execute(query, handle)
        return int(await cursor.fetchone() or 0), None

    async def detach(self, conn: AsyncConnection[Any], handle: Handle) -> None:
        """Forget a handle: its worker goes on, its output is dropped."""
        try:
            await conn.execute(self.query("select {f}(%s, %s)", f="detach"), handle)
        except (errors.UndefinedObject, errors.ObjectNotInPrerequisiteState):
            return  # forgotten already

    async def detach_many(self, conn: AsyncConnection[Any], handles: Sequence[Handle]) -> None:
        """Forget handles, in one query; one by one where that fails, because one is not known any more."""
        rows = ", ".join(f"({pid:d}, {cookie:d})" for pid, cookie in handles)  # parameters would cost twice the CPU
        if "detach" not in self._ready:
            self._ready["detach"] = self.query("select {f}(h.pid, h.cookie) from (values ", f="detach").as_bytes(None)
        try:
            await conn.execute(self._ready["detach"] + rows.encode() + b") as h (pid, cookie)")
        except (errors.UndefinedObject, errors.ObjectNotInPrerequisiteState):
            for handle in handles if len(handles) > 1 else ():
                await self.detach(conn, handle)

    async def detach_all(self, conn: AsyncConnection[Any]) -> int:
        """Forget every handle of this session; returns how many there were."""
        return await self._number(conn, "detach_all")

    async def cancel(self, conn: AsyncConnection[Any], handle: Handle) -> None:
        """Cancel a worker by the extension's own cancel, without a grace period (which can end in SIGKILL).

        Safe only for a worker that is seen at work: before 2.0.2 it can crash the server when the worker is starting.
        """
        await conn.execute(self.query("select {f}(%s, %s)", f="cancel"), handle)

    async def cancel_all(self, conn: AsyncConnection[Any]) -> int:
        """Cancel every worker of this session; under the same condition as :meth:`cancel`."""
        return await self._number(conn, "cancel_all")

    async def wait(self, conn: AsyncConnection[Any], handle: Handle, milliseconds: int) -> bool:
        """Block this session until the worker ended, or for that many milliseconds; returns whether it ended."""
        if milliseconds <= 0:
            raise ValueError("a wait without a bound would block the session for ever")
        query = sql.SQL("select {}(%s, %s, %s)").format(self._wait_name)
        cursor = await conn.cursor(row_factory=scalar_row).execute(query, (*handle, milliseconds))
        return bool(await cursor.fetchone())

    async def wait_for(self, conn: AsyncConnection[Any], handle: Handle, milliseconds: int) -> ResultInfo | None:
        """Block this session until the worker ended, or for that many milliseconds; returns what is known of it then.

        The query's snapshot is held meanwhile: what waits for older snapshots to go (CREATE INDEX CONCURRENTLY) waits
        for it.
        """
        if milliseconds <= 0:
            raise ValueError("a wait without a bound would block the session for ever")
        waiting = sql.SQL("case when {}(%s, %s, %s) is not null then %s::int4 end").format(self._wait_name)
        query = sql.SQL(
            "select {columns} from (select {waiting} as pid offset 0) as w cross join lateral {info}(w.pid, %s) as r"
        ).format(columns=sql.SQL(self._info_columns), waiting=waiting, info=self.name("result_info"))
        cursor = await conn.cursor(row_factory=dict_row).execute(
            query, (*handle, milliseconds, handle.pid, handle.cookie)
        )
        row = await cursor.fetchone()
        return _result_info(row) if row is not None else None

    async def list(self, conn: AsyncConnection[Any]) -> list[Mapping[str, Any]]:
        """Return the workers that this session tracks: pid, cookie, label, state, … as the extension lists them."""
        if self.numbers >= (1, 10):
            query = sql.SQL("select * from {}").format(sql.Identifier(self.schema, "pg_background_list"))
        else:
            query = sql.SQL("select * from {}() as l({})").format(self.name("list"), sql.SQL(LIST_COLUMNS_1_9))
        cursor = await conn.cursor(row_factory=dict_row).execute(query)
        return list(await cursor.fetchall())

    async def stats(self, conn: AsyncConnection[Any]) -> Mapping[str, Any]:
        """Return the session's counters: launched, completed, failed, … workers."""
        cursor = await conn.cursor(row_factory=dict_row).execute(self.query("select * from {f}()", f="stats"))
        return await cursor.fetchone() or {}

    async def _number(self, conn: AsyncConnection[Any], function: str) -> int:
        query = sql.SQL("select {}()").format(self.name(function))
        cursor = await conn.cursor(row_factory=scalar_row).execute(query)
        return int(await cursor.fetchone() or 0)

    def supervision(
        self, columns: sql.Composable | None, *, padded: bool, numbers_up_to: int | None = None
    ) -> Sequence[str]:
        """Return the statements by which a supervisor inside the server runs its worker, with $1 and $2 for a handle.

        1. launch: of the text $1, with the queue size $2 and the label $3.
        2. ``result_info``: row count, tag, completed, has_error.
        3. ``error_info``: an array.
        4. ``result``, read to its end: the number of rows; tag and count of the last statement as one text, or null
           where ``columns`` are given; ``padded``, with which they are those of the last statement but one.
        5. the wait for the worker's end, for $3 milliseconds at most; from 2.0 on. The function of 1.9 and 1.10 is gone
           in 2.0, and an update may come while the supervisor is at work.

        Parameters
        ----------
        numbers_up_to:
            How many statements the worker has, where it reports as its progress which one is at work. An error in a
            statement then has "statement 2 of 3" as the last line of its context; one at the commit does not. They are
            told apart by the line of the worker's own, which the context of the first alone ends with.
        """
        context = "context"
        if numbers_up_to is not None:
            numbered = f"^statement [0-9]+ of {numbers_up_to}$"
            context = _NUMBERED_CONTEXT.format(numbered=numbered, progress=self.text("get_progress"))
        texts = {
            "launch": "select pid, cookie from {f}($1, $2, $3)",
            "result_info": "select row_count, command_tag, completed, has_error from {f}($1, $2)",
            "error_info": "select array[sqlstate, message, detail, hint, {context}{more}] from {f}($1, $2)",
            "result": _RESULT_OF_COLUMNS if columns is not None else _RESULT_OF_PADDED if padded else _RESULT_OF_TAGS,
        }
        if not self.v2_names:
            texts["wait"] = "select {f}($1, $2, $3)"
        parts = {
            "more": "" if self.v2_names else ", schema_name, table_name, column_name, constraint_name",
            "context": context,
            "columns": columns.as_string(None) if columns is not None else "",
            "info": self.text("result_info"),
        }
        return [text.format(f=self.text(function), **parts) for function, text in texts.items()]

    def grant_statement(self, role: str) -> str:
        """Return the statement with which an administrator lets ``role`` use the extension."""
        return sql.SQL("GRANT {} TO {};").format(sql.Identifier(ROLE), sql.Identifier(role)).as_string(None)


_NUMBERED_CONTEXT = (
    "case when pg_catalog.textregexeq(context, '(^|\n)background worker, pid [0-9]+$')"
    " then pg_catalog.concat_ws(E'\n', context, (select pg_catalog.substring(p.progress_msg, '{numbered}')"
    " from {progress}($1, $2) as p)) else context end"
)
_RESULT_OF_COLUMNS = "select count(*), null, false from {f}($1, $2) as r({columns})"
_RESULT_OF_PADDED = "select count(*), (array_agg(r.tag))[count(*)::int4 - 1], true from {f}($1, $2) as r(tag text)"
# A result has "SELECT 9" for CREATE TABLE AS, and no count of a refresh; result_info has the statement's own tag and
# count. It has to be asked first, since reading the result forgets the handle: so the result's arguments depend on it.
_RESULT_OF_TAGS = (
    "select count(*), coalesce(max(case when i.completed then i.command_tag || ' ' || i.row_count end),"
    " (array_agg(r.tag))[count(*)::int4]), false"
    " from {info}($1, $2) as i cross join lateral {f}($1, case when i.completed is not null then $2 end) as r(tag text)"
)


def _result_info(row: dict[str, Any]) -> ResultInfo:
    times = {name: datetime.fromtimestamp(row[name], UTC) for name in ("started_at", "finished_at") if row.get(name)}
    return ResultInfo(**{**row, **times})
