"""The verdict: a table with a line for each rule, and what must hold for every combination of evidence there is."""

# ruff: noqa: E501  (a rule is a line)

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from itertools import product
from typing import Any

import pytest

from pgbg_orchestration.verdict import (
    ALREADY_COMMITTED,
    CALLED_OFF,
    CANCELED,
    OUTCOMES,
    TURNED_AWAY,
    Evidence,
    Holder,
    Intent,
    Receipt,
    Report,
    Step,
    judge,
)

OWN_ERROR = "23505"
REGISTERED = Evidence(registered=True)
LAUNCHED = Evidence(report=Report.RUNNING)
SESSION = Evidence(carries_receipt=False)


def failed(sqlstate: str | None, **more: object) -> Evidence:
    return replace(Evidence(report=Report.FAILED, sqlstate=sqlstate), **more)  # type: ignore[arg-type]


# Each line: the rule, the evidence, the step.
RULES: list[tuple[str, Evidence, Step]] = [
    # A receipt says how the job ended, and nothing else does.
    ("a receipt is the end", Evidence(receipt=Receipt.COMMITTED), Step.COMMITTED),
    ("also while its worker still holds the lock", Evidence(receipt=Receipt.COMMITTED, holder=Holder.THIS_JOB), Step.COMMITTED),
    ("also when the worker reported an error", failed(CANCELED, receipt=Receipt.COMMITTED), Step.COMMITTED),
    ("also when a cancel was wanted", Evidence(receipt=Receipt.COMMITTED, intent=Intent.ASKED), Step.COMMITTED),
    ("also when a newer generation is there", Evidence(receipt=Receipt.COMMITTED, superseded=True), Step.COMMITTED),
    ("a mark is the end", Evidence(receipt=Receipt.CANCELLED), Step.CANCELLED),
    ("a mark is lifted for a retry", Evidence(receipt=Receipt.CANCELLED, lift=True), Step.LIFT),
    ("not by one who wants the end himself", Evidence(receipt=Receipt.CANCELLED, lift=True, intent=Intent.ASKED), Step.CANCELLED),
    ("not for an older generation", Evidence(receipt=Receipt.CANCELLED, lift=True, superseded=True), Step.SUPERSEDED),
    # Nothing yet: register, then launch.
    ("the first step is to register", Evidence(), Step.REGISTER),
    ("then to launch", REGISTERED, Step.LAUNCH),
    # The lock.
    ("our job's worker is attached to", Evidence(holder=Holder.THIS_JOB), Step.WAIT),
    ("an older worker is dealt with", replace(REGISTERED, holder=Holder.OLDER), Step.CLEAR_OLDER),
    ("but not before we are registered", Evidence(holder=Holder.OLDER), Step.REGISTER),
    ("a newer worker ends us", Evidence(holder=Holder.NEWER), Step.MARK),
    ("a sibling is waited for", replace(REGISTERED, holder=Holder.SIBLING), Step.WAIT_FOR_SERIES),
    ("a stranger is waited for", replace(REGISTERED, holder=Holder.STRANGER), Step.WAIT_FOR_SERIES),
    # The report of our own worker.
    ("a worker that runs is waited for", LAUNCHED, Step.WAIT),
    ("completed without an error is no success", Evidence(report=Report.ENDED), Step.LOST),
    ("an error is the end", failed(OWN_ERROR), Step.FAILED),
    ("but not while a worker of the job is at work", failed(OWN_ERROR, holder=Holder.THIS_JOB), Step.WAIT),
    ("an error without a SQLSTATE is one", failed(None), Step.FAILED),
    ("a 57014 that nobody asked for is an error", failed(CANCELED), Step.FAILED),
    ("a 57014 by a newer generation is not", failed(CANCELED, superseded=True), Step.MARK),
    ("another error is, newer generation or not", failed(OWN_ERROR, superseded=True), Step.FAILED),
    ("turned away: register and try again", failed(TURNED_AWAY), Step.REGISTER),
    ("turned away, by one who is there", failed(TURNED_AWAY, holder=Holder.THIS_JOB), Step.WAIT),
    ("turned away too often by nobody", failed(TURNED_AWAY, rejections_left=0), Step.FAILED),
    ("turned away often by a sibling", failed(TURNED_AWAY, rejections_left=0, holder=Holder.SIBLING, registered=True), Step.WAIT_FOR_SERIES),
    ("PB001 without a receipt is the job's own", failed(ALREADY_COMMITTED), Step.FAILED),
    ("PB003 without a mark: the mark was lifted since", failed(CALLED_OFF), Step.REGISTER),
    ("but not again and again", failed(CALLED_OFF, rejections_left=0), Step.FAILED),
    ("PB003 for a newer generation", failed(CALLED_OFF, superseded=True), Step.MARK),
    ("a lost handle: launch again", Evidence(report=Report.GONE, registered=True), Step.LAUNCH),
    ("a lost handle, its worker at work", Evidence(report=Report.GONE, holder=Holder.THIS_JOB), Step.WAIT),
    ("lost too often", Evidence(report=Report.GONE, launches_left=0), Step.LOST),
    ("another process wrote down how its worker failed", Evidence(recorded_failure=True), Step.FAILED),
    # A worker of this call may still begin: nothing is told before it cannot.
    ("an error, and a stray: mark it first", failed(OWN_ERROR, stray=True), Step.MARK),
    ("lost, and a stray: mark it first", Evidence(report=Report.ENDED, stray=True), Step.MARK),
    ("lost too often: mark it first", Evidence(report=Report.GONE, launches_left=0, stray=True), Step.MARK),
    ("marked by us: now the error is told", failed(OWN_ERROR, stray=True, gave_up=True, receipt=Receipt.CANCELLED), Step.FAILED),
    ("marked by us: now it is lost", Evidence(report=Report.GONE, stray=True, gave_up=True, receipt=Receipt.CANCELLED), Step.LOST),
    ("the stray was quicker", failed(OWN_ERROR, stray=True, receipt=Receipt.COMMITTED), Step.COMMITTED),
    ("a stray at work is waited for", failed(OWN_ERROR, stray=True, holder=Holder.THIS_JOB), Step.WAIT),
    # A supervised job: its receipt is claimed before the work, and says how it ended after it.
    ("claimed: its supervisor is at work", Evidence(receipt=Receipt.LAUNCHING, holder=Holder.THIS_JOB), Step.WAIT),
    ("claimed: only the worker is left", Evidence(receipt=Receipt.LAUNCHING, found_by_name=True), Step.WAIT),
    ("claimed: only the worker is left, and is not wanted", Evidence(receipt=Receipt.LAUNCHING, found_by_name=True, intent=Intent.ASKED), Step.SIGNAL),
    ("claimed: nobody is left, nobody knows", Evidence(receipt=Receipt.LAUNCHING), Step.UNKNOWN),
    ("claimed: nobody is left, verify_sql", Evidence(receipt=Receipt.LAUNCHING, can_verify=True), Step.VERIFY),
    ("claimed: verify_sql said so", Evidence(receipt=Receipt.LAUNCHING, can_verify=True, verified=False), Step.SETTLE),
    ("claimed: not done, but it may begin yet", Evidence(receipt=Receipt.LAUNCHING, can_verify=True, verified=False, may_begin=True), Step.UNKNOWN),
    ("claimed: done, by whomever", Evidence(receipt=Receipt.LAUNCHING, can_verify=True, verified=True, may_begin=True), Step.SETTLE),
    # Full output.
    ("blocked output is let go", replace(LAUNCHED, holder=Holder.THIS_JOB, output_blocked=True), Step.UNBLOCK),
    # The end is wanted.
    ("a cancel signals the one at work", replace(LAUNCHED, holder=Holder.THIS_JOB, intent=Intent.ASKED), Step.SIGNAL),
    ("a cancel marks one that is not seen at work", replace(LAUNCHED, intent=Intent.ASKED), Step.MARK),
    ("a cancel marks before anything was launched", Evidence(intent=Intent.ASKED), Step.MARK),
    ("a deadline does the same", Evidence(intent=Intent.DEADLINE), Step.MARK),
    ("a cancel is no failure", failed(CANCELED, intent=Intent.ASKED), Step.MARK),
    ("a cancel does not touch others", Evidence(intent=Intent.ASKED, holder=Holder.OLDER), Step.MARK),
    # A newer generation is registered.
    ("an older generation gives up", Evidence(superseded=True), Step.MARK),
    ("also with its worker on its way", replace(LAUNCHED, superseded=True), Step.MARK),
    ("its worker at work is waited for", replace(LAUNCHED, superseded=True, holder=Holder.THIS_JOB), Step.WAIT),
    # Without a receipt.
    ("session: launch", SESSION, Step.LAUNCH),
    ("session: wait", replace(SESSION, report=Report.RUNNING), Step.WAIT),
    ("session: the result is the proof", replace(SESSION, report=Report.ENDED), Step.READ_RESULT),
    ("session: the proof is there", replace(SESSION, report=Report.ENDED, receipt=Receipt.COMMITTED), Step.COMMITTED),
    ("session: an error is the end", failed(OWN_ERROR, carries_receipt=False), Step.FAILED),
    ("session: a lost handle", replace(SESSION, report=Report.GONE), Step.UNKNOWN),
    ("session: a lost handle, its worker there", replace(SESSION, report=Report.GONE, holder=Holder.THIS_JOB), Step.WAIT),
    ("session: a lost handle, verify_sql", replace(SESSION, report=Report.GONE, can_verify=True), Step.VERIFY),
    ("session: verified", replace(SESSION, report=Report.GONE, can_verify=True, verified=True), Step.COMMITTED),
    ("session: not done", replace(SESSION, report=Report.GONE, can_verify=True, verified=False), Step.LAUNCH),
    ("session: not done, but it may begin yet", replace(SESSION, report=Report.GONE, can_verify=True, verified=False, may_begin=True), Step.UNKNOWN),
    ("session: not done, and often", replace(SESSION, report=Report.GONE, can_verify=True, verified=False, launches_left=0), Step.LOST),
    ("session: not done, and not wanted", replace(SESSION, report=Report.GONE, can_verify=True, verified=False, intent=Intent.ASKED), Step.CANCELLED),
    ("session: cancel before launch", replace(SESSION, intent=Intent.ASKED), Step.CANCELLED),
    ("session: cancel", replace(SESSION, report=Report.RUNNING, intent=Intent.ASKED), Step.SIGNAL),
    ("session: full output", replace(SESSION, report=Report.RUNNING, holder=Holder.THIS_JOB, output_blocked=True), Step.UNBLOCK),
]  # fmt: skip


