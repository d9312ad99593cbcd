"""What can be known of a server before anything is launched there, and the clear refusals that follow from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from psycopg import AsyncConnection, sql
from psycopg.rows import dict_row

from pgbg_orchestration.errors import (
    ExtensionMissing,
    ExtensionTooOld,
    NoPrivilege,
    ReadOnlyServer,
    SchemaMissing,
    SchemaVersionMismatch,
)
from pgbg_orchestration.postgres.pg_background import OLDEST, ROLE, Extension

from . import install

_QUERY = """
select session_user::text as login,
       pg_catalog.current_setting('server_version_num')::int as version,
       pg_catalog.current_setting('server_version') as version_text,
       pg_catalog.pg_is_in_recovery() as in_recovery,
       pg_catalog.current_database()::text as database,
       pg_catalog.pg_backend_pid() as backend_pid,
       pg_catalog.current_setting('statement_timeout') as statement_timeout,
       -- What the login's sessions begin with; unset where no session has loaded the extension.
       coalesce(pg_catalog.current_setting('pg_background.worker_timeout', true), '0') as worker_timeout,
       pg_catalog.current_setting('default_transaction_isolation') as default_transaction_isolation,
       pg_catalog.current_setting('max_worker_processes')::int as max_worker_processes,
       e.extversion as extension_version, n.nspname::text as extension_schema,
       (select a.default_version from pg_catalog.pg_available_extensions as a
         where a.name = 'pg_background') as extension_available,
       m.oid is not null as has_schema,
       coalesce(pg_catalog.has_schema_privilege(m.relnamespace, 'USAGE')
                and pg_catalog.has_table_privilege(m.oid, 'SELECT'), false) as schema_usage,
       (select r.rolsuper from pg_catalog.pg_roles as r where r.rolname = session_user) as superuser,
       coalesce((select pg_catalog.pg_has_role(session_user, r.oid, 'USAGE') from pg_catalog.pg_roles as r
         where r.rolname = %(role)s), false) as in_role,
       coalesce((select r.reset_val from pg_catalog.pg_settings as r
         where r.name = 'default_transaction_read_only'), 'off') = 'on' as read_only
  from (select) as one
  left join pg_catalog.pg_extension as e on e.extname = 'pg_background'
  left join pg_catalog.pg_namespace as n on n.oid = e.extnamespace
  -- Not to_regclass: it fails for a login that may not use the schema, and that login is to be told what to grant.
  left join pg_catalog.pg_class as m
    on m.relname = 'meta' and m.relnamespace = pg_catalog.to_regnamespace(%(schema)s)
"""


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """What a login sees of its server and database.

    ``backend_pid`` is what the server says; behind a pooler it is not what the connection was told at its start.
    """

    login: str
    version: int
    version_text: str
    in_recovery: bool
    database: str
    backend_pid: int
    statement_timeout: str
    worker_timeout: str
    default_transaction_isolation: str
    max_worker_processes: int
    extension_version: str | None
    extension_schema: str | None
    extension_available: str | None
    has_schema: bool
    schema_usage: bool
    schema_version: int | None
    superuser: bool
    in_role: bool
    read_only: bool
    through_pooler: bool

    @property
    def defaults(self) -> dict[str, str]:
        """What a worker of the login's has of its own, of the settings that its supervisor has otherwise."""
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
        found = Extension(self.extension_version, self.extension_schema)
        if found.numbers < OLDEST:
            raise ExtensionTooOld(
                f"pg_background {found.version} is too old: 1.9 is the oldest with result_info and error_info",
                todo="Install a newer package, then: ALTER EXTENSION pg_background UPDATE;",
            )
        return found


async def look_at(conn: AsyncConnection[Any], schema: str) -> ServerFacts:
    """Gather the facts of a server, in at most two queries."""
    arguments = {
        "schema": sql.Identifier(schema).as_string(None),
        "role": ROLE,
    }
    row = await (await conn.cursor(row_factory=dict_row).execute(_QUERY, arguments)).fetchone()
    assert row is not None
    version = None
    if row["has_schema"] and row["schema_usage"]:
        query = sql.SQL("select max(version) as version from {}").format(sql.Identifier(schema, "meta"))
        found = await (await conn.cursor(row_factory=dict_row).execute(query)).fetchone()
        version = found["version"] if found else None
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
    """
    if facts.in_recovery:
        raise ReadOnlyServer(
            "the server is a hot standby, which runs no background workers for a job",
            sqlstate="25006",
            todo="Connect to the primary (libpq: target_session_attrs=read-write).",
        )
    extension = facts.extension
    if not facts.in_role and not facts.superuser:
        raise NoPrivilege(
            f"the login {facts.login!r} may not use pg_background",
            sqlstate="42501",
            todo=extension.grant_statement(facts.login),
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
            f"the login {facts.login!r} may not use the schema {schema!r}",
            sqlstate="42501",
            todo=extension.grant_statement(facts.login),
        )
    if facts.schema_version != install.VERSION:
        raise SchemaVersionMismatch(
            f"the schema {schema!r} has version {facts.schema_version}, and this package needs {install.VERSION}",
            todo="Run `pgbg install`."
            if (facts.schema_version or 0) < install.VERSION
            else "Upgrade pg-background-orchestration here.",
        )
