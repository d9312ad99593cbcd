"""Success is told only with proof: whatever the extension reports, the rows are there when we say so."""

from __future__ import annotations

import asyncio

import pytest

from pgbg_orchestration import Job, Outcome, arun, errors
from tests.core.kit import Watched, count, effect, ended, within

pytestmark = pytest.mark.any_surface


def tells_names(db: Watched) -> bool:
    """Whether this extension tells an error's schema, table and constraint."""
    return db.server.surface == "2.0" and not db.server.is_standin


async def rows_or_error(db: Watched, job: Job) -> BaseException | Outcome:
    """Run a job that may fail; its end and its effect must fit."""
    end = await ended(asyncio.ensure_future(arun(db.conninfo, job)))
    assert db.effects(job.id) == (1 if isinstance(end, Outcome) else 0), end
    assert (job.id in db.receipts()) is isinstance(end, Outcome), end
    return end


@pytest.mark.since(postgres=17)
@pytest.mark.servers("real", "embedded")
@pytest.mark.parametrize(
    "sql",
    ["{effect}; select pg_sleep(3)", "select pg_sleep(3); {effect}", "{effect}"],
    ids=["in the last statement", "before the effect", "too quick"],
)
async def test_transaction_timeout(db: Watched, sql: str) -> None:
    end = await rows_or_error(
        db, Job(sql.format(effect=effect("j")), id="j", settings={"transaction_timeout": "400ms"})
    )
    if "sleep" in sql:
        assert isinstance(end, errors.WorkerLost | errors.WorkerError), end


@pytest.mark.parametrize("sql", ["{effect}; select 1/0", "select 1/0; {effect}"])
async def test_exit_on_error(db: Watched, sql: str) -> None:
    end = await rows_or_error(db, Job(sql.format(effect=effect("j")), id="j", settings={"exit_on_error": "on"}))
    assert isinstance(end, errors.WorkerLost | errors.WorkerError), end


async def test_deferred_constraint(db: Watched) -> None:
    db.sql("create table parent (i int primary key)")
    db.sql("create table child (i int references parent deferrable initially deferred)")
    db.sql("grant insert, select on parent, child to pgbg_app")
    end = await rows_or_error(db, Job(f"{effect('j')}; insert into child values (5)", id="j"))
    assert isinstance(end, errors.WorkerError)
    assert end.sqlstate == "23503"
    assert end.fields.detail
    if tells_names(db):
        fields = end.fields
        assert (fields.table_name, fields.constraint_name) == ("child", "child_i_fkey")
    good = await rows_or_error(
        db, Job(f"{effect('k')}; insert into child values (5); insert into parent values (5)", id="k")
    )
    assert isinstance(good, Outcome)


@pytest.mark.servers("real", "embedded")
@pytest.mark.parametrize("setting", ["transaction_timeout", "pg_background.worker_timeout"])
async def test_deferred_trigger_that_is_too_slow(db: Watched, setting: str) -> None:
    """Its tag and count are written before the commit that the trigger then prevents."""
    db.sql("create function slow() returns trigger language plpgsql as $$begin perform pg_sleep(3); return null; end$$")
    db.sql("create table triggered (i int)")
    db.sql("grant insert on triggered to pgbg_app")
    db.sql(
        "create constraint trigger slow after insert on triggered deferrable initially deferred"
        " for each row execute function slow()"
    )
    sql = f"{effect('j')}; insert into triggered values (1)"
    end = await rows_or_error(db, Job(sql, id="j", settings={setting: "500ms"}))
    # worker_timeout does not cover the commit: there the trigger ends, and the job with it.
    assert not isinstance(end, Outcome) or setting != "transaction_timeout"


async def test_deadline(db: Watched) -> None:
    """The job's own timeout: its worker ends, no effect, the right error; a rerun with more time is a new try."""
    end = await rows_or_error(db, Job(f"{effect('j')}; select pg_sleep(30)", id="j", timeout=0.5))
    assert isinstance(end, errors.DeadlinePassed)
    assert "0.5" in str(end)
    assert isinstance(await rows_or_error(db, Job(effect("k"), id="k", timeout=60)), Outcome)


async def test_job_that_met_its_deadline_is_run_again_when_asked(db: Watched) -> None:
    sql = "insert into effects values ('j', 1); select pg_sleep(case when (select count(*) from pgbg.jobs where attempt > 1) > 0 then 0 else 30 end)"  # fmt: skip # noqa: E501
    db.sql("grant select on pgbg.jobs to pgbg_app")
    end = await rows_or_error(db, Job(sql, id="j", timeout=0.7))
    assert isinstance(end, errors.DeadlinePassed)
    outcome = await within(arun(db.conninfo, Job(sql, id="j"), retry_cancelled=True))
    assert outcome.attempt == 2
    assert db.effects("j") == 1


