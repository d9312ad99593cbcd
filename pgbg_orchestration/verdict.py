"""The verdict: from what can be seen of a job to the next step, or to its outcome.

A pure function without I/O: the walk of a job (``walk/run.py``) and the tests' exhaustive search use it.

How to read the signs:

- A receipt says how the job ended, and nothing else does. "Completed without an error" and a command tag do not: both
  are written before the commit. An error does not either: a committed job can report one.
- A held lock means a worker at work. Neither lock nor receipt means only that launching again is safe (of two workers
  the second is turned away), not that nothing will run.
- The evidence is gathered in this order: the handle's report, the lock, the receipt. A worker that is seen to have
  ended, whose lock is then seen free, and that has no receipt after that, did not commit.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

ALREADY_COMMITTED = "PB001"  # the job has a receipt
TURNED_AWAY = "PB002"  # another worker holds the lock
CALLED_OFF = "PB003"  # the job is marked, or a newer generation registered
OURS = (ALREADY_COMMITTED, TURNED_AWAY, CALLED_OFF)
"""The codes with which a worker is turned away before the job's SQL begins."""
CANCELED = "57014"


class Receipt(Enum):
    """What the job's receipt says. A result read to its end, and verify_sql, count as one."""

    NONE = auto()
    LAUNCHING = auto()  # a supervisor claimed it, and has not written down how its worker ended
    COMMITTED = auto()
    CANCELLED = auto()


class Holder(Enum):
    """Who holds the advisory lock of the series."""

    NOBODY = auto()
    THIS_JOB = auto()
    OLDER = auto()
    NEWER = auto()
    SIBLING = auto()  # another job of the series, of the same generation
    STRANGER = auto()  # no worker of the owner's that is known


class Report(Enum):
    """What the launching session says of the worker that this process launched last."""

    NONE = auto()  # nothing launched
    RUNNING = auto()
    ENDED = auto()  # completed, no error
    FAILED = auto()  # completed, with an error
    GONE = auto()  # the handle is lost: the session ended, or the launch call failed on its way


class Intent(Enum):
    """Why this process wants the job to end."""

    NONE = auto()
    ASKED = auto()
    DEADLINE = auto()


@dataclass(frozen=True, slots=True)
class Evidence:
    """Everything that a verdict may depend on.

    Attributes
    ----------
    carries_receipt:
        Whether the job's SQL can carry a receipt (its kind says).
    found_by_name:
        A worker of this job is at work that holds no lock, because its supervisor is gone. It was found by its
        ``application_name``.
    superseded:
        A newer generation of the series is registered, or the receipt was cancelled for that reason.
    registered:
        This process has registered the launch that comes next: at that moment there was no newer generation.
    sqlstate:
        The error of the worker that this process launched last.
    recorded_failure:
        The history has how a worker failed: one that this process was attached to, or one whose launching side was
        gone, so that its supervisor wrote it down.
    output_blocked:
        The worker waits for its output to be read, and nobody does.
    launches_left, rejections_left:
        How often the job may still be launched after a worker was lost; and after one was turned away while nobody
        was seen to hold the lock.
    lift:
        A cancel of this job is to be taken back, since its orchestrator wants it to run after all.
    stray, gave_up:
        This call lost or gave up a handle, so its worker may begin at any time; this call marked the job, so that
        this worker is turned away.
    verified:
        What verify_sql said, None before it was asked; ``can_verify`` whether there is one.
    may_begin:
        A worker without a receipt of its own may have been launched by somebody who is gone. Nobody has seen it at work
        yet: it may begin at any moment, and nothing would turn it away.
    """

    carries_receipt: bool = True
    receipt: Receipt = Receipt.NONE
    holder: Holder = Holder.NOBODY
    found_by_name: bool = False
    superseded: bool = False
    registered: bool = False
    report: Report = Report.NONE
    sqlstate: str | None = None
    recorded_failure: bool = False
    output_blocked: bool = False
    intent: Intent = Intent.NONE
    launches_left: int = 1
    rejections_left: int = 1
    lift: bool = False
    can_verify: bool = False
    verified: bool | None = None
    stray: bool = False
    gave_up: bool = False
    may_begin: bool = False


class Step(Enum):
    """What to do next. The second group ends the job."""

    REGISTER = auto()
    LAUNCH = auto()
    WAIT = auto()  # for the worker of this job
    WAIT_FOR_SERIES = auto()  # until nobody else holds the lock of the series
    CLEAR_OLDER = auto()  # an older generation's worker is at work: cancel it or wait for it
    UNBLOCK = auto()  # read the worker's error, then detach it, so that it goes on
    SIGNAL = auto()  # cancel the worker that holds this job's lock
    MARK = auto()  # make the cancel final
    LIFT = auto()  # take an earlier cancel back
    READ_RESULT = auto()  # to its end: the proof of a job without a receipt
    VERIFY = auto()  # ask verify_sql
    SETTLE = auto()  # write down what verify_sql said of a worker whose supervisor is gone

    COMMITTED = auto()
    FAILED = auto()
    CANCELLED = auto()
    SUPERSEDED = auto()
    LOST = auto()
    UNKNOWN = auto()


