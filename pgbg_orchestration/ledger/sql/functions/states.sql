-- The state of jobs, for whoever only looks. That a job is lost is said here from lock, receipt and history alone; to the
-- call that drives the job, verdict.py says it.

-- The true state of jobs, newest launch first. Filters that are null are none; p_label and p_series are patterns of
-- LIKE. What is registered is found by an index, whatever the history's length. With p_limit, a receipt of a worker's
-- whose line of the history somebody deleted is left out: to find such takes a look at every receipt. With
-- p_ended_after, jobs are left out that are written down as ended before then: for a view that looks every other
-- second.
--
-- Planned for each call: which filters there are decides the plan, and the plan for any of them, which a session has
-- from its sixth call on, takes ten times as long for some thousand jobs.
create or replace function @schema@.find_jobs(
    p_job_id text default null, p_label text default null, p_series text default null, p_since timestamptz default null,
    p_states text[] default null, p_limit bigint default null, p_ended_after timestamptz default null
)
    returns table (
        owner text, job_id text, label text, series text, generation bigint, kind text, state text, attempt int,
        running_pid int, launched_by text, registered_at timestamptz, launched_at timestamptz, ended_at timestamptz,
        row_count bigint, command_tag text, sqlstate text, message text, detail text, hint text, context text,
        cancelled_by text, reason text, worker_pid int, started_at timestamptz, cause text,
        has_launcher boolean
    )
    language plpgsql volatile security definer
    set search_path = pg_catalog, pg_temp
    set plan_cache_mode = force_custom_plan
as $$
#variable_conflict use_column
declare
    v_keys   bigint[];
    v_pids   int[];
    v_logins oid[];
    v_here   oid := (select d.oid from pg_database d where d.datname = current_database());
    v_job    bytea := @schema@.digest(p_job_id);
    -- is_mine, for all owners at once: it would be called for each job.
    v_admin  boolean := coalesce((select r.rolsuper from pg_roles r where r.rolname = session_user), false);
    v_mine   text[] := array(select r.rolname::text from pg_roles r where pg_has_role(session_user, r.oid, 'MEMBER'));