async def test_statement_timeout_of_the_server_is_no_cancel_of_ours(db: Watched) -> None:
    """57014 that nobody asked for: an error of the job, not JobCancelled, and it can be run again."""
    job = Job(f"{effect('j')}; select pg_sleep(30)", id="j", settings={"statement_timeout": "300ms"})
    end = await rows_or_error(db, job)
    assert isinstance(end, errors.WorkerError)
    assert end.sqlstate == "57014"
    assert not db.receipts("cancelled")


async def test_error_has_every_field(db: Watched) -> None:
    db.sql("create table fields (i int, constraint positive check (i > 0))")
    db.sql("grant insert on fields to pgbg_app")
    end = await rows_or_error(db, Job(f"{effect('j')}; insert into fields values (-1)", id="j"))
    assert isinstance(end, errors.WorkerError)
    assert (end.sqlstate, end.fields.sqlstate, end.job_id) == ("23514", "23514", "j")
    assert "positive" in (end.fields.message or "")
    assert end.fields.detail
    if tells_names(db):
        assert (end.fields.schema_name, end.fields.table_name, end.fields.constraint_name) == (
            "public",
            "fields",
            "positive",
        )
    raised = "do $$ begin raise exception using errcode = 'ZZ123', message = 'm', detail = 'd', hint = 'h'; end $$"
    end = await rows_or_error(db, Job(f"{effect('k')}; {raised}", id="k"))
    assert isinstance(end, errors.WorkerError)
    assert (end.sqlstate, end.fields.message, end.fields.detail, end.fields.hint) == ("ZZ123", "m", "d", "h")
    assert "inline_code_block" in (end.fields.context or "")
    for part in ("ZZ123", "m", "d", "h"):
        assert part in str(end)
    assert "Nothing of this job is committed" in str(end)
    row = db.sql("select state, sqlstate, message, detail, hint from pgbg.jobs where job_id = 'k'")
    assert row == [("failed", "ZZ123", "m", "d", "h")]


async def test_a_failed_job_can_be_run_again(db: Watched) -> None:
    db.sql("create table gate (i int)")
    db.sql("grant select on gate to pgbg_app")
    job = Job(f"{effect('j')}; select 1 / (select count(*) from gate)", id="j")
    assert isinstance(await rows_or_error(db, job), errors.WorkerError)
    db.sql("insert into gate values (1)")
    outcome = await rows_or_error(db, job)
    assert isinstance(outcome, Outcome)
    assert outcome.attempt == 2
    assert outcome.launched


@pytest.mark.servers("real", "embedded")
async def test_serializable_jobs_side_by_side(db: Watched) -> None:
    """Jobs that share nothing of their own must not fail with 40001 because of the receipts."""
    jobs = count(60, 200)
    # With room on each page: an update that finds none writes into a page of the index, which the others have read.
    db.sql("create table own (i int primary key, v int) with (fillfactor = 10)")
    db.sql(f"insert into own select g, 0 from generate_series(1, {jobs}) g")
    db.sql("analyze own")
    db.sql("grant select, update on own to pgbg_app")
    ends = await within(
        asyncio.gather(
            *(
                # Each job touches one row, by its key, so that PostgreSQL sees no dependency between them.
                arun(
                    db.conninfo,
                    Job(
                        f"update own set v = v + 1 where i = {n}; select pg_sleep(0.02)",
                        id=f"j{n}", isolation="serializable", settings={"enable_seqscan": "off"},
                    ),
                )
                for n in range(1, jobs + 1)
            ),
            return_exceptions=True,
        ),
        120,
    )  # fmt: skip
    failed = [end for end in ends if not isinstance(end, Outcome)]
    assert not failed, failed[:3]
    assert db.value("select count(*) from own where v = 1") == jobs


@pytest.mark.servers("real", "embedded")
async def test_real_serialization_failures_leave_nothing(db: Watched) -> None:
    """A 40001 of the user's own making: no effect, no receipt, and the next try succeeds."""
    db.sql("create table counter (v int)")
    db.sql("insert into counter values (0)")
    db.sql("grant select, update on counter to pgbg_app")

    async def one(number: int) -> None:
        job = Job(
            f"update counter set v = v + 1; {effect(f'j{number}')}; select pg_sleep(0.01)",
            id=f"j{number}", isolation="serializable",
        )  # fmt: skip
        while True:
            try:
                await arun(db.conninfo, job)
            except errors.WorkerError as error:
                assert error.sqlstate == "40001", error  # noqa: PT017
            else:
                return

    await within(asyncio.gather(*(one(n) for n in range(6))), 120)
    assert db.value("select v from counter") == 6
    assert db.effects_by_job() == {f"j{n}": 1 for n in range(6)}