OUTCOMES = frozenset({Step.COMMITTED, Step.FAILED, Step.CANCELLED, Step.SUPERSEDED, Step.LOST, Step.UNKNOWN})


def judge(evidence: Evidence) -> Step:
    """Return the next step for a job, or its outcome.

    A job fails only when nothing of it can commit any more: where a worker of this call may still begin, the job is
    marked first.

    Parameters
    ----------
    evidence:
        Gathered in the order above.

    Returns
    -------
    Step
        The outcome (a member of ``OUTCOMES``) only where it is certain, ``UNKNOWN`` where it cannot be had.
    """
    step = _judge(evidence)
    may_still_begin = evidence.stray and evidence.carries_receipt and evidence.receipt is Receipt.NONE
    return Step.MARK if step in (Step.FAILED, Step.LOST) and may_still_begin else step


def _judge(evidence: Evidence) -> Step:
    if evidence.receipt is Receipt.COMMITTED:
        return Step.COMMITTED
    if evidence.receipt is Receipt.CANCELLED:
        return _judge_cancelled(evidence)

    if evidence.holder is Holder.THIS_JOB:
        if evidence.intent is not Intent.NONE:
            return Step.SIGNAL
        return Step.UNBLOCK if evidence.output_blocked else Step.WAIT

    if evidence.receipt is Receipt.LAUNCHING:
        return _judge_unsupervised(evidence)
    if not evidence.carries_receipt:
        return _judge_without_receipt(evidence)

    if evidence.intent is not Intent.NONE:
        return Step.MARK
    superseded = evidence.superseded or evidence.holder is Holder.NEWER
    # A worker's error is the job's end, unless the worker was turned away, or cancelled for a newer generation.
    if (
        evidence.report is Report.FAILED
        and evidence.sqlstate not in OURS
        and not (superseded and evidence.sqlstate == CANCELED)
    ):
        return Step.FAILED
    if superseded:
        return Step.MARK
    if evidence.report is Report.RUNNING:
        return Step.WAIT
    if evidence.report is Report.ENDED:
        return Step.FAILED if evidence.recorded_failure else Step.LOST
    if evidence.report is Report.FAILED and evidence.sqlstate == ALREADY_COMMITTED:
        return Step.FAILED  # there is no receipt: the job's own SQL raised this code
    # Another launch goes well where the lock is free by now, or the mark was lifted. Where the job's own SQL raises
    # such a code, every launch ends like this one: so they are counted.
    turned_away = evidence.report is Report.FAILED and evidence.sqlstate in (TURNED_AWAY, CALLED_OFF)
    if turned_away and evidence.holder is Holder.NOBODY and not evidence.rejections_left:
        return Step.FAILED
    if evidence.recorded_failure:
        return Step.FAILED
    return _judge_launch(evidence)


def _judge_cancelled(evidence: Evidence) -> Step:
    if evidence.superseded:
        return Step.SUPERSEDED
    if evidence.intent is not Intent.NONE:
        return Step.CANCELLED
    if evidence.gave_up:
        return Step.FAILED if evidence.report is Report.FAILED or evidence.recorded_failure else Step.LOST
    return Step.LIFT if evidence.lift else Step.CANCELLED


def _judge_launch(evidence: Evidence) -> Step:
    """Say whether the job may be launched: nothing of it is at work or decided."""
    if not evidence.launches_left:
        return Step.LOST
    if not evidence.registered:
        return Step.REGISTER
    match evidence.holder:
        case Holder.NOBODY:
            return Step.LAUNCH
        case Holder.OLDER:
            return Step.CLEAR_OLDER
        case _:
            return Step.WAIT_FOR_SERIES


def _judge_unsupervised(evidence: Evidence) -> Step:
    """Judge a supervised job whose receipt is claimed, and whose supervisor holds no lock any more."""
    if evidence.found_by_name:
        return Step.WAIT if evidence.intent is Intent.NONE else Step.SIGNAL
    return _judge_verified(evidence) or Step.SETTLE


def _judge_verified(evidence: Evidence) -> Step | None:
    """Return the next step for a job whose end only verify_sql can tell; None once verify_sql has told it."""
    if not evidence.can_verify:
        return Step.UNKNOWN
    if evidence.verified is None:
        return Step.VERIFY
    # "Not done" was true when verify_sql answered. An earlier worker that may still begin could do the work after that,
    # and another one beside it would do it twice.
    return Step.UNKNOWN if not evidence.verified and evidence.may_begin else None


def _judge_without_receipt(evidence: Evidence) -> Step:
    """A job of kind session: its handle is all there is, and after that verify_sql."""
    end_wanted = evidence.intent is not Intent.NONE
    match evidence.report:
        case Report.RUNNING:
            return Step.SIGNAL if end_wanted else Step.WAIT
        case Report.FAILED:
            return Step.CANCELLED if evidence.sqlstate == CANCELED and end_wanted else Step.FAILED
        case Report.ENDED:
            return Step.READ_RESULT
        case Report.NONE:
            return Step.CANCELLED if end_wanted else Step.LAUNCH
        case Report.GONE:
            pass
    if undecided := _judge_verified(evidence):
        return undecided
    if evidence.verified:
        return Step.COMMITTED
    if end_wanted:
        return Step.CANCELLED
    return Step.LAUNCH if evidence.launches_left else Step.LOST