begin
    perform @schema@.require_read_committed();
    select array_agg((l.classid::bigint << 32) | l.objid::bigint), array_agg(l.pid), array_agg(a.usesysid)
        into v_keys, v_pids, v_logins
        from pg_locks l left join pg_stat_activity a on a.pid = l.pid
        where l.locktype = 'advisory' and l.objsubid = 1 and l.granted and l.database = v_here;
    return query
        with held as materialized (
            select h.key, h.pid, h.login from unnest(v_keys, v_pids, v_logins) as h (key, pid, login)
        ), here as materialized (
            -- Not by its start too, which the owner of this schema may not see.
            select a.pid from pg_stat_activity a where a.datid = v_here
        ), registered as (
            select j.owner, j.job_id, coalesce(j.label, r.label) as label, j.series, j.generation, j.kind, s.state,
                   j.attempt, w.pid as running_pid, j.launched_by, j.registered_at, j.launched_at,
                   -- A receipt of the work's own transaction (xid) was written at its start.
                   case when r.status in ('committed', 'cancelled') and r.xid is null
                       then coalesce(j.ended_at, r.decided_at) else j.ended_at end as ended_at,
                   j.row_count, j.command_tag, j.sqlstate, j.message, j.detail, j.hint, j.context,
                   case when r.status = 'cancelled' then r.decided_by end as cancelled_by, r.reason,
                   coalesce(w.pid, r.worker_pid, j.worker_pid) as worker_pid,
                   coalesce(r.started_at, j.started_at) as started_at, r.cause,
                   l.pid is not null as has_launcher, j.launched_at as at
            from @schema@.job j
            left join @schema@.receipt r on r.owner = j.owner and r.job_digest = j.job_digest
            -- "offset 0": made once for each job. A plan for few locks would make it for each pair of job and lock.
            cross join lateral (select @schema@.lock_key('job', j.owner, j.job_digest) as key offset 0) k
            -- Anybody can take the lock.
            left join held h on h.key = k.key and (h.login is null or @schema@.is_member(h.login, j.owner))
            -- CASE, and no WHERE: the planner would call the function for every job and filter afterwards.
            cross join lateral (
                select case when r.status = 'launching'
                    then @schema@.marked(r.owner, r.job_id, r.worker_pid, r.decided_by, r.supervisor_pid) end as pid
            ) m
            -- Of two workers, the one whose cancel ends the SQL and not the one above it.
            cross join lateral (
                select case when r.status = 'launching' or j.kind = 'supervised' then m.pid else h.pid end as pid
            ) w
            left join here l on l.pid = j.launcher_pid
            cross join lateral (
                select case -- The mark of a newer generation, or of a call that gives up, comes after how it ended.
                    when r.status = 'cancelled' and r.cause in ('superseded', 'given up')
                         and j.outcome in ('failed', 'lost', 'unknown')
                        then j.outcome
                    when r.status in ('committed', 'cancelled') then r.status
                    when h.pid is not null or m.pid is not null then 'running'
                    when r.status = 'launching' then 'unknown'
                    when j.outcome in ('failed', 'cancelled', 'lost', 'unknown', 'committed')
                        then case j.outcome when 'committed' then
                            case j.kind when 'receipt' then 'lost' else 'committed' end else j.outcome end
                    -- Neither lock nor receipt: it may be about to start as long as somebody is there to launch it.
                    when j.launched_at > clock_timestamp() - interval '10 s' or l.pid is not null then 'waiting'
                    when j.kind <> 'receipt' then 'unknown'
                    else 'lost' end as state
            ) s
            where (p_job_id is null or j.job_digest = v_job)
              and (p_label is null or j.label like p_label)
              and (p_series is null or j.series like p_series)
              and (p_since is null or j.launched_at >= p_since)
              and (p_states is null or s.state = any (p_states))
              and (p_ended_after is null or j.ended_at is null or j.ended_at >= p_ended_after)
              and (v_admin or j.owner = any (v_mine))
            order by j.launched_at desc
            limit p_limit
        ), unregistered as (
            select r.owner, r.job_id, r.label, null::text, null::bigint, null::text, s.state, null::int,
                   m.pid, null::text, null::timestamptz, null::timestamptz,
                   case when r.xid is null and r.status <> 'launching' then r.decided_at end,
                   null::bigint, null::text, null::text, null::text, null::text, null::text, null::text,
                   case when r.status = 'cancelled' then r.decided_by end, r.reason, r.worker_pid, r.started_at, r.cause,
                   false, r.decided_at
            from @schema@.receipt r
            cross join lateral (
                select case when r.status = 'launching'
                    then @schema@.marked(r.owner, r.job_id, r.worker_pid, r.decided_by, r.supervisor_pid) end as pid
            ) m
            cross join lateral (
                select case when r.status <> 'launching' then r.status
                            when m.pid is not null then 'running' else 'unknown' end as state
            ) s
            where (r.attempt is null or p_limit is null)
              and not exists (
                  select from @schema@.job j where j.owner = r.owner and j.job_digest = r.job_digest)
              and (p_job_id is null or r.job_digest = v_job)
              and (p_label is null or r.label like p_label)
              and p_series is null
              and (p_since is null or r.decided_at >= p_since)
              and (p_states is null or s.state = any (p_states))
              and (p_ended_after is null or r.status = 'launching' or r.decided_at >= p_ended_after)
              and (v_admin or r.owner = any (v_mine))
            order by r.decided_at desc
            limit p_limit
        ), both_kinds as (
            select * from registered union all select * from unregistered
        )
        select b.owner, b.job_id, b.label, b.series, b.generation, b.kind, b.state, b.attempt, b.running_pid,
               b.launched_by, b.registered_at, b.launched_at, b.ended_at, b.row_count, b.command_tag, b.sqlstate,
               b.message, b.detail, b.hint, b.context, b.cancelled_by, b.reason, b.worker_pid, b.started_at, b.cause,
               b.has_launcher
        from both_kinds b
        order by b.at desc, b.job_id
        limit p_limit;