@pytest.mark.parametrize(("seen", "step"), [rule[1:] for rule in RULES], ids=[rule[0] for rule in RULES])
def test_rule(seen: Evidence, step: Step) -> None:
    assert judge(seen) is step


def test_the_table_knows_every_step() -> None:
    assert {step for _, _, step in RULES} == set(Step)


# Every combination --------------------------------------------------------------------------------------------------

REPORTS: list[tuple[Report, str | None]] = [
    (report, None) for report in (Report.NONE, Report.RUNNING, Report.ENDED, Report.GONE)
] + [(Report.FAILED, state) for state in (None, OWN_ERROR, CANCELED, ALREADY_COMMITTED, TURNED_AWAY, CALLED_OFF)]
VERIFICATIONS: list[tuple[bool, bool | None]] = [(False, None), (True, None), (True, True), (True, False)]
YES_NO = (False, True)
NO = (False,)


def every_evidence() -> Iterator[Evidence]:
    """All there is. Counters are 0 or not; a SQLSTATE is one of ours, a cancel's, another, or was not told.

    What only some kinds of job can show is varied for those alone: verify_sql, a marker and a worker that may begin for a claimed
    receipt and for jobs that carry none, strays for jobs that carry one.
    """
    decided = tuple(receipt for receipt in Receipt if receipt is not Receipt.LAUNCHING)
    plain = VERIFICATIONS[:1]
    yield from _all((True,), decided, tuple(Holder), YES_NO, NO, plain, YES_NO, NO)
    yield from _all((True,), (Receipt.LAUNCHING,), tuple(Holder), YES_NO, YES_NO, VERIFICATIONS, NO, NO)
    yield from _all((True,), (Receipt.LAUNCHING,), tuple(Holder), NO, YES_NO, VERIFICATIONS[1:], NO, (True,))
    yield from _all((False,), (Receipt.NONE, Receipt.COMMITTED), WITHOUT_LOCK, NO, NO, VERIFICATIONS, YES_NO, NO)
    yield from _all((False,), (Receipt.NONE,), WITHOUT_LOCK, NO, NO, VERIFICATIONS[1:], YES_NO, (True,))


