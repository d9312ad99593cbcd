"""Input that cannot be used is refused before anything is launched, or gives the right result."""

from __future__ import annotations

import traceback
from datetime import datetime
from typing import Any

import pytest

from pgbg_orchestration import Job, arun, errors, run
from tests.core.kit import Watched, effect, within

pytestmark = pytest.mark.any_surface


@pytest.mark.parametrize(
    "fields",
    [
        {"sql": ""},
        {"sql": "   \n\t"},
        {"sql": ";;"},
        {"sql": "-- only a comment"},
        {"sql": "/* only /* a nested */ comment */"},
        {"sql": []},
        {"sql": ["", " ; ", "-- a comment"]},
        {"sql": ["select 1", None]},
        {"sql": "begin; select 1; commit"},
        {"sql": "select 1; commit"},
        {"sql": "start transaction; select 1"},
        {"sql": "select 1; rollback"},
        {"sql": "savepoint s; select 1"},
        {"sql": "select 1; /* c */ END"},
        {"sql": "vacuum effects; select 1"},
        {"sql": "insert into effects values ('j'); vacuum effects"},
        {"sql": "create index concurrently i on effects (job); select 1"},
        {"sql": "vacuum effects", "kind": "receipt"},
        {"sql": "create database x", "kind": "receipt"},
        {"sql": "copy effects from stdin"},
        {"sql": "select 1; listen x"},
        {"sql": "copy effects to stdout"},
        {"sql": "select 'not ended"},
        {"sql": "select $a$ not ended $b$"},
        {"sql": 'select "not ended'},
        {"sql": "select /* not ended"},
        {"sql": "select 1; select 2", "kind": "session"},
        {"sql": "select '\0'"},
        {"sql": "select 1", "id": "a\0b"},
        {"sql": "select 1", "label": "a\0b"},
        {"sql": "select 1", "id": ""},
        {"sql": "select 1", "id": "\ud800"},
        {"sql": "select 1", "label": "x" * 65},
        {"sql": "select 1", "label": "é" * 40},
        {"sql": "select 1", "kind": "other"},
        {"sql": "select 1", "isolation": "read"},
        {"sql": "select 1", "isolation": "serializable; drop table effects"},
        {"sql": "select 1", "timeout": 0},
        {"sql": "select 1", "timeout": -1},
        {"sql": "select 1", "timeout": float("nan")},
        {"sql": "select 1", "timeout": float("inf")},
        {"sql": "select 1", "timeout": "5"},
        {"sql": "select 1", "queue_size": 1},
        {"sql": "select 1", "queue_size": 2**30},
        {"sql": "select 1", "queue_size": 65536.5},
        {"sql": "select 1", "generation": 1},
        {"sql": "select 1", "series": "s"},
        {"sql": "select 1", "series": "s", "generation": -1},
        {"sql": "select 1", "series": "s", "generation": 2**63},
        {"sql": "select 1", "series": "s", "generation": True},
        {"sql": "select %s", "parameters": "text"},
        {"sql": "select 1", "settings": {"work_mem; drop table effects": "1"}},
        {"sql": "select 1", "settings": {"role": "postgres"}},
        {"sql": "select 1", "settings": {"work_mem": "1\0"}},
        {"sql": "select 1", "settings": {"work_mem": None}},
        {"sql": "select 1", "settings": [("work_mem", "1MB")]},
        {"sql": 7},
        {"sql": "select 1", "id": 7},
    ],
    ids=repr,
)
def test_refused_when_it_is_made(fields: dict[str, object]) -> None:
    with pytest.raises(errors.InvalidJob) as caught:
        Job(**fields)  # type: ignore[arg-type]
    assert isinstance(caught.value, ValueError)
    assert "Nothing was launched" in str(caught.value)
    assert len(str(caught.value)) > len("Nothing was launched.") + 8


@pytest.mark.parametrize(
    "option",
    [
        {"on_cancel": "stop"},
        {"on_superseded": "ignore"},
        {"slot_timeout": 0},
        {"slot_timeout": "5"},
        {"poll_interval": 0},
        {"poll_interval": "often"},
        {"deadline": "tomorrow"},
        {"deadline": datetime(2030, 1, 1)},  # noqa: DTZ001
        {"observer": "print"},
    ],
    ids=repr,
)
def test_options_are_refused_before_anything_is_asked(option: dict[str, Any]) -> None:
    with pytest.raises(errors.InvalidJob, match=next(iter(option))) as caught:
        run("host=nowhere.invalid", Job("select 1"), **option)
    assert "Nothing was launched" in str(caught.value)


def test_a_connection_string_that_cannot_be_read() -> None:
    """What libpq says of it quotes it, and a password may be in it."""
    for conninfo in ("password=secret; host", "no_such_option=secret", "postgresql://me:sec ret@host/db"):
        with pytest.raises(errors.InvalidJob) as caught:
            run(conninfo, Job("select 1"))
        assert "sec" not in "".join(traceback.format_exception(caught.value)).replace(__file__, "")


def test_refusal_names_the_statement() -> None:
    with pytest.raises(errors.InvalidJob, match=r"(?i)vacuum"):
        Job("select 1; vacuum (analyze) effects; select 2")
    with pytest.raises(errors.InvalidJob, match=r"(?i)commit"):
        Job(["select 1", "commit and chain"])


