-- The ledger's queries, each below a line `-- name:`. {schema} stands for the name of the package's schema; parameters
-- are psycopg's. queries.py reads this file.
--
-- No commit here waits for a synchronous standby ({await_no_standby}): one that is away would keep everybody waiting. A
-- failover may lose such a write. A registration is safe once its receipt is, which is committed later and waits. What
-- else is lost, the next call finds out again, or would have taken back. A person's cancel is confirmed by a query of
-- its own.

-- name: look
select l.*, a.wait_event
from {schema}.look(%s::text[], %s::bytea[], %s::bytea[]) as l
left join pg_catalog.pg_stat_activity as a on a.pid = l.holder_pid
order by l.number

-- name: supervised_end
select e.*, pg_catalog.clock_timestamp() as looked_at from {schema}.supervised_end(%s, %s, %s) as e

-- name: changed
-- Of jobs that a look showed at work, the indexes of those that show anything else by now: another worker or none,
-- somebody else's lock, a receipt.
select distinct l.number - 1
from {schema}.look(%s::text[], %s::bytea[], %s::bytea[]) as l
join unnest(%s::int4[], %s::int4[], %s::text[]) with ordinality as k (holder_pid, marked_pid, status, number)
    on k.number = l.number
where not coalesce(l.holds_this_job and l.holder_is_owner and l.holder_pid = k.holder_pid, false)
   or l.marked_pid is distinct from k.marked_pid or l.status is distinct from k.status

-- name: register
select r.* from {schema}.register_launch(%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, false, %s) as r,
    {await_no_standby} as how

-- name: recording
-- For launches that may have committed: reads the receipts, and writes the ends of those that did into the history, with
-- row count and tag. These come from the handle (i), which has the last statement's; or, where a statement is put behind
-- the job's last one (is_padded), from the result (o), which has the tags of all. A result is read of committed launches
-- only, since reading it waits for the worker's end, and after the history is written (w), since it forgets the handle.
select k.number, r.worker_pid, r.started_at, pg_catalog.clock_timestamp() as seen_at, t.row_count, t.command_tag,
       case when t.command_tag <> '' then {schema}.record(
           k.owner, k.job_id, k.attempt, 'committed', r.worker_pid, r.started_at, t.row_count, t.command_tag, null)
       end as recorded
from (values {keys}) as k (owner, job_id, attempt, is_padded, pid, cookie, number)
join lateral {schema}.committed(k.owner, k.job_id) as r on r.attempt = k.attempt
left join lateral (
    select {schema}.record(k.owner, k.job_id, k.attempt, 'committed', r.worker_pid, r.started_at, null, null, null)
    where k.is_padded
    offset 0
) as w (recorded) on true
cross join lateral (
    select i.row_count, i.command_tag from {result_info}(k.pid, k.cookie) as i where not k.is_padded
    union all
    select coalesce(substring(o.tag from ' ([0-9]+)$')::int8, 0), pg_catalog.regexp_replace(o.tag, '( [0-9]+)+$', '')
    from (
        select (pg_catalog.array_agg(o.tag))[pg_catalog.count(*) - 1] as tag
        from {result}(k.pid, k.cookie) as o (tag text)
        where w.recorded
    ) as o
    where w.recorded
) as t
cross join {await_no_standby} as how
cross join pg_catalog.set_config('lock_timeout', '250ms', true) as patience  -- all jobs of the session wait meanwhile

-- name: mark_cancelled
-- "awaits": the login's commits wait for a synchronous standby; this one does not.
select {schema}.mark_cancelled(%(owner)s, %(job_id)s, %(cause)s, %(reason)s, %(of_try)s) as status, l.awaits
from (
    select pg_catalog.current_setting('synchronous_standby_names') <> ''
           and pg_catalog.current_setting('synchronous_commit') not in ('off', 'local') as awaits
    offset 0  -- before it is changed
) as l
cross join pg_catalog.set_config('lock_timeout', %(patience)s, true)
cross join lateral (select {await_no_standby} where l.awaits is not null offset 0) as how

-- name: confirm
-- Its commit waits until a synchronous standby has it, and with it all that was committed before.
select pg_catalog.pg_logical_emit_message(true, 'pgbg', '')

-- name: mark_older
select {schema}.mark_older(%s, %s, %s) as status
from pg_catalog.set_config('lock_timeout', %s, true),
    {await_no_standby} as how

-- name: lift_cancel
select {schema}.lift_cancel(%s, %s) as lifted
from {await_no_standby} as how

