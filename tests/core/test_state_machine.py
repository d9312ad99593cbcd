"""Launch or attach, by a state machine: any order of what people and faults can do, against a small model.

Hypothesis chooses the steps. After each one the database and what every call was told must be what the model allows.
A failure is printed with the seed that brings it back (PGBG_SEED), and with PGBG_LONG=1 shrunk to the fewest steps.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from pgbg_orchestration import Job, Launcher, Outcome, errors
from tests.core.kit import Recorder, Watched, cancelled, count, ended, eventually, seeded
from tests.matrix import LONG

T = TypeVar("T")
EXAMPLES = itertools.count()
LAUNCHERS = st.integers(0, 1)
SERIES = st.sampled_from("ab")
GENERATIONS = st.integers(0, 2)
NOT_COMMITTED = errors.WorkerError | errors.WorkerLost
"""What a call for a job may be told whose worker failed or was killed."""


@dataclass
class Call:
    """Somebody waits for a job."""

    task: asyncio.Task[Outcome]
    seen: Recorder
    leave: bool  # the job at work when it is let go


@dataclass
class Modelled:
    """What is true of a job: ``idle`` (never run, failed or lost), ``working``, ``committed``, ``cancelled``."""

    name: str
    series: str
    generation: int
    state: str = "idle"
    superseded: bool = False
    calls: list[Call] = field(default_factory=list)


class Machine(RuleBasedStateMachine):
    """Two launchers, two series of three generations, whose jobs work until the test lets them end."""

    db: ClassVar[Watched]
    runner: ClassVar[asyncio.Runner]

    def __init__(self) -> None:
        super().__init__()
        self.example = next(EXAMPLES)
        self.jobs: dict[str, Modelled] = {}
        self.newest: dict[str, int] = {}
        self.restarts = 0
        self.launchers = [Launcher(self.db.conninfo) for _ in range(2)]

    # The hands ----------------------------------------------------------------------------------------------------

    def await_(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(coroutine)

    def until(self, look: Callable[[], Any], what: str) -> None:
        self.await_(eventually(look, what))

    def job(self, series: str, generation: int) -> Modelled:
        series = f"{self.example}{series}"
        name = f"{series}#{generation}"
        return self.jobs.setdefault(name, Modelled(name, series, generation))

    def pid(self, job: Modelled) -> int | None:
        pid: int | None = self.db.value("select max(running_pid) from pgbg.jobs where job_id = %s", job.name)
        return pid

    def gate(self, job: Modelled, state: str) -> None:
        """Let the job's SQL end: 'open' well, 'broken' by an error; 'shut' makes it wait."""
        self.db.sql("insert into gates values (%s, %s) on conflict (job) do update set state = excluded.state",
                    job.name, state)  # fmt: skip

    def ends(self, job: Modelled) -> list[Outcome | BaseException]:
        """Wait until every call for the job has ended, and return how."""
        calls, job.calls = job.calls, []
        return [self.await_(ended(call.task)) for call in calls]

    def come_to_rest(self, job: Modelled, old: int | None) -> None:
        """Wait until whoever still wants the job has launched it anew; those that gave up were told the truth."""
        self.until(
            lambda: all(call.task.done() for call in job.calls) or self.pid(job) not in (None, old),
            f"{job.name} is at work again or given up",
        )
        waiting = [call for call in job.calls if not call.task.done()]
        job.calls, over = waiting, [call for call in job.calls if call.task.done()]
        for call in over:
            end = self.await_(ended(call.task))
            assert isinstance(end, NOT_COMMITTED), f"{job.name}: {end!r}"
        job.state = "working" if waiting else "idle"
        if not waiting:
            self.until(lambda: self.pid(job) is None, f"the worker of {job.name} has ended")

    # What people do -----------------------------------------------------------------------------------------------

    @rule(launcher=LAUNCHERS, series=SERIES, generation=GENERATIONS, again=st.booleans(), leave=st.booleans())
    def run(self, launcher: int, series: str, generation: int, again: bool, leave: bool) -> None:
        """A call for a job: launches it, attaches to it, or is told how it ended; ``again`` after a cancel too."""
        job = self.job(series, generation)
        older = [j for j in self.jobs.values() if j.series == job.series and j.generation < generation]
        if job.state != "working":
            self.gate(job, "shut")
        seen = Recorder()
        sql = f"insert into effects values ('{job.name}'); select pass_gate('{job.name}')"
        call = Call(
            self.await_(
                self.begin(
                    self.launchers[launcher].run(
                        Job(sql, series=job.series, generation=generation),
                        on_cancel="leave" if leave else "cancel", retry_cancelled=again, observer=seen,
                    )
                )
            ),
            seen,
            leave,
        )  # fmt: skip
        superseded = self.newest.get(job.series, 0) > generation
        if job.state == "working":
            self.until(lambda: call.task.done() or {"launched", "attached"} & {*seen.kinds()}, "the call is attached")
            assert "launched" not in seen.kinds(), f"{job.name} was launched while it is at work"
            assert not call.task.done(), f"{job.name}: {self.await_(ended(call.task))!r}"
            job.calls.append(call)
        elif job.state == "committed":
            end = self.await_(ended(call.task))
            assert isinstance(end, Outcome), f"{job.name} is committed: {end!r}"
            assert not end.launched, f"{job.name} is committed, and was launched again"
        elif superseded or job.superseded:
            end = self.await_(ended(call.task))
            assert isinstance(end, errors.Superseded), f"{job.name} is superseded: {end!r}"
            job.state, job.superseded = "cancelled", True
        elif job.state == "cancelled" and not again:
            end = self.await_(ended(call.task))
            assert isinstance(end, errors.JobCancelled), f"{job.name} is cancelled: {end!r}"
        else:
            self.until(lambda: call.task.done() or self.pid(job), f"{job.name} is at work")
            self.until(lambda: call.task.done() or "launched" in seen.kinds(), f"{job.name} is launched")
            assert not call.task.done(), f"{job.name}: {self.await_(ended(call.task))!r}"
            job.state = "working"
            job.calls.append(call)
            self.newest[job.series] = generation
            for other in older:
                self.supersede(other)

    async def begin(self, coroutine: Coroutine[Any, Any, Outcome]) -> asyncio.Task[Outcome]:
        task = asyncio.create_task(coroutine)
        await asyncio.sleep(0)
        return task

    def supersede(self, job: Modelled) -> None:
        for end in self.ends(job):
            assert isinstance(end, errors.Superseded), f"{job.name} was superseded: {end!r}"
        if job.state == "working":
            job.state = "cancelled"
        registered = self.db.value("select count(*) from pgbg.job where job_id = %s", job.name)
        if job.state != "committed" and registered:
            job.state, job.superseded = "cancelled", True

    @rule(launcher=LAUNCHERS, series=SERIES, generation=GENERATIONS)
    def cancel(self, launcher: int, series: str, generation: int) -> None:
        """A cancel from outside, of any job: final, unless the job is committed."""
        job = self.job(series, generation)
        told = self.await_(self.launchers[launcher].cancel(job.name, series=job.series))
        assert told == ("committed" if job.state == "committed" else "cancelled")
        for end in self.ends(job):
            assert isinstance(end, errors.JobCancelled), f"{job.name} was cancelled: {end!r}"
        job.state = told

    def working(self) -> list[Modelled]:
        return [job for job in self.jobs.values() if job.state == "working"]

    def waited_for(self) -> list[Modelled]:
        return [job for job in self.jobs.values() if job.calls]

    @precondition(lambda self: bool(self.waited_for()))
    @rule(data=st.data())
    def let_go(self, data: st.DataObject) -> None:
        """A caller goes away: its job is cancelled for all, or left at work, as that caller chose."""
        job = data.draw(st.sampled_from(self.waited_for()))
        call = job.calls.pop(data.draw(st.integers(0, len(job.calls) - 1)))
        pid = self.pid(job)
        end = self.await_(cancelled(call.task))
        assert isinstance(end, asyncio.CancelledError), f"{job.name} was let go: {end!r}"
        if call.leave:
            assert self.pid(job) == pid, f"{job.name} was to be left at work"
            return
        for other in self.ends(job):
            assert isinstance(other, errors.JobCancelled), f"{job.name} was cancelled: {other!r}"
        job.state = "cancelled"

    # What the SQL does --------------------------------------------------------------------------------------------

    @precondition(lambda self: bool(self.working()))
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        """The SQL ends well: everybody who waits is told so."""
        job = data.draw(st.sampled_from(self.working()))
        self.gate(job, "open")
        ends = self.ends(job)
        self.until(lambda: job.name in self.db.receipts(), f"{job.name} is committed")
        self.until(lambda: self.pid(job) is None, f"the worker of {job.name} has ended")
        for end in ends:
            assert isinstance(end, Outcome), f"{job.name} is committed: {end!r}"
        assert sum(end.launched for end in ends if isinstance(end, Outcome)) <= 1
        job.state = "committed"

    @precondition(lambda self: bool(self.working()))
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        """The SQL ends with an error, also each time that it is launched anew."""
        job = data.draw(st.sampled_from(self.working()))
        self.gate(job, "broken")
        for end in self.ends(job):
            assert isinstance(end, NOT_COMMITTED), f"{job.name} failed: {end!r}"
        self.until(lambda: self.pid(job) is None, f"the worker of {job.name} has ended")
        job.state = "idle"

    # What breaks --------------------------------------------------------------------------------------------------

    @rule()
    def lose_sessions(self) -> None:
        """Every launching session is terminated: the workers go on, and are followed without their handles."""
        self.db.terminate([pid for pid, *_ in self.db.sessions("pgbg: launching%")])

    @precondition(lambda self: bool(self.working()))
    @rule(data=st.data())
    def kill_worker(self, data: st.DataObject) -> None:
        job = data.draw(st.sampled_from(self.working()))
        pid = self.pid(job)
        assert pid is not None
        self.db.terminate([pid])
        self.come_to_rest(job, pid)

    @precondition(lambda self: self.restarts < 1)
    @rule(go=st.integers(0, 9))
    def restart(self, go: int) -> None:
        """The server stops at once and comes back: all that was at work is gone."""
        if go < 9:
            return
        self.restarts += 1
        began = {job.name: self.pid(job) for job in self.working()}
        self.db.close()
        self.db.server.restart("immediate")
        for job in self.working():
            self.come_to_rest(job, began[job.name])

    # What must be true --------------------------------------------------------------------------------------------

    @invariant()
    def all_agree(self) -> None:
        """Effects, receipts and the view say of each job what the model says."""
        prefix = f"{self.example}_#%"
        effects = dict(self.db.sql("select job, count(*) from effects where job like %s group by job", prefix))
        states = dict(self.db.sql("select job_id, state from pgbg.jobs where job_id like %s", prefix))
        receipts = self.db.receipts()
        for job in self.jobs.values():
            done = job.state == "committed"
            assert effects.get(job.name, 0) == done, f"{job.name} is {job.state}, with {effects} effects"
            assert (job.name in receipts) == done, f"{job.name} is {job.state}, and its receipt says otherwise"
            allowed: set[str | None] = {job.state}
            if job.state == "working":
                allowed = {"running"}
            elif job.state == "idle":
                allowed = {None, "failed", "lost", "waiting", "cancelled"}  # cancelled: given up, after a lost launch
            elif job.superseded:
                allowed = {"cancelled", "failed", "lost"}  # as it ended, if it had before
            assert states.get(job.name) in allowed, f"{job.name} is {job.state}, and seen as {states.get(job.name)}"

    def teardown(self) -> None:
        """Nothing is left at work once every job was cancelled."""
        try:
            for job in self.jobs.values():
                for call in job.calls:
                    self.await_(cancelled(call.task))
                self.await_(self.launchers[0].cancel(job.name, series=job.series))
            self.until(lambda: not self.db.workers(), "no worker is left")
        finally:
            for launcher in self.launchers:
                self.await_(launcher.close())


PREPARED = """
create table gates (job text primary key, state text not null);
create function pass_gate(p_job text) returns void language plpgsql volatile as $$
declare v_state text;
begin
    loop
        select state into v_state from gates where job = p_job;
        exit when v_state <> 'shut';
        perform pg_sleep(0.02);
    end loop;
    if v_state = 'broken' then
        raise exception 'the gate of % is broken', p_job;
    end if;
end $$;
grant select on gates to public;
"""


@pytest.mark.timeout(3600 if LONG else 300)
@pytest.mark.servers("embedded")
def test_any_order_of_steps(own_db: Callable[..., Watched]) -> None:
    db = own_db()
    db.sql(PREPARED)
    number = seeded("state machine").randrange(2**31)
    chosen = settings(
        max_examples=count(8, 100),
        stateful_step_count=count(12, 40),
        deadline=None,
        database=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
        # A failure is shrunk by running it again and again, for minutes.
        phases=tuple(Phase) if LONG else (Phase.generate,),
    )
    with asyncio.Runner() as runner:
        machine = type("Machine", (Machine,), {"db": db, "runner": runner})
        run_state_machine_as_test(seed(number)(machine), settings=chosen)
