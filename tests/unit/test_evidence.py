"""The evidence: what a look means to a call, and how long it is doubted; a line for each rule, and what always holds."""

from __future__ import annotations

# ruff: noqa: E501  (a rule is a line)
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from datetime import timedelta
from itertools import product
from typing import Any

import pytest

from pgbg_orchestration import pace
from pgbg_orchestration.job import Kind
from pgbg_orchestration.ledger.sighting import Sighting
from pgbg_orchestration.outcome import Cause, ErrorFields
from pgbg_orchestration.postgres.pg_background import ResultInfo
from pgbg_orchestration.verdict import CALLED_OFF, CANCELED, TURNED_AWAY, Evidence, Holder, Intent, Receipt, Report
from pgbg_orchestration.walk.evidence import Doubt, Sign, claim_without_pid, doubt, doubt_the_look, weigh, weigh_marker
from pgbg_orchestration.walk.memory import FOLLOWS, REPORTS, Launch, Memory, Stage, Stray, Terms, Tries, Verification
from tests.chaos.looks import NOW, registration, sighting

OWN_ERROR = "23505"
TERMS = Terms(generation=1)
AGAIN = Terms(generation=1, takes_back=frozenset({Cause.ASKED}))
SUPERVISED = Terms(kind=Kind.SUPERVISED, generation=1)
SUPERVISED_BESIDE = Terms(generation=1, adds_supervisor=True)
FREE = sighting()
HELD = sighting(holder=1)
CLAIMED = sighting(status="launching", attempt=1)
MARKED = sighting(status="launching", attempt=1, marked=True)
LATER = NOW + timedelta(seconds=1)
BETWEEN = replace(FREE, holder_pid=1)
ATTACHED = Memory(attached_since=NOW)
ENDED = Launch(Stage.ENDED, registration("registered", 1, 1), ResultInfo(True, False, 0, "CALL"))


def failed(sqlstate: str | None) -> Launch:
    return Launch(Stage.FAILED, error=ErrorFields(sqlstate))


# How long a look is doubted -----------------------------------------------------------------------------------------

HALF: list[tuple[str, Sighting, Terms, Memory, Doubt | None]] = [
    ("a free lock is one", FREE, TERMS, Memory(), None),
    ("a held lock is one", HELD, TERMS, Memory(), None),
    ("claimed, and nobody at work", CLAIMED, SUPERVISED, Memory(), Doubt(Sign.CLAIM, 1, pace.STARTING)),
    ("the same after verify_sql was asked", CLAIMED, SUPERVISED, Memory(verification=Verification(False)), Doubt(Sign.CLAIM, 1, pace.SIGN)),
    ("another claim is another doubt", sighting(status="launching", attempt=2), SUPERVISED, Memory(), Doubt(Sign.CLAIM, 2, pace.STARTING)),
    ("claimed, its worker at work", MARKED, SUPERVISED, Memory(), None),
    ("claimed, its supervisor at work", replace(CLAIMED, holder_pid=1, holds_this_job=True), SUPERVISED, Memory(), None),
    ("the lock of the series alone", BETWEEN, TERMS, Memory(), Doubt(Sign.LOCKS, None, pace.SIGN)),
    ("also for one who wants the end", BETWEEN, TERMS, Memory(intent=Intent.ASKED), Doubt(Sign.LOCKS, None, pace.SIGN)),
    ("the end of a worker that it was attached to", FREE, TERMS, ATTACHED, Doubt(Sign.END, None, pace.GRACE)),
    ("not once it is written down", sighting(failed=True), TERMS, ATTACHED, None),
    ("nor with a receipt", sighting(status="committed"), TERMS, ATTACHED, None),
    ("nor while it is at work", HELD, TERMS, ATTACHED, None),
    ("nor for one who wants the end", FREE, TERMS, ATTACHED._replace(intent=Intent.ASKED), None),
    ("nor after the deadline", FREE, TERMS._replace(deadline=0.0), ATTACHED, None),
    ("a 57014: its mark may be on its way", FREE, TERMS, Memory(launch=failed(CANCELED)), Doubt(Sign.CANCEL, None, pace.SIGN)),
    ("of a supervised job", FREE, SUPERVISED, Memory(launch=failed(CANCELED)), Doubt(Sign.CANCEL, None, pace.GRACE)),
    ("a 57014 that was written down", replace(sighting(failed=True), error=ErrorFields(CANCELED)), TERMS, ATTACHED, Doubt(Sign.CANCEL, None, pace.SIGN)),
    ("a 57014 of old", replace(sighting(failed=True), error=ErrorFields(CANCELED)), TERMS, Memory(), None),
    ("a 57014, and somebody at work", HELD, TERMS, Memory(launch=failed(CANCELED)), None),
    ("another error", FREE, TERMS, Memory(launch=failed(OWN_ERROR)), None),
]  # fmt: skip