-- name: signal
-- Cancels what holds the job's lock; where that is a supervisor, the worker below it. Anybody can take the lock, so its
-- holder must be a login of the owner's. A supervisor has the marker as its name while it launches.
with job as materialized (
    select {schema}.lock_key('job', %(owner)s, {schema}.digest(%(job_id)s)) as key,
           {schema}.marker(%(owner)s, %(job_id)s) as marker
), holder as materialized (
    select l.pid
    from job, pg_catalog.pg_locks as l
    where l.locktype = 'advisory' and l.objsubid = 1 and l.granted and l.pid is not null
      and l.database = (select d.oid from pg_catalog.pg_database as d
                        where d.datname = pg_catalog.current_database())
      and (l.classid::bigint << 32) | l.objid::bigint = job.key
), target as materialized (
    select h.pid
    from job, holder as h
    join pg_catalog.pg_stat_activity as a on a.pid = h.pid
    where {schema}.is_member(a.usesysid, %(owner)s)
      and coalesce(not starts_with(a.application_name, job.marker)
                   and not starts_with(a.application_name, %(supervises)s), true)
    union all
    select w.pid
    from {schema}.supervised(%(owner)s, %(job_id)s) as w (pid)
    where not exists (select from holder as h where h.pid = w.pid)
)
select coalesce(bool_or(pg_catalog.pg_cancel_backend(t.pid)), false) as sent from target as t

-- name: follow
select {schema}.follow(%s, %s, %s, %s)
from {await_no_standby} as how

-- name: settle
select {schema}.end_supervision(%s, %s, %s, %s, null, null, null, null)
from {await_no_standby} as how

-- name: at_work
-- A supervisor holds locks too, and is never said to be at work.
select count(distinct l.pid) as holders
from pg_catalog.pg_locks as l
where l.locktype = 'advisory' and l.granted and l.pid = any(%(pids)s)
  and not exists (
      select from pg_catalog.pg_stat_activity as a
      where a.pid = l.pid
        and (starts_with(a.application_name, %(supervises)s) or a.application_name like 'pgbg:%%'))

-- name: record
select {schema}.record(%s, %s, %s, %s, %s, %s, %s, %s, %s::text[])
from {await_no_standby} as how

-- name: reported
select {schema}.reported(%s, %s, %s)
from {await_no_standby} as how

-- name: jobs
select j.owner, j.job_id, j.label, j.series, j.generation, j.kind, j.state, j.attempt, j.running_pid,
       j.launched_by, j.registered_at, j.launched_at, j.ended_at, j.row_count, j.command_tag, j.sqlstate,
       j.message, j.detail, j.hint, j.context, j.cancelled_by, j.reason, j.worker_pid, j.started_at, j.cause,
       j.has_launcher
from {schema}.find_jobs(%(job_id)s, %(label)s, %(series)s, %(since)s, %(states)s::text[], %(limit)s) as j

-- name: orphans
select o.owner, o.job_id, o.label, o.series, o.state, o.launched_by, o.when_orphaned
from {schema}.orphans(%(series)s, %(job_id)s) as o

-- name: durations
-- How long the jobs of a name took: those that committed, from the beginning of their work to its end as it is known.
with job as materialized (
    select case when %(by)s = 'series' then coalesce(j.series, j.job_id) else coalesce(j.label, j.job_id) end as name,
           j.state, j.sqlstate, coalesce(j.launched_at, j.ended_at) as at,
           case when j.state = 'committed' then
               pg_catalog.date_part('epoch', j.ended_at - coalesce(j.started_at, j.launched_at))
           end as seconds
    from {schema}.jobs as j
    where (%(label)s::text is null or j.label like %(label)s)
      and (%(series)s::text is null or j.series like %(series)s)
      and (%(since)s::timestamptz is null or coalesce(j.launched_at, j.ended_at) >= %(since)s)
),
half as (
    select job.*, pg_catalog.ntile(2) over (partition by name, seconds is null order by at) as half from job
),
failure as (
    select name, pg_catalog.json_object_agg(what, number order by number desc, what) as failures
    from (
        select name, coalesce(sqlstate, state) as what, pg_catalog.count(*) as number
        from job where state in ('failed', 'lost', 'unknown') group by 1, 2
    ) as counted
    group by 1
)
select name, pg_catalog.count(*) as jobs,
       pg_catalog.count(*) filter (where state = 'committed') as committed,
       pg_catalog.count(*) filter (where state = 'cancelled') as cancelled,
       pg_catalog.count(*) filter (where state in ('failed', 'lost', 'unknown')) as failed,
       coalesce(pg_catalog.max(failure.failures::text)::json, '{{}}') as failures,
       pg_catalog.percentile_cont(0.5) within group (order by seconds) as median,
       pg_catalog.percentile_cont(0.95) within group (order by seconds) as p95,
       pg_catalog.max(seconds) as longest,
       pg_catalog.percentile_cont(0.5) within group (order by seconds) filter (where half = 1) as earlier_median,
       pg_catalog.percentile_cont(0.5) within group (order by seconds) filter (where half = 2) as later_median,
       pg_catalog.min(at) as first_at, pg_catalog.max(at) as last_at
