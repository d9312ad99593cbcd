"""Look a server over: can jobs run there, what would go wrong, and what to do about it.

Nothing is changed and nothing is launched. What the login may not see is called "not visible", never "missing".
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import psycopg
from psycopg import AsyncConnection, sql

from pgbg_orchestration.embedded.standin import STANDIN_COMMENT
from pgbg_orchestration.errors import ExtensionMissing, ExtensionTooOld, PgbgError, PoolerInTransactionMode
from pgbg_orchestration.launcher import Launcher
from pgbg_orchestration.ledger import install, readiness
from pgbg_orchestration.postgres import connection
from pgbg_orchestration.postgres.pg_background import MAX_TRACKED, ROLE

from . import privileges
from .finding import QUERIES, Finding, Patient, Status

SHARED_MEMORY = "/dev/shm"  # noqa: S108  (looked at, not written to)
OLDEST_SERVER = 140000
FEW_SLOTS = 8  # PostgreSQL's default of max_worker_processes
LITTLE_SHARED_MEMORY = 32 * 1024 * 1024  # bytes
NEEDED_FUNCTIONS = ("launch", "result_info", "error_info", "result", "get_progress", "detach")
# Every other backend_type takes a slot of max_worker_processes (PostgreSQL source, miscinit.c and bgworker.c).
NO_SLOT_TAKEN = (
    "autovacuum launcher", "autovacuum worker", "client backend", "dead-end client backend", "background writer",
    "checkpointer", "startup", "walreceiver", "walsender", "walsummarizer", "walwriter", "archiver", "logger",
    "slotsync worker", "io worker", "standalone backend",
)  # fmt: skip


def worst(findings: Iterable[Finding]) -> Status:
    """Return the gravest status; what is not visible counts as ok."""
    statuses = {finding.status for finding in findings}
    return next((status for status in (Status.FAILS, Status.WARNING) if status in statuses), Status.OK)


async def examine(conninfo: str, *, schema: str = install.DEFAULT_SCHEMA) -> list[Finding]:
    """Look a server over, as the login of ``conninfo`` sees it.

    Parameters
    ----------
    conninfo:
        A libpq connection string or URI.
    schema:
        Name of the package's schema.

    Returns
    -------
    list of Finding
        In the order in which they should be mended.

    Raises
    ------
    ServerUnreachable
        The server cannot be reached, or refuses the login.
    """
    pooler = Finding("server", "pooler", Status.OK, "The connection keeps one server session.")
    async with Launcher(conninfo, schema=schema) as launcher:
        try:
            facts = await launcher.facts()
            if facts.through_pooler:
                pooler = Finding("server", "pooler", Status.OK, "A pooler in session mode, which keeps handles.")
        except PoolerInTransactionMode as error:
            pooler = Finding("server", "pooler", Status.FAILS, _sentence(error.message), error.todo)
    try:
        conn = await connection.connect(conninfo, "pgbg: doctor")
    except (psycopg.OperationalError, OSError, TimeoutError) as error:
        raise connection.unreachable(error, "the server cannot be reached") from error
    try:
        patient = await _admit(conn, schema)
        findings = [_greeting(patient), pooler]
        for group, check in _CHECKS:
            findings += await _safely(patient, group, check)
    finally:
        await connection.close(conn)
    return findings


async def _admit(conn: AsyncConnection[Any], schema: str) -> Patient:
    facts = await readiness.look_at(conn, schema)
    # In a new session, which has set nothing itself, these are what the login's sessions get.
    cursor = await conn.execute(QUERIES["settings"])
    settings: dict[str, str | None] = dict(await cursor.fetchall())
    cursor = await conn.execute(QUERIES["extension_comment"])
    return Patient(conn, facts, schema, settings, standin=await cursor.fetchone() == (STANDIN_COMMENT,))


def _greeting(patient: Patient) -> Finding:
    info, facts = patient.conn.info, patient.facts
    where = info.host if info.host.startswith("/") else f"{info.host}:{info.port}"
    text = f"PostgreSQL {facts.version_text} at {where}, database {facts.database}, login {facts.login}"
    # Set by ALTER ROLE … SET role: its privileges count, and not the login's.
    text += "." if facts.role == facts.login else f", with the role {facts.role} in force."
    return Finding("server", "reached", Status.OK, text)


async def _safely(patient: Patient, group: str, check: Callable[[Patient], Awaitable[list[Finding]]]) -> list[Finding]:
    """Run a check; what the server refuses to tell is not visible, and the other checks go on."""
    try:
        return await check(patient)
    except psycopg.errors.InsufficientPrivilege as error:
        name = check.__name__.strip("_").replace("_", " ")
        return [Finding(group, name, Status.HIDDEN, f"Not visible: {error.diag.message_primary}.")]


# The server ---------------------------------------------------------------------------------------------------------


async def _standby(patient: Patient) -> list[Finding]:
    if patient.facts.in_recovery:
        text = "A hot standby runs no background workers for jobs."
        todo = "Connect to the primary (libpq: target_session_attrs=read-write)."
        return [Finding("server", "primary", Status.FAILS, text, todo)]
    found = [Finding("server", "primary", Status.OK, "Not a standby.")]
    if patient.facts.read_only:
        text = "default_transaction_read_only is on for this login: a job cannot commit."
        login = sql.Identifier(patient.facts.login).as_string(None)
        todo = f"ALTER ROLE {login} SET default_transaction_read_only = off;"
        found.append(Finding("server", "read-write", Status.FAILS, text, todo))
    else:
        found.append(Finding("server", "read-write", Status.OK, "Transactions of this login may write."))
    return found


async def _connections(patient: Patient) -> list[Finding]:
    """Say whether the login may have the connections that a process needs."""
    facts = patient.facts
    need, comfortable = readiness.CONNECTIONS_NEEDED, readiness.CONNECTIONS_COMFORTABLE
    holds = f"a process that runs jobs holds {need} to {comfortable}, and one more for each job of kind session at work"
    limit = facts.connection_limit
    if limit is None:
        text = f"max_connections = {facts.max_connections}, and no limit of the login's or the database's; {holds}."
        return [Finding("server", "connections", Status.OK, text)]
    text = f"The login may have {limit[0]} to this database; {holds}."
    if limit[0] >= comfortable:
        return [Finding("server", "connections", Status.OK, text)]
    status = Status.FAILS if limit[0] < need else Status.WARNING
    return [Finding("server", "connections", status, text, f"{limit[1]} {comfortable};")]


# The extension --------------------------------------------------------------------------------------------------


async def _extension(patient: Patient) -> list[Finding]:
    facts = patient.facts
    try:
        extension = facts.extension
    except (ExtensionMissing, ExtensionTooOld) as error:
        have = f" Version {facts.extension_available} is available on this server." if facts.extension_available else ""
        return [Finding("extension", "pg_background", Status.FAILS, _sentence(error.message) + have, error.todo)]
    text = f"Version {extension.version}, in the schema {extension.schema}."
    if patient.standin:
        text = f"A stand-in with the surface of {extension.version}, in the schema {extension.schema}."
        todo = "For trying out and for tests only: production needs the real extension."
        return [Finding("extension", "pg_background", Status.WARNING, text, todo)]
    if facts.extension_available and facts.extension_available != extension.version:
        text += f" The server has {facts.extension_available} to offer."
        todo = "As a superuser: ALTER EXTENSION pg_background UPDATE;"
        return [Finding("extension", "pg_background", Status.WARNING, text, todo)]
    return [Finding("extension", "pg_background", Status.OK, text)]


async def _privilege(patient: Patient) -> list[Finding]:
    extension, facts = patient.extension, patient.facts
    if extension is None:
        return []
    names = [extension.name(function).as_string(None) for function in NEEDED_FUNCTIONS]
    row = await patient.one(
        "extension_privileges",
        ROLE,
        names,
    )
    grant = extension.grant_statement(facts.role)
    name = "role membership"
    who = "The login" if facts.role == facts.login else f"The role in force, {facts.role},"
    if facts.superuser:
        text = f"{who} is a superuser. Jobs run as well as an ordinary login with " + ROLE + "."
        found = [Finding("extension", name, Status.OK, text)]
    elif facts.in_role:
        found = [Finding("extension", name, Status.OK, f"{who} has the privileges of {ROLE}.")]
    elif row["member"]:
        text = f"{who} is a member of {ROLE} but does not inherit its privileges."
        login = sql.Identifier(facts.role).as_string(None)
        todo = f"{grant.rstrip(';')} WITH INHERIT TRUE;" if facts.version >= 160000 else f"ALTER ROLE {login} INHERIT;"
        found = [Finding("extension", name, Status.FAILS, text, todo)]
    else:
        found = [Finding("extension", name, Status.FAILS, f"{who} is not a member of {ROLE}.", grant)]
    if found[0].status is Status.OK and not row["execute"]:
        text = f"{ROLE} lacks EXECUTE on functions of the extension."
        function = extension.name("grant_privileges").as_string(None)
        todo = f"As a superuser: SELECT {function}('{ROLE}');"
        found.append(Finding("extension", "functions", Status.FAILS, text, todo))
    return found


async def _library(patient: Patient) -> list[Finding]:
    """Call the extension once: its files can be gone, or of another version, though it is installed."""
    extension = patient.extension
    if extension is None or not (patient.facts.in_role or patient.facts.superuser):
        return []
    try:
        stats = await extension.stats(patient.conn)
    except psycopg.errors.InsufficientPrivilege:
        raise
    except psycopg.Error as error:
        text = f"The extension is installed and cannot be called: {error.diag.message_primary or error}."
        todo = "Install the server's package of it anew, in the version that pg_extension names."
        return [Finding("extension", "library", Status.FAILS, text, todo)]
    text = (
        f"It answers. pg_background.max_workers = {stats.get('max_workers')} for each session;"
        f" this package's own sessions take {MAX_TRACKED}."
    )
    return [Finding("extension", "library", Status.OK, text)]


async def _supported(patient: Patient) -> list[Finding]:
    """Say what this server or its extension has not, of what others have (docs/servers.md)."""
    version, extension = patient.facts.version, patient.extension
    if version < OLDEST_SERVER:
        text = f"PostgreSQL {patient.facts.version_text} is older than {OLDEST_SERVER // 10000}, the oldest supported."
        return [Finding("server", "version", Status.FAILS, text, "Upgrade the server.")]
    found = [Finding("server", "version", Status.OK, "A supported version of PostgreSQL.")]
    if extension is not None and extension.numbers < (2, 0):
        text = (
            f"pg_background {extension.version} does not tell when a worker started and finished, nor the schema, "
            "table, column and constraint of an error: outcomes have these from the receipt, or not at all."
        )
        found.append(Finding("extension", "not offered", Status.OK, text, "pg_background 2.0 has them."))
    return found


async def _known_faults(patient: Patient) -> list[Finding]:
    extension = patient.extension
    if extension is None or patient.standin:
        return []
    old = extension.numbers < (2, 0)
    update = "Update to pg_background 2.0.2 or newer." if old else None
    cancel = (
        "pg_background's own cancel and cancel_all can crash the server before 2.0.2 when they meet a worker that is "
        "starting. This package cancels by pg_cancel_backend, which is safe on every version."
    )
    if not old:
        cancel += " Version 2.0 may be 2.0.0 or 2.0.3, which cannot be told apart: look at the package's version."
    found = [
        Finding("known faults", "cancel", Status.WARNING if old else Status.OK, cancel, update),
        Finding(
            "known faults",
            "visible rows",
            Status.OK,
            "Statements of one launch do not see each other's rows, up to 2.0.3. In jobs of this package they do: it "
            "puts a SET LOCAL between them.",
        ),
        Finding(
            "known faults",
            "silent ends",
            Status.OK,
            "A worker can end without a commit and be reported as completed without an error. This package believes "
            "the receipt only.",
        ),
    ]
    if extension.numbers == (1, 10):
        leak = (
            "A launching session keeps up to 64 KiB of each launch's SQL. This package replaces its sessions after "
            "some launches."
        )
        found.append(Finding("known faults", "memory leak", Status.WARNING, leak, update))
    return found


# Workers ----------------------------------------------------------------------------------------------------------


async def _worker_slots(patient: Patient) -> list[Finding]:
    total = patient.facts.max_worker_processes
    if patient.standin:
        text = f"The stand-in's workers are connections and take no slots (max_worker_processes = {total})."
        return [Finding("workers", "worker slots", Status.OK, text)]
    row = await patient.one(
        "worker_slots",
        list(NO_SLOT_TAKEN),
    )
    other = row["used"] - row["pg_background"] - row["parallel"] - row["logical"]
    parts = [(row["pg_background"], "pg_background"), (row["parallel"], "parallel query")]
    parts += [(row["logical"], "logical replication"), (other, "other")]
    by_kind = ", ".join(f"{count} {kind}" for count, kind in parts if count) or "none"
    free = total - row["used"]
    if row["hidden"]:
        text = (
            f"{row['used']} of {total} seen in use ({by_kind}). What {row['hidden']} more processes are is not visible "
            "to this login."
        )
        login = sql.Identifier(patient.facts.login).as_string(None)
        found = [Finding("workers", "worker slots", Status.HIDDEN, text, f"GRANT pg_read_all_stats TO {login};")]
    elif free <= 0:
        text = f"All {total} are used ({by_kind}): new jobs wait until one comes free."
        todo = "Run fewer jobs at once, or raise max_worker_processes (takes a restart)."
        found = [Finding("workers", "worker slots", Status.WARNING, text, todo)]
    else:
        found = [Finding("workers", "worker slots", Status.OK, f"{free} of {total} free; used: {by_kind}.")]
    if total <= FEW_SLOTS:
        parallel = patient.settings.get("max_parallel_workers")
        text = (
            f"max_worker_processes = {total} is shared with parallel query (up to {parallel}) and logical "
            f"replication: no more than {total} jobs run at once, whatever pg_background.max_workers says."
        )
        todo = (
            "ALTER SYSTEM SET max_worker_processes = 32; then restart the server. Until then jobs wait in a fair queue."
        )
        found.append(Finding("workers", "room", Status.WARNING, text, todo))
    return found


async def _blockers(patient: Patient) -> list[Finding]:
    """Say what a job that waits for a lock can tell of the session in its way (``pg_stat_activity``)."""
    row = await patient.one("sees_others")
    if row["sees"]:
        text = "A job that waits for a lock tells whose: pid, user, application, query, and for how long."
        return [Finding("workers", "blockers", Status.OK, text)]
    text = (
        "A job that waits for a lock tells whose, by pid, user and application. What that session runs, in what state "
        "and for how long, is not visible to this login. No job needs it; with it, logs quote other logins' queries."
    )
    login = sql.Identifier(patient.facts.role).as_string(None)
    return [Finding("workers", "blockers", Status.HIDDEN, text, f"GRANT pg_read_all_stats TO {login};")]


async def _shared_memory(patient: Patient) -> list[Finding]:
    kind = patient.settings.get("dynamic_shared_memory_type")
    name = "shared memory"
    if kind != "posix":
        text = f"Queues of workers are in {kind or 'a kind that is not visible'}, not in {SHARED_MEMORY}."
        return [Finding("workers", name, Status.OK if kind else Status.HIDDEN, text)]
    # Over TCP the server may be on another machine, or in a container with shared memory of its own.
    room = _room(SHARED_MEMORY) if patient.conn.info.host.startswith("/") else None
    each = f"each worker takes its queue (64 KiB) from {SHARED_MEMORY}."
    if room is None:
        todo = "A container has 64 MB by default: docker run --shm-size=1g"
        return [Finding("workers", name, Status.HIDDEN, f"Not visible from here; {each}", todo)]
    free, total = room
    text = f"{free >> 20} of {total >> 20} MiB free; {each}"
    if free < LITTLE_SHARED_MEMORY:
        todo = f"Make {SHARED_MEMORY} bigger (a container: docker run --shm-size=1g)."
        return [Finding("workers", name, Status.WARNING, text, todo)]
    return [Finding("workers", name, Status.OK, text)]


def _room(directory: str) -> tuple[int, int] | None:
    """Return free and total bytes of this machine's directory, None where there is none."""
    try:
        room = os.statvfs(directory)
    except FileNotFoundError:
        return None
    return room.f_bavail * room.f_frsize, room.f_blocks * room.f_frsize


