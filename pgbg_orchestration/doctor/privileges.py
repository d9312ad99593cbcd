"""The doctor's checks of who may do more than is needed (docs/security.md)."""

from __future__ import annotations

from psycopg import sql

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
        "select array_remove(array[case when r.rolsuper then 'SUPERUSER' end,"
        " case when r.rolcreaterole then 'CREATEROLE' end, case when r.rolcreatedb then 'CREATEDB' end,"
        " case when r.rolreplication then 'REPLICATION' end, case when r.rolbypassrls then 'BYPASSRLS' end], null)"
        " || array(select p.rolname::text from pg_catalog.pg_roles as p where p.rolname = any(%s) and not r.rolsuper"
        "   and pg_catalog.pg_has_role(r.oid, p.oid, 'MEMBER')) as too_much"
        " from pg_catalog.pg_roles as r where r.rolname = session_user",
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
        "select array(select distinct coalesce(g.rolname, 'PUBLIC')::text from pg_catalog.pg_namespace as n"
        "   cross join lateral ("
        "     select c.relowner as owner, a.grantee, a.privilege_type from pg_catalog.pg_class as c,"
        "       pg_catalog.aclexplode(c.relacl) as a where c.relnamespace = n.oid and c.relkind = 'r'"
        "     union all select n.nspowner, a.grantee, a.privilege_type from pg_catalog.aclexplode(n.nspacl) as a"
        "     union all select p.proowner, a.grantee, 'PUBLIC' from pg_catalog.pg_proc as p, pg_catalog.aclexplode("
        "       coalesce(p.proacl, pg_catalog.acldefault('f', p.proowner))) as a"
        "       where p.pronamespace = n.oid and a.grantee = 0"
        "   ) as x left join pg_catalog.pg_roles as g on g.oid = x.grantee"
        "   where n.nspname = %s and x.grantee <> x.owner and x.privilege_type <> all(array['SELECT', 'USAGE'])"
        " ) as grantees",
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
    row = await patient.one(
        "select pg_catalog.has_database_privilege(pg_catalog.current_database(), 'TEMPORARY') as may,"
        " pg_catalog.quote_ident(current_user) as role, pg_catalog.quote_ident(pg_catalog.current_database()) as name"
    )
    if row["may"]:
        return [Finding("privileges", "temporary", Status.OK, "Jobs may keep their rows (fetch).")]
    text = "Jobs cannot keep their rows (fetch): whoever runs their SQL may make no temporary table in this database."
    todo = f"If jobs are to: GRANT TEMPORARY ON DATABASE {row['name']} TO {row['role']};"
    return [Finding("privileges", "temporary", Status.WARNING, text, todo)]


async def search_path(patient: Patient) -> list[Finding]:
    """Say where everybody can create what a job's SQL may run unawares (PostgreSQL wiki, CVE-2018-1058)."""
    row = await patient.one(
        "select array(select n.nspname::text from pg_catalog.pg_namespace as n, pg_catalog.aclexplode(n.nspacl) as a"
        " where n.nspname = any(pg_catalog.current_schemas(false)) and a.grantee = 0"
        " and a.privilege_type = 'CREATE') as open"
    )
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
    told = f"{text}, by {', '.join(logged)}." if logged else "The server's log gets no SQL of jobs by its settings."
    return [Finding("privileges", "server log", Status.OK, told)]