end $$;

-- The same without the last of these filters, which came later; the view of jobs stands on it.
create or replace function @schema@.list_jobs(
    p_job_id text default null, p_label text default null, p_series text default null, p_since timestamptz default null,
    p_states text[] default null, p_limit bigint default null
)
    returns table (
        owner text, job_id text, label text, series text, generation bigint, kind text, state text, attempt int,
        running_pid int, launched_by text, registered_at timestamptz, launched_at timestamptz, ended_at timestamptz,
        row_count bigint, command_tag text, sqlstate text, message text, detail text, hint text, context text,
        cancelled_by text, reason text, worker_pid int, started_at timestamptz, cause text,
        has_launcher boolean
    )
    language sql volatile
    set search_path = pg_catalog, pg_temp
as $$
    select * from @schema@.find_jobs(p_job_id, p_label, p_series, p_since, p_states, p_limit)
$$;

-- Jobs of some series (a pattern of LIKE) that are at work, or may begin yet, while the session that registered their
-- launch is gone, and of which somebody said what is to become of them then. Another process may wait for them by now:
-- who asks has to know whether anybody still wants them.
create or replace function @schema@.orphans(p_series text, p_job_id text default null)
    returns table (
        owner text, job_id text, label text, series text, state text, launched_by text, when_orphaned text
    )
    language sql volatile security definer
    set search_path = pg_catalog, pg_temp
as $$
    with unended as materialized (
        -- What ended has an outcome, or a receipt where nobody was there to write one down.
        select j.owner, j.job_id, j.when_orphaned
        from @schema@.job j
        left join pg_stat_activity a on a.pid = j.launcher_pid and a.datname = current_database()
        where j.when_orphaned is not null and j.outcome is null and a.pid is null
          and (p_series is null or j.series like p_series)
          and (p_job_id is null or j.job_digest = @schema@.digest(p_job_id))
          and not exists (
              select from @schema@.receipt r
              where r.owner = j.owner and r.job_digest = j.job_digest and r.status <> 'launching')
    )
    select l.owner, l.job_id, l.label, l.series, l.state, l.launched_by, u.when_orphaned
    from unended u
    cross join lateral @schema@.list_jobs(p_job_id => u.job_id, p_states => array['running', 'waiting']) l
    where l.owner = u.owner and not l.has_launcher
    order by l.launched_at, l.job_id
$$;

-- What the history keeps of one job beside its line: the SQL, the attempts before the latest one, and the number of
-- rows that each of its statements kept. No line where there is no such job, or none that the login may see.
create or replace function @schema@.job_detail(p_owner text, p_job_id text)
    returns table (statement text, past_attempts jsonb, kept jsonb)
    language sql stable security definer
    set search_path = pg_catalog, pg_temp
as $$
    select j.statement,
           coalesce((
               select jsonb_agg(to_jsonb(p) - 'owner' - 'job_digest' order by p.attempt)
               from @schema@.past_attempt p where p.owner = j.owner and p.job_digest = j.job_digest), '[]'),
           coalesce((
               select jsonb_agg(
                   jsonb_build_object('statement', s.statement, 'row_count', s.row_count) order by s.statement)
               from @schema@.row_set s where s.owner = j.owner and s.job_digest = j.job_digest), '[]')
    from @schema@.job j
    where j.owner = p_owner and j.job_digest = @schema@.digest(p_job_id) and @schema@.is_mine(j.owner)
$$;

-- For people.
create or replace view @schema@.jobs as select * from @schema@.list_jobs();
comment on view @schema@.jobs is
    'The true state of every job that the login may see: waiting, running, committed, cancelled, failed, lost, unknown.';
