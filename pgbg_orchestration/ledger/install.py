"""The package's own schema: installing, upgrading and removing it.

What a version changes of the tables is one file, ``sql/tables_NNNN.sql``, run once. Functions stand in
``sql/functions/``, each once and as it is now, and are made anew by every installation and upgrade. ``<schema>.meta``
has the installed versions, with the checksum of what was run.

Processes that began before an upgrade go on: a function keeps its name and arguments, or another one takes its place.
A body of BEGIN ATOMIC holds on to what it names: a file of tables that drops such a column drops the function first. It
keeps the columns of a server's own function by their places, so none of those stands in one.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from dataclasses import dataclass
from importlib import resources
from typing import Any

import psycopg
from psycopg import sql

from pgbg_orchestration.errors import (
    ExtensionMissing,
    InvalidJob,
    LedgerError,
    NoPrivilege,
    SchemaMissing,
    SchemaVersionMismatch,
)

VERSION = 7
FUNCTIONS = ("common", "worker", "registering", "history", "looking", "states", "rows", "supervision", "privileges")
"""The files of functions, in the order in which they can be run: one that is in SQL needs those that it calls."""
DEFAULT_SCHEMA = "pgbg"
DEFAULT_OWNER = "pgbg_owner"
NAME_BYTES = 63  # what the server cuts a longer name to (NAMEDATALEN)
LOCK_TIMEOUT = "5s"  # every look and every launch queues behind a migration's locks

OFF_WORDS = "('off', 'false', 'no', '0')"
"""The values, in SQL, with which a setting of the package's own (``pgbg.notify``, ``pgbg.keep_sql``) is off."""

_TOKEN = re.compile(r"@(?:schema|owner|owner_text|off_words)@")

# Roles are shared by all databases of a server: the owner may be there already.
_OWNER = """\
do $pgbg$
begin
    if not exists (select from pg_catalog.pg_roles where rolname = {owner_text}) then
        create role {owner} nologin;
    end if;
    if exists (select from pg_catalog.pg_roles where rolname = {owner_text} and rolsuper) then
        raise exception 'the owner of the schema must not be a superuser';
    end if;
    if not pg_catalog.pg_has_role(current_user, {owner_text}, 'USAGE') then
        grant {owner} to current_user;
    end if;
end $pgbg$;
"""
_CREATE = """\
create schema {schema} authorization {owner};
set local role {owner};
"""
_BECOME = "set local role {owner};\n"
_RECORD = "insert into {schema}.meta (version, checksum) values ({version}, {checksum});\n"
_DONE = "reset role;\n"


