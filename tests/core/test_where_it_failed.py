"""An error tells which statement of the job it came from, and where; a parameter's value never shows."""

from __future__ import annotations

import secrets
from typing import Any

import pytest

from pgbg_orchestration import ErrorFields, Job, Launcher, arun, errors
from pgbg_orchestration.outcome import EventKind
from tests.core.kit import Recorder, Watched, effect, within

real = pytest.mark.servers("real", "embedded")  # the stand-in hands on neither positions nor what SQL raises


async def failure(db: Watched, sql: str, **options: Any) -> ErrorFields:
    with pytest.raises(errors.WorkerError) as caught:
        await within(arun(db.conninfo, Job(sql, id=secrets.token_hex(8), **options)))
    told = caught.value
    again = errors.PgbgError.from_dict(told.to_dict())
    assert isinstance(again, errors.WorkerError)
    assert again.fields == told.fields
    assert all(line in str(told) for line in told.fields.place())
    return told.fields


@real
@pytest.mark.parametrize("fetch", [None, True])
@pytest.mark.parametrize(
    ("sql", "place"),
    [
        ("select 1; select 1/0; select 3", ["STATEMENT 2 of 3: select 1/0"]),
        ("select 1/0; select 2", ["STATEMENT 1 of 2: select 1/0"]),
        (
            "select 'ü'; select 'ü',\n\t🐘, nope\nfrom pg_class as 🐘; select 3",
            ["STATEMENT 2 of 3: select 'ü',", "LINE 2:  🐘, nope", "             ^"],
        ),
        ("select 1; selec 2", ["STATEMENT 2 of 2: selec 2", "LINE 1: selec 2", "        ^"]),
        ("insert into nope values (1)", [
            "STATEMENT: insert into nope values (1)", "LINE 1: insert into nope values (1)", "                    ^",
        ]),
        ("with a as (select nope) insert into effects (job) select 'x' from a returning job",
         ["STATEMENT: with a as (select nope) insert into effects (job) select 'x' from a returning j…",
          "LINE 1: with a as (select nope) insert into effects (job) select 'x'...",
          "                          ^"]),
        ("set local role none; reset all; discard plans; do 'begin perform 1/0; end'; select 5",
         ["STATEMENT 4 of 5: do 'begin perform 1/0; end'"]),
    ],
)  # fmt: skip
async def test_the_statement_and_the_place(db: Watched, sql: str, place: list[str], fetch: bool | None) -> None:
    fields = await failure(db, sql, fetch=fetch)
    assert fields.place() == place


@real
async def test_a_role_without_privileges_hides_nothing(db: Watched) -> None:
    db.role("pgbg_bare", "nologin", [])
    db.sql(f"grant pgbg_bare to {db.value('select %s', 'pgbg_app')}")
    fields = await failure(db, "select 1; set local role pgbg_bare; select 3; select 1/0; select 5")
    assert fields.statement == "4 of 5"


@real
@pytest.mark.parametrize("parameters", [{"secret": "pa;ss'\\word", "n": 1}, ["pa;ss'\\word", 1, "pa;ss'\\word"]])
async def test_a_parameter_never_shows(db: Watched, parameters: Any) -> None:
    names = ("%(secret)s", "%(n)s", "%(secret)s") if isinstance(parameters, dict) else ("%s", "%s", "%s")
    sql = "select {}, {}; select '100 %%', {}, nope".format(*names)

    fields = await failure(db, sql, parameters=parameters)

    # As the text has it: what psycopg takes for a per cent sign is one.
    shown = f"select '100 %', {names[2]}, nope"
    assert fields.place() == [
        f"STATEMENT 2 of 2: {shown}", f"LINE 1: {shown}", " " * len(f"LINE 1: {shown[:-4]}") + "^",
    ]  # fmt: skip
    assert "pa;ss" not in str(fields)


async def test_an_error_at_the_commit_is_of_no_statement(db: Watched) -> None:
    db.sql("create table once (n int unique deferrable initially deferred)")
    db.sql("grant insert on once to pgbg_app")
    fields = await failure(db, "select 1; insert into once values (1), (1)")
    at_commit = None if db.server.is_standin else "the commit"
    assert (fields.sqlstate, fields.statement) == ("23505", at_commit)


@real
@pytest.mark.parametrize("kind", ["receipt", "supervised"])
async def test_nor_is_one_of_a_deferred_trigger_which_has_a_context(db: Watched, kind: str) -> None:
    db.sql("create function refuse() returns trigger language plpgsql as $$ begin raise 'not at all'; end $$")
    db.sql("create constraint trigger at_end after insert on effects deferrable initially deferred"
           " for each row execute function refuse()")  # fmt: skip
    sql = f"select 1; {effect('a')}"
    fields = await failure(db, sql, kind=kind)
    assert "refuse() line 1" in (fields.context or "")
    if kind == "supervised":  # its supervisor knows no more than that it was none of them
        assert fields.place() == []
    else:
        assert fields.place() == ["AT THE COMMIT, behind the last statement"]
    early = await failure(db, f"select 1; {effect('a')}; set constraints all immediate; select 4", kind=kind)
    assert early.statement == "3 of 4"


