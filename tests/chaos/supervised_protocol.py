"""A written model of supervised jobs: callers, supervisors, their workers and faults, around the very verdict.

As in :mod:`tests.chaos.protocol`, a step is a moment of the server's, and callers look as the walk does: at the report,
the lock, then claim and marker, twice where the walk's own :func:`doubt` doubts a claim. What a look means and what is
remembered of it is the walk's too. Nothing rests on time: a worker starts as late as it likes, also after its
supervisor is gone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple, TypeVar

from pgbg_orchestration.job import Kind
from pgbg_orchestration.ledger.sighting import Sighting
from pgbg_orchestration.verdict import (
    CALLED_OFF,
    CANCELED,
    OUTCOMES,
    TURNED_AWAY,
    Evidence,
    Intent,
    Report,
    Step,
    judge,
)
from pgbg_orchestration.walk.evidence import Sign, claim_without_pid, doubt, weigh
from pgbg_orchestration.walk.memory import Memory, Terms, Verification
from tests.chaos import looks
from tests.chaos.states import NOBODY, Move, Phase

T = TypeVar("T")
Judge = Callable[[Evidence], Step]
FAULTS = ("crash", "kill_supervisor", "restart", "sql_error", "ask")


class Sup(IntEnum):
    """How far a supervisor is. From LOCKED to TOLD it holds the locks."""

    STARTING = 0
    LOCKED = 1
    CLAIMED = 2
    WATCHING = 3
    TOLD = 4
    ENDED = 5
    REFUSED = 6  # by lock, marker or receipt
    KILLED = 7

    __hash__ = int.__hash__  # asked for a million times, where an enum's own is slow


class Work(IntEnum):
    """How far a worker is. From SHOWN to FAILING it bears the marker."""

    STARTING = 0
    SHOWN = 1  # at work
    COMMITTING = 2  # its commit is visible
    FAILING = 3  # its error can be read
    COMMITTED = 4
    FAILED = 5
    NEVER = 6  # it never began

    __hash__ = int.__hash__


class Supervisor(NamedTuple):
    attempt: int
    at: Sup = Sup.STARTING
    sqlstate: str | None = None
    worker: int = NOBODY


FORGOTTEN = Supervisor(0, Sup.ENDED)
MET = Memory(looked=True)
"""Of one that has looked before: nothing here rests on which look was the first."""


class Inner(NamedTuple):
    at: Work = Work.STARTING
    recorded: bool = False  # how it ended stands in the history
    told: bool = False  # and somebody was told


STATUSES = {"launching": "launching", "committed": "committed", "cancelled": "cancelled", "given up": "cancelled"}
PLAIN = Terms(kind=Kind.SUPERVISED, generation=1, relaunches=1, rejections=1)
VERIFYING = PLAIN._replace(can_verify=True)


class Claim(NamedTuple):
    """The receipt."""

    status: str
    attempt: int = 0
    named: bool = False
    stale: bool = False  # of before a restart of the server


class Caller(NamedTuple):
    phase: Phase = Phase.LOOK
    looks: int = 0
    doubted: int = 0  # the attempt whose claim an earlier look of this turn saw with nobody at work
    memory: Memory = MET  # what the walk itself would remember
    supervisor: int = NOBODY
    holder: bool = False
    claim: tuple[int, bool] = (0, False)  # that was seen, and whether its worker may begin
    step: Step | None = None


class State(NamedTuple):
    supervisors: tuple[Supervisor, ...]
    workers: tuple[Inner, ...]
    callers: tuple[Caller, ...]
    receipt: Claim | None
    attempts: int
    failed: bool  # the history says so of the last attempt
    reported: bool
    lifted: bool
    hit: bool  # a supervisor was killed, or the server restarted
    faults: tuple[int, ...]


@dataclass(frozen=True)
class Supervision:
    """Who takes part, what may go wrong, and what is broken on purpose.

    Parameters
    ----------
    callers:
        How many calls there are for the one job.
    verify:
        There is a verify_sql: it says whether a worker has committed.
    broken:
        Faults of the protocol that are built in on purpose, by name.
    """

    # Two of one kind are one, whatever they are called: what was searched is not searched again.
    name: str = field(compare=False)
    callers: int = 2
    verify: bool = False
    crash: int = 0
    kill_supervisor: int = 0
    restart: int = 0
    sql_error: int = 0
    ask: int = 0
    broken: frozenset[str] = field(default_factory=frozenset)
    judge: Judge = judge

    def start(self) -> State:
        """The state before anything happened."""
        faults = tuple(int(getattr(self, name)) for name in FAULTS)
        return State((), (), (Caller(),) * self.callers, None, 0, False, False, False, False, faults)

    def twin(self, state: State) -> State | None:
        """The state with the two callers in each other's place: nothing but its number tells one from the other."""
        if self.callers != 2:
            return None
        first, second = state.callers
        return state._replace(callers=(second, first))

    def is_done(self, state: State) -> bool:
        """Whether everybody has an outcome, or is dead, and nothing is left that works."""
        return (
            all(caller.phase >= Phase.DEAD for caller in state.callers)
            and all(supervisor.at >= Sup.ENDED for supervisor in state.supervisors)
            and all(worker.at >= Work.COMMITTED for worker in state.workers)
        )

    def moves(self, state: State) -> Iterator[Move]:
        """Everything that can happen next."""
        for number, worker in enumerate(state.workers):
            yield from self._work(state, number, worker)
        for number, supervisor in enumerate(state.supervisors):
            if supervisor.at < Sup.ENDED:
                yield from self._supervise(state, number, supervisor)
        for number, caller in enumerate(state.callers):
            if caller.phase < Phase.DEAD:
                yield from self._call(state, number, caller)
        if paid := _pay(state, "restart"):
            yield Move("the server is restarted", True, _restarted(paid))

    # Workers ------------------------------------------------------------------------------------------------------

    def _work(self, state: State, number: int, worker: Inner) -> Iterator[Move]:
        name = f"worker {number}"
        match worker.at:
            case Work.STARTING:
                yield Move(f"{name} begins", False, _worker(state, number, Work.SHOWN), self._wrong_to_begin(state))
                if not any(s.worker == number and s.at < Sup.ENDED for s in state.supervisors):
                    yield Move(f"{name} finds nothing to run", False, _worker(state, number, Work.NEVER))
            case Work.SHOWN:
                yield Move(f"{name} commits", False, _worker(state, number, Work.COMMITTING))
                if paid := _pay(state, "sql_error"):
                    yield Move(f"{name}: its SQL fails", True, _worker(paid, number, Work.FAILING))
            case Work.COMMITTING:
                yield Move(f"{name} ends", False, _worker(state, number, Work.COMMITTED))
            case Work.FAILING:
                yield Move(f"{name} ends, failed", False, _worker(state, number, Work.FAILED))
            case _:
                return

    def _wrong_to_begin(self, state: State) -> str | None:
        for other in state.workers:
            if other.at is Work.SHOWN:
                return "two workers of the job are at work at once"
            if other.at in (Work.COMMITTING, Work.COMMITTED):
                return "the job runs again after it committed"
            if other.at in (Work.FAILING, Work.FAILED) and not (other.recorded or self.verify):
                return "the job runs again though nobody knows how it ended"
            if other.at is Work.FAILED and other.recorded and not other.told:
                return "the job runs again before anybody was told that it had failed"
        cancelled = any(c.phase is Phase.DONE and c.step is Step.CANCELLED for c in state.callers)
        return "the job runs after its cancel was told" if cancelled and not state.lifted else None

    # Supervisors --------------------------------------------------------------------------------------------------

    def _supervise(self, state: State, number: int, supervisor: Supervisor) -> Iterator[Move]:
        name = f"supervisor {number}"
        match supervisor.at:
            case Sup.STARTING:
                taken = any(Sup.LOCKED <= other.at <= Sup.TOLD for other in state.supervisors)
                after = supervisor._replace(at=Sup.LOCKED)
                if taken:
                    after = supervisor._replace(at=Sup.REFUSED, sqlstate=TURNED_AWAY)
                yield Move(f"{name} takes the lock: {'no' if taken else 'yes'}", False, _sup(state, number, after))
            case Sup.LOCKED:
                yield self._claim(state, number, supervisor)
            case Sup.CLAIMED:
                started = state._replace(workers=(*state.workers, Inner()))
                watching = supervisor._replace(at=Sup.WATCHING, worker=len(state.workers))
                yield Move(f"{name} launches worker {watching.worker}", False, _sup(started, number, watching))
                if paid := _pay(state, "kill_supervisor"):
                    half = paid._replace(workers=(*paid.workers, Inner()))
                    yield Move(f"{name} is killed in its launch", True, _killed(half, number))
            case Sup.WATCHING:
                yield from self._watch(state, number, supervisor)
            case Sup.TOLD:
                yield Move(f"{name} ends", False, _sup(state, number, supervisor._replace(at=Sup.ENDED)))
            case _:
                return
        if paid := _pay(state, "kill_supervisor"):
            yield Move(f"{name} is killed", True, _killed(paid, number))

    def _claim(self, state: State, number: int, supervisor: Supervisor) -> Move:
        name = f"supervisor {number}"
        receipt = state.receipt
        code = None
        if any(Work.SHOWN <= worker.at <= Work.FAILING for worker in state.workers) or (
            state.failed and not state.reported and "failures are not told" not in self.broken
        ):
            code = TURNED_AWAY
        elif receipt is not None:
            code = {"launching": TURNED_AWAY, "cancelled": CALLED_OFF}.get(receipt.status, "PB001")
        if code is not None:
            refused = supervisor._replace(at=Sup.REFUSED, sqlstate=code)
            return Move(f"{name} is refused: {code}", False, _sup(state, number, refused))
        claimed = _sup(state, number, supervisor._replace(at=Sup.CLAIMED))
        return Move(f"{name} claims", False, claimed._replace(receipt=Claim("launching", supervisor.attempt)))

    def _watch(self, state: State, number: int, supervisor: Supervisor) -> Iterator[Move]:
        name = f"supervisor {number}"
        at, receipt = state.workers[supervisor.worker].at, state.receipt
        told = _sup(state, number, supervisor._replace(at=Sup.TOLD))
        if at is Work.SHOWN and receipt is not None and not receipt.named:
            yield Move(f"{name} names its worker", False, state._replace(receipt=receipt._replace(named=True)))
        elif at in (Work.COMMITTING, Work.COMMITTED):
            yield Move(f"{name} tells its commit", False, told._replace(receipt=Claim("committed", supervisor.attempt)))
        elif at in (Work.FAILING, Work.FAILED):
            workers = _set(state.workers, supervisor.worker, Inner(at, recorded=True))
            after = told._replace(receipt=None, failed=True, reported=False, workers=workers)
            yield Move(f"{name} tells its failure", False, after)

    # Callers ------------------------------------------------------------------------------------------------------

    def _call(self, state: State, number: int, caller: Caller) -> Iterator[Move]:
        if caller.phase is Phase.LOOK:
            yield self._look(state, number, caller)
        else:
            yield self._take(state, number, caller)
        if paid := _pay(state, "crash"):
            yield Move(f"caller {number} is killed", True, _caller(paid, number, Caller(Phase.DEAD)))
        if caller.memory.intent is Intent.NONE and (paid := _pay(state, "ask")):
            wanting = caller.memory.wanting_end(Intent.ASKED)
            asked = caller._replace(memory=wanting, phase=Phase.LOOK, looks=0, doubted=0, step=None)
            yield Move(f"caller {number} is asked to end", True, _caller(paid, number, asked))

    @property
    def terms(self) -> Terms:
        """What a caller was asked for."""
        return VERIFYING if self.verify else PLAIN

    def _look(self, state: State, number: int, caller: Caller) -> Move:
        if caller.looks == 0:
            caller = _read_report(state, caller, self.terms)._replace(looks=1)
            report = caller.memory.launch.report.name
            return Move(f"caller {number} sees report: {report}", False, _caller(state, number, caller))
        if caller.looks == 1:
            holder = any(Sup.LOCKED <= supervisor.at <= Sup.TOLD for supervisor in state.supervisors)
            looked = caller._replace(looks=2, holder=holder)
            return Move(f"caller {number} sees the lock held: {holder}", False, _caller(state, number, looked))
        receipt = state.receipt
        marked = any(Work.SHOWN <= worker.at <= Work.FAILING for worker in state.workers)
        claimed = receipt is not None and receipt.status == "launching"
        may_begin = claimed and receipt is not None and not receipt.named and not receipt.stale
        seen = looks.sighting(
            holder=1 if caller.holder else None,
            status=STATUSES[receipt.status] if receipt is not None else None,
            cause="given up" if receipt is not None and receipt.status == "given up" else None,
            attempt=receipt.attempt if receipt is not None else 0,
            marked=marked,
            may_begin=may_begin and "what may begin is forgotten" not in self.broken,
            failed=state.failed,
            reported=state.reported or "failures are not told" in self.broken,
        )
        move = f"caller {number} sees {receipt}, marked: {marked}"
        # Another doubt is about what others may write down: time may pass as quickly as it likes.
        unsure = doubt(seen, self.terms, caller.memory, 0.0)
        claim = unsure.claim if unsure is not None and unsure.sign is Sign.CLAIM else None
        if claim not in (None, caller.doubted) and "one look at a claim" not in self.broken:
            return Move(move, False, _caller(state, number, caller._replace(looks=1, doubted=claim or 0)))
        if receipt is not None and claim_without_pid(seen) is not None:
            state = state._replace(receipt=receipt._replace(named=True))
        return self._judge(state, number, caller, seen, move)

    def _judge(self, state: State, number: int, caller: Caller, seen: Sighting, move: str) -> Move:
        memory, claim = caller.memory, (seen.receipt_attempt or 0, seen.may_begin)
        if memory.verification is not None and "verify_sql said so of another claim" in self.broken:
            memory = memory._replace(verification=Verification(memory.verification.done, claim))
        found, memory = weigh(seen, self.terms, memory, 0.0)
        step = self.judge(found)
        caller = caller._replace(memory=memory)
        move = f"{move} -> {step.name}"
        if step in OUTCOMES:
            return self._conclude(state, number, caller, step, move)
        again = caller._replace(looks=0, doubted=0, holder=False)
        if step in (Step.VERIFY, Step.SETTLE):
            again = again._replace(claim=claim)
        if step in (Step.WAIT, Step.WAIT_FOR_SERIES):
            return Move(move, False, _caller(state, number, again))
        return Move(move, False, _caller(state, number, again._replace(phase=Phase.STEP, step=step)))

    def _conclude(self, state: State, number: int, caller: Caller, step: Step, move: str) -> Move:
        ats = [worker.at for worker in state.workers]
        committed = Work.COMMITTING in ats or Work.COMMITTED in ats
        wrong = None
        if step is Step.COMMITTED and not committed:
            wrong = "COMMITTED is told of a job that is not"
        elif step in (Step.FAILED, Step.LOST, Step.CANCELLED) and (committed or Work.SHOWN in ats):
            wrong = f"{step.name} is told of a job that is committed or at work"
        elif step is Step.LOST and Work.FAILED in ats:
            wrong = "LOST is told of a job that failed"
        elif step is Step.FAILED and not (self._rejected(caller) or {Work.FAILING, Work.FAILED} & {*ats} or state.hit):
            wrong = "FAILED is told of a job that did not fail"
        elif step is Step.UNKNOWN and not state.hit:
            wrong = "UNKNOWN is told though nothing happened to the supervisor"
        elif step is Step.UNKNOWN and any(Sup.CLAIMED <= s.at <= Sup.TOLD for s in state.supervisors):
            wrong = "UNKNOWN is told while a supervisor is at work"
        if step is Step.FAILED:
            workers = tuple(worker._replace(told=True) if worker.recorded else worker for worker in state.workers)
            state = state._replace(reported=True, workers=workers)
        return Move(move, False, _caller(state, number, Caller(Phase.DONE, step=step)), wrong)

    def _rejected(self, caller: Caller) -> bool:
        return caller.memory.tries.rejected >= self.terms.rejections

    def _take(self, state: State, number: int, caller: Caller) -> Move:
        looking = caller._replace(phase=Phase.LOOK, step=None, claim=(0, False))
        memory = caller.memory
        name = f"caller {number}"
        receipt = state.receipt
        match caller.step:
            case Step.REGISTER:
                untold = state.failed and not state.reported and "failures are not told" not in self.broken
                if receipt is not None or untold:
                    refused = memory.registered(looks.registration("untold", 1))
                    looking = looking._replace(memory=refused)
                    return Move(f"{name} cannot register", False, _caller(state, number, looking))
                after = state._replace(attempts=state.attempts + 1, failed=False, reported=False)
                memory = memory.registered(looks.registration("registered", 1, after.attempts))
                registered = looking._replace(memory=memory)
                return Move(f"{name} registers", False, _caller(after, number, registered))
            case Step.LAUNCH:
                return self._launch(state, number, caller)
            case Step.SIGNAL:
                workers = tuple(
                    worker._replace(at=Work.FAILING) if worker.at is Work.SHOWN else worker for worker in state.workers
                )
                after = _caller(state._replace(workers=workers), number, looking)
                return Move(f"{name} signals the worker", False, after)
            case Step.MARK:
                cause = "cancelled" if memory.intent is not Intent.NONE else "given up"
                after = state if receipt is not None else state._replace(receipt=Claim(cause))
                gave_up = cause == "given up" and receipt is None
                return Move(
                    f"{name} marks",
                    False,
                    _caller(after, number, looking._replace(memory=memory.marked(gave_up=gave_up))),
                )
            case Step.LIFT:
                after = state
                if receipt is not None and receipt.status in ("given up", "cancelled"):
                    after = state._replace(receipt=None, lifted=True)
                return Move(f"{name} lifts the mark", False, _caller(after, number, looking))
            case Step.VERIFY:
                done = any(worker.at in (Work.COMMITTING, Work.COMMITTED) for worker in state.workers)
                asked = looking._replace(memory=memory.verified(done, caller.claim))
                return Move(f"{name} asks verify_sql: {done}", False, _caller(state, number, asked))
            case Step.SETTLE:
                return self._settle(state, number, caller, looking)
            case _:
                raise AssertionError(f"the model has no step {caller.step}")

    def _launch(self, state: State, number: int, caller: Caller) -> Move:
        registration = caller.memory.registration
        assert registration is not None
        supervisor = Supervisor(registration.attempt)
        memory = caller.memory.put_away().calling().running()
        # Only a launch that found no second slot asks for it again.
        memory = memory._replace(launch=memory.launch._replace(registration=None))
        launched = Caller(supervisor=len(state.supervisors), memory=memory)
        after = state._replace(supervisors=(*state.supervisors, supervisor))
        return Move(f"caller {number} launches {supervisor}", False, _caller(after, number, launched))

    def _settle(self, state: State, number: int, caller: Caller, looking: Caller) -> Move:
        verification, receipt = caller.memory.verification, state.receipt
        done = verification is not None and verification.done
        if receipt is not None and receipt.status == "launching" and receipt.attempt == caller.claim[0]:
            state = state._replace(receipt=receipt._replace(status="committed") if done else None)
        settled = looking._replace(memory=caller.memory.settled())
        if not done:
            settled = settled._replace(supervisor=NOBODY)
        return Move(f"caller {number} settles: {done}", False, _caller(state, number, settled))


