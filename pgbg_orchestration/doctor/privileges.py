"""The doctor's checks of who may do more than is needed (docs/security.md)."""

from __future__ import annotations

from psycopg import sql

from pgbg_orchestration.postgres import catalog
from pgbg_orchestration.postgres.pg_background import ROLE

from .finding import Finding, Patient, Status

# Predefined roles with power over the server's files, other sessions' data or the data of all.
TOO_MUCH = (
    "pg_execute_server_program", "pg_read_server_files", "pg_write_server_files", "pg_read_all_data",
    "pg_write_all_data",
)  # fmt: skip


async def login(patient: Patient) -> list[Finding]:
    """Say what power over the server the login has."""
    row = await patient.one(
        "login_power",
        list(TOO_MUCH),
    )
    if not row["too_much"]:
        return [Finding("privileges", "login", Status.OK, "The login has no power over the server itself.")]
    text = f"The login has {', '.join(row['too_much'])}, and so has the SQL of every job. No job needs that."
    todo = f"Run jobs as a login of their own: CREATE ROLE etl LOGIN; GRANT {ROLE} TO etl;"
    return [Finding("privileges", "login", Status.WARNING, text, todo)]


async def grants(patient: Patient) -> list[Finding]:
    """Say who can write to the package's tables besides their owner."""
    if not patient.facts.has_schema:
        return []
    row = await patient.one(
        "schema_grantees",
        patient.schema,
    )
    if not row["grantees"]:
        return [Finding("privileges", "grants", Status.OK, "Nobody but its owner can write to the schema's tables.")]
    name, who = sql.Identifier(patient.schema).as_string(None), ", ".join(row["grantees"])
    text = f"More is granted on the schema {patient.schema!r} than it needs, to {who}: receipts could be forged."
    todo = (
        f"REVOKE ALL ON ALL TABLES IN SCHEMA {name} FROM {who}; REVOKE CREATE ON SCHEMA {name} FROM {who}; "
        f"REVOKE ALL ON ALL ROUTINES IN SCHEMA {name} FROM PUBLIC; then GRANT SELECT ON {name}.meta, {name}.jobs TO "
        f"{ROLE};"
    )
    return [Finding("privileges", "grants", Status.WARNING, text, todo)]


async def temporary(patient: Patient) -> list[Finding]:
    """Say whether jobs can keep their rows, which go through a temporary table."""
    may, role, database = await catalog.temporary_privilege(patient.conn)
    if may:
        return [Finding("privileges", "temporary", Status.OK, "Jobs may keep their rows (fetch).")]
    text = "Jobs cannot keep their rows (fetch): whoever runs their SQL may make no temporary table in this database."
    todo = f"If jobs are to: GRANT TEMPORARY ON DATABASE {database} TO {role};"
    return [Finding("privileges", "temporary", Status.WARNING, text, todo)]


async def search_path(patient: Patient) -> list[Finding]:
    """Say where everybody can create what a job's SQL may run unawares (PostgreSQL wiki, CVE-2018-1058)."""
    row = await patient.one("open_schemas")
    if not row["open"]:
        return [Finding("privileges", "search_path", Status.OK, "Not everybody can create objects in it.")]
    names = ", ".join(sql.Identifier(name).as_string(None) for name in row["open"])
    text = f"Everybody may create functions and operators in {names}, where the SQL of jobs may run them."
    return [Finding("privileges", "search_path", Status.WARNING, text, f"REVOKE CREATE ON SCHEMA {names} FROM PUBLIC;")]


async def server_log(patient: Patient) -> list[Finding]:
    """Say what of a job's SQL, with the values in it, the server's own log gets."""
    logged = []
    if patient.settings.get("log_statement") in ("all", "mod"):
        logged.append(f"log_statement = {patient.settings['log_statement']}")
    if patient.settings.get("log_min_duration_statement") not in (None, "-1"):
        logged.append(f"log_min_duration_statement = {patient.settings['log_min_duration_statement']}")
    if patient.settings.get("log_min_error_statement") not in (None, "log", "fatal", "panic"):
        logged.append(f"log_min_error_statement = {patient.settings['log_min_error_statement']}")
    text = "The server's log gets the SQL of jobs, parameters included"
    sentence = f"{text}, by {', '.join(logged)}." if logged else "The server's log gets no SQL of jobs by its settings."
    return [Finding("privileges", "server log", Status.OK, sentence)]
