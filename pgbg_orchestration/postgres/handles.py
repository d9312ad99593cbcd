"""Handles, in the session that owns them: which of its workers have ended, how, and what they gave.

A handle works in the session that launched it and nowhere else. When the session ends, its workers go on and commit;
whoever waits for them here learns that the handle is gone and looks at lock and receipt instead.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NamedTuple, TypeAlias, TypeVar

import psycopg
from psycopg import AsyncConnection
from psycopg.rows import tuple_row

from pgbg_orchestration import pace
from pgbg_orchestration.errors import PoolerInTransactionMode
from pgbg_orchestration.outcome import ErrorFields
from pgbg_orchestration.testing import faults

from . import activity, connection
from .connection import ConnectionLost
from .describe import Readable
from .pg_background import OUTPUT_WAITS, Extension, Handle, Progress, ResultInfo

T = TypeVar("T")
Hearing: TypeAlias = Callable[[psycopg.errors.Diagnostic], None]
logger = logging.getLogger("pgbg_orchestration")
TOKEN = "pgbg.session_token"  # noqa: S105  (the name of a setting)
DETACHES = 4  # tries, before a session that cannot forget its handles is given up
KEYS = f"keys_{secrets.token_hex(8)}"  # stands in the query that records for what is recorded; in no name besides
ASKED_ALL = 20  # polls, after which each handle is asked for by itself


class ReceiptKey(NamedTuple):
    """One launch of a job, as its receipt names it; ``is_padded``: a statement of ours stands behind its last one."""

    owner: str
    job_id: str
    attempt: int
    is_padded: bool


class Proof(NamedTuple):
    """The receipt of a launch: it committed, and its end is in the history."""

    worker_pid: int
    started_at: datetime
    seen_at: datetime


class Nudge:
    """That somebody should look before the time: an event for one that waits, without a task for each wait."""

    __slots__ = ("_given", "call")

    def __init__(self) -> None:
        self._given = False
        self.call: Callable[[], None] | None = None  # wakes who waits

    def set(self) -> None:
        """Give it."""
        self._given = True
        if self.call is not None:
            self.call()

    def clear(self) -> None:
        """Take it back: it was looked."""
        self._given = False

    def is_set(self) -> bool:
        """Say whether it was given since."""
        return self._given


@dataclass(slots=True, eq=False)
class Worker:
    """A worker that this process launched: its handle, and the future of how it ended.

    ``end`` gets the last ``ResultInfo``, or None when the handle is lost.
    """

    session: HandleSession
    handle: Handle
    launched_at: float  # seconds of the event loop's clock
    end: asyncio.Future[ResultInfo | None]
    poll_interval: float | None = None  # the longest time between two polls; None for the usual one
    receipt_key: ReceiptKey | None = None  # the launch that its receipt would prove, where it writes one
    proof: Proof | None = None  # that receipt, read after its commit was heard of; it is in the history then
    nudged: Nudge = field(default_factory=Nudge)  # somebody should look at it before its time

    @property
    def gone(self) -> bool:
        """Whether the handle is lost."""
        return self.end.done() and self.end.result() is None

    async def error(self) -> ErrorFields | None:
        """Return the worker's error; None without one, or with the session lost."""
        return await self.session.error_info(self.handle)

    async def detach(self) -> None:
        """Forget the handle: the worker goes on, its output is dropped."""
        await self.session.detach(self)

    def release(self) -> None:
        """Forget the handle, in the session's own time."""
        self.session.release(self)


