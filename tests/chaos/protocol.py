"""A written model of the protocol: launchers, workers, a canceller and faults, step by step, around the very verdict.

What is one step here is one moment of the server's (a lock taken, a row seen, a commit made visible), so a search over
all orders of the steps (:mod:`tests.chaos.search`) meets every interleaving. Launchers look as the walk does: at the
report, the lock and the receipt, each at a moment of its own. What a look means, what is remembered of it and what to
do then is no model: they ask the walk's own :func:`weigh` and :func:`judge`, and remember in its :class:`Memory`.

Pessimistic where PG_BACKGROUND leaves a choice: a worker may start as late as it likes, "completed" is reported before
the commit, an error before the abort, and a committed worker may report an error. Time passes as it likes, so what the
walk would wait for to be written down is believed to be missing at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import TypeVar

from pgbg_orchestration.outcome import Cause
from pgbg_orchestration.verdict import (
    ALREADY_COMMITTED,
    CALLED_OFF,
    CANCELED,
    OUTCOMES,
    TURNED_AWAY,
    Evidence,
    Intent,
    Receipt,
    Report,
    Step,
    judge,
)
from pgbg_orchestration.walk.evidence import is_superseded, weigh
from pgbg_orchestration.walk.memory import Memory, Stage, Terms
from tests.chaos import looks
from tests.chaos.states import (
    AT_WORK,
    ENDED,
    FAULTS,
    GIVEN_UP,
    NOBODY,
    OWN_ERROR,
    At,
    Canceller,
    Launcher,
    Move,
    Phase,
    State,
    Worker,
)

T = TypeVar("T")
Judge = Callable[[Evidence], Step]


@dataclass(frozen=True)
class Scenario:
    """Who takes part, what may go wrong, and what is broken on purpose.

    Parameters
    ----------
    jobs:
        For each launcher the number of its job; job n is generation n + 1 of the one series.
    cancels:
        For each canceller the number of its job.
    lifting:
        Launchers that take an earlier cancel back (``retry_cancelled``).
    repeatable_read:
        Workers check the generation with a snapshot from their start.
    broken:
        Faults of the protocol that are built in on purpose, by name (tests/chaos/test_protocol.py).
    judge:
        The verdict, or one that is broken on purpose.
    """

    # Two of one kind are one, whatever they are called: what was searched is not searched again.
    name: str = field(compare=False)
    jobs: tuple[int, ...]
    cancels: tuple[int, ...] = ()
    lifting: tuple[int, ...] = ()
    relaunches: int = 1
    rejections: int = 1
    repeatable_read: bool = False
    wait_for_older: bool = False
    crash: int = 0
    lose_session: int = 0
    lose_launch: int = 0
    kill_worker: int = 0
    sql_error: int = 0
    ask: int = 0
    broken: frozenset[str] = field(default_factory=frozenset)
    judge: Judge = judge

    def start(self) -> State:
        """The state before anything happened."""
        count = max((*self.jobs, *self.cancels)) + 1
        return State(
            workers=(),
            # Pessimistic: whoever lifts a mark takes back any that is there.
            launchers=tuple(
                Launcher(job, memory=Memory(looked=True, old_mark=looks.NOW if number in self.lifting else None))
                for number, job in enumerate(self.jobs)
            ),
            cancellers=tuple(Canceller(job) for job in self.cancels),
            receipts=(None,) * count,
            commits=(0,) * count,
            registered=(False,) * count,
            newest=0,
            begun=0,
            marked=0,
            lifted=(False,) * count,
            faults=tuple(int(getattr(self, name)) for name in FAULTS),
        )

    def terms(self, number: int) -> Terms:
        """What the launcher of that number was asked for."""
        return _terms(self.jobs[number] + 1, number in self.lifting, self.relaunches, self.rejections)

    def twin(self, state: State) -> State | None:
        """The state with two launchers in each other's place, where nothing but its number tells one from the other."""
        if len(self.jobs) != 2 or self.jobs[0] != self.jobs[1] or self.lifting:
            return None
        first, second = state.launchers
        return state._replace(
            launchers=(second, first),
            workers=tuple(None if worker is None else worker._replace(by=1 - worker.by) for worker in state.workers),
        )

    def is_done(self, state: State) -> bool:
        """Whether everybody has an outcome, or is dead, and no worker is left."""
        return (
            all(launcher.phase >= Phase.DEAD for launcher in state.launchers)
            and all(canceller.phase == len(_CANCELLING) for canceller in state.cancellers)
            and all(worker is None or worker.at in ENDED for worker in state.workers)
        )

    def moves(self, state: State) -> Iterator[Move]:
        """Everything that can happen next."""
        for number, worker in enumerate(state.workers):
            if worker is not None and worker.at not in ENDED:
                yield from self._work(state, number, worker)
        for number, launcher in enumerate(state.launchers):
            if launcher.phase < Phase.DEAD:
                yield from self._launcher(state, number, launcher)
        for number, canceller in enumerate(state.cancellers):
            if canceller.phase < len(_CANCELLING):
                yield from self._cancel(state, number, canceller)

    # Workers ------------------------------------------------------------------------------------------------------

    def _work(self, state: State, number: int, worker: Worker) -> Iterator[Move]:
        name = f"worker {number} of job {worker.job}"
        match worker.at:
            case At.STARTING if self.repeatable_read:
                begun = worker._replace(at=At.BEGUN, snapshot=state.newest)
                yield Move(f"{name} takes its snapshot", False, _put(state, number, begun))
            case At.STARTING | At.BEGUN:
                yield self._take_lock(state, number, worker)
            case At.LOCKED:
                newest = worker.snapshot if self.repeatable_read else state.newest
                newer = newest > worker.job + 1 and "no generation check" not in self.broken
                after = (
                    worker._replace(at=At.ABORTING, sqlstate=CALLED_OFF) if newer else worker._replace(at=At.CHECKED)
                )
                yield Move(
                    f"{name} checks the generation: {'refused' if newer else 'ok'}", False, _put(state, number, after)
                )
            case At.CHECKED:
                yield from self._insert(state, number, worker)
            case At.INSERTED:
                yield Move(f"{name} works", False, _put(state, number, worker._replace(at=At.WORKED)))
                if paid := _pay(state, "sql_error"):
                    failing = worker._replace(at=At.ABORTING, sqlstate=OWN_ERROR)
                    yield Move(f"{name}: its SQL fails", True, _put(paid, number, failing))
            case At.WORKED:
                locked = worker.locked and "lock goes before the commit" not in self.broken
                if worker.locked and not locked:
                    yield Move(f"{name} lets the lock go", False, _put(state, number, worker._replace(locked=False)))
                    return
                yield self._commit(state, number, worker)
            case At.VISIBLE:
                ended = worker._replace(at=At.COMMITTED, locked=False)
                yield Move(f"{name} ends", False, _put(state, number, ended))
            case At.ABORTING:
                ended = worker._replace(at=At.FAILED, locked=False)
                yield Move(f"{name} ends with {worker.sqlstate}", False, _put(state, number, ended))
            case _:
                return
        if worker.at < At.VISIBLE and (paid := _pay(state, "kill_worker")):
            killed = worker._replace(at=At.SILENT, locked=False)
            yield Move(f"{name} is killed", True, _put(paid, number, killed))

    def _take_lock(self, state: State, number: int, worker: Worker) -> Move:
        name = f"worker {number} of job {worker.job}"
        taken = any(other is not None and other.locked for other in state.workers)
        if taken and "no series lock" not in self.broken:
            refused = worker._replace(at=At.FAILED, sqlstate=TURNED_AWAY)
            return Move(f"{name} is turned away", False, _put(state, number, refused))
        locked = worker._replace(at=At.LOCKED, locked="no series lock" not in self.broken)
        return Move(f"{name} takes the lock", False, _put(state, number, locked))

    def _insert(self, state: State, number: int, worker: Worker) -> Iterator[Move]:
        name = f"worker {number} of job {worker.job}"
        decided = state.receipts[worker.job]
        if "no receipt" not in self.broken:
            if any(other is not None and other.inserting and other.job == worker.job for other in state.workers):
                return  # waits for the other's end
            if decided is not None:
                code = ALREADY_COMMITTED if decided == "committed" else CALLED_OFF
                refused = worker._replace(at=At.ABORTING, sqlstate=code)
                yield Move(f"{name} is refused: {decided}", False, _put(state, number, refused))
                return
        wrong = None
        if any(other is not None and other.at in AT_WORK for other in state.workers):
            wrong = "two workers of one series are at work at once"
        elif worker.job + 1 < max(state.marked, state.begun):
            wrong = "an older generation began after a newer one had begun, or had marked it"
        after = _put(state, number, worker._replace(at=At.INSERTED))
        after = after._replace(begun=max(state.begun, worker.job + 1))
        yield Move(f"{name} writes its receipt", False, after, wrong)

    def _commit(self, state: State, number: int, worker: Worker) -> Move:
        job = worker.job
        wrong = "a job is committed twice" if state.commits[job] else None
        for launcher in state.launchers:
            if launcher.phase is not Phase.DONE or launcher.job != job:
                continue
            if launcher.step in (Step.CANCELLED, Step.SUPERSEDED) and not state.lifted[job]:
                wrong = wrong or "a job is committed after it was told to be cancelled"
        told = state.launchers[worker.by]
        failed = told.phase is Phase.DONE and told.job == job and told.step in (Step.FAILED, Step.LOST)
        if failed and not state.lifted[job]:
            wrong = wrong or "a worker commits whose own launcher has told that its job is failed or lost"
        if not state.lifted[job] and any(
            canceller.job == job and canceller.told is Receipt.CANCELLED for canceller in state.cancellers
        ):
            wrong = wrong or "a job is committed after a cancel was told to be final"
        after = _put(state, number, worker._replace(at=At.VISIBLE))
        after = after._replace(
            commits=_set(state.commits, job, state.commits[job] + 1),
            receipts=_set(state.receipts, job, "committed") if "no receipt" not in self.broken else state.receipts,
        )
        return Move(f"worker {number} of job {job} commits", False, after, wrong)

    # Launchers ----------------------------------------------------------------------------------------------------

    def _launcher(self, state: State, number: int, launcher: Launcher) -> Iterator[Move]:
        if launcher.phase is Phase.LOOK:
            yield self._look(state, number, launcher)
        elif launcher.phase is Phase.STEP:
            yield self._take(state, number, launcher)
        else:
            yield from self._launch(state, number, launcher)
        name = f"launcher {number}"
        if paid := _pay(state, "crash"):
            for after in self._half_launched(paid, number, launcher):
                dead = Launcher(launcher.job, Phase.DEAD)
                yield Move(f"{name} is killed", True, _with(after, number, dead))
        memory = launcher.memory
        if memory.launch.report is Report.RUNNING and (paid := _pay(state, "lose_session")):
            lost = launcher._replace(memory=memory.handle_lost(), worker=NOBODY)
            yield Move(f"{name} loses its session", True, _with(paid, number, lost))
        if memory.intent is Intent.NONE and (paid := _pay(state, "ask")):
            wanting = (memory.not_launched() if memory.launch.stage is Stage.CALLING else memory).wanting_end(
                Intent.ASKED
            )
            for after in self._half_launched(paid, number, launcher):
                asked = launcher._replace(memory=wanting, phase=Phase.LOOK, looks=0, step=None)
                yield Move(f"{name} is asked to end", True, _with(after, number, asked))

    def _half_launched(self, state: State, number: int, launcher: Launcher) -> Iterator[State]:
        """What a launcher leaves behind that goes away in the middle: of a launch call, a worker or none."""
        yield state
        if launcher.phase is Phase.LAUNCH:
            yield self._started(state, number, launcher.job)[0]

    def _started(self, state: State, number: int, job: int) -> tuple[State, int]:
        worker = Worker(job, number)
        free = next((n for n, known in enumerate(state.workers) if known is None), None)
        if free is None:
            return state._replace(workers=(*state.workers, worker)), len(state.workers)
        return _put(state, free, worker), free

    @property
    def order(self) -> tuple[str, ...]:
        """The order of the three looks."""
        if "receipt before lock" in self.broken:
            return "report", "receipt", "lock"
        if "report last" in self.broken:
            return "lock", "receipt", "report"
        return "report", "lock", "receipt"

    def _look(self, state: State, number: int, launcher: Launcher) -> Move:
        what = self.order[launcher.looks]
        if what == "report":
            launcher, told = _read_report(state, launcher, self.terms(number))
        elif what == "lock":
            launcher, told = _read_lock(state, launcher)
        else:
            launcher, told = _read_receipt(state, launcher)
        launcher = launcher._replace(looks=launcher.looks + 1)
        move = f"launcher {number} sees {what}: {told}"
        if launcher.looks < len(self.order):
            return Move(move, False, _with(state, number, launcher))
        return self._judge(state, number, launcher, move)

    def _judge(self, state: State, number: int, launcher: Launcher, move: str) -> Move:
        terms, memory = self.terms(number), launcher.memory
        told = launcher.told
        seen = looks.sighting(
            generation=launcher.job + 1,
            holder=None if launcher.holder == NOBODY else launcher.holder + 1,
            status=None if told is None else "committed" if told == "committed" else "cancelled",
            cause=None if told == "committed" else told,
            newest=launcher.newest,
            failed=launcher.heard,
        )
        if "no registration" in self.broken:
            memory = memory._replace(registration=looks.registration("registered", launcher.job + 1))
        found, memory = weigh(seen, terms, memory, 0.0)
        superseded = is_superseded(seen, terms, memory)
        launcher = launcher._replace(memory=memory, superseded=superseded)
        if memory.attached_since is None:
            launcher = launcher._replace(heard=False)
        step = self.judge(found)
        move = f"{move} -> {step.name}"
        if step in OUTCOMES:
            return self._conclude(state, number, launcher, step, move)
        again = launcher._replace(looks=0, holder=NOBODY, held=NOBODY, told=None, newest=0)
        if step in (Step.WAIT, Step.WAIT_FOR_SERIES) or (step is Step.CLEAR_OLDER and self.wait_for_older):
            return Move(move, False, _with(state, number, again))
        if step is Step.REGISTER and "older marked before registration" in self.broken:
            state = _mark_older(state, launcher.job) or state
        return Move(move, False, _with(state, number, again._replace(phase=Phase.STEP, step=step)))

    def _conclude(self, state: State, number: int, launcher: Launcher, step: Step, move: str) -> Move:
        committed = state.commits[launcher.job] > 0
        # Another call may launch the job again at any moment; its own workers, and the one it saw, it answers for.
        at_work = any(
            w is not None and w.job == launcher.job and w.at in AT_WORK and (w.by == number or n == launcher.held)
            for n, w in enumerate(state.workers)
        )
        wrong = None
        if (step is Step.COMMITTED) != committed:
            wrong = f"{step.name} is told of a job that is {'' if committed else 'not '}committed"
        elif step is Step.FAILED and (refusal := self._refusal(launcher)):
            wrong = f"our own refusal ({refusal}) is told as the job's failure"
        elif step is not Step.COMMITTED and at_work and "no receipt" not in self.broken:
            wrong = f"{step.name} is told while a worker is at work on the job"
        launchers = list(state.launchers)
        if step is Step.FAILED and launcher.memory.launch.stage is not Stage.NONE:
            for index, other in enumerate(launchers):
                if other.job == launcher.job and other.memory.attached_since is not None:
                    launchers[index] = other._replace(heard=True)
        # Nothing of it matters any more but what it told.
        launchers[number] = Launcher(launcher.job, Phase.DONE, step=step)
        return Move(move, False, _tidied(state._replace(launchers=tuple(launchers))), wrong)

    def _refusal(self, launcher: Launcher) -> str | None:
        sqlstate = launcher.memory.launch.sqlstate
        again = launcher.memory.tries.rejected < self.rejections
        return sqlstate if sqlstate in (ALREADY_COMMITTED, CALLED_OFF) and again else None

    def _take(self, state: State, number: int, launcher: Launcher) -> Move:
        step, job, memory = launcher.step, launcher.job, launcher.memory
        looking = launcher._replace(phase=Phase.LOOK, step=None, superseded=False)
        name = f"launcher {number}"
        match step:
            case Step.REGISTER:
                if job + 1 < state.newest:
                    refused = memory.registered(looks.registration("superseded", job + 1))
                    after = _with(state, number, looking._replace(memory=refused))
                    return Move(f"{name} registers: superseded", False, after)
                registered = memory.registered(looks.registration("registered", job + 1))
                after = _with(state, number, looking._replace(memory=registered))
                launchers = tuple(o._replace(heard=False) if o.job == job else o for o in after.launchers)
                after = after._replace(
                    registered=_set(state.registered, job, True),
                    newest=max(state.newest, job + 1),
                    launchers=launchers,
                )
                return Move(f"{name} registers", False, after)
            case Step.LAUNCH:
                marked: State | None = state
                if not self.broken & {"older not marked", "older marked before registration"}:
                    marked = _mark_older(state, job)
                if marked is None:
                    return Move(f"{name} cannot mark older generations yet", False, _with(state, number, looking))
                if "no registration" in self.broken:
                    memory = memory._replace(registration=looks.registration("registered", job + 1))
                calling = memory.put_away().calling()
                launching = looking._replace(phase=Phase.LAUNCH, memory=calling, worker=NOBODY, heard=False)
                return Move(f"{name} calls for a launch", False, _with(marked, number, launching))
            case Step.SIGNAL:
                return Move(f"{name} signals", False, _with(_signalled(state, lambda j: j == job), number, looking))
            case Step.CLEAR_OLDER:
                after = _signalled(state, lambda j: j < job)
                return Move(f"{name} signals the older worker", False, _with(after, number, looking))
            case Step.MARK:
                cause = "superseded" if launcher.superseded else GIVEN_UP
                if memory.intent is not Intent.NONE:
                    cause = "asked"
                after = self._mark(state, job, cause)
                cancelled = after.receipts[job] not in (None, "committed")
                looking = looking._replace(memory=memory.marked(gave_up=cause == GIVEN_UP and cancelled))
                return Move(f"{name} marks: {cause}", False, _with(after, number, looking))
            case Step.LIFT:
                lifted = state
                if state.receipts[job] not in (None, "committed", "superseded"):
                    lifted = state._replace(receipts=_set(state.receipts, job, None))
                    if number in self.lifting or state.receipts[job] == GIVEN_UP:  # by right
                        lifted = lifted._replace(lifted=_set(state.lifted, job, True))
                return Move(f"{name} lifts the mark", False, _with(lifted, number, looking))
            case _:
                raise AssertionError(f"the model has no step {step}")

    def _launch(self, state: State, number: int, launcher: Launcher) -> Iterator[Move]:
        name = f"launcher {number}"
        looking = launcher._replace(phase=Phase.LOOK)
        started, worker = self._started(state, number, launcher.job)
        running = looking._replace(worker=worker, memory=launcher.memory.running())
        yield Move(f"{name} has launched worker {worker}", False, _with(started, number, running))
        if paid := _pay(state, "lose_launch"):
            lost = looking._replace(memory=launcher.memory.call_lost())
            yield Move(f"{name} loses the launch call; no worker", True, _with(paid, number, lost))
            started, worker = self._started(paid, number, launcher.job)
            yield Move(f"{name} loses the launch call; worker {worker} starts", True, _with(started, number, lost))

    # Cancelling ---------------------------------------------------------------------------------------------------

    def _mark(self, state: State, job: int, cause: str) -> State:
        waits = any(w is not None and w.job == job and w.inserting for w in state.workers)
        if "mark does not wait" in self.broken:
            waits = False
        if waits or state.receipts[job] is not None:
            return state
        return state._replace(receipts=_set(state.receipts, job, cause))

    def _cancel(self, state: State, number: int, canceller: Canceller) -> Iterator[Move]:
        job, name = canceller.job, f"canceller {number}"
        doing = _CANCELLING[canceller.phase]
        after = canceller._replace(phase=(canceller.phase + 1) % len(_CANCELLING))
        wrong = None
        if doing == "look":
            told = state.receipts[job]
            if told is not None:
                after = Canceller(
                    job, len(_CANCELLING), Receipt.COMMITTED if told == "committed" else Receipt.CANCELLED
                )
            move = f"{name} looks: {told}"
        elif doing == "signal":
            state = _signalled(state, lambda j: j == job)
            move = f"{name} signals"
            if "cancel without a mark" in self.broken:
                after = Canceller(job, len(_CANCELLING), Receipt.CANCELLED)
                if state.commits[job]:
                    wrong = "a cancel is told to be final of a job that is committed"
        else:
            state = self._mark(state, job, "asked")
            move = f"{name} marks"
        cancellers = _set(state.cancellers, number, after)
        yield Move(move, False, state._replace(cancellers=cancellers), wrong)


