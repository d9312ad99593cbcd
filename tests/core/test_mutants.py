"""The product, broken on purpose on a real server: each break must be noticed by a test that passes without it.

This is the list. What the search through the model notices besides stands in ``tests/chaos/test_protocol.py``.

| broken | how | noticed by |
|---|---|---|
| no lock | ``try_begin`` and ``begin_work`` take none | jobs of one series overlap |
| no receipt check | ``begin_work`` commits beside a receipt | a worker that starts late commits a second time |
| no generation check | both of them do not look | an older worker starts late, after its mark was pruned |
| older generations are not marked | before a launch | an older worker with an older snapshot starts after a newer one |
| lock and receipt in one snapshot | the looks are STABLE | a job that commits during a look shows neither |
| success on "completed and not has_error" | in the verdict | a worker that ends by a FATAL error is told as a success |
| cancel at once | one signal, without waiting until the worker is at work | a cancelled job leaves its effect |
| detach before the outcome is written | in the conclusion | a process that dies in between leaves no outcome |
| a notification is believed | in the session, without the receipt | a job that fails is told as a success |
| no poll below the notifications | handles and jobs are never looked at | a commit that nobody hears of is waited for |
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import UTC, datetime
from typing import Any

import psycopg
import pytest

from pgbg_orchestration import Job, Launcher, Outcome, arun, errors, launcher, pace
from pgbg_orchestration.ledger.ledger import Ledger
from pgbg_orchestration.ledger.sighting import Key
from pgbg_orchestration.postgres.handles import Proof, Worker
from pgbg_orchestration.postgres.launch_message import Opening
from pgbg_orchestration.postgres.pg_background import ResultInfo
from pgbg_orchestration.postgres.session import LaunchingSession
from pgbg_orchestration.testing import faults
from pgbg_orchestration.verdict import Evidence, Report, Step, judge
from pgbg_orchestration.walk import conclusion, recording, run
from pgbg_orchestration.walk.case import Case
from pgbg_orchestration.walk.worker_sql import WORK
from tests.core.kit import APP, Watched, cancelled, effect, ended, eventually, slow, within

pytestmark = pytest.mark.servers("real", "embedded")


def rewrite(db: Watched, function: str, old: str, new: str) -> None:
    """Put another text into a function of the schema."""
    text: str = db.value("select pg_get_functiondef(oid) from pg_proc where proname = %s", function)
    assert old in text
    db.sql(text.replace(old, new))


def noticed(broken: bool) -> AbstractContextManager[object]:
    """Broken, the check must fail; otherwise it must pass."""
    return pytest.raises(AssertionError, match="noticed") if broken else nullcontext()


BOTH = pytest.mark.parametrize("broken", [False, True], ids=["whole", "broken"])


@BOTH
async def test_no_lock(db: Watched, broken: bool) -> None:
    if broken:
        rewrite(db, "begin_work", "not pg_try_advisory_xact_lock(", "0 = (")
        rewrite(db, "try_begin", "pg_try_advisory_xact_lock(", "0 <> (")
    db.sql(f"create table spans (began timestamptz, ended timestamptz); grant insert on spans to {APP}")
    seconds = 5 if broken else 0.5  # so that a busy machine begins the second one while the first is at work
    sql = (
        f"create temp table t on commit drop as select clock_timestamp() c; select pg_sleep({seconds});"
        " insert into spans select c, clock_timestamp() from t"
    )
    async with Launcher(db.conninfo) as launcher:
        jobs = [Job(sql, id=name, series="s", generation=1) for name in "ab"]
        await within(asyncio.gather(*(launcher.run(job) for job in jobs)))
    with noticed(broken):
        first, second = db.sql("select * from spans order by began")
        assert first[1] <= second[0], "noticed: they overlap"


@BOTH
async def test_no_receipt_check(db: Watched, broken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if broken:
        rewrite(db, "begin_work", "pg_current_xact_id(), clock_timestamp());",
                "pg_current_xact_id(), clock_timestamp()) on conflict do nothing;")  # fmt: skip
    texts = launched(monkeypatch)
    await within(arun(db.conninfo, Job(effect("j"), id="j")))
    await launch_late(db, texts[0])
    with noticed(broken):
        assert db.effects() == 1, "noticed: it committed twice"


def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Return the list that gets what is launched from now on: texts, and the settings that say which launch it is."""
    texts: list[tuple[str, str]] = []
    launch, begin = LaunchingSession.launch, LaunchingSession.begin

    def spy(self: LaunchingSession, text: str, **arguments: Any) -> Any:
        texts.append((text, arguments["settings"][WORK]))
        return launch(self, text, **arguments)

    def spy_at_first(self: LaunchingSession, opening: Opening, script: bytes, **arguments: Any) -> Any:
        call = begin(self, opening, script, **arguments)

        def note(_: object) -> None:
            registered = opening.registration or {}
            if registered.get("verdict") == "registered":
                assert opening.arguments is not None
                assert isinstance(opening.text, str)
                _, (head, middle, tail) = opening.arguments
                work = f"{head}{registered['generation']}{middle}{registered['attempt']}{tail}"
                texts.append((opening.text, work))

        call.add_done_callback(note)
        return call

    monkeypatch.setattr(LaunchingSession, "launch", spy)
    monkeypatch.setattr(LaunchingSession, "begin", spy_at_first)
    return texts


