"""``redact_details``: no text of the server's that may quote data is raised, logged or written down."""

from __future__ import annotations

import logging
import traceback

import pytest

from pgbg_orchestration import Job, Launcher, arun, errors
from pgbg_orchestration.outcome import WITHHELD
from tests.core.kit import Watched, effect, eventually, launching_process, slow, within

pytestmark = pytest.mark.any_surface

CANARY = "canary-4711"
UNIQUE = (
    "create temp table card (holder text constraint one_card primary key);"
    f" insert into card values ('{CANARY}'); insert into card values ('{CANARY}')"
)
DO = (
    f"do $$ begin raise exception 'no {CANARY}' using detail = '{CANARY}', hint = '{CANARY}', errcode = '22000'; end $$"
)
FAILING = [
    # The server's DETAIL, and its message, quote the value.
    pytest.param({"sql": UNIQUE}, "23505", id="unique"),
    pytest.param({"sql": "select %s::text::int", "parameters": [CANARY]}, "22P02", id="message"),
    pytest.param({"sql": DO}, "22000", id="raised"),
    pytest.param({"sql": DO, "kind": "supervised"}, "22000", id="supervised"),
    pytest.param({"sql": DO, "kind": "session"}, "22000", id="session"),
    pytest.param({"sql": f"select {CANARY!r}::int", "kind": "supervised"}, "22P02", id="described"),
    pytest.param({"sql": "select 1", "settings": {"work_mem": CANARY}}, "22023", id="launch refused"),
    pytest.param(
        {"sql": "select 1", "kind": "supervised", "settings": {"work_mem": CANARY}}, "22023", id="supervised settings"
    ),
]


def everything_kept(db: Watched) -> str:
    """All that the package's tables hold, as text."""
    tables = ("job", "past_attempt", "receipt", "series")
    return "".join(str(db.sql(f"select t::text from pgbg.{table} as t")) for table in tables)


@pytest.mark.parametrize(("fields", "sqlstate"), FAILING)
async def test_nothing_of_the_servers_text_is_kept(
    db: Watched, fields: dict[str, object], sqlstate: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with pytest.raises(errors.PgbgError) as caught:
        await within(arun(db.conninfo, Job(id="j", label="l", redact_details=True, **fields)))  # type: ignore[arg-type]
    error = caught.value
    assert error.sqlstate == sqlstate
    assert WITHHELD in str(error)
    shown = "".join(traceback.format_exception(error, chain=True)) + repr(error.__dict__)
    assert CANARY not in shown
    assert CANARY not in caplog.text
    assert CANARY not in everything_kept(db)
    if isinstance(error, errors.WorkerError):
        assert (error.fields.message, error.fields.detail, error.fields.hint, error.fields.context) == (
            WITHHELD, None, None, None,
        )  # fmt: skip


async def test_what_can_hold_no_data_is_kept(db: Watched) -> None:
    with pytest.raises(errors.WorkerError) as caught:
        await within(arun(db.conninfo, Job(UNIQUE, id="j", redact_details=True)))
    if caught.value.fields.constraint_name is not None:  # 1.9 does not tell it
        assert caught.value.fields.constraint_name == "one_card"
    assert db.sql("select state, sqlstate, message, detail from pgbg.jobs") == [("failed", "23505", WITHHELD, None)]


async def test_without_it_the_server_is_quoted(db: Watched) -> None:
    """Otherwise these tests would prove nothing."""
    for number, kind in enumerate(("receipt", "supervised")):
        with pytest.raises(errors.WorkerError, match=CANARY) as caught:
            await within(arun(db.conninfo, Job(DO, id=f"j{number}", kind=kind)))
        assert caught.value.fields.detail == CANARY
    assert everything_kept(db).count(CANARY) >= 2


async def test_who_is_attached_keeps_it_back_too(db: Watched) -> None:
    """Its own word counts: the launching process wrote the error down in full."""
    sql = f"{slow('j', 1.5)}; {DO}"
    async with launching_process(db.conninfo) as child:
        answer = child.run({"sql": sql, "id": "j"})
        await db.at_work("j")
        with pytest.raises(errors.WorkerError) as caught:
            await within(arun(db.conninfo, Job(sql, id="j", redact_details=True)))
        assert CANARY in str(await within(answer))
    assert CANARY not in str(caught.value)


@pytest.mark.servers("real", "embedded", "standin20")
async def test_a_supervisor_redacts_without_its_launching_process(db: Watched) -> None:
    """Its SQL writes the error down by itself."""
    sql = f"do $$ begin perform pg_sleep(0.5); raise exception '{CANARY}' using detail = '{CANARY}'; end $$"
    async with launching_process(db.conninfo, fault="while_running:kill") as child:
        child.run({"sql": sql, "id": "j", "kind": "supervised", "redact_details": True})
        await child.killed()
    await eventually(lambda: db.states().get("j") == "failed", "the supervisor told how it ended")
    assert db.sql("select sqlstate, message, detail, context from pgbg.job") == [("P0001", WITHHELD, None, None)]
    assert CANARY not in everything_kept(db)


async def test_a_verify_sql_that_fails_is_not_quoted(db: Watched, caplog: pytest.LogCaptureFixture) -> None:
    db.sql(
        "insert into pgbg.receipt (owner, job_digest, status, job_id, attempt)"
        " values ('pgbg_app', pgbg.digest('j'), 'launching', 'j', 1)"
    )
    job = Job(effect("j"), id="j", kind="supervised", verify_sql=f"select '{CANARY}'::int = 1", redact_details=True)
    async with Launcher(db.conninfo) as launcher:
        with pytest.raises(errors.OutcomeUnknown) as caught:
            await within(launcher.run(job))
    assert caught.value.sqlstate == "22P02"
    assert CANARY not in "".join(traceback.format_exception(caught.value)) + caplog.text