WITHOUT_LOCK = (Holder.NOBODY, Holder.THIS_JOB)


def _all(
    carries: Sequence[bool],
    receipts: Sequence[Receipt],
    holders: Sequence[Holder],
    ledger: Sequence[bool],
    marks: Sequence[bool],
    verifications: Sequence[tuple[bool, bool | None]],
    strays: Sequence[bool],
    beginnings: Sequence[bool],
) -> Iterator[Evidence]:
    values: dict[str, Sequence[Any]] = {
        "carries_receipt": carries,
        "receipt": receipts,
        "holder": holders,
        "found_by_name": marks,
        "superseded": ledger,
        "registered": ledger,
        "reported": REPORTS,
        "recorded_failure": ledger,
        "output_blocked": YES_NO,
        "intent": tuple(Intent),
        "launches_left": (0, 1),
        "rejections_left": (0, 1),
        "lift": ledger,
        "verification": verifications,
        "stray": strays,
        "gave_up": strays,
        "may_begin": beginnings,
    }
    for chosen in product(*values.values()):
        fields_of = dict(zip(values, chosen, strict=True))
        fields_of["report"], fields_of["sqlstate"] = fields_of.pop("reported")
        fields_of["can_verify"], fields_of["verified"] = fields_of.pop("verification")
        yield Evidence(**fields_of)