async def launch_late(db: Watched, launch_call: tuple[str, str]) -> None:
    """Run a worker of a launch call that was lost on its way, and that starts only now."""
    text, work = launch_call
    with psycopg.connect(db.conninfo, autocommit=True) as late:
        late.execute("select set_config('pgbg.work', %s, false)", (work,))
        launch, info = (db.database.function(name) for name in ("launch", "result_info"))
        handle = late.execute(f"select pid, cookie from {launch}(%s)".encode(), (text,)).fetchone()

        def completed() -> bool:
            return late.execute(f"select completed from {info}(%s, %s)".encode(), handle).fetchone() == (True,)

        await eventually(completed, "the late worker has ended")


@BOTH
async def test_no_generation_check(db: Watched, broken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if broken:
        rewrite(db, "begin_work", "s.newest > p_generation", "false")
        rewrite(db, "try_begin", "<= try_begin.p_generation", "is not null")
    texts = launched(monkeypatch)
    older = Job(f"{effect('older')}; select 1 / (select count(*)::int from effects where job = 'newer')",
                series="s", generation=1)  # fmt: skip
    assert isinstance(await ended(arun(db.conninfo, older)), errors.WorkerError)
    await within(arun(db.conninfo, Job(effect("newer"), series="s", generation=2)))
    db.sql("delete from pgbg.receipt where status = 'cancelled'")
    await launch_late(db, texts[0])
    with noticed(broken):
        assert db.effects("older") == 0, "noticed: it committed after the newer one"


@BOTH
async def test_older_generations_not_marked(db: Watched, broken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if broken:

        async def nobody(*_: object) -> list[str]:
            return []

        monkeypatch.setattr(Ledger, "mark_older", nobody)
    # Under repeatable read it sees the generations of before its sleep.
    rewrite(db, "begin_work", "\nbegin\n", "\nbegin perform pg_sleep(case p_generation when 1 then 1.5 else 0 end);\n")
    older = Job(effect("older"), series="s", generation=1, isolation="repeatable read")
    async with Launcher(db.conninfo) as launching:
        task = asyncio.create_task(launching.run(older, on_cancel="leave"))
        await eventually(lambda: [w for w in db.workers() if w[3] == "PgSleep"], "the older worker has its snapshot")
        assert isinstance(await cancelled(task), asyncio.CancelledError)  # nobody is left to give up for it
        await within(launching.run(Job(effect("newer"), series="s", generation=2)))
        await eventually(lambda: not db.workers(), "the older worker has ended")
    with noticed(broken):
        assert db.effects("older") == 0, "noticed: it began after the newer one"


@BOTH
@pytest.mark.parametrize("function", ["look", "find_jobs"])
async def test_lock_and_receipt_in_one_snapshot(db: Watched, function: str, broken: bool) -> None:
    checked = '"pgbg".require_read_committed();'
    rewrite(db, function, checked, f"{checked} perform pg_sleep(1);")
    if broken:
        db.sql(f"alter function pgbg.{function} stable")
    async with Launcher(db.conninfo) as launching:
        task = asyncio.create_task(launching.run(Job(slow("j", 0.5), id="j")))
        await eventually(lambda: [w for w in db.workers() if w[3] == "PgSleep"], "the worker is at work")
        if function == "look":
            seen = await within(launching.look("j"))
            shown = seen.status == "committed" or seen.holds_this_job
        else:
            shown = db.states()["j"] in ("running", "committed")
        await ended(task)
    with noticed(broken):
        assert shown, "noticed: it looks lost"


def _completed_is_success(seen: Evidence) -> Step:
    return Step.COMMITTED if seen.report is Report.ENDED else judge(seen)


@BOTH
async def test_success_without_proof(db: Watched, broken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if broken:
        monkeypatch.setattr(run, "judge", _completed_is_success)
    # It ends by a FATAL error, which bypasses the report: completed, no error, and a command tag.
    job = Job(f"{effect('j')}; do $$begin perform 1/0; end$$", id="j", settings={"exit_on_error": "on"})
    end = await ended(arun(db.conninfo, job))
    with noticed(broken):
        assert not isinstance(end, Outcome), "noticed: a success"
        assert isinstance(end, errors.WorkerLost | errors.WorkerError)
    assert db.effects() == 0


async def _signal_once(ledger: Ledger, key: Key, *_: object) -> str:
    await ledger.signal(key)
    return "cancelled"


@BOTH
async def test_cancel_at_once(own_db: Callable[..., Watched], broken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every new process sleeps a second before its first command, so a signal finds nobody."""
    db = own_db(settings={"post_auth_delay": 1})
    if broken:
        monkeypatch.setattr(launcher, "cancel_job", _signal_once)
    async with Launcher(db.conninfo) as launching, Launcher(db.conninfo) as cancelling:
        # Its connections are open before they are needed.
        await within(asyncio.gather(launching.run(Job("select 1", id="warm")), cancelling.cancel("never launched")))
        task = asyncio.create_task(launching.run(Job(effect("j"), id="j")))
        # Nothing shows a worker that starts; the launch call follows its registration at once.
        await eventually(lambda: "j" in db.states(), "the registration")
        await asyncio.sleep(0.4)
        assert await within(cancelling.cancel("j")) == "cancelled"
        await ended(task)
        await eventually(lambda: not db.workers(), "the worker has ended")
    with noticed(broken):
        assert db.effects() == 0, "noticed: cancelled, and committed"


@BOTH
@pytest.mark.parametrize(
    "sql", [effect("j"), f"{effect('j')}; do $$ begin perform 1/0; end $$"], ids=["committed", "failed"]
)
async def test_detach_before_the_outcome_is_written(
    db: Watched, sql: str, broken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, record_hints = recording.record, LaunchingSession._record

    async def too_late(case: Case, *arguments: Any, **named: Any) -> None:
        if case.worker is not None:
            await case.worker.detach()
        await record(case, *arguments, **named)

    async def recorded_too_late(self: LaunchingSession, workers: list[Worker]) -> list[tuple[Worker, ResultInfo]]:
        faults.point("after_detach")
        return await record_hints(self, workers)

    if broken:
        monkeypatch.setattr(conclusion, "record", too_late)
        monkeypatch.setattr(LaunchingSession, "_record", recorded_too_late)
    written: list[object] = []

    def look(point: str) -> None:
        if point == "after_detach":  # where a process may die
            written.append(db.value("select outcome from pgbg.job where job_id = 'j'"))

    faults.install(look)
    try:
        async with Launcher(db.conninfo) as launching:
            await ended(launching.run(Job(sql, id="j")))
            await eventually(lambda: written, "the handle is given up")
    finally:
        faults.install(None)
    with noticed(broken):
        assert written[0] in ("committed", "failed"), "noticed: detached, and nothing is written"


async def _believe(self: LaunchingSession, workers: list[Worker]) -> list[tuple[Worker, ResultInfo]]:
    now = datetime.now(UTC)
    for worker in workers:
        worker.proof = Proof(worker.handle.pid, now, now)
    return [(worker, ResultInfo(True, False, 1, "SELECT")) for worker in workers]


@BOTH
async def test_a_notification_is_believed(db: Watched, broken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Anybody can notify."""
    if broken:
        monkeypatch.setattr(LaunchingSession, "_record", _believe)
    async with Launcher(db.conninfo) as launching:
        task = asyncio.create_task(launching.run(Job(f"{slow('j', 1)}; do $$ begin perform 1/0; end $$", id="j")))
        await db.at_work("j")
        await eventually(lambda: db.sessions("pgbg: listening"), "somebody listens")
        while not task.done():
            db.sql("select pg_notify('pgbg', pgbg.marker(%s, 'j'))", APP)
            await asyncio.sleep(0.05)
        end = await ended(task)
        await eventually(lambda: not db.workers(), "the worker has ended")
    with noticed(broken):
        assert isinstance(end, errors.WorkerError), "noticed: a success"
    assert db.effects() == 0


@BOTH
async def test_no_poll_below_the_notifications(db: Watched, broken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if broken:
        monkeypatch.setattr(pace, "poll_handle", lambda *_: 10_000)
        monkeypatch.setattr(pace, "look", lambda *_: 10_000)
    async with Launcher(db.conninfo) as launching:
        # It takes longer than the first wait, after which a job is looked at in any case.
        silent = {"pgbg.notify": "off"}
        task = asyncio.create_task(launching.run(Job(slow("j", 3), id="j", settings=silent), on_cancel="leave"))
        await db.at_work("j")
        await eventually(lambda: db.receipts() == {"j"} and not db.workers(), "the commit")
        with noticed(broken):
            done, _ = await asyncio.wait({task}, timeout=5 if broken else 60)
            assert done, "noticed: nobody looks"
        task.cancel()
        await asyncio.wait({task})