class HandleSession:
    """A session that owns handles, and polls all their workers with one query.

    Parameters
    ----------
    conn:
        Its connection, in autocommit mode; this object owns it.
    extension:
        pg_background as installed there.
    recording:
        The query that reads the receipts of launches, writes their ends into the history, and tells both; of receipts'
        keys and of handles, a row each in the place of ``KEYS``. None: nothing is heard of.
    """

    def __init__(self, conn: AsyncConnection[Any], extension: Extension, recording: bytes | None = None) -> None:
        self._conn = conn
        self.extension = extension
        self._recording = recording
        self._heard: dict[Handle, Worker] = {}
        self._recorder: asyncio.Task[None] | None = None
        self._polls, self._looked = 0, 0.0
        self._due = 0.0  # when it polls next
        self._shortest: float | None = None  # of the intervals that its callers gave
        self._may_poll = pace.POLLING_AT_ONCE  # for so many seconds, as things stood when it last polled
        self.workers: dict[Handle, Worker] = {}
        self.lost = False
        self.is_clean = True  # no reader has left settings of its own, or a statement that was broken off
        self._token = secrets.token_hex(8)
        self._turn = asyncio.Lock()
        self._wake = asyncio.Event()
        self._poller: asyncio.Task[None] | None = None
        self._answered = self._polled = asyncio.get_running_loop().time()
        self._releasing: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """End the session; its workers go on, and whoever waits for them is told that their handles are lost."""
        self._give_up()
        for task in (self._poller, self._recorder, *self._releasing):
            if task is not None:
                task.cancel()
        await connection.close(self._conn)

    @property
    def stalled(self) -> bool:
        """Whether the session has workers, is asked something, and has not answered for a while."""
        return (
            bool(self.workers)
            and self._turn.locked()
            and asyncio.get_running_loop().time() - self._answered > pace.STALLED
        )

    # Following ----------------------------------------------------------------------------------------------------

    def _track(self, handle: Handle, poll_interval: float | None, receipt_key: ReceiptKey | None) -> Worker:
        loop = asyncio.get_running_loop()
        self._answered = loop.time()
        known = self.workers.pop(handle, None)
        if known is not None and not known.end.done():
            known.end.set_result(None)  # a pid and cookie given twice: trust neither
        worker = Worker(self, handle, loop.time(), loop.create_future(), poll_interval, receipt_key)
        if poll_interval is not None:
            self._shortest = min(poll_interval, self._shortest or poll_interval, pace.HANDLE_LATEST)
        self.workers[handle] = worker
        return worker

    async def wait_for(self, worker: Worker) -> None:
        """Have the server wait for a worker's end, and for a moment only, in place of the first polls.

        This session does nothing else meanwhile. Whatever goes wrong, or is not known then, its polls find out.
        """
        async with self._turn:
            if self.lost or worker.end.done() or self.workers.get(worker.handle) is not worker:
                return
            info = None
            try:
                async with asyncio.timeout(pace.CALL):
                    info = await self.extension.wait_for(self._conn, worker.handle, int(pace.WAIT_IN_SERVER * 1000))
            except (psycopg.Error, OSError, TimeoutError) as error:
                self._give_up_if_lost(error)
            self._answered = asyncio.get_running_loop().time()
        if info is not None and info.completed and not worker.end.done():
            worker.end.set_result(info)

    def _start_polling(self, worker: Worker) -> None:
        if self._poller is None or self._poller.done():
            self._poller = asyncio.create_task(self._poll_while_workers_run())
        elif worker.launched_at + max(pace.poll_handle(0, worker.poll_interval), self._resting) < self._due:
            self._wake.set()

    async def _poll_while_workers_run(self) -> None:
        try:
            await self._poll_in_turn()
        except Exception:
            # Whatever it was: nobody would poll these workers any more. Their receipts tell how they end.
            logger.exception("the polling of a launching session failed; its workers are followed by their receipts")
            self._give_up()

    async def _poll_in_turn(self) -> None:
        loop = asyncio.get_running_loop()
        while not self.lost and (pause := self._pause(loop.time())) is not None:
            # One query polls all: the one that is due first sets the pace, but for what polling may cost.
            pause = max(pause, self._resting)
            self._wake.clear()
            self._due = loop.time() + pause
            try:
                async with asyncio.timeout(pause):
                    await self._wake.wait()  # a new worker sets the pace anew
            except TimeoutError:
                await self.poll()

    @property
    def _resting(self) -> float:
        """How long it may not poll, for what it has polled."""
        return min(-self._may_poll / pace.POLLING, pace.LOOK_SOONEST)

    def _pause(self, now: float) -> float | None:
        """Return how long to wait before the next poll; None where no worker is waited for.

        The youngest sets the pace, and one with a shorter interval: further back than to where none could be due
        sooner, nobody is looked at.
        """
        pause = None
        for worker in reversed(self.workers.values()):
            age = now - worker.launched_at
            if pause is not None and pause <= pace.poll_handle(age, self._shortest):
                break
            if not worker.end.done():
                own = pace.poll_handle(age, worker.poll_interval)
                pause = own if pause is None else min(pause, own)
        return pause

    async def poll(self) -> None:
        """Look once which workers have ended, and tell those who wait for them."""
        async with self._turn:
            if self.lost or all(worker.end.done() for worker in self.workers.values()):
                return
            self._polls, began = self._polls + 1, asyncio.get_running_loop().time()
            try:
                async with asyncio.timeout(pace.CALL):
                    token, tracked, ended = await self.extension.ended(self._conn, TOKEN)
                    self._check_token(token)
                    if tracked < len(self.workers) or self._polls % ASKED_ALL == 0:
                        ended = [*self.workers]  # one is missing; and now and then each is asked for by itself
                    await self._look_for_blocked()
                    asked = [handle for handle in ended if self._waits_for(handle)]
                    found = await self.extension.ends(self._conn, asked) if asked else {}
            except PoolerInTransactionMode as error:
                self._give_up(error)
                return
            except (psycopg.Error, OSError, TimeoutError):
                # Whatever it was, this session cannot tell its workers' state any more; their receipts can.
                self._give_up()
                return
            self._answered = asyncio.get_running_loop().time()
            self._may_poll = pace.polling_left(self._may_poll, began - self._polled, self._answered - began)
            self._polled = self._answered
            told = [(self.workers[handle], info) for handle, info in found.items() if handle in self.workers]
            # What would have been done at a notification, had it come before.
            well = [worker for worker, info in told if info is not None and not info.has_error]
            await self._record_and_forget([w for w in well if w.receipt_key is not None and not w.end.done()])
        for worker, info in told:
            if not worker.end.done():
                worker.end.set_result(info)

    def _waits_for(self, handle: Handle) -> bool:
        worker = self.workers.get(handle)
        return worker is not None and not worker.end.done()

    async def _look_for_blocked(self) -> None:
        """Now and then, have whoever follows a worker look at it that waits for its output to be read."""
        if (now := asyncio.get_running_loop().time()) < self._looked + pace.BLOCKED:
            return
        self._looked = now
        pids = await activity.waiting_for(self._conn, OUTPUT_WAITS)
        if not pids:
            return
        for worker in self.workers.values():
            if worker.handle.pid in pids and not worker.end.done():
                worker.nudged.set()  # a hint: the pid of a handle can be another's

    def _check_token(self, token: str | None) -> None:
        if token != self._token:
            raise PoolerInTransactionMode(
                "this connection is given another server session from one statement to the next",
                todo="Connect to the server itself, or through a pool in session mode.",
            )

    # Hearing ------------------------------------------------------------------------------------------------------

    def hear(self, worker: Worker) -> None:
        """Take a hint that a worker's launch may have committed: its receipt is read, and nothing else believed."""
        if worker.end.done() or self.lost:
            return
        if worker.receipt_key is None or self._recording is None:
            worker.nudged.set()
            return
        self._heard[worker.handle] = worker
        if self._recorder is None or self._recorder.done():
            self._recorder = asyncio.create_task(self._record_heard())
            self._recorder.add_done_callback(self._released)

    async def _record_heard(self) -> None:
        """Read the receipts of all launches that were heard of meanwhile, and write down how they ended, together."""
        while self._heard and not self.lost:
            async with self._turn:
                heard, self._heard = self._heard, {}
                await self._record_and_forget([worker for worker in heard.values() if not worker.end.done()])

    async def _record_and_forget(self, workers: Sequence[Worker]) -> None:
        """Tell how launches ended that committed, when their ends are in the history, and forget their handles."""
        if not workers or self._recording is None or self.lost:
            return
        ended = await self._record(workers)
        for worker, info in ended:
            if not worker.end.done():
                worker.end.set_result(info)
        if ended and not self.lost:
            await self._forget([worker for worker, _ in ended])

    async def _record(self, workers: Sequence[Worker]) -> list[tuple[Worker, ResultInfo]]:
        assert self._recording is not None
        quote = connection.quoting(self._conn)
        keys = ", ".join(
            f"({', '.join([quote(value) for value in (*worker.receipt_key, *worker.handle, number)])})"
            for number, worker in enumerate(workers)
            if worker.receipt_key is not None
        )
        query = self._recording.replace(KEYS.encode(), keys.encode())  # as parameters they would cost twice the CPU
        faults.point("before_record")
        try:
            async with asyncio.timeout(pace.CALL):
                cursor = await self._conn.cursor(row_factory=tuple_row).execute(query)
                rows = await cursor.fetchall()
        except (psycopg.Error, OSError, TimeoutError) as error:
            if self._give_up_if_lost(error) or len(workers) == 1:
                return []  # it was a hint: the poll finds out
            return [pair for worker in workers for pair in await self._record([worker])]
        faults.point("after_record")
        ended = []
        for number, pid, started_at, seen_at, row_count, tag, recorded in rows:
            if not recorded:
                continue  # its report is not there yet, or the history has no line of it
            worker = workers[number]
            worker.proof = Proof(pid, started_at, seen_at)
            ended.append((worker, ResultInfo(True, False, row_count, tag, started_at, seen_at)))
        return ended

    async def _forget(self, workers: Sequence[Worker]) -> None:
        """Forget handles whose ends are in the history; the server has forgotten those whose results were read."""
        known = [worker for worker in workers if self.workers.pop(worker.handle, None) is not None]
        handles = [worker.handle for worker in known if worker.receipt_key is None or not worker.receipt_key.is_padded]
        if handles:
            await self._detach(lambda: self.extension.detach_many(self._conn, handles))
        faults.point("after_detach")

    async def _detach(self, question: Callable[[], Awaitable[None]]) -> None:
        """Have the server forget handles, in this session's turn; again where that is broken off."""
        for attempt in range(DETACHES):
            if await self._is_done(question):
                return
            await asyncio.sleep(pace.backoff(attempt))
        self._give_up()  # what it keeps counts against pg_background.max_workers; it can be done without

    async def _is_done(self, question: Callable[[], Awaitable[None]]) -> bool:
        """Ask; returns False where it was broken off, and may be asked again."""
        try:
            async with asyncio.timeout(pace.CALL):
                await question()
        except (psycopg.Error, OSError, TimeoutError) as error:
            lost = self._give_up_if_lost(error)
            if not lost and not connection.is_passing(error):
                raise
            return lost
        return True

    # A worker's end -----------------------------------------------------------------------------------------------

    async def error_info(self, handle: Handle) -> ErrorFields | None:
        """Return the error of a worker; None without one, or with this session lost."""
        return await self._ask(lambda: self.extension.error_info(self._conn, handle)) if not self.lost else None

    @property
    def is_busy(self) -> bool:
        """Whether the session is being asked something, or reads a result: another question would wait."""
        return self.lost or self._turn.locked()

    async def look_at_progress(self, workers: Sequence[Worker]) -> dict[Worker, Progress]:
        """Return what the SQL of these workers last reported, by one query; nothing of one that reported none."""
        handles = {worker.handle: worker for worker in workers}
        if self.lost:
            return {}
        found = await self._ask(lambda: self.extension.progress(self._conn, [*handles]))
        return {handles[handle]: progress for handle, progress in (found or {}).items()}

    async def drain(
        self, worker: Worker, readable: Readable, heard: Hearing | None = None
    ) -> tuple[int | None, str | None]:
        """Read the worker's result to its end, which proves its commit; returns row count and command tag.

        This session does nothing else meanwhile. However it ends, the server has forgotten the handle then; a worker
        whose result was not read to its end goes on.

        Parameters
        ----------
        heard:
            Is told what the SQL raises, as it is raised.

        Raises
        ------
        psycopg.Error
            As :meth:`Extension.drain`.
        ConnectionLost
            The connection is gone.
        """
        async with self.reading(worker, heard) as conn:
            return await self.extension.drain(conn, worker.handle, readable.columns, padded=readable.padded)

    @asynccontextmanager
    async def reading(self, worker: Worker, heard: Hearing | None) -> AsyncIterator[AsyncConnection[Any]]:
        """Lend the connection to read a worker's result; the handle is forgotten with that. Raises as :meth:`drain`."""
        async with self._turn:
            if self.lost:
                raise ConnectionLost("the launching session is lost")
            self.workers.pop(worker.handle, None)
            was_clean, self.is_clean = self.is_clean, False
            try:
                if heard is not None:
                    # The session raises them again, below its own threshold too.
                    await connection.configure(self._conn, (("client_min_messages", "debug1"),))
                    self._conn.add_notice_handler(heard)
                yield self._conn
                self.is_clean = was_clean and heard is None
            except (psycopg.Error, OSError) as error:
                if self._give_up_if_lost(error):
                    raise ConnectionLost(str(error)) from error
                raise
            finally:
                if heard is not None:
                    self._conn.remove_notice_handler(heard)
                if not worker.end.done():
                    worker.end.set_result(None)

    async def hear_failed(self, worker: Worker, heard: Hearing) -> psycopg.Error | None:
        """Tell what a worker that failed had raised, as far as the server kept it: WARNINGs, where nothing else is set.

        Returns what reading its result raises: its error, with a position. The handle is forgotten with that.
        """
        if self.workers.pop(worker.handle, None) is None or self.lost:
            return None

        async def read() -> None:
            self._conn.add_notice_handler(heard)
            try:
                await self.extension.result(self._conn, worker.handle)
            finally:
                self._conn.remove_notice_handler(heard)

        error = None
        try:
            await self._ask(read)
        except psycopg.Error as raised:
            error = raised  # the worker's own; or its rows do not fit, behind which nothing is heard
        faults.point("after_detach")
        return error

    async def detach(self, worker: Worker) -> None:
        """Forget a handle, and end the wait for it: the worker goes on, its output is dropped."""
        if self.workers.pop(worker.handle, None) is not None and not self.lost:
            async with self._turn:
                await self._detach(lambda: self.extension.detach(self._conn, worker.handle))
            faults.point("after_detach")
        if not worker.end.done():
            worker.end.set_result(None)

    def release(self, worker: Worker) -> None:
        """Detach a worker as soon as this session has time, without a wait for that."""
        if worker.handle not in self.workers and worker.end.done():
            return  # forgotten already
        releasing = asyncio.create_task(self.detach(worker))
        self._releasing.add(releasing)
        releasing.add_done_callback(self._released)

    def _released(self, releasing: asyncio.Task[None]) -> None:
        self._releasing.discard(releasing)
        if not releasing.cancelled() and releasing.exception() is not None:
            # A handle that may be kept counts against pg_background.max_workers; the session can be done without.
            logger.warning("a launching session is given up: it could not forget a worker: %s", releasing.exception())
            self._give_up()

    async def cancel_all(self, at_work: Callable[[Sequence[int]], Awaitable[bool]]) -> int:
        """Cancel every worker of this session by the extension's own ``cancel_all``; returns how many.

        Parameters
        ----------
        at_work:
            Tells whether all workers with these process ids are seen at work. Where one is not, nothing is cancelled:
            one that is starting can take the whole server down (pg_background before 2.0.2).
        """

        async def cancel() -> int:
            # Inside the session's turn, so that no launch comes in between.
            pids = [worker.handle.pid for worker in self.workers.values() if not worker.end.done()]
            return await self.extension.cancel_all(self._conn) if pids and await at_work(pids) else 0

        return await self._ask(cancel) or 0 if not self.lost else 0

    async def _ask(self, question: Callable[[], Awaitable[T]]) -> T | None:
        async with self._turn:
            try:
                async with asyncio.timeout(pace.CALL):
                    return await question()
            except (psycopg.Error, OSError, TimeoutError) as error:
                if not self._give_up_if_lost(error) and not connection.is_passing(error):
                    raise
                return None

    def _give_up(self, error: Exception | None = None) -> None:
        self.lost = True
        workers, self.workers = self.workers, {}
        for worker in workers.values():
            if worker.end.done():
                continue
            if error is None:
                worker.end.set_result(None)
            else:
                worker.end.set_exception(error)
                worker.end.exception()  # its waiter may be gone
        self._wake.set()

    def _give_up_if_lost(self, error: BaseException) -> bool:
        lost = connection.is_lost(self._conn, error)
        if lost:
            self._give_up()
        return lost
