"""The evidence: what a look at a job means to a call that remembers what came before. No I/O.

A look has a fixed order, which its meaning depends on: the handle's report, the lock, the receipt. Where a look may
have come in the middle of a change, it is *doubted*: it counts only once later looks have shown the same for a while.
"""

from __future__ import annotations

from enum import Enum, auto
from typing import NamedTuple

from pgbg_orchestration import pace
from pgbg_orchestration.job import Kind
from pgbg_orchestration.ledger.sighting import Sighting
from pgbg_orchestration.outcome import Cause
from pgbg_orchestration.postgres.pg_background import OUTPUT_WAITS
from pgbg_orchestration.verdict import CANCELED, TURNED_AWAY, Evidence, Holder, Intent, Receipt, Report

from .memory import SUPERVISION, Memory, Stage, Stray, Terms


class Sign(Enum):
    """What a look may show in the middle of a change, and of which change.

    - CLAIM: a claimed receipt with nobody at work. A supervisor that started between the look at its lock and the one
      at its claim looks like that; and where a supervisor is gone, its worker shows its marker only once it has begun.
    - LOCKS: the lock of the series without the lock of a job that is known. A worker takes the two one after the other,
      and the server frees them one after the other.
    - END: a worker that somebody else launched has ended. Its launching side is about to write down how.
    - CANCEL: a 57014. Whoever cancels a job signals its worker first and marks the job then.
    """

    CLAIM = auto()
    LOCKS = auto()
    END = auto()
    CANCEL = auto()


class Doubt(NamedTuple):
    """A sign that counts once looks have shown it for so many ``seconds``."""

    sign: Sign
    claim: int | None  # the attempt that claimed the receipt: for another claim the time begins anew
    seconds: float


def doubt_the_look(sighting: Sighting, starting: float = pace.STARTING) -> Doubt | None:
    """Return the doubt about a look that whoever looks has to have; None without one.

    Parameters
    ----------
    starting:
        The time, in seconds, that a worker has to show its marker, where its supervisor is gone.
    """
    if sighting.is_unsupervised:
        return Doubt(Sign.CLAIM, sighting.receipt_attempt, starting)
    if sighting.is_between_locks:
        return Doubt(Sign.LOCKS, None, pace.SIGN)
    return None


def doubt(sighting: Sighting, terms: Terms, memory: Memory, now: float) -> Doubt | None:
    """Return the doubt about a look of a call that drives the job; None when the look can be weighed.

    A call that wants the job to end does not wait for what others are about to write down.
    """
    # Before verify_sql was asked, this very sign was waited out: a worker had its time to show its marker.
    doubtful = doubt_the_look(sighting, pace.STARTING if memory.verification is None else pace.SIGN)
    if doubtful is not None or sighting.receipt is not Receipt.NONE or memory.at(now, terms).intent is not Intent.NONE:
        return doubtful
    holder = sighting.holder(_generation(sighting, terms, memory))
    if memory.attached_since is not None and holder is not Holder.THIS_JOB and sighting.outcome is None:
        return Doubt(Sign.END, None, pace.GRACE)
    sqlstate = sighting.error.sqlstate if _is_recorded(sighting, terms, memory) else memory.launch.sqlstate
    if sqlstate == CANCELED and holder is Holder.NOBODY:
        # A supervised job can be marked only once its supervisor has ended: that takes longer.
        return Doubt(Sign.CANCEL, None, pace.GRACE if terms.kind is Kind.SUPERVISED else pace.SIGN)
    return None


def weigh(sighting: Sighting, terms: Terms, memory: Memory, now: float) -> tuple[Evidence, Memory]:
    """Return what a look at lock, receipt and history means, and what is remembered of it.

    Parameters
    ----------
    sighting:
        The look, without a doubt.
    terms:
        What was asked for.
    memory:
        What this call remembers, its handle's report included.
    now:
        The event loop's clock, in seconds.
    """
    memory = memory.at(now, terms)
    if not memory.looked:
        # If this call registered the job before it looked, the job was new. Any cancel that it sees now came later, and
        # is not an old one.
        is_new = memory.registration is not None or memory.launch.stage is not Stage.NONE
        old_mark = None if is_new else sighting.decided_at
        memory = memory._replace(looked=True, old_mark=old_mark)
    launch = memory.launch
    holder = sighting.holder(_generation(sighting, terms, memory))
    recorded = _is_recorded(sighting, terms, memory)
    # Somebody else's lock explains why this call's workers were turned away: they are counted anew. Not while such a
    # worker runs, since the lock may be its own: a supervisor holds it for a moment before it is turned away.
    if holder is not Holder.NOBODY and launch.report is not Report.RUNNING and memory.tries.rejected:
        memory = memory._replace(tries=memory.tries._replace(rejected=0))
    somebody_elses = launch.report in (Report.NONE, Report.GONE) or launch.sqlstate == TURNED_AWAY
    if holder is Holder.THIS_JOB and somebody_elses:
        memory = memory._replace(attached_since=memory.attached_since or sighting.looked_at)
    elif holder is not Holder.THIS_JOB and sighting.receipt is Receipt.NONE and not _ended_badly(sighting, memory):
        memory = memory._replace(attached_since=None)
    if _is_outdated(sighting, memory):
        memory = memory._replace(verification=None)
    evidence = _evidence(
        terms,
        memory,
        receipt=sighting.receipt,
        holder=holder,
        found_by_name=sighting.marked_pid is not None,
        may_begin=sighting.may_begin,
        superseded=is_superseded(sighting, terms, memory),
        recorded_failure=recorded,
        output_blocked=sighting.wait_event in OUTPUT_WAITS and not terms.adds_supervisor,  # its supervisor reads it
        lift=_lifts(sighting, terms, memory),
    )
    return evidence, memory