_CANCELLING = ("look", "signal", "mark")


# Looks --------------------------------------------------------------------------------------------------------------


@cache
def _terms(generation: int, lifting: bool, relaunches: int, rejections: int) -> Terms:
    takes_back = frozenset(Cause) if lifting else frozenset[Cause]()
    return Terms(generation=generation, takes_back=takes_back, relaunches=relaunches, rejections=rejections)


def _read_report(state: State, launcher: Launcher, terms: Terms) -> tuple[Launcher, str]:
    memory = launcher.memory
    if memory.launch.report is Report.RUNNING:
        worker = state.workers[launcher.worker]
        assert worker is not None
        told = None
        if worker.at in (At.ABORTING, At.FAILED) or (worker.at >= At.VISIBLE and worker.sqlstate):
            told = looks.info(worker.sqlstate, failed=True)
        elif worker.at >= At.WORKED:
            told = looks.info()
        if told is not None:
            launcher = launcher._replace(memory=memory.ended(*told, terms), worker=NOBODY)
    return launcher, launcher.memory.launch.report.name


def _read_lock(state: State, launcher: Launcher) -> tuple[Launcher, str]:
    holder, held = NOBODY, NOBODY
    for number, worker in enumerate(state.workers):
        if worker is not None and worker.locked:
            holder, held = worker.job, number
            if worker.job == launcher.job:
                break
    return launcher._replace(holder=holder, held=held), "free" if holder == NOBODY else f"job {holder}"


