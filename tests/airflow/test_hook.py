"""Airflow's connections as libpq connection strings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import MagicMock, patch

import psycopg
import pytest
from airflow.providers.postgres.hooks.postgres import PostgresHook
from airflow.sdk import Connection
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from airflow_provider.hook import PgBackgroundHook, conninfo_of
from pgbg_orchestration import Job
from pgbg_orchestration.errors import InvalidJob
from tests.conftest import Database

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


class Asked(NamedTuple):
    """A connection as users write it: its fields, or a URI."""

    fields: dict[str, Any]
    database: str | None = None

    @property
    def connection(self) -> Connection:
        if "uri" in self.fields:
            return Connection.from_uri(self.fields["uri"], conn_id="books")
        extra = self.fields.get("extra", {})
        return connection(**{**self.fields, "extra": extra if isinstance(extra, str) else json.dumps(extra)})


TABLE = {
    "nothing": Asked({}),
    "all fields": Asked({"host": "db", "port": 6432, "login": "airflow", "password": "p w'\\", "schema": "books"}),
    "empty fields": Asked({"host": "", "login": "", "password": "", "schema": ""}),
    "another database": Asked({"host": "db", "schema": "books"}, database="archive"),
    "extras win": Asked(
        {
            "host": "db", "port": 1, "login": "a", "password": "secret-of-field", "schema": "b",
            "extra": {
                "host": "other", "port": 2, "user": "c", "password": "secret-of-extra", "dbname": "d",
                "hostaddr": "10.0.0.1",
            },
        },
        database="archive",
    ),
    "extras that are empty or none": Asked({"host": "db", "extra": {"host": "", "sslmode": None, "options": ""}}),
    "numbers and truths": Asked({"extra": {"connect_timeout": 5, "keepalives": True, "keepalives_idle": 30.0}}),
    "options with blanks": Asked({"extra": {"options": r"-c search_path=a\ b,c -c work_mem='64MB'"}}),
    "what the hook keeps": Asked(
        {
            "extra": {
                "cursor": "dictcursor", "aws_conn_id": "aws", "iam": False, "redshift": False,
                "cluster-identifier": "x", "workgroup-name": "y", "sqlalchemy_scheme": "postgresql",
                "sqlalchemy_query": {"a": "b"},
                "azure_conn_id": "azure", "redshift-serverless": False, "sslmode": "require",
            }
        }
    ),
    "its driver's own": Asked({"extra": {"autocommit": True, "prepare_threshold": 0, "application_name": "me"}}),
    "a connection string": Asked({"extra": {"conninfo": "service=books host=db", "port": 7}}),
    "service": Asked({"extra": {"service": "books"}}),
    "several hosts": Asked({"host": "one,two", "extra": {"port": "5432,5433", "target_session_attrs": "read-write"}}),
    "socket": Asked({"host": "/run/postgresql", "login": "me"}),
    "ssl": Asked({"extra": {"sslmode": "verify-full", "sslrootcert": "/etc/a b.pem", "sslcert": "c"}}),
    "uri": Asked({"uri": "postgres://air%40flow:p%2Fw%40d%25@db:6432/books?sslmode=require&options=-c%20a%3Db"}),
    "uri of several hosts": Asked({"uri": "postgresql://me@one,two:5433/books"}),
    "uri without anything": Asked({"uri": "postgres://"}),
    "uri with its extra as JSON": Asked({"uri": "postgres://me@db/books?__extra__=%7B%22connect_timeout%22%3A+3%7D"}),
    "v6": Asked({"host": "::1", "port": 5433}),
}  # fmt: skip


def by_the_hook(asked: Asked) -> dict[str, Any]:
    """The parameters that reach libpq when PostgresHook itself connects."""
    found: dict[str, Any] = {}

    def connect(
        conninfo: str = "", *, autocommit: Any = 0, prepare_threshold: Any = 0, context: Any = None,
        row_factory: Any = None, cursor_factory: Any = None, **parameters: Any,
    ) -> MagicMock:  # fmt: skip
        found.update(conninfo_to_dict(make_conninfo(conninfo, **parameters)))  # as libpq reads them
        return MagicMock()

    with (
        patch("psycopg.connection.Connection.connect", connect),
        patch("airflow.providers.postgres.hooks.postgres.register_default_adapters"),
        patch.object(PostgresHook, "get_connection", return_value=asked.connection),
    ):
        PostgresHook(postgres_conn_id="books", database=asked.database).get_conn()
    return found


@pytest.mark.parametrize("name", TABLE)
def test_a_connection_means_what_it_means_to_postgres_hook(name: str) -> None:
    asked = TABLE[name]

    assert conninfo_to_dict(conninfo_of(asked.connection, database=asked.database)) == by_the_hook(asked)


def test_a_token_goes_where_the_hooks_goes() -> None:
    """An extra wins over it, there as here; the connection itself is not changed."""
    asked = Asked({"host": "db", "login": "a", "password": "old", "extra": {"iam": True, "user": "extra"}})
    with patch.object(PostgresHook, "get_iam_token", return_value=("iam", "token", 5433)):
        expected = by_the_hook(asked)
        given = asked.connection
        found = conninfo_to_dict(conninfo_of(given))

    assert found == expected
    assert (found["user"], found["password"], found["port"]) == ("extra", "token", "5433")
    assert given.password == "old"


def test_a_check_asks_for_no_token() -> None:
    asked = Asked({"host": "db", "login": "a", "password": "old", "extra": {"iam": True}})
    with (
        patch.object(PostgresHook, "get_iam_token", side_effect=AssertionError),
        patch.object(PgBackgroundHook, "get_connection", return_value=asked.connection),
    ):
        PgBackgroundHook("books").check()


@pytest.mark.servers("real", "embedded")
def test_rows_as_they_come(database: Database) -> None:
    there = conninfo_to_dict(database.conninfo)
    given = connection(login=there.pop("user"), schema=there.pop("dbname"), extra=json.dumps(there))
    with (
        patch.object(PgBackgroundHook, "get_connection", return_value=given),
        PgBackgroundHook("books").stream(Job("select g, g / 2.0 from generate_series(1, 2500) as g")) as rows,
    ):
        read = list(rows)
    with psycopg.connect(database.conninfo) as conn:
        assert read == conn.execute("select g, g / 2.0 from generate_series(1, 2500) as g").fetchall()
    assert rows.outcome is not None
    assert (rows.outcome.row_count, rows.outcome.proof) == (2500, "receipt")


@pytest.mark.servers("real", "embedded")
class TestByConnecting:
    """The same server, database, login and settings answer to both."""

    WHO = "select current_database(), session_user::text, current_setting('work_mem'), current_setting('search_path')"

    def both(self, asked: Asked) -> tuple[Any, Any]:
        with patch.object(PostgresHook, "get_connection", return_value=asked.connection):
            theirs = PostgresHook(postgres_conn_id="books", database=asked.database).get_conn()
        with psycopg.connect(conninfo_of(asked.connection, database=asked.database)) as ours:
            mine = ours.execute(self.WHO).fetchone()
        cursor = theirs.cursor()
        cursor.execute(self.WHO)
        found = cursor.fetchone()
        theirs.close()
        return mine, found

    def test_extras_lead_elsewhere(self, database: Database) -> None:
        there = conninfo_to_dict(database.conninfo)
        fields = {"host": "no.such.host.invalid", "port": 1, "login": "nobody", "schema": "postgres"}
        extra = {**there, "options": r'-c work_mem=7MB -c search_path="a\ b"'}
        mine, theirs = self.both(Asked({**fields, "extra": extra}))

        assert mine == theirs == (there["dbname"], there["user"], "7MB", '"a b"')

    def test_a_service_of_a_file(self, database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        there = conninfo_to_dict(database.conninfo)
        file = tmp_path / "services"
        file.write_text("[books]\n" + "".join(f"{name}={value}\n" for name, value in there.items()))
        monkeypatch.setenv("PGSERVICEFILE", str(file))
        mine, theirs = self.both(Asked({"extra": {"service": "books"}}))

        assert mine == theirs
        assert mine[:2] == (there["dbname"], there["user"])

    def test_the_second_of_two_hosts(self, database: Database, tmp_path: Path) -> None:
        there = conninfo_to_dict(database.conninfo)
        asked = Asked(
            {
                "host": f"{tmp_path},{there['host']}",
                "login": there["user"],
                "schema": there["dbname"],
                "extra": {"port": f"1,{there.get('port', 5432)}"},
            }
        )
        mine, theirs = self.both(asked)

        assert mine == theirs
        assert mine[:2] == (there["dbname"], there["user"])
