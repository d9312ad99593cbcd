-- Version 5 of the schema: a supervisor is told at once that its worker has ended, and jobs are found sooner.
-- The functions of earlier versions keep their arguments, so that processes that run with them go on.

-- As in version 1, but that the history has the beginning of the work too. Says how a supervised job ended, in the
-- supervisor or by whoever found it out: 'committed', or 'failed' and 'unlaunched', which free the receipt for another
-- attempt. Returns whether there was anything to settle.
create or replace function @schema@.end_supervision(
    p_owner text, p_job_id text, p_attempt int, p_outcome text, p_worker_pid int, p_row_count bigint,
    p_command_tag text, p_error text[]
) returns boolean
    language plpgsql volatile security definer
    set search_path = pg_catalog, pg_temp
as $$
declare
    v_owner text := @schema@.owner_for(p_owner);
    v_job   bytea := @schema@.digest(p_job_id);
    v_found boolean;
    v_began timestamptz;
begin
    perform @schema@.require_read_committed();
    if p_outcome = 'committed' then
        update @schema@.receipt r set status = 'committed', worker_pid = coalesce(p_worker_pid, r.worker_pid),
               decided_at = clock_timestamp(), decided_by = session_user
            where r.owner = v_owner and r.job_digest = v_job and r.attempt is not distinct from p_attempt
              and r.status = 'launching'
            returning r.started_at into v_began;
    else
        delete from @schema@.receipt r
            where r.owner = v_owner and r.job_digest = v_job and r.attempt is not distinct from p_attempt
              and r.status = 'launching';
    end if;
    v_found := found;
    if v_found and p_outcome <> 'unlaunched' then
        perform @schema@.record(
            p_owner, p_job_id, p_attempt, p_outcome, p_worker_pid, v_began, p_row_count, p_command_tag, p_error, null);
        perform @schema@.tell(v_owner, p_job_id);
    end if;
    return v_found;
end $$;

-- As in version 1, but that the server waits for the worker's end between the looks at it, in place of a sleep.
-- p_calls: that wait besides, with the handle and milliseconds; a client of the version before gives none.
create or replace procedure @schema@.supervise(
    p_owner text, p_job_id text, p_series text, p_generation bigint, p_label text, p_attempt int, p_sql_digest bytea,
    p_sql text, p_queue_size int, p_role text, p_name text, p_settings text[], p_calls text[], p_redact_details boolean
)
    language plpgsql
as $$
declare
    v_marker  text;
    v_own     text[];
    v_pid     int;
    v_cookie  bigint;
    v_rows    bigint;
    v_count   bigint;
    v_told    text;
    v_padded  boolean := false;
    v_tag     text;
    v_done    boolean := false;
    v_failed  boolean := false;
    v_read    boolean := false;
    v_ready   boolean := false;
    v_named   boolean := false;
    v_cancel  boolean := false;
    v_seen    boolean := false;
    v_blocked boolean := false;
    v_error   text[];
    v_polls   int := 0;  -- bigint % int is no operator of pg_catalog: somebody could make one
    v_name    text := pg_catalog.current_setting('application_name');
    v_role    text := pg_catalog.current_setting('role');  -- ALTER ROLE ... SET role
    v_withheld constant text := '(withheld: redact_details)';
