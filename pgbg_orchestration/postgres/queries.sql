-- What postgres/ asks the server's own catalog; what it asks the extension stands in pg_background.py.

-- name: marked
-- A backend of the owner's that bears a marker. Anybody can take any name.
select a.pid, a.wait_event
from pg_catalog.pg_stat_activity as a
where pg_catalog.starts_with(a.application_name, %s)
  and a.datname = pg_catalog.current_database()
  and a.pid <> pg_catalog.pg_backend_pid()
  and pg_catalog.pg_has_role(a.usesysid, %s, 'MEMBER')

-- name: signal_marked
-- Cancels the statement of every backend that "marked" finds.
select coalesce(bool_or(pg_catalog.pg_cancel_backend(a.pid)), false)
from pg_catalog.pg_stat_activity as a
where pg_catalog.starts_with(a.application_name, %s)
  and a.datname = pg_catalog.current_database()
  and a.pid <> pg_catalog.pg_backend_pid()
  and pg_catalog.pg_has_role(a.usesysid, %s, 'MEMBER')

-- name: type_names
-- Types as SQL has them, and whether each is a pseudo-type. Parameters: their OIDs and modifiers.
select pg_catalog.format_type(c.oid, c.mod), t.typtype = 'p'
from unnest(%s::oid[], %s::int4[]) with ordinality as c (oid, mod, n)
join pg_catalog.pg_type as t on t.oid = c.oid
order by n

-- name: progress_views
-- Which of the progress views the server has. Parameter: the ends of their names.
select n
from pg_catalog.unnest(%s::text[]) with ordinality as v (n, number)
where pg_catalog.to_regclass('pg_catalog.pg_stat_progress_' || n) is not null
order by number

-- name: activity
-- What backends are at, what they wait for, and who is in the way. {which} is a condition on "a", {commands} a query of
-- the progress views.
select a.pid, a.application_name, a.wait_event_type, a.wait_event,
    case when a.wait_event_type = 'Lock' then (
        select pg_catalog.max(extract(epoch from pg_catalog.clock_timestamp() - l.waitstart))::float8
        from pg_catalog.pg_locks as l where l.pid = a.pid and not l.granted) end as waited,
    case when a.wait_event_type = 'Lock' then (
        select pg_catalog.jsonb_agg(pg_catalog.jsonb_build_object(
            'pid', b.pid, 'user_name', x.usename, 'application', x.application_name, 'state', x.state,
            'query', pg_catalog.left(pg_catalog.regexp_replace(x.query, '\s+', ' ', 'g'), 100),
            'seconds', extract(epoch from pg_catalog.clock_timestamp() - x.xact_start)::float8))
        from pg_catalog.unnest(pg_catalog.pg_blocking_pids(a.pid)) as b (pid)
        left join pg_catalog.pg_stat_activity as x on x.pid = b.pid) end as blockers,
    (select pg_catalog.jsonb_object_agg(c.command, c.counters) from ({commands}) as c) as commands
from pg_catalog.pg_stat_activity as a
where a.datname = pg_catalog.current_database() and ({which})

-- name: workers
-- Workers of this server, whoever launched them: all that show their label, or the one of a pid. A worker of another
-- login shows its name, and its type to pg_read_all_stats alone: what is hidden may be a worker.
select a.pid, a.application_name from pg_catalog.pg_stat_activity as a
where case when %(pid)s::int is null then pg_catalog.starts_with(a.application_name, 'pg_background:')
    else a.pid = %(pid)s and (coalesce(a.backend_type = 'pg_background', true)
        or pg_catalog.starts_with(a.application_name, 'pg_background:'))
    end
order by a.pid

-- name: encoded
-- Texts as the database stores them.
select pg_catalog.array_agg(pg_catalog.convert_to(t.part, pg_catalog.getdatabaseencoding()) order by t.number)
from pg_catalog.unnest(%s::text[]) with ordinality as t (part, number)

-- name: membership
-- Whether the login is a member of a role in each of these ways; its own name, quoted.
select pg_catalog.bool_and(pg_catalog.pg_has_role(session_user, %s, h)), pg_catalog.quote_ident(session_user)
from pg_catalog.unnest(%s::text[]) as h

-- name: temporary_privilege
-- Whether a role (null: the one in force) may make temporary tables; its name and the database's, quoted.
select pg_catalog.has_database_privilege(r.name, pg_catalog.current_database(), 'TEMPORARY') as may,
       pg_catalog.quote_ident(r.name) as role,
       pg_catalog.quote_ident(pg_catalog.current_database()) as database
from (select coalesce(%s, current_user)::text as name) as r
