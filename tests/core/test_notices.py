"""What a job's SQL raises, told as it is raised."""

from __future__ import annotations

import asyncio
import logging
import time

import pytest

from pgbg_orchestration import Event, Job, Launcher, Outcome, arun, errors, pace
from pgbg_orchestration.outcome import EventKind
from tests.core.kit import Recorder, Watched, cancelled, effect, ended, eventually, within

pytestmark = pytest.mark.servers("real", "embedded")

RAISES = """do $$ begin
    raise debug 'a debug';
    raise notice 'a notice' using detail = 'more of it', hint = 'do this', errcode = '01234';
    raise info 'an info';
    raise warning 'a warning';
    raise log 'only for the log';
end $$"""


def notices(seen: Recorder) -> list[Event]:
    return [event for event in seen.events if event.kind is EventKind.NOTICE]


@pytest.mark.parametrize("kind", ["receipt", "session"])
async def test_each_severity_with_detail_and_hint(db: Watched, caplog: pytest.LogCaptureFixture, kind: str) -> None:
    seen = Recorder()
    caplog.set_level(logging.DEBUG, logger="pgbg_orchestration")
    job = Job(RAISES, id="raises", kind=kind, settings={"client_min_messages": "debug1"})
    outcome = await within(arun(db.conninfo, job, observer=seen, notices=True))

    assert outcome.command_tag == "DO"
    ours = [event for event in notices(seen) if event.data["text"].split()[0] in ("a", "an")]
    assert [(event.data["severity"], event.data["text"]) for event in ours] == [
        ("DEBUG", "a debug"), ("NOTICE", "a notice"), ("INFO", "an info"), ("WARNING", "a warning"),
    ]  # fmt: skip
    assert (ours[1].data["detail"], ours[1].data["hint"], ours[1].data["sqlstate"]) == (
        "more of it",
        "do this",
        "01234",
    )
    logged = {record.levelname: record.getMessage() for record in caplog.records if "WARNING" in record.getMessage()}
    assert list(logged) == ["WARNING"]
    assert "NOTICE: a notice\nDETAIL: more of it\nHINT: do this" in caplog.text


async def test_twenty_thousand_come_in_order(db: Watched) -> None:
    seen = Recorder()
    sql = f"{effect('j')}; do $$ begin for i in 1 .. 20000 loop raise notice '%', i; end loop; end $$"
    outcome = await within(arun(db.conninfo, Job(sql, id="j"), observer=seen, notices=True))

    assert [int(event.data["text"]) for event in notices(seen)] == list(range(1, 20001))
    assert (outcome.proof, outcome.command_tag) == ("receipt", "DO")
    assert db.effects("j") == 1
    assert "output_blocked" not in seen.kinds()


@pytest.mark.parametrize("end", ["", "raise division_by_zero;"])
async def test_whoever_hears_them_slowly_hears_all(
    db: Watched, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, end: str
) -> None:
    """The job's end is known long before its last notice is told, as in a triggerer that has much to write down."""
    monkeypatch.setattr(pace, "CALL", 2.0)
    # What is slow is the observer: 3,000 lines in the log take a busy machine a minute.
    caplog.set_level(logging.WARNING, "pgbg_orchestration")
    seen = Recorder()

    def slow(event: Event) -> None:
        seen(event)
        if event.kind is EventKind.NOTICE:
            time.sleep(0.003)

    sql = f"do $$ begin for i in 1 .. 3000 loop raise notice '%', i; end loop; {end} end $$"
    told = await ended(asyncio.create_task(arun(db.conninfo, Job(sql, id="j"), observer=slow, notices=True)))

    assert [int(event.data["text"]) for event in notices(seen)] == [*range(1, 3001)]
    if end:
        assert isinstance(told, errors.WorkerError)
        assert told.sqlstate == "22012"
    else:
        assert isinstance(told, Outcome)


async def test_they_come_while_the_job_is_at_work(db: Watched) -> None:
    seen = Recorder()
    sql = "do $$ begin raise notice 'first'; perform pg_sleep(3); raise notice 'last'; end $$"
    running = asyncio.create_task(arun(db.conninfo, Job(sql, id="j"), observer=seen, notices=True))
    await eventually(lambda: notices(seen), "the first notice")
    assert [event.data["text"] for event in notices(seen)] == ["first"]
    assert not running.done()
    await within(running)
    assert [event.data["text"] for event in notices(seen)] == ["first", "last"]


