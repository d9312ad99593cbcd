"""Jobs side by side: how many run at once, and what the failure of one means for the others."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Literal, NamedTuple, Protocol, Unpack
from uuid import uuid4

from .call_options import Options, RunOptions
from .driver import to_its_end
from .errors import InvalidJob, JobCancelled, OutcomeUnknown, PgbgError
from .job import Job, Kind
from .outcome import Cause, Event, EventKind, Outcome

STOPPED = "another job of the batch failed"
"""Why the rest of a batch is cancelled, for people; code looks at the cause, :attr:`Cause.FAILED_BESIDE`."""

End = Outcome | PgbgError
"""How a job of a batch ended: committed, or not."""

CancelEnd = Literal["cancelled", "committed"] | BaseException
"""What came of a cancel; an exception where it could not be decided."""


class Target(NamedTuple):
    """A job that is to be cancelled, as :meth:`pgbg_orchestration.Launcher.cancel` takes it."""

    job_id: str
    owner: str | None = None
    series: str | None = None

    @classmethod
    def of(cls, job: Job) -> Target:
        """Return the target for a job."""
        assert job.id is not None  # a Job gives itself one
        return cls(job.id, job.owner, job.series)


class Runner(Protocol):
    """What a batch needs of a :class:`pgbg_orchestration.Launcher`."""

    async def run(self, job: Job, **options: Unpack[RunOptions]) -> Outcome:
        """Run a job."""

    async def cancel(
        self,
        job_id: str,
        *,
        owner: str | None = None,
        series: str | None = None,
        reason: str = ...,
        cause: Cause = ...,
        of_try: str | None = None,
    ) -> Literal["cancelled", "committed"]:
        """Cancel a job."""


class Call(NamedTuple):
    """A job, and the options that it is run with."""

    job: Job
    options: RunOptions


Preparation = Callable[[], Awaitable[Call]]
"""Returns the call for a member of a batch; asked when its turn comes, or when it is to be cancelled before that."""


class BatchObserver:
    """Called on the way of a batch; a subclass overrides what it wants to know."""

    def failed(self, name: str, error: PgbgError) -> None:
        """Called when a job did not commit."""

    def stopping(self, names: list[str]) -> None:
        """Called before the jobs of these names are cancelled, since one failed."""

    def stopped(self, job: Job, end: CancelEnd) -> None:
        """Called when the cancel of one has ended."""


class Batch:
    """Jobs that are run side by side over one launcher.

    With ``fail_fast`` the first failure ends all: those at work are cancelled, and so are those whose turn has not
    come, since an earlier process may have left a worker of theirs. Each one's end is waited for: a cancel may come too
    late. A job without a receipt is cancelled by cancelling the call that runs it.

    When :meth:`run` is cancelled itself, each job does what its ``on_cancel`` says, and ``interrupted`` tells which
    these were.

    Parameters
    ----------
    runner:
        The launcher.
    members:
        By name, what returns the job to run and its options. A retry of the batch brings all of them again: one that
        committed is not run twice, and one that was stopped is run where its ``retry_cancelled`` has
        ``Cause.FAILED_BESIDE``.
    at_once:
        How many run at the same time at most; None for all. Those that wait for their turn hold no connection.
    fail_fast:
        Whether the others are cancelled when one fails.
    reason:
        Why, for people: it stands in the receipts of those that are cancelled.
    of_try:
        Names the try of the batch, where another process may go on with it: what one try has stopped, the same try
        does not run again.
    observer:
        Told what happens on the way.

    Raises
    ------
    InvalidJob
        ``at_once`` is below 1.
    """

    def __init__(
        self,
        runner: Runner,
        members: Mapping[str, Preparation],
        *,
        at_once: int | None = None,
        fail_fast: bool = False,
        reason: str = STOPPED,
        of_try: str | None = None,
        observer: BatchObserver | None = None,
    ) -> None:
        if at_once is not None and at_once < 1:
            raise InvalidJob(f"at_once must be at least 1, not {at_once}")
        self._runner = runner
        self._members = members
        self._turns = asyncio.Semaphore(at_once or max(len(members), 1))
        self._fail_fast = fail_fast
        self._reason = reason
        # Never None: a job whose call looks for the first time would lift the mark that its own batch has just made.
        self._of_try = of_try or uuid4().hex
        self._observer = observer or BatchObserver()
        self._ends: dict[str, End] = {}
        self._at_work: dict[str, Job] = {}
        self._calls: dict[str, asyncio.Future[Outcome]] = {}
        self._cancels: dict[str, asyncio.Task[CancelEnd]] = {}
        self._last_words: dict[str, End] = {}

    @property
    def interrupted(self) -> list[Job]:
        """The jobs that had begun, and not ended, when :meth:`run` was cancelled."""
        return list(self._at_work.values())

    async def run(self) -> dict[str, End]:
        """Run all jobs; returns the end of each by its name, in the order in which they ended."""
        tasks = [asyncio.create_task(self._member(name)) for name in self._members]
        try:
            await asyncio.gather(*tasks)
            await asyncio.gather(*self._cancels.values())
        finally:
            await to_its_end(_cancelled([*tasks, *self._cancels.values()]))
        return self._ends

    async def _member(self, name: str) -> None:
        try:
            async with self._turns:
                self._ends[name] = await self._end_of(name)
        except PgbgError as error:
            self._ends[name] = error
            self._observer.failed(name, error)
        self._at_work.pop(name, None)
        if self._fail_fast and not self._cancels and isinstance(self._ends[name], PgbgError):
            self._stop_rest()

    async def _end_of(self, name: str) -> End:
        job, options = await self._members[name]()
        if name in self._cancels:
            cancel = await self._cancels[name]
            if isinstance(cancel, BaseException):
                raise cancel
            if cancel == "cancelled":
                raise JobCancelled(STOPPED, cause=Cause.FAILED_BESIDE, job_id=job.id, label=job.label)
        self._at_work[name] = job
        options = {**options, "of_try": self._of_try}
        if not can_be_found(job):
            options = self._stoppable(name, options)
        # A task of its own: it can be cancelled without cancelling this one, which waits for it.
        call = self._calls[name] = asyncio.ensure_future(self._runner.run(job, **options))
        try:
            return await call
        except asyncio.CancelledError:
            waiting = asyncio.current_task()
            if waiting is None or waiting.cancelling():
                raise
            end = self._last_words.get(name)
            if isinstance(end, Outcome):
                return end
            if end is None:
                end = OutcomeUnknown(f"{STOPPED}, and how this one ended is not known", job_id=job.id, label=job.label)
            raise end from None

    def _stoppable(self, name: str, options: RunOptions) -> RunOptions:
        """Return options with which a cancelled call cancels its job for the batch, and notes how the job ended."""
        given = Options(**options)

        def cause() -> Cause | None:
            return Cause.FAILED_BESIDE if name in self._cancels else given.cause_of_cancel()

        def observe(event: Event) -> None:
            if event.kind is EventKind.LET_GO:
                outcome, error = event.data.get("outcome"), event.data.get("error")
                self._last_words[name] = Outcome.from_dict(outcome) if outcome else PgbgError.from_dict(error or {})
            if given.observer is not None:
                given.observer(event)

        return {**options, "on_cancel": cause, "observer": observe}

    def _stop_rest(self) -> None:
        rest = [name for name in self._members if name not in self._ends]
        self._observer.stopping(rest)
        self._cancels = {name: asyncio.create_task(self._stop(name)) for name in rest}

    async def _stop(self, name: str) -> CancelEnd:
        """Cancel one job, whether this process runs it or an earlier one may have left it at work."""
        try:
            job = self._at_work.get(name) or (await self._members[name]()).job
        except PgbgError as error:
            return error
        if not can_be_found(job):
            if name in self._calls:
                self._calls[name].cancel()
            return "cancelled"
        (end,) = await cancel_all(
            self._runner, [Target.of(job)], cause=Cause.FAILED_BESIDE, reason=self._reason, of_try=self._of_try
        )
        self._observer.stopped(job, end)
        return end


async def cancel_all(
    runner: Runner, targets: Iterable[Target], *, cause: Cause, reason: str, of_try: str | None = None
) -> list[CancelEnd]:
    """Cancel jobs side by side, for good; returns what came of each, in their order.

    Parameters
    ----------
    runner:
        The launcher.
    targets:
        The jobs.
    cause, reason, of_try:
        As :meth:`pgbg_orchestration.Launcher.cancel` takes them.
    """
    return await asyncio.gather(
        *(
            runner.cancel(job_id, owner=owner, series=series, cause=cause, reason=reason, of_try=of_try)
            for job_id, owner, series in targets
        ),
        return_exceptions=True,
    )


def can_be_found(job: Job) -> bool:
    """Tell whether a later call finds the job's worker: one of kind ``session`` leaves no receipt."""
    return job.kind is not Kind.SESSION


def was_stopped(end: object) -> bool:
    """Tell whether a job was cancelled because another one of its batch failed."""
    return isinstance(end, JobCancelled) and end.cause is Cause.FAILED_BESIDE


async def _cancelled(tasks: list[asyncio.Task[None] | asyncio.Task[CancelEnd]]) -> None:
    """Cancel tasks, and wait for them."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
