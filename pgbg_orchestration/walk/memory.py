"""What one call remembers of its job besides what it sees: values without I/O, and how each event changes them.

The launch is a small state machine; whoever drives a job (the walk, the tests' exhaustive search) calls the same
transitions. Named tuples, since a search compares millions of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from enum import Enum, auto
from typing import TYPE_CHECKING, NamedTuple

from pgbg_orchestration.job import Kind
from pgbg_orchestration.ledger.sighting import Registration
from pgbg_orchestration.outcome import Cause, ErrorFields
from pgbg_orchestration.verdict import OURS, REFUSED, TURNED_AWAY, Intent, Report

if TYPE_CHECKING:
    from pgbg_orchestration.postgres.pg_background import ResultInfo

RELAUNCHES = 3  # of a job whose worker is lost without a trace
REJECTIONS = 10  # of a worker that is turned away while nobody is seen to hold the lock
SUPERVISION = "CALL"  # the tag of a supervisor that came to its end
NO_SLOT_FOR_WORKER = "PB004"  # a supervisor that found no slot for its worker, and left its own


class Stage(Enum):
    """Where a launch is."""

    NONE = auto()  # nothing is launched
    CALLING = auto()  # the launch call is on its way
    RUNNING = auto()
    ENDED = auto()  # without an error; no proof of a commit
    FAILED = auto()  # with an error
    LOST = auto()  # the handle is; the worker may be at work
    DETACHED = auto()  # let go on purpose, since its output was blocked


FOLLOWS: Mapping[Stage, frozenset[Stage]] = {
    Stage.NONE: frozenset({Stage.CALLING, Stage.LOST}),
    Stage.CALLING: frozenset({Stage.NONE, Stage.RUNNING, Stage.LOST}),
    Stage.RUNNING: frozenset({Stage.ENDED, Stage.FAILED, Stage.LOST, Stage.DETACHED}),
    # A result that is read to its end comes after the report, and so does its error.
    Stage.ENDED: frozenset({Stage.ENDED, Stage.FAILED, Stage.LOST, Stage.NONE}),
    Stage.FAILED: frozenset({Stage.LOST, Stage.NONE}),
    Stage.LOST: frozenset({Stage.LOST, Stage.NONE}),
    Stage.DETACHED: frozenset({Stage.LOST, Stage.NONE}),
}
"""The stages that may come after each; NONE once the launch is put away for another one."""

REPORTS: Mapping[Stage, Report] = {
    Stage.NONE: Report.NONE,
    Stage.CALLING: Report.NONE,
    Stage.RUNNING: Report.RUNNING,
    Stage.ENDED: Report.ENDED,
    Stage.FAILED: Report.FAILED,
    Stage.LOST: Report.GONE,
    Stage.DETACHED: Report.ENDED,
}


class Launch(NamedTuple):
    """The launch that this call made last.

    Attributes
    ----------
    registration:
        It was registered as that.
    info, error:
        What its handle told of its end.
    result:
        Row count and command tag of a result that was read to its end: the proof of a job without a receipt.
    at_work:
        Its worker was seen at work, by its marker.
    """

    stage: Stage = Stage.NONE
    registration: Registration | None = None
    info: ResultInfo | None = None
    error: ErrorFields | None = None
    result: tuple[int | None, str | None] | None = None
    at_work: bool = False

    def to(self, stage: Stage) -> Launch:
        """Go to a stage that may come next."""
        assert stage in FOLLOWS[self.stage], f"a launch that is {self.stage.name} cannot become {stage.name}"
        return self._replace(stage=stage)

    @property
    def report(self) -> Report:
        """What the handle tells."""
        return REPORTS[self.stage]

    @property
    def sqlstate(self) -> str | None:
        """The code of its error, if it failed."""
        return self.error.sqlstate if self.error is not None and self.stage is Stage.FAILED else None

    @property
    def may_begin(self) -> bool:
        """Whether the worker of a lost handle may begin yet: it was not seen at work, nor to have ended."""
        return self.stage is Stage.LOST and self.info is None and not self.at_work

    def calling(self) -> Launch:
        """Begin the launch call."""
        return self.to(Stage.CALLING)

    def refused(self) -> Launch:
        """Take in that the call ended, or was given up, and launched nothing that could commit."""
        return self.to(Stage.NONE)

    def running(self) -> Launch:
        """Take in that the call gave a handle."""
        return self.to(Stage.RUNNING)

    def lost(self) -> Launch:
        """Take in that the call failed on its way, or that its handle is lost."""
        return self.to(Stage.LOST)._replace(error=None)

    def ended(self, info: ResultInfo | None, error: ErrorFields | None) -> Launch:
        """Take in the handle's report; without one, or with an error that cannot be read, the handle is lost."""
        known = self._replace(info=info, error=error)
        if info is None or (info.has_error and error is None):
            return known.lost()
        return known.to(Stage.FAILED if info.has_error else Stage.ENDED)

    def failed(self, error: ErrorFields) -> Launch:
        """Take in an error that came while its result was read, or before its output was dropped."""
        return self.to(Stage.FAILED)._replace(error=error)

    def detached(self, error: ErrorFields | None) -> Launch:
        """Take in that the handle was given up, since the output was blocked, after a look at its error."""
        return self.to(Stage.DETACHED) if error is None else self.failed(error)

    def read(self, result: tuple[int | None, str | None]) -> Launch:
        """Take in that its result was read to its end."""
        return self.to(Stage.ENDED)._replace(result=result)