from half left join failure using (name)
group by name
order by last_at desc nulls last, name
limit %(limit)s

-- name: prune
select receipts, jobs from {await_no_standby} as how cross join lateral {schema}.prune(%s)

-- name: facts
-- What a login sees of its server and database, before anything is launched there. Privileges are those of the role in
-- force, which ALTER ROLE ... SET role can make another than the login. Not to_regclass: it fails for a login that may not
-- use the schema, and that login is to be told what to grant. worker_timeout is unset where no session has loaded the
-- extension.
select session_user::text as login, current_user::text as role,
       pg_catalog.current_setting('server_version_num')::int as version,
       pg_catalog.current_setting('server_version') as version_text,
       pg_catalog.pg_is_in_recovery() as in_recovery,
       pg_catalog.current_database()::text as database,
       pg_catalog.pg_backend_pid() as backend_pid,
       pg_catalog.current_setting('statement_timeout') as statement_timeout,
       coalesce(pg_catalog.current_setting('pg_background.worker_timeout', true), '0') as worker_timeout,
       pg_catalog.current_setting('default_transaction_isolation') as default_transaction_isolation,
       pg_catalog.current_setting('max_worker_processes')::int as max_worker_processes,
       lower(coalesce(pg_catalog.current_setting('pgbg.notify', true), '')) not in {off_words} as notifies,
       pg_catalog.current_setting('max_connections')::int as max_connections,
       (select r.rolconnlimit from pg_catalog.pg_roles as r
         where r.rolname = session_user and not r.rolsuper) as login_limit,
       (select d.datconnlimit from pg_catalog.pg_database as d
         where d.datname = pg_catalog.current_database()) as database_limit,
       e.extversion as extension_version, n.nspname::text as extension_schema,
       (select a.default_version from pg_catalog.pg_available_extensions as a
         where a.name = 'pg_background') as extension_available,
       m.oid is not null as has_schema,
       coalesce(pg_catalog.has_schema_privilege(m.relnamespace, 'USAGE')
                and pg_catalog.has_table_privilege(m.oid, 'SELECT'), false) as schema_usage,
       (select r.rolsuper from pg_catalog.pg_roles as r where r.rolname = current_user) as superuser,
       coalesce((select pg_catalog.pg_has_role(current_user, r.oid, 'USAGE') from pg_catalog.pg_roles as r
         where r.rolname = %(role)s), false) as in_role,
       coalesce((select r.reset_val from pg_catalog.pg_settings as r
         where r.name = 'default_transaction_read_only'), 'off') = 'on' as read_only,
       exists (select from pg_catalog.pg_language as l where l.lanname = 'plpgsql'
         and pg_catalog.has_language_privilege('public', l.oid, 'USAGE')) as runs_blocks,
       exists (select from pg_catalog.pg_proc as p join pg_catalog.pg_language as l on l.oid = p.prolang
         where p.pronamespace = n.oid and l.lanname = 'c'
           and p.proname in ('pg_background_report_progress', 'pg_background_progress')) as reports
from (select) as one
left join pg_catalog.pg_extension as e on e.extname = 'pg_background'
left join pg_catalog.pg_namespace as n on n.oid = e.extnamespace
left join pg_catalog.pg_class as m
    on m.relname = 'meta' and m.relnamespace = pg_catalog.to_regnamespace(%(schema)s)

-- name: version
select max(version) as version from {schema}.meta

-- name: kept_rows
select * from {schema}.kept_rows(%s, %s)

-- name: cancel_worker
-- The process that was seen: pids are used again.
select pg_catalog.pg_cancel_backend(a.pid)
from pg_catalog.pg_stat_activity as a
where a.pid = %s and a.backend_start = %s and a.application_name = %s

-- name: job_detail
select * from {schema}.job_detail(%s, %s)

-- name: first_rows
select * from {schema}.first_rows(%s, %s, %s)