def test_a_job_is_immutable() -> None:
    settings = {"work_mem": "1MB"}
    parameters = [1]
    job = Job("select %s", id="j", settings=settings, parameters=parameters)
    settings["work_mem"] = "2MB"
    parameters.append(2)
    assert dict(job.settings or {}) == {"work_mem": "1MB"}
    assert list(job.parameters or ()) == [1]
    with pytest.raises(AttributeError):
        job.sql = "select 2"  # type: ignore[misc]
    with pytest.raises(TypeError):
        job.settings["work_mem"] = "3MB"  # type: ignore[index]


def test_default_ids_are_fresh_and_series_ids_stable() -> None:
    assert Job("select 1").id != Job("select 1").id
    assert Job("select 1", series="s", generation=3).id == Job("select 2", series="s", generation=3).id == "s#3"


@pytest.mark.servers("real", "embedded")
async def test_a_setting_that_the_login_may_not_change(db: Watched) -> None:
    with pytest.raises(errors.NoPrivilege, match="GRANT SET ON PARAMETER") as caught:
        await within(arun(db.conninfo, Job("select 1", id="j", settings={"log_statement": "all"})))
    assert "log_statement" in str(caught.value)
    assert "pgbackground_role" not in str(caught.value)


async def test_refused_by_the_server_before_launch(db: Watched) -> None:
    """What only the server knows: nothing is registered, launched or left."""
    for job in (
        Job("select 1", id="j", settings={"no_such_setting": "1"}),
        Job("select 1", id="j", settings={"work_mem": "a lot"}),
        Job("select 1", id="j", role="no_such_role"),
        Job("select 1", id="j", owner="no_such_role"),
        Job("select %s", id="j", parameters=["a\0b"]),
        Job("select %s", id="j", parameters=[object()]),
    ):
        with pytest.raises(errors.PgbgError) as caught:
            await within(arun(db.conninfo, job))
        assert not isinstance(caught.value, errors.ServerUnreachable | errors.OutcomeUnknown), caught.value
        assert not db.receipts()
        assert "running" not in db.states().values()
        # Whatever was wrong is wrong no longer: the same id is good for the corrected job.
        db.sql("delete from pgbg.job")


@pytest.mark.parametrize(
    "job_id",
    ["x" * 10_000, "é" * 5_000, 'it\'s; "a" \\ $$ %s %(x)s {}', "a\nb\tc", " a", "-- c", "😀", "a#1"],
    ids=lambda text: text[:10],
)
async def test_any_text_is_an_id(db: Watched, job_id: str) -> None:
    outcome = await within(arun(db.conninfo, Job(effect("j"), id=job_id)))
    assert (outcome.job_id, outcome.launched) == (job_id, True)
    assert len(outcome.label.encode()) <= 64
    assert (await within(arun(db.conninfo, Job(effect("j"), id=job_id)))).launched is False
    assert db.effects() == 1
    assert db.receipts() == {job_id}


async def test_long_ids_that_differ_at_their_end_are_different(db: Watched) -> None:
    for end in "ab":
        await within(arun(db.conninfo, Job(effect(end), id="x" * 10_000 + end)))
    assert db.effects_by_job() == {"a": 1, "b": 1}


@pytest.mark.parametrize("label", ["x" * 64, "é" * 32, "a%sb", "it's", "x"])
async def test_labels(db: Watched, label: str) -> None:
    outcome = await within(arun(db.conninfo, Job(effect("j"), id="j", label=label)))
    assert outcome.label == label
    assert db.value("select label from pgbg.jobs") == label


@pytest.mark.servers("real", "embedded", "standin19")
async def test_sql_of_20_mb(db: Watched) -> None:
    text = "x" * 20_000_000
    outcome = await within(arun(db.conninfo, Job(f"insert into effects select 'j', length('{text}')", id="j")))
    assert outcome.launched
    assert db.sql("select job, n from effects") == [("j", 20_000_000)]


@pytest.mark.servers("real", "embedded")
async def test_parameters_of_20_mb(db: Watched) -> None:
    job = Job("insert into effects select 'j', length(%s)", id="j", parameters=["'\\" * 10_000_000])
    await within(arun(db.conninfo, job))
    assert db.sql("select job, n from effects") == [("j", 20_000_000)]


@pytest.mark.parametrize(
    "sql",
    [
        "insert into effects values ('C:\\'); insert into effects values ('b;--\\')",
        "insert into effects values (e'\\';'); insert into effects values ($$;$$)",
        "/* a; /* b; */ ; */ insert into effects values ('a'); insert into effects values ('b') -- ;",
        (
            "insert into effects values ($q$;$$;$q$);"
            " insert into effects select \"begin\".x from (select ';'::text x) \"begin\" ;"
        ),
        (
            "create function pg_temp.f() returns void language sql begin atomic insert into effects values ('a');"
            " insert into effects values ('b'); end; select pg_temp.f()"
        ),
        (
            "with begin as (select 'a'::text as commit) insert into effects select commit from begin;"
            " insert into effects values ('b')"
        ),
    ],
)  # fmt: skip
async def test_statements_are_split_as_postgresql_does(db: Watched, sql: str) -> None:
    await within(arun(db.conninfo, Job(sql, id="j")))
    assert db.effects() == 2


async def test_a_syntax_error_is_the_servers_to_tell(db: Watched) -> None:
    with pytest.raises(errors.WorkerError) as caught:
        await within(arun(db.conninfo, Job(f"{effect('j')}; selekt 1", id="j")))
    assert caught.value.sqlstate == "42601"
    assert db.effects() == 0