def weigh_proof(terms: Terms, memory: Memory, now: float) -> tuple[Evidence, Memory]:
    """Return what a commit's receipt means that was read without a look, after a hint."""
    memory = memory.at(now, terms)
    evidence = _evidence(
        terms, memory, receipt=Receipt.COMMITTED, holder=Holder.NOBODY, may_begin=False, output_blocked=False
    )
    return evidence, memory


def weigh_marker(
    found_by_name: bool, wait_event: str | None, terms: Terms, memory: Memory, now: float
) -> tuple[Evidence, Memory]:
    """Return what a look for the worker of a job without a receipt means, and what is remembered of it.

    Parameters
    ----------
    found_by_name:
        Whether a worker is at work that bears the job's marker.
    wait_event:
        What that worker waits for.
    """
    memory = memory.at(now, terms)
    if found_by_name:
        # What verify_sql said before is out of date.
        memory = memory._replace(launch=memory.launch._replace(at_work=True), verification=None)
    launch = memory.launch
    evidence = _evidence(
        terms,
        memory,
        receipt=Receipt.COMMITTED if launch.result else Receipt.NONE,
        holder=Holder.THIS_JOB if found_by_name and launch.report is not Report.NONE else Holder.NOBODY,
        may_begin=launch.may_begin,
        output_blocked=wait_event in OUTPUT_WAITS,
    )
    return evidence, memory


def claim_without_pid(sighting: Sighting) -> int | None:
    """Return the attempt of a claim that lacks its worker's pid, because its supervisor was gone too early."""
    if sighting.may_begin and sighting.marked_pid is not None and not sighting.holds_this_job:
        return sighting.receipt_attempt
    return None


def is_superseded(sighting: Sighting, terms: Terms, memory: Memory) -> bool:
    """Say whether a newer generation of the series is registered."""
    generation = _generation(sighting, terms, memory)
    if sighting.cause is Cause.SUPERSEDED:
        return True
    return sighting.newest is not None and generation is not None and sighting.newest > generation


def _evidence(
    terms: Terms,
    memory: Memory,
    *,
    receipt: Receipt,
    holder: Holder,
    may_begin: bool,
    output_blocked: bool,
    found_by_name: bool = False,
    superseded: bool = False,
    recorded_failure: bool = False,
    lift: bool = False,
) -> Evidence:
    launch, tries = memory.launch, memory.tries
    return Evidence(
        carries_receipt=terms.carries_receipt,
        receipt=receipt,
        holder=holder,
        found_by_name=found_by_name,
        superseded=superseded,
        registered=memory.registration is not None,
        report=launch.report,
        sqlstate=launch.sqlstate,
        recorded_failure=recorded_failure,
        output_blocked=output_blocked and launch.report is Report.RUNNING,
        intent=memory.intent,
        launches_left=terms.relaunches - tries.lost,
        rejections_left=terms.rejections - tries.rejected,
        lift=lift,
        can_verify=terms.can_verify,
        verified=memory.verification.done if memory.verification else None,
        stray=memory.stray is not Stray.NONE,
        gave_up=memory.stray is Stray.STOPPED,
        may_begin=may_begin,
    )


def _generation(sighting: Sighting, terms: Terms, memory: Memory) -> int | None:
    """Return the job's generation, as far as it is known yet."""
    if memory.generation is not None:
        return memory.generation
    return sighting.generation if terms.generation is None else terms.generation


def _lifts(sighting: Sighting, terms: Terms, memory: Memory) -> bool:
    """Say whether this call takes the job's cancel back: one from before this call, where its caller wants that."""
    if sighting.is_provisional:
        return True
    # Equal, and not earlier: after a clock was set back, a new cancel would look older than it is.
    before = memory.old_mark is not None and sighting.decided_at == memory.old_mark
    # A cancel of the same try stays, also where the try went on in another process since.
    own = terms.of_try is not None and sighting.of_try == terms.of_try
    return before and not own and sighting.cause in terms.takes_back


def _ended_badly(sighting: Sighting, memory: Memory) -> bool:
    """Say whether the history has a failure of the worker that this call was attached to."""
    since = memory.attached_since
    return (
        since is not None
        and sighting.outcome == "failed"
        and sighting.ended_at is not None
        and sighting.ended_at >= since
    )


def _is_recorded(sighting: Sighting, terms: Terms, memory: Memory) -> bool:
    """Say whether the history has a failure that this call is to tell, before it launches anything."""
    holder = sighting.holder(_generation(sighting, terms, memory))
    if holder is not Holder.THIS_JOB and sighting.receipt is Receipt.NONE and _ended_badly(sighting, memory):
        return True
    info = memory.launch.info
    own = memory.launch.registration
    if terms.adds_supervisor and own is not None and sighting.outcome == "failed" and sighting.attempt == own.attempt:
        return True  # its supervisor wrote it down
    if terms.kind is Kind.SUPERVISED and info is not None and info.command_tag == SUPERVISION:
        return True  # its supervisor did its part: a worker that left no receipt failed, and that is written down
    # A launch of the same SQL failed, and nobody was there to be told: this call is told, and the next one launches.
    return sighting.is_unreported and sighting.sql_digest == terms.sql_digest


def _is_outdated(sighting: Sighting, memory: Memory) -> bool:
    """Say whether a worker is at work, or has been since verify_sql was asked: its answer is out of date then."""
    if memory.verification is None or sighting.receipt is not Receipt.LAUNCHING:
        return False
    claim = (sighting.receipt_attempt, sighting.may_begin)
    return sighting.holds_this_job or sighting.marked_pid is not None or claim != memory.verification.claim