@pytest.mark.parametrize(("seen", "terms", "memory", "half"), [rule[1:] for rule in HALF], ids=[r[0] for r in HALF])
def test_doubt(seen: Sighting, terms: Terms, memory: Memory, half: Doubt | None) -> None:
    assert doubt(seen, terms, memory, 0.0) == half


def test_the_table_knows_every_sign() -> None:
    assert {half.sign for *_, half in HALF if half} == set(Sign)


# What a look means ---------------------------------------------------------------------------------------------------

MEANINGS: list[tuple[str, Sighting, Terms, Memory, dict[str, Any]]] = [
    ("nothing", FREE, TERMS, Memory(), {"receipt": Receipt.NONE, "holder": Holder.NOBODY, "report": Report.NONE, "registered": False}),
    ("registered", FREE, TERMS, Memory().registered(registration("registered", 1)), {"registered": True}),
    ("a refused registration", FREE, TERMS, Memory().registered(registration("superseded", 1)), {"registered": False}),
    ("an older worker", sighting(generation=2, holder=1), TERMS._replace(generation=2), Memory(), {"holder": Holder.OLDER}),
    ("its generation is the registration's", sighting(generation=1, holder=2), TERMS, Memory(generation=3), {"holder": Holder.OLDER}),
    ("a newer one is registered", sighting(newest=2), TERMS, Memory(), {"superseded": True}),
    ("marked by a newer one", sighting(status="cancelled", cause="superseded"), TERMS, Memory(), {"superseded": True, "lift": False}),
    ("a mark that is provisional", sighting(status="cancelled", cause="given up"), TERMS, Memory(looked=True), {"lift": True}),
    ("a mark of before", sighting(status="cancelled", cause="asked"), AGAIN, Memory(), {"lift": True}),
    ("a mark that came meanwhile", sighting(status="cancelled", cause="asked"), AGAIN, Memory(looked=True), {"lift": False}),
    ("a mark seen first after a launch of its own", sighting(status="cancelled", cause="asked"), AGAIN, Memory(launch=failed(CANCELED)), {"lift": False}),
    ("a mark for another cause", sighting(status="cancelled", cause="run gone"), AGAIN, Memory(), {"lift": False}),
    ("a mark of this very try", replace(sighting(status="cancelled", cause="asked"), of_try="1"), AGAIN._replace(of_try="1"), Memory(), {"lift": False}),
    ("a mark, and no retry", sighting(status="cancelled", cause="asked"), TERMS, Memory(), {"lift": False}),
    ("the deadline", FREE, TERMS._replace(deadline=0.0), Memory(), {"intent": Intent.DEADLINE}),
    ("before it", FREE, TERMS._replace(deadline=1.0), Memory(), {"intent": Intent.NONE}),
    ("it was asked before", FREE, TERMS._replace(deadline=0.0), Memory(intent=Intent.ASKED), {"intent": Intent.ASKED}),
    ("somebody wrote down the failure", sighting(failed=True), TERMS, ATTACHED, {"recorded_failure": True}),
    ("an earlier one", sighting(failed=True), TERMS, Memory(attached_since=LATER), {"recorded_failure": False}),
    ("of another time", sighting(failed=True), TERMS, Memory(), {"recorded_failure": False}),
    ("while it is at work again", sighting(holder=1, failed=True), TERMS, ATTACHED, {"recorded_failure": False}),
    ("nobody was told", sighting(failed=True, reported=False), TERMS, Memory(), {"recorded_failure": True}),
    ("of other SQL", sighting(failed=True, reported=False), TERMS._replace(sql_digest=b"other"), Memory(), {"recorded_failure": False}),
    ("a supervisor that came to its end", FREE, SUPERVISED, Memory(launch=Launch(Stage.ENDED, info=ResultInfo(True, False, 0, "CALL"))), {"recorded_failure": True, "report": Report.ENDED}),
    ("a CALL of the job's own", FREE, TERMS, Memory(launch=Launch(Stage.ENDED, info=ResultInfo(True, False, 0, "CALL"))), {"recorded_failure": False}),
    ("what a supervisor wrote down of its own launch", sighting(attempt=1, failed=True), SUPERVISED_BESIDE, Memory(launch=ENDED), {"recorded_failure": True}),
    ("of another launch", sighting(attempt=2, failed=True), SUPERVISED_BESIDE, Memory(launch=ENDED), {"recorded_failure": False}),
    ("nothing", FREE, SUPERVISED_BESIDE, Memory(launch=ENDED), {"recorded_failure": False}),
    ("blocked output, which a supervisor reads", replace(HELD, wait_event="MessageQueuePutMessage"), SUPERVISED_BESIDE, Memory(launch=Launch(Stage.RUNNING)), {"output_blocked": False}),
    ("blocked output", replace(HELD, wait_event="MessageQueuePutMessage"), TERMS, Memory(launch=Launch(Stage.RUNNING)), {"output_blocked": True}),
    ("another's blocked output", replace(HELD, wait_event="MessageQueuePutMessage"), TERMS, Memory(), {"output_blocked": False}),
    ("launches are counted", FREE, TERMS, Memory(tries=Tries(lost=2, rejected=4)), {"launches_left": 1, "rejections_left": 6}),
    ("somebody is there: no refusal is in vain", sighting(holder=2), TERMS, Memory(tries=Tries(rejected=4)), {"rejections_left": 10}),
    ("its own worker's lock explains none", HELD, TERMS, Memory(launch=Launch(Stage.RUNNING), tries=Tries(rejected=4)), {"rejections_left": 6}),
    ("a stray", FREE, TERMS, Memory(stray=Stray.LOOSE), {"stray": True, "gave_up": False}),
    ("a stray that is stopped", FREE, TERMS, Memory(stray=Stray.STOPPED), {"stray": True, "gave_up": True}),
    ("verified", CLAIMED, SUPERVISED, Memory(verification=Verification(True, (1, False))), {"verified": True}),
    ("of another claim", CLAIMED, SUPERVISED, Memory(verification=Verification(True, (2, False))), {"verified": None}),
    ("before its worker showed", MARKED, SUPERVISED, Memory(verification=Verification(False, (1, False))), {"verified": None, "found_by_name": True}),
]  # fmt: skip


