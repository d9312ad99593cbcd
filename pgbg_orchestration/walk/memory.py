"""What one call remembers of its job between looks, and how each event changes that. No I/O.

The launch is a small state machine. The walk and the tests' exhaustive search go through the same transitions; named
tuples, since the search compares millions of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from enum import Enum, auto
from typing import TYPE_CHECKING, NamedTuple

from pgbg_orchestration.job import Kind
from pgbg_orchestration.ledger.sighting import Registration
from pgbg_orchestration.outcome import Cause, ErrorFields
from pgbg_orchestration.verdict import CALLED_OFF, OURS, TURNED_AWAY, Intent, Report

if TYPE_CHECKING:
    from pgbg_orchestration.postgres.pg_background import ResultInfo

RELAUNCHES = 3  # of a job whose worker is lost without a trace
REJECTIONS = 10  # of a worker that is turned away while nobody is seen to hold the lock
SUPERVISION = "CALL"  # the tag of a supervisor that came to its end
NO_SLOT_FOR_WORKER = "PB004"  # a supervisor found no slot for its worker, and ended


class Stage(Enum):
    """Where a launch is."""

    NONE = auto()  # nothing is launched
    CALLING = auto()  # the launch call is on its way
    RUNNING = auto()
    ENDED = auto()  # without an error; no proof of a commit
    FAILED = auto()  # with an error
    HANDLE_GONE = auto()  # the worker may be at work
    DETACHED = auto()  # the handle was given up, since the worker's output was blocked


FOLLOWS: Mapping[Stage, frozenset[Stage]] = {
    Stage.NONE: frozenset({Stage.CALLING, Stage.HANDLE_GONE}),
    Stage.CALLING: frozenset({Stage.NONE, Stage.RUNNING, Stage.HANDLE_GONE}),
    Stage.RUNNING: frozenset({Stage.ENDED, Stage.FAILED, Stage.HANDLE_GONE, Stage.DETACHED}),
    # A result is read after the report; it ends well, or with an error.
    Stage.ENDED: frozenset({Stage.ENDED, Stage.FAILED, Stage.HANDLE_GONE, Stage.NONE}),
    Stage.FAILED: frozenset({Stage.HANDLE_GONE, Stage.NONE}),
    Stage.HANDLE_GONE: frozenset({Stage.HANDLE_GONE, Stage.NONE}),
    Stage.DETACHED: frozenset({Stage.HANDLE_GONE, Stage.NONE}),
}
"""The stages that may come after each; NONE where nothing was launched, or before another launch."""

REPORTS: Mapping[Stage, Report] = {
    Stage.NONE: Report.NONE,
    Stage.CALLING: Report.NONE,
    Stage.RUNNING: Report.RUNNING,
    Stage.ENDED: Report.ENDED,
    Stage.FAILED: Report.FAILED,
    Stage.HANDLE_GONE: Report.GONE,
    Stage.DETACHED: Report.ENDED,  # the worker goes on, and nothing is to be learned of it by its handle any more
}


class Launch(NamedTuple):
    """The launch that this call made last.

    Attributes
    ----------
    registration:
        Its registration.
    info, error:
        The handle's report of its end.
    result:
        Row count and command tag of a result that was read to its end: the proof of a job without a receipt.
    at_work:
        Whether a look has shown its worker at work, by the marker.
    """

    stage: Stage = Stage.NONE
    registration: Registration | None = None
    info: ResultInfo | None = None
    error: ErrorFields | None = None
    result: tuple[int | None, str | None] | None = None
    at_work: bool = False

    def to(self, stage: Stage) -> Launch:
        """Return the launch in its next stage."""
        assert stage in FOLLOWS[self.stage], f"a launch that is {self.stage.name} cannot become {stage.name}"
        return self._replace(stage=stage)

    @property
    def report(self) -> Report:
        """What the handle reports."""
        return REPORTS[self.stage]

    @property
    def sqlstate(self) -> str | None:
        """The code of its error, if it failed."""
        return self.error.sqlstate if self.error is not None and self.stage is Stage.FAILED else None

    @property
    def may_begin(self) -> bool:
        """Whether the worker of a lost handle may begin yet: it was seen neither at work nor at its end."""
        return self.stage is Stage.HANDLE_GONE and self.info is None and not self.at_work

    def calling(self) -> Launch:
        """Begin the launch call."""
        return self.to(Stage.CALLING)

    def not_launched(self) -> Launch:
        """The call launched nothing that could commit."""
        return self.to(Stage.NONE)

    def running(self) -> Launch:
        """The call gave a handle."""
        return self.to(Stage.RUNNING)

    def lost(self) -> Launch:
        """The call failed on its way, or its handle is lost."""
        return self.to(Stage.HANDLE_GONE)._replace(error=None)

    def ended(self, info: ResultInfo | None, error: ErrorFields | None) -> Launch:
        """The handle reported the end; without a report, or with an error that cannot be read, the handle is lost."""
        known = self._replace(info=info, error=error)
        if info is None or (info.has_error and error is None):
            return known.lost()
        return known.to(Stage.FAILED if info.has_error else Stage.ENDED)

    def failed(self, error: ErrorFields) -> Launch:
        """An error came while its result was read, or before its output was dropped."""
        return self.to(Stage.FAILED)._replace(error=error)

    def detached(self, error: ErrorFields | None) -> Launch:
        """The handle was given up, since the output was blocked; its error was read before."""
        return self.to(Stage.DETACHED) if error is None else self.failed(error)

    def read(self, result: tuple[int | None, str | None]) -> Launch:
        """Its result was read to its end."""
        return self.to(Stage.ENDED)._replace(result=result)


class Stray(Enum):
    """Whether this call has a stray: a worker that it launched, and whose handle it has lost or given up."""

    NONE = auto()
    LOOSE = auto()  # it may begin at any time
    STOPPED = auto()  # this call marked the job, so that the worker is turned away when it begins


class Tries(NamedTuple):
    """How often this call tried in vain.

    Attributes
    ----------
    lost:
        Launches that came after one that was lost.
    rejected:
        Workers in a row that were turned away while nobody was seen to hold the lock.
    slotless:
        Supervisors that found no second slot.
    """

    lost: int = 0
    rejected: int = 0
    slotless: int = 0


class Verification(NamedTuple):
    """The answer of verify_sql, and the claim that it was asked about: its attempt, and its ``may_begin``."""

    done: bool
    claim: tuple[int | None, bool] | None = None


class Terms(NamedTuple):
    """What was asked for, as far as the evidence depends on it.

    Attributes
    ----------
    takes_back:
        The causes of a cancel from before this call that it takes back.
    of_try:
        The orchestrator's try that this call is made in: it does not take back a cancel of its own.
    deadline:
        On the event loop's clock.
    adds_supervisor:
        The worker writes its own receipt, and a supervisor launches it, which writes the history.
    """

    kind: Kind = Kind.RECEIPT
    sql_digest: bytes = b""
    generation: int | None = None
    can_verify: bool = False
    takes_back: frozenset[Cause | None] = frozenset()
    of_try: str | None = None
    deadline: float | None = None
    adds_supervisor: bool = False
    relaunches: int = RELAUNCHES
    rejections: int = REJECTIONS

    @property
    def carries_receipt(self) -> bool:
        """Whether there is a receipt to look for: of the worker, or of its supervisor."""
        return self.kind is not Kind.SESSION


class Memory(NamedTuple):
    """What one call remembers of its job.

    Attributes
    ----------
    intent:
        Why this call wants the job to end.
    generation:
        The job's generation, known from the first registration on.
    registration:
        The registration of the launch that comes next.
    stray:
        Whether a worker of this call's whose handle is lost may begin.
    looked, old_mark:
        Whether this call has looked; when the mark was made that was there before this call.
    attached_since:
        Since when looks have shown a worker of this job that somebody else launched, on the server's clock.
    """

    intent: Intent = Intent.NONE
    launch: Launch = Launch()
    registration: Registration | None = None
    generation: int | None = None
    tries: Tries = Tries()
    stray: Stray = Stray.NONE
    looked: bool = False
    old_mark: datetime | None = None
    attached_since: datetime | None = None
    verification: Verification | None = None

    def at(self, now: float, terms: Terms) -> Memory:
        """It is ``now``: past the deadline, this call wants the job to end."""
        if self.intent is not Intent.NONE or terms.deadline is None or now < terms.deadline:
            return self
        return self.wanting_end(Intent.DEADLINE)

    def wanting_end(self, intent: Intent) -> Memory:
        """The caller, or its deadline, wants the job to end."""
        return self._replace(intent=intent)

    def registered(self, registration: Registration) -> Memory:
        """A registration was answered; only with the verdict "registered" does a launch follow."""
        next_one = registration if registration.verdict == "registered" else None
        return self._replace(registration=next_one, generation=registration.generation)

    def put_away(self) -> Memory:
        """Another launch follows: count the one before it."""
        tries, launch = self.tries, self.launch
        if launch.stage is not Stage.NONE:
            if launch.sqlstate in (TURNED_AWAY, CALLED_OFF):
                tries = tries._replace(rejected=tries.rejected + 1)
            else:
                tries = tries._replace(lost=tries.lost + 1)
            launch = launch.to(Stage.NONE)
        return self._replace(tries=tries, launch=Launch(launch.stage), attached_since=None, verification=None)

    def calling(self) -> Memory:
        """A launch call begins."""
        return self._replace(launch=self.launch.calling())

    def not_launched(self) -> Memory:
        """The call launched nothing that could commit."""
        return self._replace(launch=self.launch.not_launched())

    def running(self) -> Memory:
        """The call gave a handle; the registration is that launch's now."""
        launch = self.launch.running()._replace(registration=self.registration)
        return self._replace(launch=launch, registration=None)

    def call_lost(self) -> Memory:
        """The call failed on its way, and may have started a worker; the registration is that launch's now."""
        launch = self.launch._replace(registration=self.registration)
        return self._replace(launch=launch, registration=None).handle_lost()

    def handle_lost(self) -> Memory:
        """The handle is lost: its worker may begin, or go on, at any time."""
        return self._loose(self.launch.lost())

    def ended(self, info: ResultInfo | None, error: ErrorFields | None, terms: Terms) -> Memory:
        """The handle reported the end. A supervisor that found no second slot launched nothing: no attempt is used."""
        launch = self.launch.ended(info, error)
        # The user's SQL may raise this code as well, but never in a supervisor.
        supervised = terms.adds_supervisor or terms.kind is Kind.SUPERVISED
        if supervised and launch.sqlstate == NO_SLOT_FOR_WORKER:
            tries = self.tries._replace(slotless=self.tries.slotless + 1)
            return self._replace(tries=tries, launch=Launch(), registration=launch.registration)
        if terms.adds_supervisor and launch.stage is not Stage.HANDLE_GONE and not _came_to_its_end(launch):
            launch = launch.lost()  # the worker below it may be at work, or begin
        return self._loose(launch)

    def _loose(self, launch: Launch) -> Memory:
        gone = launch.stage in (Stage.HANDLE_GONE, Stage.DETACHED) and self.stray is Stray.NONE
        return self._replace(launch=launch, stray=Stray.LOOSE if gone else self.stray)

    def read(self, result: tuple[int | None, str | None]) -> Memory:
        """The result was read to its end."""
        return self._replace(launch=self.launch.read(result))

    def failed(self, error: ErrorFields) -> Memory:
        """An error came while the result was read."""
        return self._replace(launch=self.launch.failed(error))

    def detached(self, error: ErrorFields | None) -> Memory:
        """The handle was given up, after its error was read: the worker may go on."""
        stray = Stray.LOOSE if self.stray is Stray.NONE else self.stray
        return self._replace(launch=self.launch.detached(error), stray=stray)

    def marked(self, *, gave_up: bool) -> Memory:
        """The job was marked; ``gave_up``: only so that no stray worker commits any more."""
        stray = self.stray
        if gave_up:
            stray = Stray.STOPPED
        elif stray is Stray.STOPPED:
            stray = Stray.LOOSE
        return self._replace(stray=stray)

    def verified(self, done: bool, claim: tuple[int | None, bool] | None) -> Memory:
        """The answer of verify_sql came."""
        return self._replace(verification=Verification(done, claim))

    def settled(self) -> Memory:
        """That answer is written down. If the work is not done, the claim is gone: that launch counts as lost."""
        if self.verification is None or self.verification.done:
            return self
        return self.handle_lost()._replace(verification=None)


def _came_to_its_end(launch: Launch) -> bool:
    """Say whether a supervisor beside a receipt did its part: it fails only where its worker was turned away."""
    if launch.stage is Stage.FAILED:
        return launch.sqlstate in OURS
    return launch.info is not None and launch.info.command_tag == SUPERVISION