class Stray(Enum):
    """Whether this call has a stray: a worker that it launched, and whose handle it has lost or let go."""

    NONE = auto()
    LOOSE = auto()  # it may begin at any time
    STOPPED = auto()  # this call marked the job, so that the worker is refused when it begins


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
    """The answer of verify_sql, and which claim it was about: its attempt, and whether its worker might begin."""

    done: bool
    claim: tuple[int | None, bool] | None = None


class Terms(NamedTuple):
    """What was asked for, as far as the evidence depends on it.

    Attributes
    ----------
    takes_back:
        The causes of a cancel from before this call that it takes back.
    of_try:
        The caller's try of the work: what this very try made final stays so.
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
        The job's, once a registration told it.
    registration:
        That of the launch that comes next.
    stray:
        Whether a worker of an earlier handle of this call's may begin.
    looked, old_mark:
        Whether this call has looked; when the mark was made that its first look saw.
    attached_since:
        Since when a worker of this job was seen that somebody else launched, on the server's clock.
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
        """Take in the time: past the deadline, this call wants the job to end."""
        if self.intent is not Intent.NONE or terms.deadline is None or now < terms.deadline:
            return self
        return self.wanting_end(Intent.DEADLINE)

    def wanting_end(self, intent: Intent) -> Memory:
        """Want the job to end."""
        return self._replace(intent=intent)

    def registered(self, registration: Registration) -> Memory:
        """Take in a registration; one that was refused registers nothing."""
        done = registration if registration.verdict == "registered" else None
        return self._replace(registration=done, generation=registration.generation)

    def put_away(self) -> Memory:
        """Make room for another launch, and count the one before it."""
        tries, launch = self.tries, self.launch
        if launch.stage is not Stage.NONE:
            if launch.sqlstate in (TURNED_AWAY, REFUSED):
                tries = tries._replace(rejected=tries.rejected + 1)
            else:
                tries = tries._replace(lost=tries.lost + 1)
            launch = launch.to(Stage.NONE)
        return self._replace(tries=tries, launch=Launch(launch.stage), attached_since=None, verification=None)

    def calling(self) -> Memory:
        """Begin a launch call."""
        return self._replace(launch=self.launch.calling())

    def refused(self) -> Memory:
        """Take in that the call ended, or was given up, and launched nothing that could commit."""
        return self._replace(launch=self.launch.refused())

    def running(self) -> Memory:
        """Take in that the call gave a handle; that uses the registration up."""
        launch = self.launch.running()._replace(registration=self.registration)
        return self._replace(launch=launch, registration=None)

    def call_lost(self) -> Memory:
        """Take in that the call failed on its way; it may have started a worker, and uses the registration up."""
        launch = self.launch._replace(registration=self.registration)
        return self._replace(launch=launch, registration=None).handle_lost()

    def handle_lost(self) -> Memory:
        """Take in that the handle is lost: its worker may begin, or go on, at any time."""
        return self._loose(self.launch.lost())

    def ended(self, info: ResultInfo | None, error: ErrorFields | None, terms: Terms) -> Memory:
        """Take in the handle's report. A supervisor without a second slot launched nothing, and uses up no attempt."""
        launch = self.launch.ended(info, error)
        # SQL of the user's can raise this code too, and does so in a worker of its own.
        supervised = terms.adds_supervisor or terms.kind is Kind.SUPERVISED
        if supervised and launch.sqlstate == NO_SLOT_FOR_WORKER:
            tries = self.tries._replace(slotless=self.tries.slotless + 1)
            return self._replace(tries=tries, launch=Launch(), registration=launch.registration)
        if terms.adds_supervisor and launch.stage is not Stage.LOST and not _came_to_its_end(launch):
            launch = launch.lost()  # the worker below it may be at work, or begin
        return self._loose(launch)

    def _loose(self, launch: Launch) -> Memory:
        gone = launch.stage in (Stage.LOST, Stage.DETACHED) and self.stray is Stray.NONE
        return self._replace(launch=launch, stray=Stray.LOOSE if gone else self.stray)

    def read(self, result: tuple[int | None, str | None]) -> Memory:
        """Take in that the result was read to its end."""
        return self._replace(launch=self.launch.read(result))

    def failed(self, error: ErrorFields) -> Memory:
        """Take in an error that came while the result was read."""
        return self._replace(launch=self.launch.failed(error))

    def let_go(self, error: ErrorFields | None) -> Memory:
        """Take in that the handle was given up, after a look at the error: the worker may go on."""
        stray = Stray.LOOSE if self.stray is Stray.NONE else self.stray
        return self._replace(launch=self.launch.detached(error), stray=stray)

    def marked(self, *, gave_up: bool) -> Memory:
        """Take in that this call marked the job; ``gave_up``: only so that no stray worker commits any more."""
        stray = self.stray
        if gave_up:
            stray = Stray.STOPPED
        elif stray is Stray.STOPPED:
            stray = Stray.LOOSE
        return self._replace(stray=stray)

    def verified(self, done: bool, claim: tuple[int | None, bool] | None) -> Memory:
        """Take in what verify_sql said."""
        return self._replace(verification=Verification(done, claim))

    def settled(self) -> Memory:
        """Take in that what verify_sql said of a claim is written down; not done, the job may be launched again."""
        if self.verification is None or self.verification.done:
            return self
        return self.handle_lost()._replace(verification=None)


def _came_to_its_end(launch: Launch) -> bool:
    """Say whether the supervisor of a watched worker did its work: it fails only where that worker was turned away."""
    if launch.stage is Stage.FAILED:
        return launch.sqlstate in OURS
    return launch.info is not None and launch.info.command_tag == SUPERVISION
