-- Writing into the history, for the launching side and supervisors, and pruning it.

-- Writes an attempt's outcome into the history: into the job's line, unless a later attempt's end is there
-- already; and to the past attempts, where a later one has begun. p_reported_at: null, where nobody is told of it yet.
create or replace function @schema@.record(
    p_owner text, p_job_id text, p_attempt int, p_outcome text, p_worker_pid int, p_started_at timestamptz,
    p_row_count bigint, p_command_tag text, p_error text[], p_reported_at timestamptz default clock_timestamp()
) returns boolean
    language plpgsql volatile security definer
    set search_path = pg_catalog, pg_temp
as $$
declare
    v_latest int;
begin
    update @schema@.job j set
        outcome = p_outcome, ended_at = clock_timestamp(), reported_at = p_reported_at,
        -- Where there is a supervisor, the launching side gives no pid: the supervisor has written the worker's.
        worker_pid = coalesce(p_worker_pid, j.worker_pid),
        started_at = p_started_at, row_count = p_row_count, command_tag = p_command_tag, sqlstate = p_error[1],
        message = @schema@.sendable(p_error[2]), detail = @schema@.sendable(p_error[3]),
        hint = @schema@.sendable(p_error[4]), context = @schema@.sendable(p_error[5]), schema_name = p_error[6],
        table_name = p_error[7], column_name = p_error[8], constraint_name = p_error[9]
    where j.owner = @schema@.owner_for(p_owner) and j.job_digest = @schema@.digest(p_job_id)
      -- A later attempt may be one whose worker was turned away: it must not hide how the earlier one ended.
      and (j.attempt = p_attempt or j.outcome is null or p_outcome = 'committed')
    returning j.attempt into v_latest;
    if v_latest is distinct from p_attempt then
        update @schema@.past_attempt p set
            outcome = p_outcome, ended_at = clock_timestamp(), worker_pid = coalesce(p_worker_pid, p.worker_pid),
            sqlstate = p_error[1], message = @schema@.sendable(p_error[2])
        where p.owner = @schema@.owner_for(p_owner) and p.job_digest = @schema@.digest(p_job_id)
          and p.attempt = p_attempt and p.outcome is null;
    end if;
    return v_latest is not null;
end $$;

-- Says that somebody was told how an attempt ended.
create or replace function @schema@.reported(p_owner text, p_job_id text, p_attempt int) returns void
    language sql volatile security definer
    set search_path = pg_catalog, pg_temp
as $$
    update @schema@.job j set reported_at = clock_timestamp()
        where j.owner = @schema@.owner_for(p_owner) and j.job_digest = @schema@.digest(p_job_id)
          and j.attempt = p_attempt and j.reported_at is null
$$;

-- Forgets what ended longer ago than p_older_than. A retry that comes later than that runs the job again. A receipt's
-- age counts from the end of its job as somebody wrote it down, or from when this found that nobody had; it never goes
-- before its line of the history is as old.
create or replace function @schema@.prune(p_older_than interval, out receipts bigint, out jobs bigint)
    language plpgsql volatile security definer
    set search_path = pg_catalog, pg_temp
as $$
declare
    v_before timestamptz := clock_timestamp() - p_older_than;
    v_held   bigint[];
    v_empty  tid[];
begin
    perform @schema@.require_read_committed();
    v_held := array(
        select (l.classid::bigint << 32) | l.objid::bigint from pg_locks l
        where l.locktype = 'advisory' and l.objsubid = 1 and l.granted
          and l.database = (select d.oid from pg_database d where d.datname = current_database()));
    delete from @schema@.receipt r
        using (
            select k.ctid as tid, greatest(j.launched_at, j.ended_at) as touched_at, j.outcome
            from @schema@.receipt k
            left join @schema@.job j on j.owner = k.owner and j.job_digest = k.job_digest
        ) e
        where e.tid = r.ctid and @schema@.is_mine(r.owner)
          and coalesce(e.touched_at, '-infinity') < v_before
          -- The work's own transaction (xid) wrote the receipt at its start.
          and (r.xid is not null and e.outcome = 'committed'
               or case when r.xid is null then r.decided_at else r.found_at end < v_before)
          -- A job that calls this does not take its own receipt away.
          and coalesce(r.xid <> pg_current_xact_id_if_assigned(), true)
          -- One that is at work claimed its receipt at its start, however long ago that was.
          and not (r.status = 'launching' and (
              @schema@.marked(r.owner, r.job_id) is not null
              or exists (
                  select from pg_stat_activity a where a.pid = r.worker_pid and a.datname = current_database())
              or @schema@.lock_key('job', r.owner, r.job_digest) = any (v_held)));
    get diagnostics receipts = row_count;
    update @schema@.receipt r set found_at = clock_timestamp()
        where r.xid is not null and r.found_at is null and @schema@.is_mine(r.owner)
          and coalesce(r.xid <> pg_current_xact_id_if_assigned(), true)
          and not exists (
              select from @schema@.job j
              where j.owner = r.owner and j.job_digest = r.job_digest and j.outcome = 'committed');
    -- A job without a receipt may still be running or be retried; its newest launch says how old it is.
    delete from @schema@.job j
        where @schema@.is_mine(j.owner) and greatest(j.launched_at, j.ended_at) < v_before
          and not exists (select from @schema@.receipt r where r.owner = j.owner and r.job_digest = j.job_digest)
          and @schema@.lock_key('job', j.owner, j.job_digest) <> all (v_held);
    get diagnostics jobs = row_count;
    -- A registration holds the lock of its series' row until its job is there to see: first the locks, then a look.
    v_empty := array(
        select s.ctid from @schema@.series s
        where @schema@.is_mine(s.owner) and not exists (
            select from @schema@.job j where j.owner = s.owner and j.series_digest = s.series_digest)
        for update skip locked);
    delete from @schema@.series s
        where s.ctid = any (v_empty) and not exists (
            select from @schema@.job j where j.owner = s.owner and j.series_digest = s.series_digest);
end $$;