def _asks(seen: Evidence) -> bool:
    return seen.intent is not Intent.NONE


def _decided(seen: Evidence) -> bool:
    return seen.receipt in (Receipt.COMMITTED, Receipt.CANCELLED)


PROPERTIES: dict[str, Callable[[Evidence, Step], bool]] = {
    "a success has a receipt, or verify_sql said so of a job that cannot carry one": lambda e, s: (
        s is not Step.COMMITTED or e.receipt is Receipt.COMMITTED or (not e.carries_receipt and e.verified is True)
    ),
    "a committed job is told so, whatever else is seen": lambda e, s: (
        e.receipt is not Receipt.COMMITTED or s is Step.COMMITTED
    ),
    "a decided job is neither launched nor cancelled nor waited for": lambda e, s: (
        not _decided(e) or s in OUTCOMES or s is Step.LIFT
    ),
    "a mark is lifted only for one who wants the job and is the newest": lambda e, s: (
        s is not Step.LIFT or (e.lift and not e.superseded and not _asks(e) and e.receipt is Receipt.CANCELLED)
    ),
    "no outcome while the job's worker holds the lock and nothing is decided": lambda e, s: (
        e.holder is not Holder.THIS_JOB or _decided(e) or s not in OUTCOMES
    ),
    "no launch while somebody is seen to hold the lock": lambda e, s: (
        s is not Step.LAUNCH or e.holder is Holder.NOBODY or not e.carries_receipt
    ),
    "no launch beside our own worker, nor after one that is known to have ended": lambda e, s: (
        s is not Step.LAUNCH
        or e.report in (Report.NONE, Report.GONE)
        or (e.report is Report.FAILED and e.sqlstate in (TURNED_AWAY, CALLED_OFF))
    ),
    "no launch of a job with a receipt that is not registered": lambda e, s: (
        s is not Step.LAUNCH or not e.carries_receipt or e.registered
    ),
    "no launch when the end is wanted": lambda e, s: s not in (Step.LAUNCH, Step.REGISTER) or not _asks(e),
    "no launch of an older generation": lambda e, s: (
        s not in (Step.LAUNCH, Step.REGISTER) or not e.carries_receipt or not (e.superseded or e.holder is Holder.NEWER)
    ),
    "no launch without an end": lambda e, s: (
        s is not Step.LAUNCH or e.launches_left > 0 or (not e.carries_receipt and e.report is Report.NONE)
    ),
    "whoever wants the end signals, marks, or has it": lambda e, s: (
        not _asks(e)
        or s in (Step.SIGNAL, Step.MARK, *OUTCOMES)
        or (not e.carries_receipt and s in (Step.READ_RESULT, Step.VERIFY))
        or (e.receipt is Receipt.LAUNCHING and s in (Step.VERIFY, Step.SETTLE))
    ),
    "a job that can carry a receipt is cancelled by its mark only": lambda e, s: (
        s not in (Step.CANCELLED, Step.SUPERSEDED) or not e.carries_receipt or e.receipt is Receipt.CANCELLED
    ),
    "superseded is said only where a newer generation is": lambda e, s: s is not Step.SUPERSEDED or e.superseded,
    "a job is failed by its own error only": lambda e, s: (
        s is not Step.FAILED or e.report is Report.FAILED or e.recorded_failure
    ),
    "a mark of ours is a failure's, unless others want it": lambda e, s: (
        not (e.gave_up and e.receipt is Receipt.CANCELLED) or e.superseded or _asks(e) or s in (Step.FAILED, Step.LOST)
    ),
    "a wanted end is no failure": lambda e, s: s is not Step.FAILED or not _asks(e) or not e.carries_receipt,
    "a job with a receipt is unknown only while it is claimed": lambda e, s: (
        s is not Step.UNKNOWN or not e.carries_receipt or (e.receipt is Receipt.LAUNCHING and not e.found_by_name)
    ),
    "unknown is said only where nothing verifies, or what does cannot be relied on": lambda e, s: (
        s is not Step.UNKNOWN or not e.can_verify or (e.verified is False and e.may_begin)
    ),
    "no second launch beside a worker that nothing refuses and that may begin": lambda e, s: (
        s is not Step.LAUNCH or e.carries_receipt or e.report is not Report.GONE or not e.may_begin
    ),
    "a claim is not freed while its worker may begin": lambda e, s: (
        s is not Step.SETTLE or e.verified is True or not e.may_begin
    ),
    "unknown is said of a job without a receipt only when its handle is lost": lambda e, s: (
        s is not Step.UNKNOWN or e.carries_receipt or e.report is Report.GONE
    ),
    "no failure is told while a worker of this call may still begin": lambda e, s: (
        s not in (Step.FAILED, Step.LOST) or not e.carries_receipt or not e.stray or _decided(e)
    ),
    "a claimed job is not launched beside its worker": lambda e, s: (
        s not in (Step.LAUNCH, Step.REGISTER) or e.receipt is not Receipt.LAUNCHING
    ),
    "lost is said only of a worker that ended, or that cannot be launched again": lambda e, s: (
        s is not Step.LOST or e.report is Report.ENDED or not e.launches_left or e.gave_up
    ),
    "an older worker is dealt with only by one that is registered": lambda e, s: (
        s is not Step.CLEAR_OLDER or (e.registered and e.holder is Holder.OLDER and not e.superseded)
    ),
    "output is dropped only when it blocks our own job": lambda e, s: (
        s is not Step.UNBLOCK or (e.output_blocked and e.holder is Holder.THIS_JOB)
    ),
    "a result is proof only where no receipt can be": lambda e, s: (
        s not in (Step.READ_RESULT, Step.VERIFY) or not e.carries_receipt or e.receipt is Receipt.LAUNCHING
    ),
}


