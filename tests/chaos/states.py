"""What the model of the protocol knows at a moment: of each worker, each launcher, the canceller, and the tables."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

from pgbg_orchestration.verdict import OURS, Receipt, Step
from pgbg_orchestration.walk.memory import Memory

OWN_ERROR = "23505"
GIVEN_UP = "given up"
NOBODY = -1


class At(IntEnum):
    """How far a worker is. From LOCKED to VISIBLE it holds the lock of the series."""

    STARTING = 0
    BEGUN = 1  # it has its snapshot, which repeatable read keeps
    LOCKED = 2
    CHECKED = 3  # the generation
    INSERTED = 4  # its receipt, which nobody else sees; the job's SQL runs
    WORKED = 5  # the SQL is done; "completed" can be reported
    VISIBLE = 6  # the commit
    ABORTING = 7  # its error can be read, it still holds its locks
    COMMITTED = 8
    FAILED = 9
    SILENT = 10  # ended without a word, nothing done

    __hash__ = int.__hash__  # asked for a million times, where an enum's own is slow


ENDED = (At.COMMITTED, At.FAILED, At.SILENT)
AT_WORK = (At.INSERTED, At.WORKED)


class Worker(NamedTuple):
    job: int
    by: int
    at: At = At.STARTING
    locked: bool = False
    sqlstate: str | None = None
    snapshot: int = 0  # the newest generation, as its snapshot sees it

    @property
    def inserting(self) -> bool:
        """Whether a receipt of it is there that is neither committed nor gone: an insert of the same key waits."""
        return self.at in AT_WORK or (self.at is At.ABORTING and self.sqlstate not in OURS)


class Phase(IntEnum):
    """What a launcher does next: a look, or what the verdict asked for."""

    LOOK = 0
    STEP = 1
    LAUNCH = 2  # the launch call is on its way
    DEAD = 3
    DONE = 4

    __hash__ = int.__hash__


class Launcher(NamedTuple):
    job: int
    phase: Phase = Phase.LOOK
    looks: int = 0  # how many of the three looks of this turn are done
    memory: Memory = Memory()  # what the walk itself would remember
    worker: int = NOBODY
    holder: int = NOBODY  # the job whose worker held the lock at that look
    held: int = NOBODY  # and that worker
    told: str | None = None  # what the receipt said at that look
    newest: int = 0  # and the series
    superseded: bool = False
    step: Step | None = None  # to be taken, or the outcome
    heard: bool = False  # another launcher wrote down, since we attached, how its worker failed


class Canceller(NamedTuple):
    job: int
    phase: int = 0  # look, signal, mark, done
    told: Receipt = Receipt.NONE


class State(NamedTuple):
    workers: tuple[Worker | None, ...]
    launchers: tuple[Launcher, ...]
    cancellers: tuple[Canceller, ...]
    receipts: tuple[str | None, ...]  # of each job: 'committed', or the cause of its cancel
    commits: tuple[int, ...]
    registered: tuple[bool, ...]
    newest: int
    begun: int  # the newest generation that was ever at work
    marked: int  # older generations than this were all marked
    lifted: tuple[bool, ...]
    faults: tuple[int, ...]  # how many of each kind may still happen


FAULTS = ("crash", "lose_session", "lose_launch", "kill_worker", "sql_error", "ask")


class Move(NamedTuple):
    """A step: what happens, whether it is a fault (which need not happen), and where it leads."""

    what: str
    fault: bool
    after: NamedTuple
    wrong: str | None = None  # an invariant that this very step breaks
