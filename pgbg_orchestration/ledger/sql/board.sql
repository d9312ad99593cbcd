-- All that is to be seen of a server at one moment: jobs that have not ended or ended a short while ago, every worker
-- of this database, whoever launched it, whom each of them waits for, and the worker slots.
with activity as materialized (
    select a.pid, a.datid, a.usename::text, a.application_name, a.backend_type, a.backend_start, a.state, a.query
    from pg_catalog.pg_stat_activity as a
), jobs as materialized (
    select * from {s}.jobs as j
    where j.state in ('running', 'waiting') or j.ended_at >= pg_catalog.clock_timestamp() - %(ended_within)s::interval
), workers as materialized (
    select a.*
    from activity as a
    where a.datid = (select d.oid from pg_catalog.pg_database as d where d.datname = pg_catalog.current_database())
      and a.pid <> pg_catalog.pg_backend_pid()
      and (a.backend_type = 'pg_background' or a.application_name like 'pg\_background:%%'
           or a.pid in (select j.running_pid from jobs as j))
)
select pg_catalog.clock_timestamp() as looked_at,
       pg_catalog.current_database()::text as database,
       pg_catalog.current_setting('server_version') as server_version,
       pg_catalog.current_setting('max_worker_processes')::int as slots,
       (select pg_catalog.count(*)::int from activity as a where a.backend_type not in (
            'client backend', 'autovacuum launcher', 'autovacuum worker', 'background writer', 'checkpointer', 'startup',
            'walreceiver', 'walsender', 'walwriter', 'archiver', 'logger', 'slotsync worker', 'walsummarizer',
            'io worker', 'standalone backend')) as slots_used,
       -- What a login may not see has no type: some of these may hold a slot too.
       (select pg_catalog.count(*)::int from activity as a where a.backend_type is null) as not_visible,
       coalesce((select pg_catalog.jsonb_agg(pg_catalog.to_jsonb(j)) from jobs as j), '[]') as jobs,
       coalesce((
            select pg_catalog.jsonb_agg(pg_catalog.jsonb_build_object(
                'pid', w.pid, 'login', w.usename, 'application_name', w.application_name, 'began_at', w.backend_start,
                'state', w.state, 'query', w.query))
            from workers as w), '[]') as workers,
       coalesce((select pg_catalog.jsonb_agg(pg_catalog.to_jsonb(x)) from ({activity}) as x), '[]') as activity