@pytest.mark.parametrize(
    ("sql", "count", "tag"),
    [
        ("insert into effects (job) select 'j' from generate_series(1, 7)", 7, "INSERT"),
        ("select repeat('x', 100) from generate_series(1, 100000)", 100000, "SELECT"),
        ("insert into effects (job) values ('a'), ('b'); delete from effects where job = 'a'", 1, "DELETE"),
    ],
)  # fmt: skip
async def test_counts_and_tag_are_the_jobs_own(db: Watched, sql: str, count: int, tag: str) -> None:
    outcome = await within(arun(db.conninfo, Job(sql, id="j"), notices=True))
    assert (outcome.row_count, outcome.command_tag, outcome.proof) == (count, tag, "receipt")


@pytest.mark.parametrize("sqlstate", ["42P01", "22012", "P0001", "42804", "23505"])
async def test_an_error_after_a_notice_is_the_jobs_own(db: Watched, sqlstate: str) -> None:
    seen = Recorder()
    sql = (
        f"{effect('j')}; do $$ begin raise notice 'before'; raise exception 'it fails' using errcode = '{sqlstate}',"
        " detail = 'why', hint = 'what now'; end $$"
    )
    with pytest.raises(errors.PgbgError) as caught:
        await within(arun(db.conninfo, Job(sql, id="j"), observer=seen, notices=True))
    assert isinstance(caught.value, errors.WorkerError), caught.value
    fields = caught.value.fields
    assert (fields.sqlstate, fields.message, fields.detail, fields.hint) == (sqlstate, "it fails", "why", "what now")
    assert [event.data["text"] for event in notices(seen)] == ["before"]
    assert db.effects() == 0


async def test_a_commit_that_was_made_before_is_told_without_a_worker(db: Watched) -> None:
    await within(arun(db.conninfo, Job(effect("j"), id="j"), notices=True))
    outcome = await within(arun(db.conninfo, Job(effect("j"), id="j"), notices=True))
    assert (outcome.launched, db.effects("j")) == (False, 1)


async def test_a_job_that_is_heard_can_be_cancelled(db: Watched) -> None:
    seen = Recorder()
    sql = f"{effect('j')}; do $$ begin loop raise notice 'again'; perform pg_sleep(0.01); end loop; end $$"
    task = asyncio.create_task(arun(db.conninfo, Job(sql, id="j"), observer=seen, notices=True))
    await eventually(lambda: len(notices(seen)) > 10, "notices")
    await cancelled(task)
    assert db.effects() == 0
    assert db.states()["j"] == "cancelled"


async def test_a_session_that_is_lost_costs_no_commit(db: Watched) -> None:
    seen = Recorder()
    sql = f"{effect('j')}; do $$ begin raise notice 'here'; perform pg_sleep(3); raise notice 'gone'; end $$"
    running = asyncio.create_task(arun(db.conninfo, Job(sql, id="j"), observer=seen, notices=True))
    await eventually(lambda: notices(seen), "the first notice")
    db.sql("select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'pgbg: launching'")
    outcome = await within(running)
    assert (db.effects("j"), outcome.proof) == (1, "receipt")
    assert [event.data["text"] for event in notices(seen)] == ["here"]


@pytest.mark.parametrize("given", [{"redact_details": True}, {"kind": "supervised"}])
async def test_what_cannot_be_heard_is_refused_before_anything_is_launched(
    db: Watched, given: dict[str, object]
) -> None:
    with pytest.raises(errors.InvalidJob, match="notices"):
        await within(arun(db.conninfo, Job("vacuum effects" if "kind" in given else "select 1", **given), notices=True))  # type: ignore[arg-type]
    assert db.states() == {}


