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
OnNotice: TypeAlias = Callable[[psycopg.errors.Diagnostic], None]
"""Called with each message that a worker's SQL raises, as it is raised."""
logger = logging.getLogger("pgbg_orchestration")
TOKEN = "pgbg.session_token"  # noqa: S105  (the name of a setting)
DETACHES = 4  # tries, before a session that cannot forget its handles is given up
KEYS = f"keys_{secrets.token_hex(8)}"  # stands for the recording query's rows; random: in no schema's name
ASK_EACH = 20  # every so many polls ask for each handle, whatever the list of workers says


class ReceiptKey(NamedTuple):
    """One launch of a job, as its receipt names it; ``is_padded``: a statement of ours stands behind its last one."""

    owner: str
    job_id: str
    attempt: int
    is_padded: bool


class Proof(NamedTuple):
    """The receipt of a launch that committed, and whose end is in the history."""

    worker_pid: int
    started_at: datetime
    seen_at: datetime


class Nudge:
    """Ends a wait early: an event for a single waiter, which needs no task to wait for it."""

    __slots__ = ("_is_set", "call")

    def __init__(self) -> None:
        self._is_set = False
        self.call: Callable[[], None] | None = None  # wakes the waiter

    def set(self) -> None:
        """End the wait, or the next one where nobody waits now."""
        self._is_set = True
        if self.call is not None:
            self.call()

    def clear(self) -> None:
        """Let the next wait take its time."""
        self._is_set = False

    def is_set(self) -> bool:
        """Say whether it was set since the last wait."""
        return self._is_set


