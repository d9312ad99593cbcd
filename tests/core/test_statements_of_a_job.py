"""The statements of one job see each other's rows; what a job is given (settings, role, parameters) takes effect."""

from __future__ import annotations

from typing import Any

import pytest

from pgbg_orchestration import Job, arun, errors
from tests.core.kit import Watched, within


async def run(db: Watched, sql: str | list[str], job_id: str = "job", **fields: object) -> object:
    return await within(arun(db.conninfo, Job(sql, id=job_id, **fields)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("sql", "rows"),
    [
        (
            "insert into effects values ('a', 1); insert into effects select 'b', count(*) from effects",
            [("a", 1), ("b", 1)],
        ),
        ("insert into effects values ('a', 1); update effects set n = n + 1", [("a", 2)]),
        ("insert into effects values ('a', 1), ('b', 1); delete from effects where job = 'a'", [("b", 1)]),
        (
            (
                "insert into effects values ('a', 9); truncate effects; insert into effects values ('b', 5);"
                " insert into effects select 'c', count(*) from effects"
            ),
            [("b", 5), ("c", 1)],
        ),
        (["insert into effects values ('a', 1)", "update effects set n = 7 -- to the end"], [("a", 7)]),
    ],
    ids=["select", "update", "delete", "truncate", "list"],
)  # fmt: skip
async def test_statements_see_each_others_rows(db: Watched, sql: str | list[str], rows: list[tuple[str, int]]) -> None:
    await run(db, sql)
    assert db.sql("select job, n from effects order by job") == rows


@pytest.mark.parametrize("isolation", ["read committed", "repeatable read", "serializable"])
async def test_rows_are_seen_in_every_isolation_level(db: Watched, isolation: str) -> None:
    await run(
        db,
        "insert into effects values (current_setting('transaction_isolation'), 1); update effects set n = n + 1;"
        " insert into effects select 'count', count(*) from effects",
        isolation=isolation,
    )
    assert db.sql("select job, n from effects order by job <> 'count'") == [("count", 1), (isolation, 2)]


async def test_last_statement_gives_tag_and_count(db: Watched) -> None:
    sql = "create temp table t (i int); insert into effects select 'j', g from generate_series(1, 7) g"
    outcome = await within(arun(db.conninfo, Job(sql, id="j", label="seven")))
    assert (outcome.job_id, outcome.label, outcome.row_count, outcome.launched) == ("j", "seven", 7, True)
    assert outcome.command_tag is not None
    assert outcome.command_tag.startswith("INSERT")
    assert outcome.attempt == 1
    assert outcome.worker_pid == db.value("select max(pid) from effects")
    assert outcome.started_at is not None
    assert outcome.finished_at is not None
    assert outcome.started_at.tzinfo is not None
    assert outcome.started_at <= outcome.finished_at


@pytest.mark.servers("real", "embedded", "standin20")
async def test_label_is_seen_on_the_worker(db: Watched) -> None:
    await run(db, "insert into effects values (current_setting('application_name'))", label="nightly load")
    assert db.value("select job from effects").startswith("pg_background:nightly load")
    assert db.value("select label from pgbg.jobs") == "nightly load"


async def test_settings_role_isolation_and_parameters(db: Watched) -> None:
    db.sql("create table seen (name text, value text)")
    db.sql("grant insert on seen to pgbg_app")
    await run(
        db,
        "insert into seen select s, current_setting(s) from unnest(%(names)s::text[]) s;"
        " insert into seen values ('quote', %(quote)s), ('percent', '100 %%'), ('null', %(none)s)",
        settings={"work_mem": "77MB", "pgbg.custom": "it's", "search_path": "public, pg_catalog"},
        isolation="repeatable read",
        parameters={
            "names": ["work_mem", "pgbg.custom", "transaction_isolation", "search_path"],
            "quote": "'); drop table seen; -- %s \\' $$ \"",
            "none": None,
        },
    )
    assert dict(db.sql("select name, value from seen")) == {
        "work_mem": "77MB",
        "pgbg.custom": "it's",
        "transaction_isolation": "repeatable read",
        "search_path": "public, pg_catalog",
        "quote": "'); drop table seen; -- %s \\' $$ \"",
        "percent": "100 %",
        "null": None,
    }


async def test_settings_do_not_leak_into_the_next_job(db: Watched) -> None:
    await run(db, "insert into effects values (current_setting('work_mem'))", "a", settings={"work_mem": "77MB"})
    await run(db, "insert into effects values (current_setting('work_mem'))", "b")
    assert db.effects("77MB") == 1
    assert db.effects() == 2


# Before PostgreSQL 16 a login that inherits nothing has not even pgbackground_role.
@pytest.mark.parametrize("inherits", [True, pytest.param(False, marks=pytest.mark.since(postgres=16))])
async def test_role_with_and_without_inheritance(db: Watched, inherits: bool) -> None:
    role = f"pgbg_etl_{'i' if inherits else 'n'}"
    login = f"{role}_login"
    db.role(role, "nologin", [])
    db.role(login, "login inherit" if inherits else "login noinherit", [role])
    # pgbackground_role itself is inherited either way; what is tried is the role of the job.
    db.sql(f"grant pgbackground_role to {login}{'' if inherits else ' with inherit true'}")
    db.sql(f"grant insert, select on effects to {role}")
    job = Job("insert into effects values ('j', 1); update effects set n = n where false", id="j", role=role)
    try:
        db.sql(f"grant update on effects to {role}")
        outcome = await within(arun(db.database.conninfo_as(login), job))
        assert outcome.launched
        assert db.sql("select job, who from effects") == [("j", role)]
        assert db.value("select owner from pgbg.receipt") == login
    finally:
        db.sql(f"drop owned by {role}, {login}")
        db.sql(f"drop role {login}, {role}")


async def test_a_role_one_is_not_a_member_of(db: Watched) -> None:
    db.role("pgbg_stranger", "nologin", [])
    with pytest.raises((errors.InvalidJob, errors.NoPrivilege)) as caught:
        await run(db, "insert into effects values ('j', 1)", role="pgbg_stranger")
    assert caught.value.sqlstate == "42501"
    assert "pgbg_stranger" in str(caught.value)
    assert db.effects() == 0
    assert not db.receipts()


async def test_parameters_without_placeholders_and_placeholders_without_parameters(db: Watched) -> None:
    await run(db, "insert into effects values ('100 % %s %(x)s')")
    assert db.effects("100 % %s %(x)s") == 1
    with pytest.raises(errors.InvalidJob):
        await run(db, "select %s", "other", parameters=[1, 2])
    with pytest.raises(errors.InvalidJob):
        await run(db, "select %(a)s", "other", parameters={"b": 1})
    assert "other" not in db.states()


@pytest.mark.parametrize("empty", [{}, [], ()])
async def test_empty_parameters_are_none(db: Watched, empty: Any) -> None:
    """As for ``SQLExecuteQueryOperator``: a `%` of the SQL is itself, and `%%` is two of them."""
    await run(db, "insert into effects values ('100 % %% %s')", parameters=empty)

    assert db.effects("100 % %% %s") == 1


async def test_bound_values_cannot_split_the_text(db: Watched) -> None:
    """A value with a semicolon, a quote and a comment stays one value: the text is split after binding."""
    for number, value in enumerate(["a;b", "';--", "$$;$$", "/* ; ", "\\';", "E'\\'';"]):
        await run(db, "insert into effects values (%s, 1); select 1", f"job{number}", parameters=[value])
        assert db.effects(value) == 1
