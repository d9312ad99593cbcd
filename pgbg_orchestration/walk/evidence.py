"""Gathering the evidence for a verdict, in the order that makes it mean something: report, lock, receipt."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from datetime import datetime

from pgbg_orchestration import pace
from pgbg_orchestration.job import Kind
from pgbg_orchestration.ledger.ledger import Ledger
from pgbg_orchestration.ledger.sighting import BLOCKED, Key, Sighting
from pgbg_orchestration.outcome import EventKind
from pgbg_orchestration.postgres import markers
from pgbg_orchestration.verdict import CANCELED, TURNED_AWAY, Evidence, Holder, Intent, Receipt, Report

from . import failures
from .case import Case, Launch

logger = logging.getLogger("pgbg_orchestration")

RELAUNCHES = 3  # of a job whose worker is lost without a trace
REJECTIONS = 10  # of a worker that is turned away while nobody is seen to hold the lock


async def gather(case: Case, ledger: Ledger) -> tuple[Evidence, Sighting | None]:
    """Return the evidence, and the look that it comes from (None for a job without a receipt).

    Raises
    ------
    JobIdReused
        The id stands for other SQL, and the caller does not accept that.
    ServerUnreachable, NoPrivilege
        The look failed.
    """
    if case.intent is Intent.NONE and case.seconds_left() == 0:
        case.intent = Intent.DEADLINE
    await case.launch.read()
    launch = case.launch
    if case.found_no_slot:
        launch = Launch()  # nothing was launched: no attempt is used up
        case.registered = case.registration is not None
    if launch.lost:
        case.stray = True
        case.tell_once(EventKind.SESSION_LOST, "its handle is lost; following the worker by its lock and receipt")
    evidence = Evidence(
        carries_receipt=case.work.carries_receipt,
        registered=case.registered,
        report=launch.report,
        sqlstate=launch.error.sqlstate if launch.error else None,
        intent=case.intent,
        launches_left=RELAUNCHES - case.relaunches,
        rejections_left=REJECTIONS - case.rejections,
        can_verify=case.work.verify_sql is not None,
        verified=case.verified,
        stray=case.stray,
        gave_up=case.gave_up,
    )
    if case.work.carries_receipt:
        return await _from_ledger(case, ledger, evidence)
    return await _from_marker(case, ledger, evidence), None


async def _from_ledger(case: Case, ledger: Ledger, evidence: Evidence) -> tuple[Evidence, Sighting]:
    # Once verify_sql was asked, a worker had its time to show itself.
    seen = await look(ledger, case.work.key, pace.STARTING if case.verified is None else pace.COUNTS)
    case.first_look = case.first_look or seen
    _check_digest(case, seen)
    holder = seen.holder(case.generation(seen))
    case.worker_pid = seen.marked_pid
    if case.worker_pid is None and seen.holds_this_job and case.work.kind is not Kind.SUPERVISED:
        case.worker_pid = seen.holder_pid
    recorded = False
    if holder is not Holder.NOBODY:
        case.rejections = 0
    somebody_elses = evidence.report in (Report.NONE, Report.GONE) or evidence.sqlstate == TURNED_AWAY
    if holder is Holder.THIS_JOB and somebody_elses:
        case.attached_since = case.attached_since or seen.looked_at
    elif case.attached_since and holder is not Holder.THIS_JOB and seen.receipt is Receipt.NONE:
        seen = await _await_history(case, ledger, seen)
        holder = seen.holder(case.generation(seen))
        recorded = _failed_since(seen, case.attached_since)
        if not recorded:
            case.attached_since = None
    if case.work.kind is Kind.SUPERVISED and case.launch.info is not None and case.launch.info.command_tag == "CALL":
        recorded = True  # its supervisor came to its end: without a receipt, it wrote down how its worker failed
    # The same work, launched by a call that is gone: what came of it is told before it is launched again.
    recorded = recorded or (seen.is_untold and seen.sql_digest == case.work.sql_digest)
    sqlstate = seen.error.sqlstate if recorded else evidence.sqlstate
    if sqlstate == CANCELED and holder is Holder.NOBODY and seen.receipt is Receipt.NONE:
        # Whoever cancels a job signals its worker first and marks it then: the mark may be on its way.
        seen = await _await_mark(case, ledger, seen)
    claim = (seen.receipt_attempt, seen.may_begin)
    if seen.receipt is Receipt.LAUNCHING and (seen.holds_this_job or seen.marked_pid or claim != case.verified_of):
        case.verified = None  # that was said before the worker ended that is, or was, at work
    return replace(
        evidence,
        receipt=seen.receipt,
        holder=holder,
        marked=seen.marked_pid is not None,
        may_begin=seen.may_begin,
        verified=case.verified,
        superseded=case.is_superseded(seen),
        recorded_failure=recorded,
        output_blocked=seen.wait_event in BLOCKED and evidence.report is Report.RUNNING,
        lift=case.lifts(seen),
    ), seen


async def look(ledger: Ledger, key: Key, starting: float = pace.STARTING) -> Sighting:
    """Look at a job; what may be half of a sign is believed only after a while.

    - A claimed receipt with nobody at work: a supervisor that starts between the look at its lock and the one at its
      claim looks the same, so it takes two looks at the same claim. The worker of one that is gone shows its marker
      only once it has started: it gets ``starting`` seconds, and is then named in the receipt.
    - The lock of the series held by no job that is known: a worker takes the locks of series and job one after the
      other, and the server frees them so, in either order.
    """
    loop = asyncio.get_running_loop()
    began = loop.time()
    seen = await ledger.look(key)
    claim = None  # that an earlier look saw with nobody at work: whoever made it is gone
    while (seen.is_unsupervised and (claim != seen.receipt_attempt or loop.time() < began + starting)) or (
        seen.is_between_locks and loop.time() < began + pace.COUNTS
    ):
        claim = seen.receipt_attempt if seen.is_unsupervised else None
        await asyncio.sleep(pace.RETRY_SOONEST)
        seen = await ledger.look(key)
    if seen.may_begin and seen.marked_pid is not None and not seen.holds_this_job and seen.receipt_attempt is not None:
        await ledger.follow(key, seen.receipt_attempt, seen.marked_pid)
    return seen


def _check_digest(case: Case, seen: Sighting) -> None:
    if seen.sql_digest in (None, case.work.sql_digest) or "changed" in case.told:
        return
    if not case.options.accept_changed_sql:
        raise failures.reused(case.work)
    case.told.add("changed")
    logger.warning("job %s has other SQL than when it was first registered", case.work.label)


async def _await_history(case: Case, ledger: Ledger, seen: Sighting) -> Sighting:
    """Give the launching side of a worker that just ended a moment to write down how."""
    until = asyncio.get_running_loop().time() + pace.GRACE
    while (
        seen.outcome is None
        and not seen.holds_this_job
        and seen.receipt is Receipt.NONE
        and case.may_wait_for_history(until)
    ):
        await asyncio.sleep(pace.RETRY_SOONEST)
        seen = await look(ledger, case.work.key)
    return seen


async def _await_mark(case: Case, ledger: Ledger, seen: Sighting) -> Sighting:
    # A supervisor has to end before its job can be marked.
    patience = pace.GRACE if case.work.kind is Kind.SUPERVISED else pace.COUNTS
    until = asyncio.get_running_loop().time() + patience
    while seen.receipt is Receipt.NONE and seen.holder_pid is None and case.may_wait_for_history(until):
        await asyncio.sleep(pace.RETRY_SOONEST)
        seen = await look(ledger, case.work.key)
    return seen


def _failed_since(seen: Sighting, since: datetime) -> bool:
    return seen.outcome == "failed" and seen.ended_at is not None and seen.ended_at >= since


async def _from_marker(case: Case, ledger: Ledger, evidence: Evidence) -> Evidence:
    marked = await ledger.run(lambda conn: markers.find(conn, case.work.marker, case.work.key.owner))
    case.worker_pid = marked.pid if marked else None
    if marked is not None:
        case.last_marked = asyncio.get_running_loop().time()
    blocked = marked is not None and marked.wait_event in BLOCKED
    case.launch.seen = case.launch.seen or marked is not None
    if marked is not None:
        case.verified = None
    return replace(
        evidence,
        may_begin=case.launch.may_begin,
        verified=case.verified,
        receipt=Receipt.COMMITTED if case.launch.result else Receipt.NONE,
        holder=Holder.THIS_JOB if marked and evidence.report is not Report.NONE else Holder.NOBODY,
        output_blocked=blocked and evidence.report is Report.RUNNING,
    )