@dataclass(slots=True, eq=False)
class Worker:
    """A worker that this process launched: its handle, and the future of its end.

    ``end`` gets the last ``ResultInfo``, or None when the handle is lost.
    """

    session: HandleSession
    handle: Handle
    launched_at: float  # seconds of the event loop's clock
    end: asyncio.Future[ResultInfo | None]
    poll_interval: float | None = None  # the longest time between two polls; None for the usual one
    receipt_key: ReceiptKey | None = None  # the launch that its receipt would prove, where it writes one
    proof: Proof | None = None  # that receipt, once this session has read it and written it into the history
    nudge: Nudge = field(default_factory=Nudge)  # to whoever follows it: look now

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
        The query that reads the receipts of launches, and writes the ends of those that committed into the history.
        ``KEYS`` in it stands for a row for each launch: the key of its receipt, and its handle. None: hints are not
        acted on here.
    """

    def __init__(self, conn: AsyncConnection[Any], extension: Extension, recording: bytes | None = None) -> None:
        self._conn = conn
        self.extension = extension
        self._recording = recording
        self._hints: dict[Handle, Worker] = {}
        self._recorder: asyncio.Task[None] | None = None
        self._polls, self._looked = 0, 0.0
        self._due = 0.0  # when it polls next
        self._shortest: float | None = None  # the shortest poll_interval that a caller gave
        self._may_poll = pace.POLLING_AT_ONCE  # seconds of polling that were left after the last poll
        self.workers: dict[Handle, Worker] = {}
        self.lost = False
        self.is_clean = True  # False once a reader has left settings of its own here, or an unfinished statement
        self._token = secrets.token_hex(8)
        self._turn = asyncio.Lock()
        self._wake = asyncio.Event()
        self._poller: asyncio.Task[None] | None = None
        self._answered = self._polled = asyncio.get_running_loop().time()
        self._releasing: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """End the session; its workers go on, and whoever waits for them is told that their handles are lost."""
        self._give_up()
        asking = (self._poller, self._recorder, *self._releasing)
        try:
            await connection.break_off(task for task in asking if task is not None)
        finally:
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
            known.end.set_result(None)  # the pair was given again: nothing more is known of the older worker
        worker = Worker(self, handle, loop.time(), loop.create_future(), poll_interval, receipt_key)
        if poll_interval is not None:
            self._shortest = min(poll_interval, self._shortest or poll_interval, pace.HANDLE_LATEST)
        self.workers[handle] = worker
        return worker

    async def wait_for(self, worker: Worker) -> None:
        """Have the server wait a moment for a worker's end, in place of the first polls.

        This session does nothing else meanwhile. An end that comes later, or an error here, is for the polls to find.
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
            # Nobody would poll these workers any more. Their receipts tell how they end.
            logger.exception("the polling of a launching session failed; its workers are followed by their receipts")
            self._give_up()

    async def _poll_in_turn(self) -> None:
        loop = asyncio.get_running_loop()
        while not self.lost and (pause := self._pause(loop.time())) is not None:
            # One query polls all, when the first worker is due, or later, where polling has cost too much.
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
        """Seconds without a poll, after polls that took more than their share of the time."""
        return min(-self._may_poll / pace.POLLING, pace.LOOK_SOONEST)

    def _pause(self, now: float) -> float | None:
        """Return how long to wait before the next poll; None where no worker is waited for.

        The younger a worker, the sooner it is due, unless a caller gave an interval. So the youngest is looked at
        first, and those are left out that are too old to be due sooner, even with the shortest interval.
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
                    token, tracked, handles = await self.extension.ended(self._conn, TOKEN)
                    self._check_token(token)
                    if tracked < len(self.workers) or self._polls % ASK_EACH == 0:
                        handles = [*self.workers]  # the list lacks one, or it is time to ask for each
                    await self._look_for_blocked()
                    handles = [handle for handle in handles if self._waits_for(handle)]
                    infos = await self.extension.ends(self._conn, handles) if handles else {}
            except PoolerInTransactionMode as error:
                self._give_up(error)
                return
            except (psycopg.Error, OSError, TimeoutError):
                # This session cannot tell its workers' state any more; their receipts can.
                self._give_up()
                return
            self._answered = asyncio.get_running_loop().time()
            self._may_poll = pace.polling_left(self._may_poll, began - self._polled, self._answered - began)
            self._polled = self._answered
            reports = [(self.workers[handle], info) for handle, info in infos.items() if handle in self.workers]
            # These have committed, it seems: what a hint would have had done is done now.
            faultless = [worker for worker, info in reports if info is not None and not info.has_error]
            await self._record_and_forget([w for w in faultless if w.receipt_key is not None and not w.end.done()])
        for worker, info in reports:
            if not worker.end.done():
                worker.end.set_result(info)

    def _waits_for(self, handle: Handle) -> bool:
        worker = self.workers.get(handle)
        return worker is not None and not worker.end.done()

    async def _look_for_blocked(self) -> None:
        """Now and then, find workers that wait for their output to be read, and have whoever follows them look."""
        if (now := asyncio.get_running_loop().time()) < self._looked + pace.BLOCKED:
            return
        self._looked = now
        pids = await activity.waiting_for(self._conn, OUTPUT_WAITS)
        if not pids:
            return
        for worker in self.workers.values():
            if worker.handle.pid in pids and not worker.end.done():
                worker.nudge.set()  # to look, not to believe it: the pid of a handle can be another's

    def _check_token(self, token: str | None) -> None:
        if token != self._token:
            raise PoolerInTransactionMode(
                "this connection is given another server session from one statement to the next",
                todo="Connect to the server itself, or through a pool in session mode.",
            )

    # Hearing ------------------------------------------------------------------------------------------------------

    def hear(self, worker: Worker) -> None:
        """Take a hint that a worker may have committed: its receipt is read, and decides."""
        if worker.end.done() or self.lost:
            return
        if worker.receipt_key is None or self._recording is None:
            worker.nudge.set()
            return
        self._hints[worker.handle] = worker
        if self._recorder is None or self._recorder.done():
            self._recorder = asyncio.create_task(self._record_hints())
            self._recorder.add_done_callback(self._released)

    async def _record_hints(self) -> None:
        """Record the ends of all launches that hints came for meanwhile, together."""
        while self._hints and not self.lost:
            async with self._turn:
                hints, self._hints = self._hints, {}
                await self._record_and_forget([worker for worker in hints.values() if not worker.end.done()])

    async def _record_and_forget(self, workers: Sequence[Worker]) -> None:
        """Write the ends of those that committed into the history, tell who waits for them, and forget the handles."""
        if not workers or self._recording is None or self.lost:
            return
        ends = await self._record(workers)
        for worker, info in ends:
            if not worker.end.done():
                worker.end.set_result(info)
        if ends and not self.lost:
            await self._forget([worker for worker, _ in ends])

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
                return []  # the poll finds its end
            return [pair for worker in workers for pair in await self._record([worker])]
        faults.point("after_record")
        ends = []
        for number, pid, started_at, seen_at, row_count, tag, recorded in rows:
            if not recorded:
                continue  # its report is not there yet, or the history has no line of it
            worker = workers[number]
            worker.proof = Proof(pid, started_at, seen_at)
            ends.append((worker, ResultInfo(True, False, row_count, tag, started_at, seen_at)))
        return ends

    async def _forget(self, workers: Sequence[Worker]) -> None:
        """Forget handles whose ends are in the history; those whose results were read are forgotten already."""
        known = [worker for worker in workers if self.workers.pop(worker.handle, None) is not None]
        handles = [worker.handle for worker in known if worker.receipt_key is None or not worker.receipt_key.is_padded]
        if handles:
            await self._detach(lambda: self.extension.detach_many(self._conn, handles))
        faults.point("after_detach")

    async def _detach(self, question: Callable[[], Awaitable[None]]) -> None:
        """Have the server forget handles, and try again where somebody cancels that. Called in this session's turn."""
        for attempt in range(DETACHES):
            if await self._needs_no_retry(question):
                return
            await asyncio.sleep(pace.backoff(attempt))
        self._give_up()  # handles that it keeps count against pg_background.max_workers: another session is opened

    async def _needs_no_retry(self, question: Callable[[], Awaitable[None]]) -> bool:
        """Ask; returns False where the query was cancelled. With the session lost, there is nothing to try again."""
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
        """Return what the SQL of these workers last reported, by one query; without those that reported nothing."""
        workers_by_handle = {worker.handle: worker for worker in workers}
        if self.lost:
            return {}
        reports = await self._ask(lambda: self.extension.progress(self._conn, [*workers_by_handle]))
        return {workers_by_handle[handle]: progress for handle, progress in (reports or {}).items()}

    async def drain(
        self, worker: Worker, readable: Readable, on_notice: OnNotice | None = None
    ) -> tuple[int | None, str | None]:
        """Read the worker's result to its end, which proves its commit; returns row count and command tag.

        This session does nothing else meanwhile. However it ends, the server has forgotten the handle then; a worker
        whose result was not read to its end goes on.

        Raises
        ------
        psycopg.Error
            As :meth:`Extension.drain`.
        ConnectionLost
            The connection is gone.
        """
        async with self.reading(worker, on_notice) as conn:
            return await self.extension.drain(conn, worker.handle, readable.columns, padded=readable.padded)

    @asynccontextmanager
    async def reading(self, worker: Worker, on_notice: OnNotice | None) -> AsyncIterator[AsyncConnection[Any]]:
        """Lend the connection to read a worker's result; the handle is forgotten with that. Raises as :meth:`drain`."""
        heard = _of_the_worker(on_notice) if on_notice is not None else None
        async with self._turn:
            if self.lost:
                raise ConnectionLost("the launching session is lost")
            self.workers.pop(worker.handle, None)
            was_clean, self.is_clean = self.is_clean, False
            try:
                if heard is not None:
                    # What the worker raised, this session raises again: its own threshold must not hold it back.
                    await connection.configure(self._conn, (("client_min_messages", "debug1"),))
                    self._conn.add_notice_handler(heard)
                yield self._conn
                self.is_clean = was_clean and on_notice is None
            except (psycopg.Error, OSError) as error:
                if self._give_up_if_lost(error):
                    raise ConnectionLost(str(error)) from error
                raise
            finally:
                if heard is not None:
                    self._conn.remove_notice_handler(heard)
                if not worker.end.done():
                    worker.end.set_result(None)

    async def read_failed(self, worker: Worker, on_notice: OnNotice) -> psycopg.Error | None:
        """Read what a worker that failed had raised before; returns its error, which has a position only here.

        The server keeps what ``client_min_messages`` lets through: WARNINGs, where nothing else is set. Reading it
        forgets the handle.
        """
        if self.workers.pop(worker.handle, None) is None or self.lost:
            return None

        async def read() -> None:
            self._conn.add_notice_handler(on_notice)
            try:
                await self.extension.result(self._conn, worker.handle)
            finally:
                self._conn.remove_notice_handler(on_notice)

        error = None
        try:
            await self._ask(read)
        except psycopg.Error as raised:
            error = raised  # the worker's own; or one about its rows, which do not fit the text column asked for
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
        """Have a worker detached once this session has time; does not wait for it."""
        if worker.handle not in self.workers and worker.end.done():
            return  # forgotten already
        releasing = asyncio.create_task(self.detach(worker))
        self._releasing.add(releasing)
        releasing.add_done_callback(self._released)

    def _released(self, releasing: asyncio.Task[None]) -> None:
        self._releasing.discard(releasing)
        if not releasing.cancelled() and releasing.exception() is not None:
            # A handle that stays counts against pg_background.max_workers: another session takes this one's place.
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
            # In the session's turn: no launch may come in between.
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


def _of_the_worker(on_notice: OnNotice) -> OnNotice:
    """Leave out what the reading session says by itself at this threshold: 1.10 tells how it tidies up, as DEBUG."""

    def hear(diag: psycopg.errors.Diagnostic) -> None:
        if diag.severity_nonlocalized != "DEBUG" or "background worker, pid " in (diag.context or ""):
            on_notice(diag)

    return hear