class TestACall:
    """Its procedure may commit, so it is supervised, and what that raises nobody but its supervisor hears."""

    @pytest.fixture
    def tells(self, db: Watched) -> None:
        db.sql(
            "create procedure tells(commits boolean) language plpgsql as $$ begin insert into effects values ('first');"
            " raise notice 'one'; if commits then commit; end if; insert into effects values ('second');"
            " raise notice 'two'; end $$"
        )

    @pytest.mark.usefixtures("tells")
    async def test_it_carries_a_receipt_where_it_is_to_be_heard(self, db: Watched) -> None:
        seen = Recorder()
        outcome = await within(
            arun(db.conninfo, Job("call tells(false)", id="j", label="a call"), observer=seen, notices=True)
        )

        assert [event.data["text"] for event in notices(seen)] == ["one", "two"]
        assert (outcome.proof, outcome.command_tag, db.effects()) == ("receipt", "CALL", 2)
        assert db.value("select kind from pgbg.jobs") == "receipt"

    @pytest.mark.usefixtures("tells")
    async def test_one_that_commits_does_nothing_and_says_how_it_is_heard(self, db: Watched) -> None:
        with pytest.raises(errors.WorkerError) as caught:
            await within(arun(db.conninfo, Job("call tells(true)", id="j"), notices=True))
        assert (caught.value.sqlstate, db.effects()) == ("2D000", 0)
        assert "where its notices are to be heard, as kind='session'" in str(caught.value.todo)

        seen = Recorder()
        await within(arun(db.conninfo, Job("call tells(true)", kind="session"), observer=seen, notices=True))
        assert [event.data["text"] for event in notices(seen)] == ["one", "two"]
        assert db.effects() == 2

    @pytest.mark.usefixtures("tells")
    async def test_one_whose_kind_is_asked_for_keeps_it(self, db: Watched) -> None:
        with pytest.raises(errors.InvalidJob, match="notices of a supervised job") as caught:
            await within(arun(db.conninfo, Job("call tells(true)", kind="supervised"), notices=True))
        assert "kind='session'" in str(caught.value.todo)
        assert (db.effects(), db.states()) == (0, {})

    @pytest.mark.usefixtures("tells")
    async def test_one_that_is_committed_is_not_run_again_to_be_heard(self, db: Watched) -> None:
        first = await within(arun(db.conninfo, Job("call tells(true)", id="j")))
        again = await within(arun(db.conninfo, Job("call tells(true)", id="j"), notices=True))
        assert (first.launched, again.launched, db.effects()) == (True, False, 2)

    async def test_one_that_is_supervised_and_at_work_is_attached_to(self, db: Watched) -> None:
        db.sql(
            "create procedure works() language plpgsql as $$ begin insert into effects values ('j'); commit;"
            " perform pg_sleep(2); insert into effects values ('j'); end $$"
        )
        first = asyncio.create_task(arun(db.conninfo, Job("call works()", id="j")))
        await eventually(db.effects, "the first commit of the procedure")
        again = await within(arun(db.conninfo, Job("call works()", id="j"), notices=True))
        assert ((await within(first)).launched, again.launched, db.effects()) == (True, False, 2)


@pytest.mark.parametrize("redact_details", [False, True])
async def test_the_warnings_of_a_failed_job_are_told_without_the_wish(db: Watched, redact_details: bool) -> None:
    seen = Recorder()
    sql = (
        "do $$ begin raise notice 'not kept'; raise warning 'look here' using hint = 'there'; end $$;"
        " do $$ begin raise warning 'and here';"
        " raise exception 'it fails' using errcode = '42P01', detail = 'why'; end $$"
    )
    job = Job(sql, id="j", redact_details=redact_details)
    with pytest.raises(errors.WorkerError) as caught:
        await within(arun(db.conninfo, job, observer=seen))
    assert caught.value.sqlstate == "42P01"
    assert caught.value.fields.detail == (None if redact_details else "why")
    told = [(event.data["severity"], event.data["text"], event.data["hint"]) for event in notices(seen)]
    wanted = [("WARNING", "look here", "there"), ("WARNING", "and here", None)]
    assert told == ([] if redact_details else wanted)


async def test_one_of_many_that_fails_with_rows_in_its_queue_disturbs_no_other(db: Watched) -> None:
    seen = Recorder()
    bad = "select 1 / (3 - g), repeat('x', 100) from generate_series(1, 5) g"
    async with Launcher(db.conninfo) as launcher:
        jobs = [Job(bad if number == 2 else effect(f"j{number}"), id=f"j{number}") for number in range(5)]
        ends = await within(asyncio.gather(*(launcher.run(job, observer=seen) for job in jobs), return_exceptions=True))
    assert [isinstance(end, errors.WorkerError) for end in ends] == [False, False, True, False, False]
    assert db.effects() == 4
    assert notices(seen) == []


async def test_without_the_wish_none_is_told(db: Watched) -> None:
    seen = Recorder()
    await within(arun(db.conninfo, Job(RAISES, id="j"), observer=seen))
    assert notices(seen) == []
