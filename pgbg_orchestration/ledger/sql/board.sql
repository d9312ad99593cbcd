-- All that is to be seen of a server at one moment: jobs that have not ended or ended a short while ago, every worker
-- of this database, whoever launched it, whom each of them waits for, and the worker slots.
with activity as materialized (
    select a.pid, a.datid, a.usename::text, a.application_name, a.backend_type, a.backend_start, a.state, a.query
    from pg_catalog.pg_stat_activity as a
), recent as materialized (
    -- Bounded, so that a receipt without a line of the history is not looked for among all of them.
    select * from {s}.find_jobs(
        p_ended_after => pg_catalog.clock_timestamp() - %(ended_within)s::interval, p_limit => 100000)
), unexplained as materialized (
    -- A worker that holds a lock as a job's does, and is no recent job's: one that began late, after it was given up.
    select a.pid from activity as a
    where (a.backend_type = 'pg_background' or a.application_name like 'pg\_background:%%')
      and a.pid not in (select r.running_pid from recent as r where r.running_pid is not null)
      and a.pid in (
          select l.pid from pg_catalog.pg_locks as l
          where l.locktype = 'advisory' and l.objsubid = 1 and l.granted and l.database = (
              select d.oid from pg_catalog.pg_database as d where d.datname = pg_catalog.current_database()))
), ended as materialized (
    select r.* from recent as r
    where r.state not in ('running', 'waiting')
      and r.ended_at >= pg_catalog.clock_timestamp() - %(ended_within)s::interval
), jobs as materialized (
    select r.* from recent as r where r.state in ('running', 'waiting')
    union all
    select j.* from {s}.find_jobs(p_states => array['running']) as j
    where (select pg_catalog.count(*) from unexplained) > 0
      and not exists (select from recent as r where r.owner = j.owner and r.job_id = j.job_id)
    union all
    (select e.* from ended as e order by e.state = 'committed', e.ended_at desc limit %(most_ended)s)
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
       (select pg_catalog.count(*)::int from ended) - (
            select pg_catalog.count(*)::int from jobs as j where j.state not in ('running', 'waiting')) as ended_left_out,
       coalesce((select pg_catalog.jsonb_agg(pg_catalog.to_jsonb(j)) from jobs as j), '[]') as jobs,
       coalesce((
            select pg_catalog.jsonb_agg(pg_catalog.jsonb_build_object(
                'pid', w.pid, 'login', w.usename, 'application_name', w.application_name, 'began_at', w.backend_start,
                'state', w.state, 'query', w.query))
            from workers as w), '[]') as workers,
       coalesce((select pg_catalog.jsonb_agg(pg_catalog.to_jsonb(x)) from ({activity}) as x), '[]') as activity
