"""The launch of a job: registered, composed, called for when there is a slot, and its handle taken over."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import NoReturn, TypeVar

import psycopg

from pgbg_orchestration import pace, telemetry
from pgbg_orchestration.errors import InvalidJob, ServerUnreachable
from pgbg_orchestration.job import Kind
from pgbg_orchestration.ledger.ledger import Ledger, NewLaunch
from pgbg_orchestration.ledger.sighting import Registration
from pgbg_orchestration.outcome import EventKind
from pgbg_orchestration.postgres import describe
from pgbg_orchestration.postgres.connection import ConnectionLost, ExtensionMoved
from pgbg_orchestration.postgres.describe import Readable
from pgbg_orchestration.postgres.handles import ReceiptKey, Worker
from pgbg_orchestration.postgres.launch_message import (
    Begun,
    LaunchRefused,
    LaunchText,
    MayBeLaunched,
    Opening,
    SlotsUsedUp,
)
from pgbg_orchestration.postgres.session import LaunchingSession
from pgbg_orchestration.statements import index_builds
from pgbg_orchestration.testing import faults
from pgbg_orchestration.threads import off_loop
from pgbg_orchestration.verdict import Intent

from . import failures, location
from .case import Case, first_of
from .follow import begin_reading
from .host import Host
from .memory import Stage
from .recording import record
from .worker_sql import PADDING, WORK, Work

T = TypeVar("T")
SESSIONS_LOST = 6  # one after the other, before a launch counts as impossible


class Launches:
    """The launches of one job: most need one.

    Parameters
    ----------
    host:
        Sessions and slots, shared with other jobs.
    case:
        The job; its memory and handles are changed here.
    """

    def __init__(self, host: Host, case: Case) -> None:
        self._host = host
        self._ledger: Ledger = host.ledger
        self._case = case

    async def begin(self) -> None:
        """Register and launch in one round trip a job of which nothing is known, as most are.

        Where something is known of it, no slot is free, or the answer is lost, the turn that follows looks, and goes on
        from what it sees.
        """
        case, work = self._case, self._case.work
        memory = case.memory
        is_first = case.opening is None and not memory.looked and not case.attempts
        if not is_first or not work.carries_receipt or memory.intent is not Intent.NONE:
            return
        if self._host.slots.waiting:
            return  # those who wait for a slot come first
        if case.options.notices or case.feed is not None:
            return  # its output is read while it runs, in a session of its own
        defaults = (await self._host.facts()).defaults
        text: str | LaunchText
        if work.has_supervisor:
            supervisor = await self._supervisor_for_opening()
            if supervisor is None:
                return
            text, arguments, settings = supervisor, None, work.launch_settings(None, defaults, None)
        else:
            case.text = telemetry.comment() + await off_loop(work.size, lambda: work.text(self._host.schema))
            text, arguments = case.text, (WORK, work.arguments())
            settings = work.settings(case.seconds_left(), defaults)
        case.limits = work.limits(defaults)
        faults.point("before_register")
        case.opening = Opening(
            owner=work.key.owner,
            job_id=work.key.job_id,
            registering=lambda quote: self._ledger.registering(work.key, quote, **self._new_launch()),
            text=text,
            arguments=arguments,
            label=work.label,
            queue_size=work.job.queue_size,
            is_counted=work.is_counted and not work.has_supervisor,
            is_padded=work.is_padded,
        )
        session = await self._host.session()
        script = await session.script(case.opening, settings)
        case.memory = case.memory.calling()
        case.call = session.begin(case.opening, script, poll_interval=case.options.poll_interval)
        try:
            await asyncio.shield(case.call)
        except ConnectionLost as lost:
            if isinstance(lost, ExtensionMoved):
                self._host.forget_facts()
        except SlotsUsedUp as error:
            self._on_slots_used_up(error)
        except MayBeLaunched as error:
            case.launch_error = error.error
        except LaunchRefused as error:
            await self.take_over_call()
            await self._refuse(error)
        await self.take_over_call()
        if case.opening.registration is not None:
            self._check_reuse(case.opening.registration["verdict"])
        await self._wait_at_first()

    async def _supervisor_for_opening(self) -> LaunchText | None:
        """Return the supervisor's text, whichever launch it will be; None where the job has to go the long way."""
        case, work = self._case, self._case.work
        if work.adds_supervisor or work.job.drop_invalid_index:
            return None
        try:
            readable = await self._make_readable()
        except InvalidJob:
            # The job may be committed already, and have dropped its own tables: the turn's look tells.
            return None
        case.slots = case.slots or self._host.turns.take_at_once(work.slots)
        if not case.slots:
            return None
        calls, settings = await self._supervision_of(readable)
        text = work.supervisor_text(self._host.schema, readable.text, calls, settings)
        return text._replace(head=telemetry.comment() + text.head)

    async def _supervision_of(self, readable: Readable) -> tuple[Sequence[str], Mapping[str, str]]:
        """Return what a supervisor calls to launch and follow its worker, and what that worker is to have set."""
        work, facts = self._case.work, await self._host.facts()
        calls = facts.extension.supervision(readable.columns, padded=readable.padded, numbers_up_to=work.numbers_up_to)
        return calls, {**facts.defaults, **work.settings(self._case.seconds_left(), facts.defaults)}

    async def _wait_at_first(self) -> None:
        case, worker = self._case, self._case.worker
        if worker is not None:
            faults.point("while_running")
            if case.session is not None and case.reading is None:
                # The session is this job's alone, so it may block. Shielded: a query that is cancelled costs it.
                await asyncio.shield(asyncio.create_task(worker.session.wait_for(worker)))
            # Most jobs end within this pause, and need no look. A look at once would show a worker that starts.
            await first_of(worker.end, worker.nudge, case.bounded(pace.LOOK_SOONEST))

    def _new_launch(self) -> NewLaunch:
        work, options = self._case.work, self._case.options
        return {
            "generation": work.job.generation,
            "label": work.label,
            "kind": work.kind,
            "sql_digest": work.sql_digest,
            "accept_changed_sql": options.accept_changed_sql,
            "when_orphaned": options.when_orphaned,
            "statement": work.statement,
        }

    async def register(self) -> None:
        """Register the launch that comes next.

        Raises
        ------
        JobIdReused
            The id stands for other SQL, and the caller does not accept that.
        """
        case, work = self._case, self._case.work
        faults.point("before_register")
        registration = await self._ledger.register(work.key, **self._new_launch())
        case.memory = case.memory.registered(registration)  # if it was not registered, the next look shows why
        faults.point("after_register")
        self._check_reuse(registration.verdict)

    def _check_reuse(self, verdict: str) -> None:
        if verdict == "reused":
            raise failures.reused(self._case.work)

    async def launch(self) -> bool:
        """Launch the job; returns False when a worker of an older generation has to end first.

        Raises
        ------
        InvalidJob, NoPrivilege
            The server refuses it; nothing was launched.
        ServerUnreachable
            Every launching session was lost.
        """
        case, work = self._case, self._case.work
        registration = case.memory.registration if work.carries_receipt else None
        if registration is not None and not await self._mark_older(registration):
            return False
        text = await self._compose(registration)
        await self._make_room_for_launch()
        await self._wait_for_slot_and_call(text)
        await self.take_over_call()
        await self._wait_at_first()
        return True

    async def _mark_older(self, registration: Registration) -> bool:
        """Make sure that no older generation starts or is at work; returns False when one was."""
        key = self._case.work.key
        at_work = await self._ledger.mark_older(key, registration.generation)
        if at_work is not None and not at_work:
            return True
        if at_work and self._case.options.on_superseded == "cancel":
            for job_id in at_work:
                await self._ledger.signal(key, job_id=job_id)
        return False

    # What is launched -----------------------------------------------------------------------------------------------

    async def _compose(self, registration: Registration | None) -> str:
        case, work = self._case, self._case.work
        if registration is None:
            return await self._prepare_session()
        if work.has_supervisor:
            if work.job.drop_invalid_index:
                await self._drop_invalid_index()
            readable = _with_tags(work, self._host.schema) if work.adds_supervisor else await self._make_readable()
            calls, settings = await self._supervision_of(readable)
            return work.supervisor(self._host.schema, registration, readable.text, calls, settings)
        text = await off_loop(work.size, lambda: work.text(self._host.schema))
        if not case.options.notices and case.feed is None:
            return text
        await self._need_own_session()
        if case.feed is not None:
            case.readable = Readable(text, case.feed.definition)
            return text
        case.readable = _with_tags(work, self._host.schema)
        return case.readable.text

    async def _prepare_session(self) -> str:
        case = self._case
        if case.worker_pid is not None:
            raise failures.already_at_work(case.work, case.worker_pid)
        await self._need_own_session()
        if case.feed is not None:
            case.readable = Readable(case.work.bare, case.feed.definition)
        else:
            case.readable = await self._make_readable()
        return case.readable.text

    async def _need_own_session(self) -> None:
        """Have a launching session that no other job uses: reading a result blocks it."""
        case = self._case
        if case.session is None or case.session.lost:
            case.session = await self._host.session(exclusive=True)

    async def _make_readable(self) -> Readable:
        """Return the text to launch, with a result that can be read to its end."""
        work = self._case.work
        text, last = work.bare, work.statements[-1].text
        padded = work.is_padded
        try:
            columns = await self._on_session(lambda s: s.describe(last, work.meaning(), without_types=padded))
            if not padded:
                return Readable(text, columns)
        except describe.UnreadableResult:
            pass
        except psycopg.Error as error:
            if len(work.statements) == 1:
                raise failures.statement_refused(work, error) from None  # its text quotes the line, parameters and all
            # It may use what the statements before it make.
        if work.makes_table:
            return Readable(text, None)
        # Behind a statement that gives no rows, the result is the statements' tags.
        return Readable(text + PADDING, None, padded=True)

    async def _drop_invalid_index(self) -> None:
        case, work = self._case, self._case.work
        index = index_builds.concurrent_index(work.statements)
        if index is None:
            return
        try:
            name = await self._host.drop_invalid_index(index, work.job)
        except psycopg.Error as error:
            raise failures.cannot_drop(work, error) from error
        if name is not None:
            case.tell(EventKind.DROPPED_INVALID_INDEX, f"dropped {name}, which an earlier build left invalid")

    # The call -------------------------------------------------------------------------------------------------------

    async def _make_room_for_launch(self) -> None:
        """Put the last launch away for another one; wait a little if its worker was turned away, or lacked a slot."""
        case = self._case
        before = case.memory
        case.memory = before.put_away()
        rejected = case.memory.tries.rejected
        if before.launch.stage is Stage.NONE and before.tries.slotless:
            case.tell_once(EventKind.WAITING_FOR_SLOT, "waiting for a second worker slot, below the supervisor")
            await asyncio.sleep(pace.backoff(before.tries.slotless))
        else:
            case.slot_deadline = None  # the last launch found its slots
        if rejected > before.tries.rejected:
            await asyncio.sleep(pace.backoff(rejected))
        if case.worker is not None:
            case.worker.release()
        case.worker = case.launch_error = None

    async def _wait_for_slot_and_call(self, text: str) -> None:
        case, work = self._case, self._case.work
        loop = asyncio.get_running_loop()
        if case.slot_deadline is None and case.options.slot_timeout is not None:
            case.slot_deadline = loop.time() + case.options.slot_timeout
        try:
            async with asyncio.timeout_at(case.slot_deadline):
                case.waited_for_slot = True  # until a call has begun
                if work.slots > 1 and not case.slots:
                    case.slots = await self._host.turns.take(work.slots)
                await self._host.slots.launch(lambda: self._call(text), self._on_slots_used_up)
        except TimeoutError:
            case.waited_for_slot = True  # a call that was not answered in that time counts as waiting, too
            case.memory = case.memory.wanting_end(Intent.DEADLINE)
        except MayBeLaunched as error:
            case.launch_error = error.error
        except LaunchRefused as error:
            await self._refuse(error)

    async def _refuse(self, refusal: LaunchRefused) -> NoReturn:
        work, error = self._case.work, refusal.error
        await record(self._case, self._ledger, "failed", error=work.telling(describe.error_fields(error)))
        facts = await self._host.facts()
        raise failures.launch_refused(work, error, facts, called=refusal.called) from error

    async def _call(self, text: str) -> None:
        case, work = self._case, self._case.work
        defaults = (await self._host.facts()).defaults
        case.limits = work.limits(defaults)
        settings = work.launch_settings(case.seconds_left(), defaults, case.memory.registration)
        if case.options.notices:
            wanted = (work.job.settings or {}).get("client_min_messages", "notice")
            settings = {**settings, "client_min_messages": wanted}

        async def call(session: LaunchingSession) -> None:
            case.memory = case.memory.calling()
            case.waited_for_slot = False
            case.text, case.failure, case.statement = telemetry.comment() + text, location.ErrorPlace(), None
            case.call = session.launch(
                case.text,
                label=work.label,
                queue_size=work.job.queue_size,
                settings=settings,
                role=work.job.role if work.kind is Kind.SESSION else None,
                poll_interval=case.options.poll_interval,
                receipt_key=ReceiptKey(work.key.owner, work.key.job_id, case.attempt, work.is_padded)
                if work.kind is Kind.RECEIPT and work.is_counted and not work.has_supervisor
                else None,
            )
            try:
                await asyncio.shield(case.call)
            except (SlotsUsedUp, LaunchRefused, ConnectionLost):
                case.call = None
                case.memory = case.memory.not_launched()
                raise

        await self._on_session(call)

    async def _on_session(self, ask: Callable[[LaunchingSession], Awaitable[T]]) -> T:
        """Ask a launching session, and another one where it turns out to be lost."""
        case = self._case
        for attempt in range(SESSIONS_LOST):
            session = case.session or await self._host.session()
            try:
                return await ask(session)
            except ConnectionLost as lost:
                if isinstance(lost, ExtensionMoved):
                    self._host.forget_facts()
                if case.session is not None:
                    await case.session.close()
                    case.session = await self._host.session(exclusive=True)
                await asyncio.sleep(pace.backoff(attempt))
        raise ServerUnreachable("every launching session was lost before the launch call", job_id=case.work.key.job_id)

    async def take_over_call(self) -> None:
        """Take over what came of a launch call, also of one that this call was cancelled in."""
        case = self._case
        if not await self._take_answer() or case.worker is None:
            return
        case.worker.end.add_done_callback(lambda _: self._host.slots.on_slot_freed())
        # People would cancel that pid: of two workers, the supervisor is not the one to cancel.
        pid = None if case.work.has_supervisor else case.worker.handle.pid
        case.tell(EventKind.LAUNCHED, f"launched attempt {case.attempt}", pid=pid)
        read = case.options.notices or case.feed is not None
        if read and case.readable is not None and case.reading is None:
            begin_reading(case, case.worker, case.readable)
        if case.nudge.is_set():
            case.worker.session.hear(case.worker)  # a hint came before the launch call's answer

    async def _take_answer(self) -> bool:
        """Learn what came of a launch call, if one is on its way; returns whether it may have started a worker."""
        case = self._case
        call = case.call
        if call is None:
            return False
        # Without a receipt, a worker can be cancelled only once its call is answered. With one, a call that has no
        # answer yet need not be waited for: the job is marked, and a worker that begins after that is turned away.
        if not case.work.carries_receipt:
            await asyncio.wait({call})
        case.call = None  # only now: if that wait is cancelled, the call is still to be taken over
        if not call.done():
            call.add_done_callback(_forget_worker)
            case.call_forgotten = True
            case.memory = case.memory.not_launched()
            return False
        # Before the first look only an opening can have been called. It registered the job itself, so take its
        # registration over.
        if case.opening is not None and case.opening.registration is not None and not case.memory.looked:
            case.memory = case.memory.registered(Registration.read(case.opening.registration))
        error = call.exception()
        if error is not None and not isinstance(error, MayBeLaunched):
            case.memory = case.memory.not_launched()
            return False
        worker = _worker_of(call) if error is None else None
        if error is None and worker is None:
            case.memory = case.memory.not_launched()  # an opening that found something to look at first
            return False
        case.attempts.append(case.attempt if case.work.carries_receipt else len(case.attempts) + 1)
        if worker is not None:
            case.worker = worker
            case.memory = case.memory.running()
        else:
            case.memory = case.memory.call_lost()
        return True

    def _on_slots_used_up(self, error: SlotsUsedUp) -> None:
        self._case.waited_for_slot = True
        where = {"53400": "this session's table", "53100": "shared memory (/dev/shm)"}.get(
            error.sqlstate or "", f"max_worker_processes ({self._host.max_worker_processes})"
        )
        message = f"waiting for a worker slot: {where} is used up"
        self._case.tell_once(EventKind.WAITING_FOR_SLOT, message, sqlstate=error.sqlstate)


def _with_tags(work: Work, schema: str) -> Readable:
    """Return the text of a worker that writes its own receipt, with a result that can be read to its end.

    Behind a statement that gives no rows, there are none to read: the result is the statements' tags.
    """
    text = work.text(schema)
    if work.makes_table:
        return Readable(text, None)
    return Readable(text if work.is_padded else text + PADDING, None, padded=True)


def _forget_worker(call: asyncio.Future[Worker] | asyncio.Future[Begun]) -> None:
    """Forget the worker of a call that nobody waited for."""
    if call.cancelled() or call.exception() is not None:
        return
    worker = _worker_of(call)
    if worker is not None:
        worker.release()


def _worker_of(call: asyncio.Future[Worker] | asyncio.Future[Begun]) -> Worker | None:
    """Return the worker that a call launched; None where an opening found something to look at first."""
    result = call.result()
    return result.worker if isinstance(result, Begun) else result
