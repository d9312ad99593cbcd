"""Airflow's connections as libpq connection strings."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
from airflow.providers.postgres.hooks.postgres import PostgresHook
from airflow.sdk import Connection
from psycopg.conninfo import conninfo_to_dict

from airflow_provider.hook import conninfo_of
from pgbg_orchestration.errors import InvalidJob

pytestmark = pytest.mark.airflow


def connection(**fields: Any) -> Connection:
    return Connection(**{"conn_id": "books", "conn_type": "postgres", **fields})


def test_all_fields_are_taken() -> None:
    given = connection(host="db", port=6432, login="airflow", password="p w'\\", schema="books")

    assert conninfo_to_dict(conninfo_of(given)) == {
        "host": "db",
        "port": "6432",
        "user": "airflow",
        "password": "p w'\\",
        "dbname": "books",
    }


def test_extras_are_libpq_options_less_those_of_postgres_hook() -> None:
    extra = '{"sslmode": "require", "keepalives": true, "cursor": "dictcursor", "aws_conn_id": "aws", "iam": false}'

    assert conninfo_to_dict(conninfo_of(connection(extra=extra))) == {"sslmode": "require", "keepalives": "True"}


def test_an_extra_that_libpq_does_not_know_is_named() -> None:
    with pytest.raises(InvalidJob, match="no_such_option"):
        conninfo_of(connection(password="secret", extra='{"no_such_option": "1"}'))


def test_another_type_of_connection_is_refused() -> None:
    with pytest.raises(InvalidJob, match="mysql"):
        conninfo_of(connection(conn_type="mysql"))


def test_a_token_is_asked_of_postgres_hook() -> None:
    given = connection(host="db", login="airflow", password="old", extra='{"iam": true}')

    with patch.object(PostgresHook, "get_iam_token", return_value=("iam_user", "token", 5433)) as asked:
        found = conninfo_to_dict(conninfo_of(given))

    assert asked.call_count == 1
    assert (found["user"], found["password"], found["port"]) == ("iam_user", "token", "5433")
    assert given.password == "old"


@pytest.mark.parametrize(
    ("endpoint", "expected"),
    [
        ("db.internal:5432", {"host": "db.internal", "port": "5432"}),
        ("db.internal", {"host": "db.internal", "port": "6432"}),
        ("[::1]:5433", {"host": "::1", "port": "5433"}),
        ("/run/postgresql", {"host": "/run/postgresql", "port": "6432"}),
    ],
)
@pytest.mark.parametrize("as_extra", [True, False])
def test_jobs_can_go_past_a_pooler(endpoint: str, expected: dict[str, str], as_extra: bool) -> None:
    extra = f'{{"pg_background_endpoint": "{endpoint}", "hostaddr": "10.0.0.1"}}' if as_extra else "{}"
    given = connection(host="pooler", port=6432, extra=extra)

    assert conninfo_to_dict(conninfo_of(given, endpoint=None if as_extra else endpoint)) == expected


def test_the_database_of_the_operator_wins() -> None:
    assert conninfo_of(connection(schema="books"), database="archive") == "dbname=archive"