# The package's schema -----------------------------------------------------------------------------------------------


async def _schema(patient: Patient) -> list[Finding]:
    facts, schema = patient.facts, patient.schema
    if not facts.has_schema:
        text = f"The schema {schema!r} with the receipts is not installed: only jobs of kind session can run."
        todo = "pgbg install (or, for your DBA: pgbg install --print)"
        return [Finding("schema", schema, Status.FAILS, text, todo)]
    who = "The login" if facts.role == facts.login else f"The role in force, {facts.role},"
    login = sql.Identifier(facts.login).as_string(None)
    in_role = facts.in_role or facts.superuser
    name = sql.Identifier(schema).as_string(None)
    anew = (
        f"GRANT USAGE ON SCHEMA {name} TO {ROLE}; GRANT SELECT ON {name}.meta, {name}.jobs TO {ROLE}; "
        f"GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA {name} TO {ROLE};"
    )
    grant = anew if in_role else f"It comes with {ROLE}: see role membership."
    if not facts.schema_usage:
        text = f"{who} may not use the schema {schema!r}; its version is not visible."
        return [Finding("schema", schema, Status.FAILS, text, grant)]
    if facts.schema_version != install.VERSION:
        newer = (facts.schema_version or 0) > install.VERSION
        text = f"Version {facts.schema_version} is installed, and this package needs {install.VERSION}."
        todo = "Upgrade pg-background-orchestration here." if newer else "pgbg install"
        return [Finding("schema", schema, Status.FAILS, text, todo)]
    found = [Finding("schema", schema, Status.OK, f"Version {facts.schema_version}, as this package needs it.")]
    row = await patient.one(
        "schema_owner",
        schema,
    )
    if not row["execute"]:
        text = f"{who} may not call the functions of the schema {schema!r}."
        found.append(Finding("schema", "functions", Status.FAILS, text, grant))
    owner = sql.Identifier(row["rolname"]).as_string(None)
    if row["rolsuper"]:
        text = f"The owner {row['rolname']} is a superuser: the functions, which run as their owner, should not."
        todo = f"pgbg uninstall, then pgbg install --owner with a role of its own; or ALTER ROLE {owner} NOSUPERUSER;"
        found.append(Finding("schema", "owner", Status.WARNING, text, todo))
    elif row["rolcanlogin"]:
        text = f"The owner {row['rolname']} can log in, and so forge receipts."
        found.append(Finding("schema", "owner", Status.WARNING, text, f"ALTER ROLE {owner} NOLOGIN;"))
    elif row["member"] and not facts.superuser:
        text = f"The login is a member of the owner {row['rolname']}, and so can forge receipts."
        found.append(Finding("schema", "owner", Status.WARNING, text, f"REVOKE {owner} FROM {login};"))
    else:
        text = f"{row['rolname']}, which cannot log in and is no superuser."
        found.append(Finding("schema", "owner", Status.OK, text))
    return found


