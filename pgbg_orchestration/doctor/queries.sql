-- What the doctor asks a server. It changes nothing.

-- name: settings
select s.name, pg_catalog.current_setting(s.name)
from pg_catalog.pg_settings as s

-- name: extension_comment
select pg_catalog.obj_description(e.oid, 'pg_extension')
from pg_catalog.pg_extension as e
where e.extname = 'pg_background'

-- name: extension_privileges
-- Parameters: the extension's role, and the qualified and quoted names of its functions.
select coalesce(bool_and(pg_catalog.has_function_privilege(p.oid, 'EXECUTE')), false) as execute,
       exists (select from pg_catalog.pg_roles as r
               where r.rolname = %s and pg_catalog.pg_has_role(current_user, r.oid, 'MEMBER')) as member
from pg_catalog.pg_proc as p
join pg_catalog.pg_namespace as n on n.oid = p.pronamespace
where '"' || n.nspname || '"."' || p.proname || '"' = any(%s)

-- name: worker_slots
-- Parameter: the types of processes that take no slot.
select count(*) filter (where backend_type is null) as hidden,
       count(*) filter (where backend_type <> all(%s)) as used,
       count(*) filter (where backend_type = 'pg_background') as pg_background,
       count(*) filter (where backend_type = 'parallel worker') as parallel,
       count(*) filter (where backend_type like 'logical replication%%') as logical
from pg_catalog.pg_stat_activity

-- name: schema_owner
-- Parameter: the package's schema.
select coalesce(bool_and(pg_catalog.has_function_privilege(p.oid, 'EXECUTE')), false) as execute,
       o.rolname, o.rolsuper, o.rolcanlogin,
       pg_catalog.pg_has_role(session_user, o.oid, 'MEMBER') as member
from pg_catalog.pg_namespace as n
join pg_catalog.pg_roles as o on o.oid = n.nspowner
left join pg_catalog.pg_proc as p on p.pronamespace = n.oid
where n.nspname = %s
group by o.oid, o.rolname, o.rolsuper, o.rolcanlogin

-- name: login_power
-- Parameter: the predefined roles that have too much of it.
select array_remove(array[case when r.rolsuper then 'SUPERUSER' end,
                          case when r.rolcreaterole then 'CREATEROLE' end,
                          case when r.rolcreatedb then 'CREATEDB' end,
                          case when r.rolreplication then 'REPLICATION' end,
                          case when r.rolbypassrls then 'BYPASSRLS' end], null)
       || array(select p.rolname::text from pg_catalog.pg_roles as p
                where p.rolname = any(%s) and not r.rolsuper
                  and pg_catalog.pg_has_role(r.oid, p.oid, 'MEMBER')) as too_much
from pg_catalog.pg_roles as r
where r.rolname = session_user

-- name: schema_grantees
-- Who but its owner can write to the tables of a schema, create in it, or, as everybody, call its functions.
-- Parameter: the package's schema.
select array(
    select distinct coalesce(g.rolname, 'PUBLIC')::text
    from pg_catalog.pg_namespace as n
    cross join lateral (
        select c.relowner as owner, a.grantee, a.privilege_type
        from pg_catalog.pg_class as c, pg_catalog.aclexplode(c.relacl) as a
        where c.relnamespace = n.oid and c.relkind = 'r'
        union all
        select n.nspowner, a.grantee, a.privilege_type
        from pg_catalog.aclexplode(n.nspacl) as a
        union all
        select p.proowner, a.grantee, 'PUBLIC'
        from pg_catalog.pg_proc as p,
             pg_catalog.aclexplode(coalesce(p.proacl, pg_catalog.acldefault('f', p.proowner))) as a
        where p.pronamespace = n.oid and a.grantee = 0
    ) as x
    left join pg_catalog.pg_roles as g on g.oid = x.grantee
    where n.nspname = %s and x.grantee <> x.owner and x.privilege_type <> all(array['SELECT', 'USAGE'])
) as grantees

-- name: open_schemas
-- Schemas of the search_path in which everybody may create.
select array(
    select n.nspname::text
    from pg_catalog.pg_namespace as n, pg_catalog.aclexplode(n.nspacl) as a
    where n.nspname = any(pg_catalog.current_schemas(false)) and a.grantee = 0 and a.privilege_type = 'CREATE'
) as open

-- name: sees_others
-- Whether the login is shown what the sessions of others do: their queries, states and times.
select coalesce(bool_or(pg_catalog.pg_has_role(current_user, r.oid, 'USAGE')), false) as sees
from pg_catalog.pg_roles as r
where r.rolname = 'pg_read_all_stats'
