"""``SET`` in a job's text: what is applied at the launch, what is refused, what is left to the worker."""

from __future__ import annotations

import pytest

from pgbg_orchestration import Job, statements
from pgbg_orchestration.errors import InvalidJob
from pgbg_orchestration.postgres.durations import milliseconds

PG_DUMP = """
SET statement_timeout = 0;
SET lock_timeout = 0;
SET idle_in_transaction_session_timeout = 0;
SET transaction_timeout = 0;
SET client_encoding = 'UTF8';
SET standard_conforming_strings = on;
SELECT pg_catalog.set_config('search_path', '', false);
SET check_function_bodies = false;
SET xmloption = content;
SET client_min_messages = warning;
SET row_security = off;
SET default_tablespace = '';
create table public.a (i int);
insert into public.a values (1);
"""


@pytest.mark.parametrize(
    ("sql", "applied"),
    [
        ("set statement_timeout = '5s'; insert into t select 1", {"statement_timeout": "5s"}),
        ("set local statement_timeout to 5; insert into t select 1; reset all", {"statement_timeout": "5"}),
        ('set session "Statement_Timeout" = $$5s$$; select 1', {"statement_timeout": "5s"}),
        ("set statement_timeout = 0; select 1; select 2", {"statement_timeout": "0"}),
        ("set statement_timeout to '0 min'; select 1; select 2", {"statement_timeout": "0 min"}),
        ("select set_config('statement_timeout', '1min', false); select 1", {"statement_timeout": "1min"}),
        ("set statement_timeout = 5; reset statement_timeout; select 1; select 2", {}),
        ("set statement_timeout = default; select 1; select 2", {}),
        ("set statement_timeout = 5", {}),
        ("set default_transaction_read_only = off; select 1", {"default_transaction_read_only": "off"}),
        ("set transaction read only; select 1", {}),
        ("set role r; set time zone 'UTC'; set search_path to a, b; select 1", {}),
        ("create function f() returns int set statement_timeout = 5 language sql as 'select 1'", {}),
        (PG_DUMP, {"statement_timeout": "0"}),
    ],
)
def test_what_is_applied_at_the_launch(sql: str, applied: dict[str, str]) -> None:
    job = Job(sql)
    assert statements.applied(job.split()) == applied


@pytest.mark.parametrize(
    ("sql", "setting", "instead"),
    [
        ("set statement_timeout = 5; select 1; select 2", "statement_timeout", "timeout"),
        ("select 1; set statement_timeout = 0; select 2", "statement_timeout", "timeout"),
        ("select 1; set local statement_timeout = '3s'; select 2", "statement_timeout", "timeout"),
        ("select set_config('statement_timeout', '5', true), 1; select 2", "statement_timeout", "timeout"),
        ("set pg_background.worker_timeout = 5; select 1", "pg_background.worker_timeout", "timeout"),
        ("set standard_conforming_strings = off; select 'a\\tb'", "standard_conforming_strings", "E'…'"),
        ("set backslash_quote = off; select 1", "backslash_quote", "settings"),
        ("set client_encoding = 'LATIN1'; select 1", "client_encoding", "UTF-8"),
        ("set names 'latin1'; select 1", "client_encoding", "UTF-8"),
        ("with a as (select 1) select set_config('client_encoding', 'latin1', false) from a", "client_encoding", "UTF"),
        ("set default_transaction_read_only = on; select 1", "default_transaction_read_only", "READ ONLY"),
        ("set session characteristics as transaction read only", "default_transaction_read_only", "READ ONLY"),
        (
            "set session characteristics as transaction isolation level serializable",
            "default_transaction_isolation",
            "isolation",
        ),
        ("set default_transaction_isolation to serializable", "default_transaction_isolation", "isolation"),
        ("set default_transaction_deferrable = on", "default_transaction_deferrable", "single one"),
    ],
)
def test_what_is_refused_with_the_way_to_do_it(sql: str, setting: str, instead: str) -> None:
    with pytest.raises(InvalidJob) as caught:
        Job(sql)
    told = str(caught.value)
    assert f"sets {setting}, which has no effect in the text of a worker: " in told
    assert instead in told


def test_what_runs_alone_is_told_where_its_settings_go() -> None:
    with pytest.raises(InvalidJob, match="a job of its own, with what is set here as its settings"):
        Job("set maintenance_work_mem = '1GB'; vacuum t")


@pytest.mark.parametrize(
    ("text", "expected"),
    [("300", 300), ("300ms", 300), ("1.5 min", 90_000), ("2h", 7_200_000), ("500us", 0.5), ("0", 0), ("soon", None)],
)
def test_milliseconds(text: str, expected: float | None) -> None:
    assert milliseconds(text) == expected