@pytest.mark.parametrize(("seen", "terms", "memory", "means"), [m[1:] for m in MEANINGS], ids=[m[0] for m in MEANINGS])
def test_meaning(seen: Sighting, terms: Terms, memory: Memory, means: dict[str, Any]) -> None:
    found, _ = weigh(seen, terms, memory, 0.0)
    assert {name: getattr(found, name) for name in means} == means


def test_attached_from_the_first_look_at_anothers_worker_to_its_end() -> None:
    _, memory = weigh(HELD, TERMS, Memory(), 0.0)
    assert memory.attached_since == NOW
    _, memory = weigh(replace(HELD, looked_at=LATER), TERMS, memory, 0.0)
    assert memory.attached_since == NOW
    _, memory = weigh(FREE, TERMS, memory, 0.0)
    assert memory.attached_since is None
    _, memory = weigh(HELD, TERMS, Memory(launch=Launch(Stage.RUNNING)), 0.0)
    assert memory.attached_since is None, "its own worker"
    _, memory = weigh(HELD, TERMS, Memory(launch=failed(TURNED_AWAY)), 0.0)
    assert memory.attached_since == NOW, "the one that its own was turned away by"


def test_a_marker() -> None:
    session = Terms(kind=Kind.SESSION)
    lost = Memory(launch=Launch(Stage.HANDLE_GONE), verification=Verification(False))
    found, memory = weigh_marker(True, "ClientWrite", session, lost, 0.0)
    assert (found.holder, found.may_begin, found.verified) == (Holder.THIS_JOB, False, None)
    assert not found.output_blocked, "nobody holds its handle"
    found, _ = weigh_marker(False, None, session, memory, 0.0)
    assert not found.may_begin, "it was seen at work"
    found, _ = weigh_marker(False, None, session, lost, 0.0)
    assert found.may_begin
    read = Memory(launch=Launch(Stage.ENDED, result=(0, None)))
    assert weigh_marker(False, None, session, read, 0.0)[0].receipt is Receipt.COMMITTED
    assert weigh_marker(True, None, session, Memory(), 0.0)[0].holder is Holder.NOBODY, "not launched by this call"