@pytest.fixture(scope="module")
def counterexamples() -> dict[str, tuple[Evidence, Step]]:
    """One pass over all combinations: the first evidence that breaks each property."""
    found: dict[str, tuple[Evidence, Step]] = {}
    for seen in every_evidence():
        step = judge(seen)
        for name, holds in PROPERTIES.items():
            if name not in found and not holds(seen, step):
                found[name] = (seen, step)
    return found


@pytest.mark.parametrize("name", PROPERTIES)
def test_holds_for_every_evidence(name: str, counterexamples: dict[str, tuple[Evidence, Step]]) -> None:
    assert name not in counterexamples, f"{name}: broken by {counterexamples[name]}"


def test_every_field_is_enumerated() -> None:
    """A new field of the evidence belongs into ``every_evidence``."""
    assert {field.name for field in fields(Evidence)} == {
        "carries_receipt", "receipt", "holder", "superseded", "registered", "report", "sqlstate", "recorded_failure",
        "output_blocked", "intent", "launches_left", "rejections_left", "lift", "can_verify", "verified", "found_by_name",
        "stray", "gave_up", "may_begin",
    }  # fmt: skip


@pytest.mark.parametrize(
    "mutant", ["ENDED is success", "FAILED without a look at the receipt", "launch beside a worker"]
)
def test_the_properties_notice(mutant: str) -> None:
    """A verdict that is broken on purpose breaks a property: they are no tautologies."""

    def broken(seen: Evidence) -> Step:
        if mutant == "ENDED is success" and seen.report is Report.ENDED and seen.carries_receipt:
            return Step.COMMITTED
        if mutant == "FAILED without a look at the receipt" and seen.report is Report.FAILED:
            return Step.FAILED
        if mutant == "launch beside a worker" and judge(seen) is Step.WAIT:
            return Step.LAUNCH
        return judge(seen)

    some = (replace(seen, report=report, sqlstate=state) for _, seen, _ in RULES for report, state in REPORTS)
    assert any(not holds(seen, broken(seen)) for seen in some for holds in PROPERTIES.values())
