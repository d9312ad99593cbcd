"""The facts of a server that are read before anything is launched, and the refusal of one where no job can run."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from psycopg import AsyncConnection, sql
from psycopg.rows import dict_row

from pgbg_orchestration.errors import (
    NOT_STARTED,
    ExtensionMissing,
    ExtensionTooOld,
    NoPrivilege,
    ReadOnlyServer,
    SchemaMissing,
    SchemaVersionMismatch,
    ServerUnreachable,
)
from pgbg_orchestration.postgres.pg_background import OLDEST, ROLE, Extension

from . import install, queries

CONNECTIONS_NEEDED = 3
"""The connections without which a process runs no jobs: one each to look, to write, and to launch."""
CONNECTIONS_COMFORTABLE = 8
"""The most that a process opens, without jobs of kind session: three to launch; one each to look, to write, to list and
to listen; one for short questions."""


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """What a login sees of its server and database.

    ``role`` is the role in force, whose privileges count: the login, unless ALTER ROLE … SET role made it another.
    ``runs_blocks``: every role may run DO. ``reports``: the extension keeps the progress that a worker reported, after
    it failed too; a stand-in does not. ``backend_pid`` is what the server says; behind a pooler the connection was told
    another one at its start.
    """

    login: str
    role: str
    version: int
    version_text: str
    in_recovery: bool
    database: str
    backend_pid: int
    statement_timeout: str
    worker_timeout: str
    default_transaction_isolation: str
    max_worker_processes: int
    notifies: bool
    max_connections: int
    login_limit: int | None
    database_limit: int | None
    extension_version: str | None
    extension_schema: str | None
    extension_available: str | None
    has_schema: bool
    schema_usage: bool
    schema_version: int | None
    superuser: bool
    in_role: bool
    read_only: bool
    runs_blocks: bool
    reports: bool
    through_pooler: bool

    @property
    def connection_limit(self) -> tuple[int, str] | None:
        """How many connections the login may have here at most, and what says so; None without such a limit."""
        # The limit of a database is none for a superuser.
        limits = {"ROLE": self.login_limit, "DATABASE": None if self.superuser else self.database_limit}
        least = min(((limit, what) for what, limit in limits.items() if limit is not None and limit >= 0), default=None)
        if least is None:
            return None
        named = sql.Identifier(self.login if least[1] == "ROLE" else self.database).as_string(None)
        return least[0], f"ALTER {least[1]} {named} CONNECTION LIMIT"

    @property
    def who(self) -> str:
        """Whose privileges count, in words."""
        if self.role == self.login:
            return f"the login {self.login!r}"
        return f"the role {self.role!r}, which is in force for the login {self.login!r} (ALTER ROLE … SET role),"

    @property
    def defaults(self) -> dict[str, str]:
        """The login's values of settings that a supervisor has others of, and a worker needs."""
        return {
            "statement_timeout": self.statement_timeout,
            "pg_background.worker_timeout": self.worker_timeout,
            "default_transaction_isolation": self.default_transaction_isolation,
            "default_transaction_read_only": "on" if self.read_only else "off",
        }

    @property
    def extension(self) -> Extension:
        """pg_background as it is installed here.

        Raises
        ------
        ExtensionMissing
            It is not installed in this database.
        ExtensionTooOld
            It is older than 1.9.
        """
        if self.extension_version is None or self.extension_schema is None:
            raise ExtensionMissing(
                f"pg_background is not installed in the database {self.database!r}",
                todo="Run as a superuser: CREATE EXTENSION pg_background;"
                if self.extension_available
                else "This server does not have pg_background at all: install its package (Debian, Ubuntu: "
                f"postgresql-{self.version // 10000}-pg-background), or run the SQL over an ordinary connection.",
            )
        extension = _extension(self.extension_version, self.extension_schema)
        if extension.numbers < OLDEST:
            raise ExtensionTooOld(
                f"pg_background {extension.version} is too old: 1.9 is the oldest with result_info and error_info",
                todo="Install a newer package, then: ALTER EXTENSION pg_background UPDATE;",
            )
        return extension


@cache
def _extension(version: str, schema: str) -> Extension:
    return Extension(version, schema)


async def look_at(conn: AsyncConnection[Any], schema: str) -> ServerFacts:
    """Gather the facts of a server, in at most two queries."""
    arguments = {
        "schema": sql.Identifier(schema).as_string(None),
        "role": ROLE,
    }
    row = await (await conn.cursor(row_factory=dict_row).execute(queries.query("facts", schema), arguments)).fetchone()
    assert row is not None
    version = None
    if row["has_schema"] and row["schema_usage"]:
        query = queries.query("version", schema)
        newest = await (await conn.cursor(row_factory=dict_row).execute(query)).fetchone()
        version = newest["version"] if newest else None
    return ServerFacts(**row, schema_version=version, through_pooler=conn.info.backend_pid != row["backend_pid"])


def require(facts: ServerFacts, schema: str, *, receipts: bool, read_write: bool = False) -> None:
    """Refuse a server on which a job cannot run, with the line to run there.

    Parameters
    ----------
    receipts:
        Whether the job carries a receipt, and so needs the package's schema.
    read_write:
        Whether the job's own settings make its transaction writable.

    Raises
    ------
    ExtensionMissing, ExtensionTooOld, NoPrivilege, ReadOnlyServer, SchemaMissing, SchemaVersionMismatch
        As their names say; nothing was launched.
    ServerUnreachable
        The login or the database may have fewer connections than a process needs (SQLSTATE 53300).
    """
    if facts.in_recovery:
        raise ReadOnlyServer(
            "the server is a hot standby, which runs no background workers for a job",
            sqlstate="25006",
            todo="Connect to the primary (libpq: target_session_attrs=read-write).",
        )
    extension = facts.extension
    if facts.connection_limit is not None and facts.connection_limit[0] < CONNECTIONS_NEEDED:
        limit, what = facts.connection_limit
        raise ServerUnreachable(
            f"the login {facts.login!r} may have {limit} connections to the database {facts.database!r} at once, and "
            f"jobs need {CONNECTIONS_NEEDED} at least",
            sqlstate="53300",
            todo=f"{what} {CONNECTIONS_COMFORTABLE}; (up to {CONNECTIONS_COMFORTABLE} are held by one process, and one "
            "more for each job of kind session at work).",
            data_state=NOT_STARTED,
        )
    if not facts.in_role and not facts.superuser:
        raise NoPrivilege(
            f"{facts.who} may not use pg_background",
            sqlstate="42501",
            todo=extension.grant_statement(facts.role),
        )
    if not receipts:
        return
    if facts.read_only and not read_write:
        raise ReadOnlyServer(
            "default_transaction_read_only is on for this login, so a job could not commit",
            sqlstate="25006",
            todo="Set it off for the job: settings={'default_transaction_read_only': 'off'}.",
        )
    if not facts.has_schema:
        raise SchemaMissing(
            f"the schema {schema!r} with the receipts is not installed in the database {facts.database!r}",
            todo="Run `pgbg install` (or `pgbg install --print` for your DBA); without it only kind='session' works.",
        )
    if not facts.schema_usage:
        raise NoPrivilege(
            f"{facts.who} may not use the schema {schema!r}",
            sqlstate="42501",
            todo=extension.grant_statement(facts.role),
        )
    if facts.schema_version != install.VERSION:
        raise SchemaVersionMismatch(
            f"the schema {schema!r} has version {facts.schema_version}, and this package needs {install.VERSION}",
            todo="Run `pgbg install`."
            if (facts.schema_version or 0) < install.VERSION
            else "Upgrade pg-background-orchestration here.",
        )