# Settings -----------------------------------------------------------------------------------------------------------


async def _timeouts(patient: Patient) -> list[Finding]:
    what = {
        "statement_timeout": "ends a job with 57014",
        "transaction_timeout": "ends a job's worker by a FATAL error: the job is then lost, never half done",
        "idle_session_timeout": "is turned off in this package's own sessions",
        "idle_in_transaction_session_timeout": "is turned off in this package's own sessions",
        "lock_timeout": "ends a job with 55P03 when it waits for a lock",
    }
    deadly = ("statement_timeout", "transaction_timeout", "lock_timeout")
    found = []
    in_force = {name: patient.settings[name] for name in what if patient.settings.get(name) not in (None, "0")}
    for name, value in in_force.items():
        status = Status.WARNING if name in deadly else Status.OK
        todo = f"Jobs that need longer: --set {name}=0" if name in deadly else None
        found.append(Finding("settings", name, status, f"{value} for this login; it {what[name]}.", todo))
    unset = [name for name in what if name not in in_force and name in patient.settings]
    found.append(Finding("settings", "timeouts", Status.OK, f"Not in force: {', '.join(unset)}."))
    return found


async def _other_settings(patient: Patient) -> list[Finding]:
    settings = patient.settings
    rules: tuple[tuple[str, Callable[[str], bool], str, str, str], ...] = (
        (
            "track_activities",
            lambda value: value == "on",
            "on: what workers run can be seen.",
            "off: pg_stat_activity shows no query of any worker. Jobs run and are cancelled all the same.",
            "ALTER SYSTEM SET track_activities = on; SELECT pg_reload_conf();",
        ),
        (
            "synchronous_commit",
            lambda value: value != "off",
            "{value}: a commit that was reported survives a crash of the server.",
            "off: a crash can take back commits that were reported. Work and receipt go together, so a rerun is right.",
            "Where that is not wanted: --set synchronous_commit=on",
        ),
        (
            "exit_on_error",
            lambda value: value == "off",
            "off.",
            "on: any error ends a worker's process, and this package's own sessions too.",
            "ALTER SYSTEM RESET exit_on_error; SELECT pg_reload_conf();",
        ),
    )
    found = []
    for name, good, text, trouble, todo in rules:
        value = settings.get(name)
        if value is None:
            found.append(Finding("settings", name, Status.HIDDEN, "Not visible to this login."))
        elif good(value):
            found.append(Finding("settings", name, Status.OK, text.format(value=value)))
        else:
            found.append(Finding("settings", name, Status.WARNING, trouble, todo))
    return found


def _sentence(text: str) -> str:
    return text.rstrip(".") + "."


_CHECKS: tuple[tuple[str, Callable[[Patient], Awaitable[list[Finding]]]], ...] = (
    ("server", _standby),
    ("server", _supported),
    ("server", _connections),
    ("extension", _extension),
    ("extension", _privilege),
    ("extension", _library),
    ("schema", _schema),
    ("privileges", privileges.login),
    ("privileges", privileges.grants),
    ("privileges", privileges.temporary),
    ("privileges", privileges.search_path),
    ("privileges", privileges.server_log),
    ("workers", _worker_slots),
    ("workers", _blockers),
    ("workers", _shared_memory),
    ("settings", _timeouts),
    ("settings", _other_settings),
    ("known faults", _known_faults),
)

__all__ = ["Finding", "PgbgError", "Status", "examine", "worst"]