@dataclass(frozen=True, slots=True)
class Script:
    """SQL that brings a schema from one version to another, and its checksum."""

    from_version: int
    to_version: int
    text: str

    @property
    def checksum(self) -> str:
        """SHA-256 of the text, in hex."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def install(
    conninfo: str, *, schema: str = DEFAULT_SCHEMA, owner: str = DEFAULT_OWNER, create_extension: bool = False
) -> Script:
    """Install or upgrade the schema, in one transaction; does nothing when it is up to date.

    Parameters
    ----------
    conninfo:
        A libpq connection string of a role that may create schemas in the database and roles in the server.
    schema, owner:
        Name of the schema, and of the NOLOGIN role that owns it (created when missing).
    create_extension:
        Run ``CREATE EXTENSION pg_background`` first, where it is not installed (needs a superuser).

    Returns
    -------
    Script
        What was run; its text is empty when there was nothing to do.

    Raises
    ------
    InvalidJob
        A name cannot be used; nothing has been changed.
    ExtensionMissing
        pg_background is not installed in this database.
    SchemaVersionMismatch
        The installed schema is newer than this package.
    NoPrivilege
        The role may not do it; nothing has been changed.
    LedgerError
        Another session holds a lock that this needs; nothing has been changed.
    """
    check_name("schema", schema)
    check_name("schema's owner", owner)
    with psycopg.connect(conninfo, autocommit=True, client_encoding="utf8") as conn:
        conn.execute("set client_min_messages to warning")
        if create_extension:
            conn.execute("create extension if not exists pg_background")
        conn.execute("set search_path to pg_catalog, pg_temp")  # nothing that somebody put into another schema
        if conn.execute("select 1 from pg_extension where extname = 'pg_background'").fetchone() is None:
            raise ExtensionMissing(
                "pg_background is not installed in this database", todo="CREATE EXTENSION pg_background;"
            )
        try:
            with conn.transaction():
                conn.execute("set transaction isolation level read committed, read write")
                conn.execute(sql.SQL("set local lock_timeout = {}").format(LOCK_TIMEOUT))
                # One installer at a time; the second one finds the work done.
                conn.execute("select pg_advisory_xact_lock(hashtextextended('pgbg:install', 0))")
                script = plan(installed_version(conn, schema), schema=schema, owner=owner)
                if script.text:
                    conn.execute(script.text)
        except psycopg.errors.LockNotAvailable as error:
            raise LedgerError(
                f"the schema {schema} cannot be installed now: another session holds a lock on it for longer than "
                f"{LOCK_TIMEOUT}",
                todo="Look for it with pg_blocking_pids() while `pgbg install` runs again, and end it.",
                sqlstate=error.sqlstate,
                data_state="Nothing was changed.",
            ) from error
        except psycopg.errors.InsufficientPrivilege as error:
            raise NoPrivilege(
                f"the schema {schema} cannot be installed: {error.diag.message_primary}",
                todo="Run `pgbg install` as a role that may create schemas and roles, or hand "
                "`pgbg install --print` to one who may.",
                sqlstate=error.sqlstate,
            ) from error
    return script


def check_name(what: str, name: str) -> None:
    """Refuse a name that cannot be put into the schema's SQL, or that the server would make another of.

    Parameters
    ----------
    what:
        What the name is of, for the error.

    Raises
    ------
    InvalidJob
        It is empty or longer than the server keeps; it holds a control character, which ends a line of the text; or a
        ``$`` beside another or beside ``pgbg``, which ends the body of a function.
    """
    wrong = None
    if not name:
        wrong = "is empty"
    elif any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in name):
        wrong = "has a line break or another control character"
    elif len(name.encode()) > NAME_BYTES:
        wrong = f"has {len(name.encode())} bytes, and a name in PostgreSQL has {NAME_BYTES} at most"
    elif "$$" in name or "$pgbg$" in name:
        wrong = "has a dollar quote"
    elif name.startswith("pg_"):
        wrong = "begins with pg_, as only the server's own may"
    if wrong is not None:
        raise InvalidJob(f"the name of the {what} {wrong}: {name[:NAME_BYTES]!r}", todo="Choose another name.")


def plan(from_version: int, *, schema: str = DEFAULT_SCHEMA, owner: str = DEFAULT_OWNER) -> Script:
    """Return the SQL that brings the schema from ``from_version`` (0: not there) to this package's version.

    Raises
    ------
    InvalidJob
        A name cannot be used.
    SchemaVersionMismatch
        ``from_version`` is newer than this package.
    """
    check_name("schema", schema)
    check_name("schema's owner", owner)
    if from_version > VERSION:
        raise SchemaVersionMismatch(
            f"the schema {schema} has version {from_version}, and this package knows versions up to {VERSION}",
            todo="Upgrade pg-background-orchestration.",
        )
    if from_version == VERSION:
        return Script(from_version, VERSION, "")
    names = {"schema": sql.Identifier(schema), "owner": sql.Identifier(owner), "owner_text": sql.Literal(owner)}
    filled = {f"@{name}@": value.as_string(None) for name, value in names.items()} | {"@off_words@": OFF_WORDS}
    head = _OWNER + (_CREATE if from_version == 0 else _BECOME)
    parts = [sql.SQL(head).format(**names).as_string(None)]
    functions = "".join(_read("functions", f"{name}.sql") for name in FUNCTIONS)
    tables = {version: _tables(version) for version in range(from_version + 1, VERSION + 1)}
    text = "".join([*tables.values(), functions])
    parts.append(_TOKEN.sub(lambda token: filled[token[0]], text))  # at one go: a name may look like a token
    for version, changed in tables.items():
        run = changed + functions if version == VERSION else changed
        checksum = hashlib.sha256(run.encode()).hexdigest()
        parts.append(sql.SQL(_RECORD).format(**names, version=version, checksum=checksum).as_string(None))
    return Script(from_version, VERSION, "".join([*parts, _DONE]))


def uninstall(conninfo: str, *, schema: str = DEFAULT_SCHEMA, owner: str = DEFAULT_OWNER) -> None:
    """Drop the schema with all receipts and history; drop its owner too, unless other databases use it.

    Raises
    ------
    SchemaMissing
        There is no such schema of this package.
    """
    with psycopg.connect(conninfo, autocommit=True, client_encoding="utf8") as conn:
        conn.execute("set client_min_messages to warning")
        if installed_version(conn, schema) == 0:
            raise SchemaMissing(f"the schema {schema} is not installed in this database")
        with conn.transaction():
            conn.execute(sql.SQL("set local lock_timeout = {}").format(LOCK_TIMEOUT))
            conn.execute(sql.SQL("drop schema {} cascade").format(sql.Identifier(schema)))
        try:
            conn.execute(sql.SQL("drop role if exists {}").format(sql.Identifier(owner)))
        except (psycopg.errors.DependentObjectsStillExist, psycopg.errors.InsufficientPrivilege):
            return  # it owns the schema of another database, or is not ours to drop


def installed_version(conn: psycopg.Connection[Any], schema: str) -> int:
    """Return the version of the installed schema, 0 without one."""
    if conn.execute("select to_regclass(%s)", (f"{sql.Identifier(schema, 'meta').as_string(None)}",)).fetchone() == (
        None,
    ):
        return 0
    query = sql.SQL("select coalesce(max(version), 0) from {}").format(sql.Identifier(schema, "meta"))
    row = conn.execute(query).fetchone()
    return int(row[0]) if row else 0


def _tables(version: int) -> str:
    """Return what a version changes of the tables; nothing, where it is about functions only."""
    name = f"tables_{version:04}.sql"
    return _read(name) if resources.files(__package__).joinpath("sql", name).is_file() else ""


def _read(*path: str) -> str:
    return resources.files(__package__).joinpath("sql", *path).read_text(encoding="utf-8")