begin
    perform @schema@.await_no_standby();
    perform @schema@.begin_supervision(
        p_owner, p_job_id, p_series, p_generation, p_label, p_attempt, p_sql_digest);
    commit;
    v_marker := @schema@.marker(coalesce(p_owner, session_user::text), p_job_id);
    -- Whatever fails in this block before the launch is taken back with it, and nothing has been launched.
    begin
        for i in 1 .. pg_catalog.cardinality(p_settings) / 2 loop
            v_own[i] := pg_catalog.current_setting(p_settings[2 * i - 1], true);
            perform pg_catalog.set_config(p_settings[2 * i - 1], p_settings[2 * i], false);
        end loop;
        perform pg_catalog.set_config('application_name', p_name, false);
        if p_role is not null then
            perform pg_catalog.set_config('role', p_role, false);
        end if;
        v_ready := true;
        execute p_calls[1] into v_pid, v_cookie using p_sql, p_queue_size, p_label;
        if p_role is not null then
            perform pg_catalog.set_config('role', v_role, false);
        end if;
        perform pg_catalog.set_config('application_name', v_name, false);
        for i in 1 .. pg_catalog.cardinality(p_settings) / 2 loop
            perform pg_catalog.set_config(p_settings[2 * i - 1], coalesce(v_own[i], ''), false);
        end loop;
    exception when others then
        -- Any other error of the launch itself may have come after it: the claimed receipt then says so.
        if v_ready and (
            v_pid is not null or sqlstate not in ('53000', '53400', '53100', '42501', '42883', '3F000')
        ) then
            raise;
        end if;
        v_error := array[sqlstate, sqlerrm];
    end;
    if p_redact_details and v_error is not null then
        v_error[2] := v_withheld;
    end if;
    if v_error is not null then
        perform @schema@.await_no_standby();
        perform @schema@.end_supervision(
            p_owner, p_job_id, p_attempt, case when v_error[1] in ('53000', '53400', '53100') then 'unlaunched' else 'failed' end,
            null, null, null, v_error);
        commit;
        -- Its report comes before its end: the next supervisor must not meet these locks.
        perform pg_catalog.pg_advisory_unlock_all();
        if v_error[1] in ('53000', '53400', '53100') then
            raise exception using errcode = 'PB004', message = 'no worker slot for the supervised worker';
        end if;
        return;
    end if;

    while not v_done loop
        commit;
        begin
            -- At a quick pace first: a supervisor that ends before it saw its worker leaves the job unknown.
            if p_calls[5] is null then
                perform pg_catalog.pg_sleep(case when v_polls < 4 then 0.001 when v_polls < 20 then 0.01 else 0.05 end);
            else
                execute p_calls[5] using v_pid, v_cookie, case when v_polls < 4 then 1 when v_polls < 20 then 10 else 50 end;
            end if;
            execute p_calls[2] into v_rows, v_tag, v_done, v_failed using v_pid, v_cookie;
            v_polls := v_polls + 1;
            -- It bears the marker before its first statement, which may take it off.
            v_seen := not v_done and not v_named and exists (
                select from pg_catalog.pg_stat_activity a
                where a.pid = v_pid and a.datname = pg_catalog.current_database()
                  and (pg_catalog.starts_with(a.application_name, v_marker) or a.state = 'active'));
            if v_seen then
                perform @schema@.await_no_standby();
                perform @schema@.follow(p_owner, p_job_id, p_attempt, v_pid);
            end if;
            -- Nobody reads its output, and it waits for that: read it now.
            v_blocked := not v_done and v_polls % 20 = 0 and exists (
                select from pg_catalog.pg_stat_activity a
                where (pg_catalog.starts_with(a.application_name, v_marker) or a.pid = v_pid)
                  and a.datname = pg_catalog.current_database()
                  and a.wait_event in ('MessageQueuePutMessage', 'ClientWrite'));
            v_named := v_named or v_seen;
        exception when query_canceled then
            v_cancel := true;
        end;
        -- Again until it is accepted: a worker that starts does not take it.
        if v_cancel and not v_done then
            begin
                v_cancel := not coalesce(pg_catalog.pg_cancel_backend(@schema@.supervised(p_owner, p_job_id)), false);
            exception when insufficient_privilege then
                v_cancel := false;  -- whoever cancelled this one may do more than it may
            end;
        end if;
        exit when v_blocked;
    end loop;
    if v_failed then
        execute p_calls[3] into v_error using v_pid, v_cookie;
    else
        -- Read to its end, which comes after the commit: "completed" and a command tag are no proof.
        begin
            execute p_calls[4] into v_count, v_told, v_padded using v_pid, v_cookie;
            v_read := true;
            -- What result_info tells is of the last statement: of the one behind the job's own, where there is one.
            if v_told is not null and (v_padded or not v_done) then
                v_tag := pg_catalog.regexp_replace(v_told, '( [0-9]+)+$', '');
                v_rows := coalesce(pg_catalog.substring(v_told, '[0-9]+$')::bigint, 0);
            elsif not v_done then
                v_rows := v_count;
            end if;
        exception when others then
            v_error := array[sqlstate, sqlerrm];
        end;
    end if;
    if p_redact_details and v_error is not null then
        v_error[2] := v_withheld;
        for i in 3 .. least(pg_catalog.cardinality(v_error), 5) loop
            v_error[i] := null;
        end loop;
    end if;
    perform @schema@.await_no_standby();
    if v_read then
        perform @schema@.end_supervision(
            p_owner, p_job_id, p_attempt, 'committed', v_pid, v_rows, nullif(v_tag, ''), null);
    elsif v_failed or (v_error[1] not in ('08006', '55000') and v_error[1] not like '42%') then
        perform @schema@.end_supervision(p_owner, p_job_id, p_attempt, 'failed', v_pid, null, null, v_error);
    end if;
    -- Otherwise nobody can tell how it ended, and the claimed receipt says so.
    commit;
    -- Not with its session, which a stand-in's launcher may keep.
    perform pg_catalog.pg_advisory_unlock_all();
end $$;

-- For find_jobs.
create index job_ended on @schema@.job (ended_at);

-- The true state of jobs, newest launch first. Filters that are null are none; p_label and p_series are patterns of LIKE.
-- What is registered is found by an index, whatever the history's length. With p_limit, a receipt of a worker's whose line
-- of the history somebody deleted is left out: to find such takes a look at every receipt. With p_ended_after, jobs are
-- left out that are written down as ended before then: for a view that looks every other second.
--
-- Planned for each call: which filters there are decides the plan, and the plan for any of them, which a session has from
-- its sixth call on, takes ten times as long for some thousand jobs.
create function @schema@.find_jobs(
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
            -- Once for each job, and not for each job and lock: a session's sixth call has a plan for few locks.
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

-- As before, without the newest of its filters; the view pgbg.jobs stands on it.
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

revoke all on function @schema@.find_jobs(text, text, text, timestamptz, text[], bigint, timestamptz) from public;
grant execute on function @schema@.find_jobs(text, text, text, timestamptz, text[], bigint, timestamptz)
    to pgbackground_role;