def test_whom_a_claimed_receipt_is_to_name() -> None:
    begun = sighting(status="launching", attempt=7, marked=True, may_begin=True)
    assert claim_without_pid(begun) == 7
    assert claim_without_pid(replace(begun, may_begin=False)) is None
    assert claim_without_pid(replace(begun, marked_pid=None)) is None
    assert claim_without_pid(replace(begun, holds_this_job=True)) is None


# The launch ---------------------------------------------------------------------------------------------------------


def test_every_stage_is_told_and_comes_from_somewhere() -> None:
    assert set(REPORTS) == set(FOLLOWS) == set(Stage)
    assert set().union(*FOLLOWS.values()) == set(Stage)


@pytest.mark.parametrize(("before", "after"), list(product(Stage, Stage)))
def test_only_what_may_follow_does(before: Stage, after: Stage) -> None:
    if after in FOLLOWS[before]:
        assert Launch(before).to(after).stage is after
    else:
        with pytest.raises(AssertionError, match=before.name):
            Launch(before).to(after)


def ended(info: ResultInfo | None, error: ErrorFields | None = None, terms: Terms = TERMS) -> Memory:
    memory = Memory().registered(registration("registered", 1, 5)).put_away().calling().running()
    assert memory.registration is None, "used up"
    return memory.ended(info, error, terms)


def test_the_handles_report() -> None:
    assert ended(ResultInfo(True, False)).launch.stage is Stage.ENDED
    assert ended(ResultInfo(True, True), ErrorFields(OWN_ERROR)).launch.sqlstate == OWN_ERROR
    for lost in (ended(None), ended(ResultInfo(True, True))):
        assert (lost.launch.stage, lost.stray, lost.launch.sqlstate) == (Stage.HANDLE_GONE, Stray.LOOSE, None)
    assert ended(None).launch.may_begin
    assert not ended(ResultInfo(True, True)).launch.may_begin, "it has ended"


def test_a_supervisor_without_a_second_slot_launched_nothing() -> None:
    memory = ended(ResultInfo(True, True), ErrorFields("PB004"), SUPERVISED)
    assert memory.launch == Launch()
    assert memory.tries == Tries(slotless=1)
    assert memory.registration == registration("registered", 1, 5), "no attempt is used up"
    assert ended(ResultInfo(True, True), ErrorFields("PB004")).launch.stage is Stage.FAILED, "SQL of the user's"


def test_a_supervisor_of_a_receipt_that_broke_may_leave_its_worker() -> None:
    assert ended(ResultInfo(True, False, 0, "CALL"), terms=SUPERVISED_BESIDE).launch.stage is Stage.ENDED
    turned_away = ended(ResultInfo(True, True), ErrorFields(TURNED_AWAY), SUPERVISED_BESIDE)
    assert turned_away.launch.sqlstate == TURNED_AWAY
    for broken in (
        ended(ResultInfo(True, False), terms=SUPERVISED_BESIDE),
        ended(ResultInfo(True, True), ErrorFields(CANCELED), SUPERVISED_BESIDE),
        ended(ResultInfo(True, True), ErrorFields(OWN_ERROR), SUPERVISED_BESIDE),
    ):
        assert (broken.launch.stage, broken.stray, broken.launch.error) == (Stage.HANDLE_GONE, Stray.LOOSE, None)
    assert ended(ResultInfo(True, True), ErrorFields("PB004"), SUPERVISED_BESIDE).launch == Launch()


def test_launches_are_counted_by_how_they_ended() -> None:
    assert Memory().put_away().tries == Tries()
    assert Memory(launch=failed(TURNED_AWAY)).put_away().tries == Tries(rejected=1)
    assert Memory(launch=failed(CALLED_OFF)).put_away().tries == Tries(rejected=1)
    assert Memory(launch=Launch(Stage.HANDLE_GONE)).put_away().tries == Tries(lost=1)
    assert Memory().calling().call_lost().put_away().stray is Stray.LOOSE, "its worker may begin for ever"


def test_a_stray_is_stopped_by_a_mark_of_ours_alone() -> None:
    loose = Memory(stray=Stray.LOOSE)
    assert loose.marked(gave_up=True).stray is Stray.STOPPED
    assert loose.marked(gave_up=False).stray is Stray.LOOSE
    assert Memory(stray=Stray.STOPPED).marked(gave_up=False).stray is Stray.LOOSE


