"""How the server shows labels: the core's own word for it is the server's."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest

from pgbg_orchestration.labels import LabelPattern, make_label, shorten_label, shown, worker_name
from tests.conftest import Database
from tests.core.kit import eventually

LABELS = [
    "plain", "é à la mode", "tab\there", "nl\nline", "del\x7f", r"a\x41b", "quo'te", "%_", "😀 and more", "x" * 64,
    "é" * 32, "x" * 48 + "é", "…" + "z" * 61, "a: 12:3",
]  # fmt: skip


@pytest.fixture
def session(extension_database: Database) -> Iterator[psycopg.Connection]:
    """A session of a person's, who launches by hand."""
    with extension_database.connect() as connection:
        yield connection
        connection.execute(
            "select pg_cancel_backend(pid) from pg_stat_activity where query like 'select pg_sleep(60)%'"
        )


def _launch(session: psycopg.Connection, database: Database, label: str) -> int:
    call = f"select pid from {database.function('launch')}('select pg_sleep(60)', 65536, %s)"
    row = session.execute(call.encode(), [label]).fetchone()
    assert row is not None
    return int(row[0])


@pytest.mark.since(extension="1.10")
@pytest.mark.parametrize("label", LABELS)
async def test_a_worker_is_named_as_we_say(
    extension_database: Database, session: psycopg.Connection, label: str
) -> None:
    pid = _launch(session, extension_database, label)
    seen = "select application_name from pg_stat_activity where pid = %s and application_name like 'pg_background%%'"

    rows = await eventually(lambda: session.execute(seen, [pid]).fetchall(), "the worker")

    name = worker_name(label, pid, server_version=session.info.server_version)
    if extension_database.server.is_standin and session.info.server_version >= 180000:
        # Named by `set`, which cuts at 63 bytes and between characters before it escapes, and then again (18.6, 19).
        name = shown(f"pg_background:{label}:{pid}".encode()[:63].decode(errors="ignore"))[:63]
    assert rows == [(name,)]
    assert LabelPattern(label, server_version=session.info.server_version).fits(rows[0][0], pid)


@pytest.mark.majors
@pytest.mark.parametrize("label", LABELS)
def test_a_name_that_was_set_fits_too(session: psycopg.Connection, label: str) -> None:
    """On any server: 1.9 gives a worker no name, and ``set`` cuts no character in two."""
    session.execute("select set_config('application_name', %s, false)", [f"pg_background:{label}:4711"])
    row = session.execute("select application_name from pg_stat_activity where pid = pg_backend_pid()").fetchone()

    assert row is not None
    version = session.info.server_version
    assert worker_name(label, 4711, server_version=version).startswith(row[0])
    assert LabelPattern(label, server_version=version).fits(row[0], 4711)
    assert not LabelPattern(f"{label[:4]}!", server_version=version).fits(row[0], 4711)


@pytest.mark.since(extension="1.10")
async def test_shortened_labels_are_told_apart(extension_database: Database, session: psycopg.Connection) -> None:
    task = "une_tâche_avec_un_nom_très_long_qui_ne_finit_pas.étape"
    labels = [shorten_label(f"{task}[{number}]") for number in range(3)] + [make_label("billing", "prod", "req-4711")]
    for label in labels:
        _launch(session, extension_database, label)

    def look() -> list[str]:
        seen = "select application_name from pg_stat_activity where starts_with(application_name, 'pg_background:')"
        names = [name for (name,) in session.execute(seen).fetchall()]
        return names if len(names) == len(labels) else []

    names = await eventually(look, "all workers")
    for label in labels:
        begins = f"pg_background:{shown(label, server_version=session.info.server_version)}"
        assert len([name for name in names if name.startswith(begins)]) == 1