@real
async def test_several_supervised_statements(db: Watched) -> None:
    fields = await failure(db, "select 1; select\n  1/0; select 3", kind="supervised")
    assert fields.place() == ["STATEMENT 2 of 3: select"]
    assert "statement 2" not in (fields.context or "")
    # Its supervisor can tell no position: PL/pgSQL does not have that of an error that it catches.
    fields = await failure(db, "select 1; select nope; select 3", kind="supervised")
    assert fields.place() == ["STATEMENT 2 of 3: select nope"]


@real
async def test_more_statements_than_the_queue_has_room_for(db: Watched) -> None:
    parts = [f"select {n}" for n in range(300)]
    parts[249] = "select 1/0"
    fields = await failure(db, ";".join(parts))
    assert fields.place() == ["STATEMENT 250 of 300: select 1/0"]


@real
async def test_the_place_inside_of_a_function(db: Watched) -> None:
    db.sql("create function f() returns int language plpgsql as $$begin\n  return (select nope from pg_class); end$$")
    fields = await failure(db, "select 1; select f(); select 3")
    assert fields.place() == [
        "STATEMENT 2 of 3: select f()", "LINE 1: (select nope from pg_class)", "                ^",
        "QUERY: (select nope from pg_class)",
    ]  # fmt: skip
    sql = "do $do$ begin execute 'selec ' || %s; end $do$"
    fields = await failure(db, sql, parameters=["secret"])
    assert fields.place() == [f"STATEMENT: {sql}"]


@real
async def test_a_job_nobody_waits_for_tells_its_statement(db: Watched) -> None:
    job = Job("select 1; select 1/0; select 3", id="watched")
    with pytest.raises(errors.WorkerError) as caught:
        await within(arun(db.conninfo, job, supervisor=True))
    assert caught.value.fields.place() == ["STATEMENT 2 of 3: select 1/0"]


@real
async def test_which_one_is_at_work_is_told_while_it_is(db: Watched) -> None:
    seen = Recorder()
    sql = "select 1; select pg_sleep(3); select pg_sleep(3)"
    await within(arun(db.conninfo, Job(sql, id="j"), observer=seen))
    told = [e for e in seen.events if e.kind is EventKind.PROGRESS]
    assert [e.message for e in told][-2:] == ["statement 2 of 3", "statement 3 of 3"]
    assert (told[-1].data["statement"], told[-1].data["of"]) == (3, 3)


@real
async def test_what_the_sql_itself_reports_stays(db: Watched) -> None:
    name = "pg_background_report_progress" if db.server.surface == "2.0" else "pg_background_progress"
    seen = Recorder()
    await within(arun(db.conninfo, Job(f"select {name}(40, 'loading'); select pg_sleep(3)", id="j"), observer=seen))
    assert [e.message for e in seen.events if e.kind is EventKind.PROGRESS] == ["40 % loading"]


async def test_what_is_withheld_shows_no_sql(db: Watched) -> None:
    fields = await failure(db, "select 1; select 'a datum'::int", redact_details=True)
    assert (fields.first_line, fields.pointer) == (None, None)
    assert fields.statement in (("2 of 2",) if not db.server.is_standin else (None,))


@pytest.mark.parametrize("kind", ["receipt", "session", "supervised"])
async def test_a_job_of_one_statement(db: Watched, kind: str) -> None:
    fields = await failure(db, "do $$ begin\n  perform 1/0;\nend $$", kind=kind)
    assert fields.place() == ["STATEMENT: do $$ begin"]


@real
async def test_whoever_reads_the_history_sees_the_place(db: Watched) -> None:
    await failure(db, f"{effect('a')}; select 1/0")
    async with Launcher(db.conninfo) as launcher:
        (job,) = await launcher.ledger.jobs()
    assert "STATEMENT 2 of 2: select 1/0" in (job.context or "")


@real
async def test_which_one_is_at_work_is_told_where_notices_are_heard(db: Watched) -> None:
    seen = Recorder()
    job = Job("select 1; do $$ begin raise notice 'mine'; end $$; select 3", id="j")
    await within(arun(db.conninfo, job, observer=seen, notices=True))
    told = [e.message for e in seen.events if e.kind in (EventKind.PROGRESS, EventKind.NOTICE)]
    assert told == ["statement 1 of 3", "statement 2 of 3", "NOTICE: mine", "statement 3 of 3"]


async def test_many_statements_are_run_as_before(db: Watched) -> None:
    parts = [f"insert into effects (job) select 'x' where {n} = (select count(*) from effects)" for n in range(300)]
    outcome = await within(arun(db.conninfo, Job(parts, id="many")))
    assert (outcome.row_count, db.effects("x")) == (1, 300)