def _read_receipt(state: State, launcher: Launcher) -> tuple[Launcher, str]:
    told = state.receipts[launcher.job]
    return launcher._replace(told=told, newest=state.newest), str(told)


# Changes ------------------------------------------------------------------------------------------------------------


def _signalled(state: State, wanted: Callable[[int], bool]) -> State:
    """pg_cancel_backend on whoever holds the lock of such a job: a worker that starts is not found by it."""
    workers = list(state.workers)
    for number, worker in enumerate(workers):
        if worker is None or not worker.locked or not wanted(worker.job):
            continue
        if worker.at < At.VISIBLE:
            workers[number] = worker._replace(at=At.ABORTING, sqlstate=CANCELED)
        elif worker.at is At.VISIBLE:
            workers[number] = worker._replace(sqlstate=CANCELED)  # committed, and reports an error
    return state._replace(workers=tuple(workers))


def _mark_older(state: State, job: int) -> State | None:
    """Mark every older registered job; None while a worker of one is at work."""
    receipts = state.receipts
    for older in range(job):
        if not state.registered[older] or receipts[older] == "committed":
            continue
        if any(w is not None and w.job == older and w.inserting for w in state.workers):
            return None
        receipts = _set(receipts, older, "superseded")
    return state._replace(receipts=receipts, marked=max(state.marked, job + 1))


def _pay(state: State, fault: str) -> State | None:
    """The state with one fault of this kind less to come; None when there is none left."""
    index = FAULTS.index(fault)
    if not state.faults[index]:
        return None
    return state._replace(faults=_set(state.faults, index, state.faults[index] - 1))


def _put(state: State, number: int, worker: Worker) -> State:
    return _tidied(state._replace(workers=_set(state.workers, number, worker)))


def _with(state: State, number: int, launcher: Launcher) -> State:
    return _tidied(state._replace(launchers=_set(state.launchers, number, launcher)))


def _tidied(state: State) -> State:
    """Forget ended workers that nobody asks after, so that states that differ in them alone are one."""
    followed = {number for launcher in state.launchers for number in (launcher.worker, launcher.held)}
    workers: list[Worker | None] = [
        None if worker is None or (worker.at in ENDED and number not in followed) else worker
        for number, worker in enumerate(state.workers)
    ]
    while workers and workers[-1] is None:
        workers.pop()
    return state._replace(workers=tuple(workers))


def _set(values: tuple[T, ...], index: int, value: T) -> tuple[T, ...]:
    return (*values[:index], value, *values[index + 1 :])