def test_a_claim_that_is_settled_as_not_done_frees_the_way() -> None:
    undone = Memory(verification=Verification(False)).settled()
    assert (undone.launch.stage, undone.verification, undone.stray) == (Stage.HANDLE_GONE, None, Stray.LOOSE)
    done = Memory(verification=Verification(True))
    assert done.settled() == done


# Every combination ---------------------------------------------------------------------------------------------------

LAUNCHES = [Launch(stage) for stage in Stage if stage is not Stage.FAILED] + [
    failed(sqlstate) for sqlstate in (None, OWN_ERROR, CANCELED, TURNED_AWAY, CALLED_OFF)
]
RECEIPTS: list[dict[str, Any]] = [
    {},
    {"status": "committed"},
    {"status": "launching", "attempt": 1},
    {"status": "launching", "attempt": 1, "marked": True, "may_begin": True},
    *({"status": "cancelled", "cause": cause} for cause in ("asked", "deadline", "given up", "superseded")),
]
HISTORY: list[dict[str, Any]] = [{}, {"failed": True}, {"failed": True, "reported": False}]


def every_look() -> Iterator[tuple[Sighting, Terms, Memory]]:
    """Every kind of look, to every kind of call."""
    for kind, holder, receipt, history, newest in product(
        (Kind.RECEIPT, Kind.SUPERVISED), (None, 1, 2, 3), RECEIPTS, HISTORY, (2, 3)
    ):
        seen = sighting(generation=2, holder=holder, newest=newest, **receipt, **history)
        for launch, intent, attached, verification, looked in product(
            LAUNCHES, Intent, (None, NOW), (None, Verification(False, (1, False))), (False, True)
        ):
            memory = Memory(
                intent=intent, launch=launch, attached_since=attached, verification=verification, looked=looked
            )
            yield seen, Terms(kind=kind, generation=2, can_verify=True), memory


ALWAYS: dict[str, Callable[[Sighting, Terms, Memory, Evidence, Memory], bool]] = {
    "receipt, lock and report are told as they are": lambda s, t, m, e, _: (
        (e.receipt, e.holder, e.report) == (s.receipt, s.holder(t.generation), m.launch.report)
    ),
    "an intent is never forgotten": lambda s, t, m, e, a: e.intent is a.intent is m.intent,
    "a look changes no launch, and no count but that of refusals": lambda s, t, m, e, a: (
        a.launch == m.launch and a.tries._replace(rejected=0) == m.tries._replace(rejected=0)
    ),
    "the first look's mark is kept": lambda s, t, m, e, a: a.looked and (not m.looked or a.old_mark == m.old_mark),
    "a failure is recorded only where the history says so": lambda s, t, m, e, a: (
        not e.recorded_failure or s.outcome == "failed"
    ),
    "nobody is attached to a worker that is gone without a word": lambda s, t, m, e, a: (
        a.attached_since is None or e.holder is Holder.THIS_JOB or s.receipt is not Receipt.NONE or e.recorded_failure
    ),
    "what verify_sql said is of a claim that has nobody at work": lambda s, t, m, e, a: (
        e.verified is None or s.receipt is not Receipt.LAUNCHING or not (s.holds_this_job or e.found_by_name)
    ),
    "a look that is weighed again means the same": lambda s, t, m, e, a: weigh(s, t, a, 0.0)[1] == a,
}


def test_holds_for_every_look() -> None:
    for seen, terms, memory in every_look():
        found, after = weigh(seen, terms, memory, 0.0)
        for name, holds in ALWAYS.items():
            assert holds(seen, terms, memory, found, after), f"{name}: {seen} {memory} -> {found} {after}"
        half = doubt(seen, terms, memory, 0.0)
        assert half is None or half.seconds > 0, "one look is never enough"
        if memory.intent is not Intent.NONE:
            own = doubt_the_look(seen, pace.STARTING if memory.verification is None else pace.SIGN)
            assert half == own, "whoever ends the job waits for nobody's history"


def test_every_fact_is_enumerated() -> None:
    """A new one belongs into ``every_look``, and into a line above."""
    assert Memory._fields == (
        "intent", "launch", "registration", "generation", "tries", "stray", "looked", "old_mark", "attached_since",
        "verification",
    )  # fmt: skip
    assert {field.name for field in fields(Evidence)} >= {"receipt", "holder", "report"}
