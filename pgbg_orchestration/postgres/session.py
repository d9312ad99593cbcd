"""One launching session: the PostgreSQL session that launches workers, and follows many of them by their handles."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import psycopg
from psycopg import AsyncConnection, IsolationLevel, sql

from pgbg_orchestration import pace
from pgbg_orchestration.rows import Column
from pgbg_orchestration.testing import faults
from pgbg_orchestration.threads import off_loop

from . import connection, describe, launch_message
from .connection import ConnectionLost, ExtensionMoved
from .handles import TOKEN, HandleSession, ReceiptKey, Worker
from .launch_message import Begun, LaunchRefused, MayBeLaunched, Opening, SlotsUsedUp
from .pg_background import MAX_TRACKED, NO_SLOT, Extension, Handle

OPENED_TOGETHER = 8  # openings in one message at most: while it runs, no worker's end is recorded
LAUNCHES = 2_000  # then the session is replaced when its workers have ended: old versions leak memory for each launch


class _Wanted(NamedTuple):
    """An opening that waits for the session's turn, or for its answer."""

    opening: Opening
    script: bytes
    poll_interval: float | None
    begun: asyncio.Future[Begun]


class LaunchingSession(HandleSession):
    """A session that launches workers, and owns their handles; parameters as of :class:`HandleSession`."""

    def __init__(self, conn: AsyncConnection[Any], extension: Extension, recording: bytes | None = None) -> None:
        super().__init__(conn, extension, recording)
        self.launches = 0
        # Only one message of launches waits for the session's turn: a worker's end need not wait behind all of them.
        self._launching = asyncio.Lock()
        self._openings: deque[_Wanted] = deque()  # those that have no answer yet
        self._opener: asyncio.Task[None] | None = None

    @classmethod
    async def open(
        cls, conninfo: connection.Conninfo, extension: Extension, recording: bytes | None = None
    ) -> LaunchingSession:
        """Connect.

        Raises
        ------
        psycopg.OperationalError
            The server cannot be reached.
        """
        conn = await connection.connect(conninfo, "pgbg: launching")
        try:
            await conn.set_isolation_level(IsolationLevel.READ_COMMITTED)
            session = cls(conn, extension, recording)
            # Workers inherit these settings: none of them may matter to a job's SQL.
            await connection.configure(
                conn,
                (
                    (TOKEN, session._token),
                    ("pg_background.max_workers", str(MAX_TRACKED)),
                    ("idle_session_timeout", "0"),
                ),
            )
        except BaseException:
            await connection.close(conn)  # the caller may have been cancelled meanwhile
            raise
        return session

    async def close(self) -> None:
        """End the session as :meth:`HandleSession.close` does; what has no answer yet may be launched all the same."""
        self._give_up()
        try:
            if self._opener is not None:  # not cancelled: it tells each of them that the session is lost
                await asyncio.wait({self._opener}, timeout=pace.BREAK)
        finally:
            await super().close()

    @property
    def worn(self) -> bool:
        """Whether the session should be replaced when its workers have ended."""
        return self.lost or self.launches >= LAUNCHES

    @property
    def is_idle(self) -> bool:
        """Whether it is as good as a new one: it has no worker, is asked nothing, and has its first settings."""
        busy = self.load or self._releasing or self._turn.locked()
        return not self.worn and not busy and self.is_clean

    @property
    def load(self) -> int:
        """How many workers it follows, and has been asked to launch."""
        return len(self.workers) + len(self._openings)

    @property
    def room(self) -> bool:
        """Whether another worker can be launched here now without waiting for another call."""
        return not self.worn and not self._turn.locked() and self.load < MAX_TRACKED - 1

    # Registering and launching ------------------------------------------------------------------------------------

    async def script(self, text: Opening, settings: Mapping[str, str]) -> bytes:
        """Return the statements of an opening, for :meth:`begin`; ``settings`` hold for the worker."""
        launch = self.extension.text("launch")
        return await off_loop(text.size, lambda: text.script(self._conn, settings, launch))

    def begin(self, text: Opening, script: bytes, *, poll_interval: float | None) -> asyncio.Future[Begun]:
        """Register a job of which nothing is known, and launch it, in one round trip; awaited like :meth:`launch`.

        Those that wait for this session's turn go in one message. The registration is committed before the launch;
        ``text.registration`` has it, also where the launch failed. Raises what :meth:`launch` does, and psycopg.Error
        where the registration is refused.
        """
        wanted = _Wanted(text, script, poll_interval, asyncio.get_running_loop().create_future())
        self._openings.append(wanted)
        if self._opener is None or self._opener.done():
            self._opener = asyncio.create_task(self._open_in_turn())
        return wanted.begun

    async def _open_in_turn(self) -> None:
        while self._openings:
            async with self._launching, self._turn:
                several = [*islice(self._openings, OPENED_TOGETHER)]
                try:
                    await self._open(several)
                except Exception as error:  # noqa: BLE001  (whoever waits gets it)
                    for wanted in several:
                        self._answer(wanted, error)

    async def _open(self, several: Sequence[_Wanted]) -> None:
        """Run openings; of those behind one that fails nothing is done, and they stay in the queue."""
        for _ in several:
            faults.point("before_launch")
        if self.lost:
            raise ConnectionLost("the launching session is lost")
        try:
            async with asyncio.timeout(pace.CALL):
                ran = await launch_message.run(self._conn, [(wanted.opening, wanted.script) for wanted in several])
        except (psycopg.Error, OSError, TimeoutError) as error:
            self._give_up()
            raise MayBeLaunched(error) from error
        for wanted, answer in zip(several, ran, strict=False):
            if isinstance(answer, launch_message.StatementFailed):
                self._answer(wanted, self._opening_error(wanted.opening, answer))
            else:
                self._answer(wanted, self._begun(wanted, answer))

    def _answer(self, wanted: _Wanted, answer: Begun | Exception) -> None:
        if wanted.begun.done():
            return
        self._openings.remove(wanted)
        if isinstance(answer, Exception):
            wanted.begun.set_exception(answer)
        else:
            wanted.begun.set_result(answer)

    def _begun(self, wanted: _Wanted, handle: Handle | None) -> Begun:
        text = wanted.opening
        assert text.registration is not None
        if handle is None:
            return Begun(text.registration, None)
        faults.point("after_launch")
        receipt_key = ReceiptKey(text.owner, text.job_id, text.registration["attempt"], text.is_padded)
        worker = self._take_handle(handle, wanted.poll_interval, receipt_key if text.is_counted else None)
        self._start_polling(worker)
        return Begun(text.registration, worker)

    def _opening_error(self, text: Opening, failure: launch_message.StatementFailed) -> Exception:
        error = failure.error
        lost = self._give_up_if_lost(error)
        if text.registration is None and isinstance(error, psycopg.errors.LockNotAvailable):
            return ConnectionLost(str(error))  # a row is locked: the next turn waits for it
        if text.registration is None and not lost and not connection.is_passing(error):
            return error
        return self._launch_error(error, called=failure.called, lost=lost)

    def _launch_error(self, error: BaseException, *, called: bool, lost: bool) -> Exception:
        """Return what a failed launch means for whoever asked for it."""
        if not called and (lost or connection.is_passing(error)):
            return ConnectionLost(str(error))
        if lost or not isinstance(error, psycopg.Error):
            return MayBeLaunched(error)
        if isinstance(error, psycopg.errors.UndefinedFunction | psycopg.errors.InvalidSchemaName):
            self._give_up()
            return ExtensionMoved(str(error))
        if called and error.sqlstate in NO_SLOT:
            return SlotsUsedUp(error)
        if called and not isinstance(error, psycopg.errors.InsufficientPrivilege):
            return MayBeLaunched(error)
        return LaunchRefused(error, called=called)

    # Launching ----------------------------------------------------------------------------------------------------

    def launch(
        self,
        text: str,
        *,
        label: str,
        queue_size: int | None,
        settings: Mapping[str, str],
        role: str | None = None,
        poll_interval: float | None = None,
        receipt_key: ReceiptKey | None = None,
    ) -> asyncio.Task[Worker]:
        """Begin to launch a worker, with settings that hold for it and not for this session.

        The call is a task of its own, to be awaited behind ``asyncio.shield``: cancelling it on its way would not
        undo the launch.

        Raises (when awaited)
        ---------------------
        SlotsUsedUp
            There is no worker slot (53000, 53400), or no shared memory for its queue (53100).
        LaunchRefused
            A setting, a role or a privilege is wrong; nothing was launched.
        ConnectionLost
            The connection was lost, or a statement cancelled, before the call; nothing was launched.
        ExtensionMoved
            It was dropped, or has another schema by now; nothing was launched.
        MayBeLaunched
            The connection or the call was lost on its way.
        """
        return asyncio.create_task(self._launch(text, label, queue_size, settings, role, poll_interval, receipt_key))

    async def _launch(
        self,
        text: str,
        label: str,
        queue_size: int | None,
        settings: Mapping[str, str],
        role: str | None,
        poll_interval: float | None,
        receipt_key: ReceiptKey | None,
    ) -> Worker:
        values = {**settings, **({"role": role} if role else {})}
        function = self.extension.text("launch")
        script = await off_loop(
            len(text), lambda: launch_message.call(self._conn, function, text, label=label, queue_size=queue_size)
        )
        async with self._launching, self._turn:
            called = False
            try:
                async with asyncio.timeout(pace.CALL):
                    await launch_message.begin(self._conn, values)
                    faults.point("before_launch")
                    called = True
                    handle = await launch_message.launch(self._conn, script)
                    faults.point("after_launch")
            except launch_message.StatementFailed as failure:
                lost = self._give_up_if_lost(failure.error)
                raise self._launch_error(failure.error, called=failure.called, lost=lost) from failure.error
            except (psycopg.Error, OSError, TimeoutError) as error:
                self._give_up()
                raise self._launch_error(error, called=called, lost=True) from error
            worker = self._take_handle(handle, poll_interval, receipt_key)
        self._start_polling(worker)
        return worker

    def _take_handle(self, handle: Handle, poll_interval: float | None, receipt_key: ReceiptKey | None) -> Worker:
        self.launches += 1
        return self._track(handle, poll_interval, receipt_key)

    # Before a launch ----------------------------------------------------------------------------------------------

    async def describe(
        self, text: str, settings: Mapping[str, str], *, without_types: bool = False
    ) -> sql.Composable | None:
        """Return the column definition list of a statement's result, None without one; nothing is run.

        Parameters
        ----------
        text:
            One statement.
        settings:
            What its worker has: names mean other things in another search_path.
        without_types:
            Only ask whether the server takes the statement, and return None.

        Raises
        ------
        psycopg.Error
            The server refuses the statement.
        UnreadableResult
            It gives a column that no column definition list can name.
        ConnectionLost
            The connection is gone, or the call was broken off.
        """
        # Shielded: cancelled half way, it would cost the connection.
        if not await asyncio.shield(asyncio.create_task(self._gives_columns(text, settings))) or without_types:
            return None
        columns = await self.describe_named(text, settings)
        return describe.definition_of([c.type for c in columns]) if columns else None

    async def _gives_columns(self, text: str, settings: Mapping[str, str]) -> bool:
        local = launch_message.local(self._conn, {**settings, "statement_timeout": "0"})
        async with self._turn:
            try:
                async with asyncio.timeout(pace.CALL):
                    return await describe.gives_columns(self._conn, text, local)
            except (psycopg.Error, OSError, TimeoutError) as error:
                if not self._give_up_if_lost(error) and not connection.is_passing(error):
                    raise
                raise ConnectionLost(str(error)) from error

    async def describe_named(self, text: str, settings: Mapping[str, str]) -> list[Column]:
        """Return the columns of a statement's result, types qualified; raises as :meth:`describe`."""
        async with self._turn:
            try:
                async with asyncio.timeout(pace.CALL), self._conn.transaction(force_rollback=True):
                    await connection.configure(self._conn, (*settings.items(), ("statement_timeout", "0")), local=True)
                    columns = await describe.named_columns_of(self._conn, text)
                    # Types come qualified then: whoever reads the result may have another search_path.
                    await connection.configure(self._conn, (("search_path", "pg_catalog"),), local=True)
                    types = await describe.type_names(self._conn, [(oid, modifier) for _, oid, modifier in columns])
                    return [Column(*column, type_) for column, type_ in zip(columns, types, strict=True)]
            except (psycopg.Error, OSError, TimeoutError) as error:
                if not self._give_up_if_lost(error) and not connection.is_passing(error):
                    raise
                raise ConnectionLost(str(error)) from error
