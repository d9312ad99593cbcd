-- What a call that drives a job sees of it.

-- A look: first the locks, and only then, with a later snapshot, the receipts. A commit becomes
-- visible before its locks go, so in this order a committed job is never seen without both.
create or replace function @schema@.look(p_owners text[], p_jobs bytea[], p_series bytea[])
    returns table (
        number int, looked_at timestamptz, holder_pid int, holder_user text, holder_is_owner boolean,
        holder_job text, holder_generation bigint, holds_this_job boolean, marked_pid int,
        may_begin boolean, status text, receipt_attempt int, receipt_pid int, receipt_started_at timestamptz,
        cause text, of_try text, reason text, decided_by text, decided_at timestamptz,
        newest bigint, generation bigint, attempt int, sql_digest bytea, outcome text, ended_at timestamptz,
        reported_at timestamptz, row_count bigint,
        command_tag text, sqlstate text, message text, detail text, hint text, context text, schema_name text,
        table_name text, column_name text, constraint_name text
    )
    language plpgsql volatile security definer
    set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
    v_owners text[];
    v_keys   bigint[];
    v_pids   int[];
begin
    perform @schema@.require_read_committed();
    v_owners := array(select @schema@.owner_for(o) from unnest(p_owners) with ordinality as u (o, n) order by n);
    select array_agg((l.classid::bigint << 32) | l.objid::bigint), array_agg(l.pid) into v_keys, v_pids
        from pg_locks l
        where l.locktype = 'advisory' and l.objsubid = 1 and l.granted
          and l.database = (select d.oid from pg_database d where d.datname = current_database());
    return query
        with held as materialized (
            select h.key, h.pid from unnest(v_keys, v_pids) as h (key, pid)
        ), wanted as (
            select u.n::int as n, u.o as owner, u.j as job, u.s as given_series
            from unnest(v_owners, p_jobs, p_series) with ordinality as u (o, j, s, n)
        )
        select w.n, clock_timestamp(), h.pid, a.usename::text,
               -- Its backend may have ended since its lock was seen: that is no stranger, and the receipts are of before.
               a.pid is null or @schema@.is_member(a.usesysid, w.owner),
               other.job_id, other.generation, h.pid is not null and h.pid = this.pid,
               case when r.status = 'launching' then
                   @schema@.marked(r.owner, r.job_id, r.worker_pid, r.decided_by, r.supervisor_pid) end,
               -- A restart of the server leaves nothing that could begin.
               coalesce(r.status = 'launching' and r.worker_pid is null
                   and r.server_started = pg_postmaster_start_time(), false),
               r.status, r.attempt, r.worker_pid, r.started_at, r.cause, r.of_try, r.reason, r.decided_by,
               r.decided_at, s.newest, k.generation, k.attempt, coalesce(r.sql_digest, k.sql_digest), k.outcome,
               k.ended_at, k.reported_at, k.row_count, k.command_tag, k.sqlstate, k.message, k.detail, k.hint,
               k.context, k.schema_name, k.table_name, k.column_name, k.constraint_name
        from wanted w
        left join @schema@.job k on k.owner = w.owner and k.job_digest = w.job
        -- Without a series given, the one that the job was registered with.
        cross join lateral (select coalesce(w.given_series, k.series_digest, w.job) as series) d
        left join held whole on whole.key = @schema@.lock_key('series', w.owner, d.series)
        left join held this on this.key = @schema@.lock_key('job', w.owner, w.job)
        -- Without the lock of the series: a worker at its very end, or a stranger.
        cross join lateral (select coalesce(whole.pid, this.pid) as pid) h
        left join pg_stat_activity a on a.pid = h.pid
        left join @schema@.receipt r on r.owner = w.owner and r.job_digest = w.job
        left join lateral (
            select j.job_id, j.generation
            from @schema@.job j
            join held o on o.pid = h.pid and o.key = @schema@.lock_key('job', j.owner, j.job_digest)
            where j.owner = w.owner and j.series_digest = d.series and h.pid is distinct from this.pid
            limit 1
        ) other on true
        left join @schema@.series s on s.owner = w.owner and s.series_digest = d.series
        order by w.n;
end $$;

-- The receipt of a job that committed, by its key alone.
create or replace function @schema@.committed(
    p_owner text, p_job_id text, out attempt int, out worker_pid int, out started_at timestamptz
) returns setof record
    language sql stable security definer
    set search_path = pg_catalog, pg_temp
as $$
    select r.attempt, r.worker_pid, r.started_at from @schema@.receipt r
        where r.owner = @schema@.owner_for(p_owner) and r.job_digest = @schema@.digest(p_job_id)
          and r.status = 'committed'
$$;

-- What the supervisor of a job wrote down that committed, by the key and the attempt alone.
create or replace function @schema@.supervised_end(
    p_owner text, p_job_id text, p_attempt int, out worker_pid int, out started_at timestamptz, out ended_at timestamptz,
    out row_count bigint, out command_tag text
) returns setof record
    language sql stable security definer
    set search_path = pg_catalog, pg_temp
as $$
    select r.worker_pid, r.started_at, j.ended_at, j.row_count, j.command_tag
    from @schema@.receipt r join @schema@.job j on j.owner = r.owner and j.job_digest = r.job_digest
    where r.owner = @schema@.owner_for(p_owner) and r.job_digest = @schema@.digest(p_job_id)
      and r.status = 'committed' and r.attempt = p_attempt and j.outcome = 'committed' and j.attempt = p_attempt
$$;