def _read_report(state: State, caller: Caller, terms: Terms) -> Caller:
    memory = caller.memory
    if memory.launch.report is not Report.RUNNING:
        return caller
    supervisor = state.supervisors[caller.supervisor]
    match supervisor.at:
        case Sup.REFUSED:
            told = looks.info(supervisor.sqlstate, failed=True)
        case Sup.KILLED:
            told = looks.info(CANCELED, failed=True)
        case Sup.ENDED:
            told = looks.info(tag="CALL")
        case _:
            return caller
    return caller._replace(memory=memory.ended(*told, terms), supervisor=NOBODY)


def _killed(state: State, number: int) -> State:
    killed = Supervisor(0, Sup.KILLED)
    return _sup(state, number, killed)._replace(hit=True)


def _restarted(state: State) -> State:
    supervisors = tuple(s if s.at >= Sup.ENDED else Supervisor(0, Sup.KILLED) for s in state.supervisors)
    ended = {Work.STARTING: Work.NEVER, Work.SHOWN: Work.FAILED, Work.COMMITTING: Work.COMMITTED}
    workers = tuple(
        w._replace(at=ended.get(w.at, Work.FAILED if w.at is Work.FAILING else w.at)) for w in state.workers
    )
    receipt = state.receipt._replace(stale=True) if state.receipt is not None else None
    callers = tuple(
        c._replace(memory=c.memory.handle_lost(), supervisor=NOBODY) if c.memory.launch.report is Report.RUNNING else c
        for c in state.callers
    )
    return state._replace(supervisors=supervisors, workers=workers, receipt=receipt, callers=callers, hit=True)


def _worker(state: State, number: int, at: Work) -> State:
    return state._replace(workers=_set(state.workers, number, state.workers[number]._replace(at=at)))


def _sup(state: State, number: int, supervisor: Supervisor) -> State:
    return _tidied(state._replace(supervisors=_set(state.supervisors, number, supervisor)))


def _caller(state: State, number: int, caller: Caller) -> State:
    return _tidied(state._replace(callers=_set(state.callers, number, caller)))


def _tidied(state: State) -> State:
    """Forget of supervisors that ended what nobody asks after, so that states that differ in it alone are one."""
    followed = {caller.supervisor for caller in state.callers if caller.memory.launch.report is Report.RUNNING}
    supervisors = tuple(
        supervisor if supervisor.at < Sup.ENDED or number in followed else FORGOTTEN
        for number, supervisor in enumerate(state.supervisors)
    )
    return state._replace(supervisors=supervisors)


def _pay(state: State, fault: str) -> State | None:
    index = FAULTS.index(fault)
    if not state.faults[index]:
        return None
    return state._replace(faults=_set(state.faults, index, state.faults[index] - 1))


def _set(values: tuple[T, ...], index: int, value: T) -> tuple[T, ...]:
    return (*values[:index], value, *values[index + 1 :])
