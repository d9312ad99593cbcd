-- Supervision: a worker that launches another one and tells how it ended.

-- Takes the locks of a series and of a job for as long as the session lives; false: somebody else has one of them.
create or replace function @schema@.try_lock(p_owner text, p_job_id text, p_series text) returns boolean
    language sql volatile
begin atomic
    select pg_try_advisory_lock(
            @schema@.lock_key('series', @schema@.owner_for(p_owner), @schema@.digest(p_series)))
        and pg_try_advisory_lock(@schema@.lock_key('job', @schema@.owner_for(p_owner), @schema@.digest(p_job_id)));
end;

-- What begin_supervision does once it has its locks, in one statement, as try_begin does what begin_work does. True:
-- the receipt is claimed. Null: something is against it, and begin_supervision raises the error that says what. The
-- locks are taken by an earlier statement (try_lock), so that this one sees what the supervisor wrote that had them
-- before.
create or replace function @schema@.try_claim(
    p_owner text, p_job_id text, p_series text, p_generation bigint, p_label text, p_attempt int, p_sql_digest bytea
) returns boolean
    language sql volatile security definer
    set search_path = pg_catalog, pg_temp
begin atomic
    insert into @schema@.receipt
        (owner, job_digest, status, job_id, label, attempt, sql_digest, started_at, supervisor_pid, server_started)
    select
        @schema@.owner_for(p_owner), @schema@.digest(p_job_id), 'launching', p_job_id, p_label, p_attempt, p_sql_digest,
        clock_timestamp(), pg_backend_pid(), pg_postmaster_start_time()
    where case when current_setting('transaction_isolation') <> 'read committed' then false
        else not @schema@.is_borne(@schema@.marker(@schema@.owner_for(p_owner), p_job_id))
            and not exists (
                select from @schema@.job j
                where j.owner = @schema@.owner_for(p_owner) and j.job_digest = @schema@.digest(p_job_id)
                  and j.outcome = 'failed' and j.reported_at is null)
            and (select s.newest from @schema@.series s
                 where s.owner = @schema@.owner_for(p_owner) and s.series_digest = @schema@.digest(p_series))
                <= p_generation
        end
    on conflict do nothing
    returning true;
end;

-- In the supervisor, before the launch: takes the locks for as long as its session lives, and claims the receipt.
-- Committed before the launch, so that a supervisor that dies leaves a trace, and nothing is launched twice. Much like
-- begin_work, and without a function that both call: in other isolation levels than READ COMMITTED, that would be one
-- more for each worker to find and to compile.
create or replace function @schema@.begin_supervision(
    p_owner text, p_job_id text, p_series text, p_generation bigint, p_label text, p_attempt int, p_sql_digest bytea
) returns void
    language plpgsql volatile security definer
    set search_path = pg_catalog, pg_temp
as $$
declare
    v_owner  text := @schema@.owner_for(p_owner);
    v_job    bytea := @schema@.digest(p_job_id);
    v_series bytea := @schema@.digest(p_series);
    v_status text;
begin
    perform @schema@.require_read_committed();
    if not @schema@.try_lock(v_owner, p_job_id, p_series) then
        raise exception using errcode = 'PB002', message = 'another worker holds the series of this job';
    end if;
    -- The worker of an earlier supervisor outlives it, and its lock.
    if @schema@.marked(v_owner, p_job_id) is not null then
        raise exception using errcode = 'PB002', message = 'an earlier worker of this job is at work';
    end if;
    if exists (
        select from @schema@.job j
        where j.owner = v_owner and j.job_digest = v_job and j.outcome = 'failed' and j.reported_at is null
    ) then
        raise exception using errcode = 'PB002', message = 'an earlier launch of this job failed, and nobody was told yet';
    end if;
    if exists (
        select from @schema@.series s
        where s.owner = v_owner and s.series_digest = v_series and s.newest > p_generation
    ) then
        raise exception using errcode = 'PB003', message = 'a newer generation of this job is registered';
    end if;
    begin
        insert into @schema@.receipt
            (owner, job_digest, status, job_id, label, attempt, sql_digest, started_at, supervisor_pid, server_started)
        values
            (v_owner, v_job, 'launching', p_job_id, p_label, p_attempt, p_sql_digest, clock_timestamp(),
             pg_backend_pid(), pg_postmaster_start_time());
    exception when unique_violation then
        select r.status into v_status from @schema@.receipt r where r.owner = v_owner and r.job_digest = v_job;
        raise exception using
            errcode = case v_status when 'cancelled' then 'PB003' when 'launching' then 'PB002' else 'PB001' end,
            message = format('this job has a receipt: %s', v_status);
    end;
end $$;

-- Writes the worker's pid into the claimed receipt, once its supervisor, or whoever came after that, has seen it at
-- work. Without it, the worker of a supervisor that is gone may begin at any time, and nobody launches another one.
create or replace function @schema@.follow(p_owner text, p_job_id text, p_attempt int, p_worker_pid int) returns void
    language sql volatile security definer
    set search_path = pg_catalog, pg_temp
as $$
    update @schema@.receipt r set worker_pid = p_worker_pid
        where r.owner = @schema@.owner_for(p_owner) and r.job_digest = @schema@.digest(p_job_id)
          and r.attempt = p_attempt and r.status = 'launching' and r.supervisor_pid <> p_worker_pid
$$;

-- The worker of a claimed job that is at work, for whoever wants to cancel it; null where none is seen.
create or replace function @schema@.supervised(p_owner text, p_job_id text) returns int
    language sql volatile security definer
    set search_path = pg_catalog, pg_temp
as $$
    select @schema@.marked(r.owner, r.job_id, r.worker_pid, r.decided_by, r.supervisor_pid) from @schema@.receipt r
        where r.owner = @schema@.owner_for(p_owner) and r.job_digest = @schema@.digest(p_job_id)
          and r.status = 'launching'
$$;

-- Writes down how a supervised job ended, for the supervisor or whoever found it out: 'committed', or 'failed' and
-- 'unlaunched', which free the receipt for another attempt. Returns false where the receipt was not claimed any more.
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

-- What may be told of an error whose details are withheld: its code and the names of objects (ledger.record has the
-- order).
create or replace function @schema@.redacted(p_error text[]) returns text[]
    language sql immutable strict
    return array[p_error[1], '(withheld: redact_details)', null, null, null] || p_error[6:];

-- In a supervisor, after the launch: polls its worker until it has ended, or waits for its output to be read, and hands
-- a cancel on to it. It commits at each poll: every kind of sleep holds a snapshot, and CREATE INDEX CONCURRENTLY would
-- wait for it for ever. No EXCEPTION block may stand around a COMMIT, here and where this is called.
--
-- The pauses between the polls grow with the worker's age, a fiftieth of it, up to two seconds: a thousand supervisors
-- that polled twenty times a second would keep seven cores busy. The extension's wait returns within a tenth of a second
-- of the worker's end all the same; a longer one only has an index build that begins meanwhile wait for its snapshot.
--
-- p_marker: what the worker's name begins with; null for one that is found by its lock. p_calls: as supervise has them.
-- The rest is what result_info told last; p_done is false where the output waits.
create or replace procedure @schema@.await_worker(
    p_owner text, p_job_id text, p_attempt int, p_marker text, p_calls text[], p_pid int, p_cookie bigint,
    inout p_rows bigint, inout p_tag text, inout p_done boolean, inout p_failed boolean
)
    language plpgsql
as $$
declare
    v_named   boolean := p_marker is null;  -- the claimed receipt has the worker's pid, or there is none
    v_seen    boolean;
    v_cancel  boolean := false;
    v_blocked boolean := false;
    v_polls   int := 0;
    v_pause   int;  -- milliseconds
    v_since   int := 0;  -- milliseconds since its output was looked at
begin
    while not p_done and not v_blocked loop
        commit;
        -- At a quick pace first: a supervisor that ends before it saw its worker leaves the job unknown.
        v_pause := case when v_polls < 4 then 1 when v_polls < 20 then 10 when v_polls = 20 or v_cancel or not v_named
            then 50 else least(2000, v_pause + v_pause / 50) end;
        begin
            if p_calls[5] is null then
                perform pg_catalog.pg_sleep(v_pause / 1000.0);
            else
                execute p_calls[5] using p_pid, p_cookie, v_pause;
            end if;
            execute p_calls[2] into p_rows, p_tag, p_done, p_failed using p_pid, p_cookie;
            v_polls := v_polls + 1;
            v_since := v_since + v_pause;
            -- It bears the marker before its first statement, which may take it off.
            v_seen := not p_done and not v_named and exists (
                select from pg_catalog.pg_stat_get_activity(p_pid) a
                where (pg_catalog.starts_with(a.application_name, p_marker) or a.state = 'active')
                  and a.datid = (select o.datid from pg_catalog.pg_stat_get_activity(pg_catalog.pg_backend_pid()) o));
            if v_seen then
                perform @schema@.await_no_standby();
                perform @schema@.follow(p_owner, p_job_id, p_attempt, p_pid);
            end if;
            -- Nobody reads its output, and it waits for that: it is to be read now.
            if not p_done and v_since >= greatest(1000, v_pause * 4) then
                v_since := 0;
                v_blocked := exists (
                    select from pg_catalog.pg_stat_activity a
                    where (pg_catalog.starts_with(a.application_name, p_marker) or a.pid = p_pid)
                      and a.datname = pg_catalog.current_database()
                      and a.wait_event in ('MessageQueuePutMessage', 'ClientWrite'));
            end if;
            v_named := v_named or v_seen;
        exception when query_canceled then
            v_cancel := true;
        end;
        -- Again until it is accepted: a worker that starts does not take it.
        if v_cancel and not p_done then
            begin
                v_cancel := not coalesce(pg_catalog.pg_cancel_backend(case when p_marker is null
                    then @schema@.watched(p_owner, p_job_id) else @schema@.supervised(p_owner, p_job_id) end), false);
            exception when insufficient_privilege then
                v_cancel := false;  -- whoever cancelled this one may do more than it may
            end;
        end if;
    end loop;
end $$;

-- The supervisor itself: the single statement of a worker, so that it can commit. It can be neither SECURITY DEFINER
-- nor have a SET clause (2D000), so every name is qualified.
--
-- p_calls: the statements of pg_background that it uses, as the client knows their names: launch, result_info,
-- error_info, result (read to its end: the number of rows, and the last tag or null), and the wait for the worker's
-- end, with the handle and milliseconds; a client of version 4 and before gives no wait, and has it sleep. p_name: the
-- application_name of the worker, which begins with the marker of its job. p_settings: names and values for the worker,
-- in turn. p_redact_details: keep of an error its code and the names of objects only.
--
-- A cancel of this one is meant for the job: it is handed on to the worker, and the job ends as the worker does.
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
    v_claimed boolean;
    v_ready   boolean := false;
    v_error   text[];
    v_name    text := pg_catalog.current_setting('application_name');
    v_role    text := pg_catalog.current_setting('role');  -- ALTER ROLE ... SET role
begin
    perform @schema@.await_no_standby();
    v_claimed := @schema@.try_lock(p_owner, p_job_id, p_series);
    if v_claimed then
        v_claimed := @schema@.try_claim(
            p_owner, p_job_id, p_series, p_generation, p_label, p_attempt, p_sql_digest);
    end if;
    if v_claimed is not true then
        perform @schema@.begin_supervision(
            p_owner, p_job_id, p_series, p_generation, p_label, p_attempt, p_sql_digest);
    end if;
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
    if p_redact_details then
        v_error := @schema@.redacted(v_error);
    end if;
    if v_error is not null then
        perform @schema@.await_no_standby();
        perform @schema@.end_supervision(
            p_owner, p_job_id, p_attempt,
            case when v_error[1] in ('53000', '53400', '53100') then 'unlaunched' else 'failed' end,
            null, null, null, v_error);
        commit;
        -- Its report comes before its end: the next supervisor must not meet these locks.
        perform pg_catalog.pg_advisory_unlock_all();
        if v_error[1] in ('53000', '53400', '53100') then
            raise exception using errcode = 'PB004', message = 'no worker slot for the supervised worker';
        end if;
        return;
    end if;

    call @schema@.await_worker(
        p_owner, p_job_id, p_attempt, v_marker, p_calls, v_pid, v_cookie, v_rows, v_tag, v_done, v_failed);
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
    if p_redact_details then
        v_error := @schema@.redacted(v_error);
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

-- In the supervisor of a worker that writes its own receipt, before the launch: makes it the job's launcher, so that
-- nobody calls the job lost between its worker's end and the line in the history.
create or replace function @schema@.begin_watch(p_owner text, p_job_id text, p_attempt int) returns void
    language sql volatile security definer
    set search_path = pg_catalog, pg_temp
as $$
    update @schema@.job j set launcher_pid = pg_backend_pid()
        where j.owner = @schema@.owner_for(p_owner) and j.job_digest = @schema@.digest(p_job_id)
          and j.attempt = p_attempt
$$;

-- The worker that holds a job's lock, for its supervisor to hand a cancel on to; null where none is seen. Anybody can
-- take the lock.
create or replace function @schema@.watched(p_owner text, p_job_id text) returns int
    language sql volatile security definer
    set search_path = pg_catalog, pg_temp
as $$
    select l.pid from pg_locks l join pg_stat_activity a on a.pid = l.pid
        where l.locktype = 'advisory' and l.objsubid = 1 and l.granted
          and l.database = (select d.oid from pg_database d where d.datname = current_database())
          and (l.classid::bigint << 32) | l.objid::bigint
              = @schema@.lock_key('job', @schema@.owner_for(p_owner), @schema@.digest(p_job_id))
          and @schema@.is_member(a.usesysid, @schema@.owner_for(p_owner))
        limit 1
$$;

-- Writes down, in its supervisor, how a worker ended that writes its own receipt. The receipt decides, whatever the
-- worker reported; where the worker was turned away, the job has not ended. p_kept: the number of the job's last
-- statement, if its rows are kept: they are counted there.
create or replace function @schema@.end_watch(
    p_owner text, p_job_id text, p_attempt int, p_kept int, p_row_count bigint, p_command_tag text, p_error text[]
) returns void
    language plpgsql volatile security definer
    set search_path = pg_catalog, pg_temp
as $$
declare
    v_owner   text := @schema@.owner_for(p_owner);
    v_receipt record;
    v_count   bigint := p_row_count;
    v_tag     text := p_command_tag;
begin
    perform @schema@.require_read_committed();
    select * into v_receipt from @schema@.committed(p_owner, p_job_id) c where c.attempt = p_attempt;
    if found then
        select s.row_count, s.command_tag into v_count, v_tag from @schema@.row_set s
            where s.owner = v_owner and s.job_digest = @schema@.digest(p_job_id) and s.statement = p_kept;
        if not found then
            v_count := p_row_count;
            v_tag := p_command_tag;
        end if;
        perform @schema@.record(
            p_owner, p_job_id, p_attempt, 'committed', v_receipt.worker_pid, v_receipt.started_at, v_count, v_tag, null);
    elsif p_error is not null and p_error[1] not in ('PB001', 'PB002', 'PB003') then
        perform @schema@.record(p_owner, p_job_id, p_attempt, 'failed', null, null, null, null, p_error);
    end if;
    perform @schema@.tell(v_owner, p_job_id);
end $$;

-- The supervisor of a worker that writes its own receipt: as supervise, but it claims nothing, and writes the history
-- only. Where its worker was turned away, it fails with the same code; where there is no slot for the worker, with
-- PB004. Any other error is one of its own: its worker may be at work.
--
-- It launches by itself, and not by a function that supervise has too: to find and to compile that would come before
-- the start of each worker.
--
-- p_sql: what the worker runs; its result is the tags of its statements. p_calls, p_redact_details: as supervise has
-- them. p_kept: as end_watch has it.
create or replace procedure @schema@.watch(
    p_owner text, p_job_id text, p_label text, p_attempt int, p_sql text, p_queue_size int, p_settings text[],
    p_calls text[], p_redact_details boolean, p_kept int
)
    language plpgsql
as $$
declare
    v_own     text[];
    v_pid     int;
    v_cookie  bigint;
    v_rows    bigint;
    v_tag     text;
    v_told    text;
    v_count   bigint;
    v_padded  boolean;
    v_done    boolean := false;
    v_failed  boolean := false;
    v_read    boolean := false;
    v_ready   boolean := false;
    v_error   text[];
    v_name    text := pg_catalog.current_setting('application_name');
begin
    perform @schema@.await_no_standby();
    perform @schema@.begin_watch(p_owner, p_job_id, p_attempt);
    commit;
    -- Whatever fails in this block before the launch is taken back with it, and nothing has been launched.
    begin
        for i in 1 .. pg_catalog.cardinality(p_settings) / 2 loop
            v_own[i] := pg_catalog.current_setting(p_settings[2 * i - 1], true);
            perform pg_catalog.set_config(p_settings[2 * i - 1], p_settings[2 * i], false);
        end loop;
        reset application_name;  -- so that pg_background gives the worker its own, which has the label
        v_ready := true;
        execute p_calls[1] into v_pid, v_cookie using p_sql, p_queue_size, p_label;
        perform pg_catalog.set_config('application_name', v_name, false);
        for i in 1 .. pg_catalog.cardinality(p_settings) / 2 loop
            perform pg_catalog.set_config(p_settings[2 * i - 1], coalesce(v_own[i], ''), false);
        end loop;
    exception when others then
        -- Any other error of the launch itself may have come after it.
        if v_ready and (
            v_pid is not null or sqlstate not in ('53000', '53400', '53100', '42501', '42883', '3F000')
        ) then
            raise;
        end if;
        if sqlstate in ('53000', '53400', '53100') then
            raise exception using errcode = 'PB004', message = 'no worker slot for the supervised worker';
        end if;
        v_error := array[sqlstate, sqlerrm];
    end;

    if v_error is null then
        call @schema@.await_worker(
            p_owner, p_job_id, p_attempt, null, p_calls, v_pid, v_cookie, v_rows, v_tag, v_done, v_failed);
    end if;
    if v_failed then
        execute p_calls[3] into v_error using v_pid, v_cookie;
    elsif v_error is null then
        begin
            execute p_calls[4] into v_count, v_told, v_padded using v_pid, v_cookie;
            v_read := true;
            v_tag := pg_catalog.regexp_replace(v_told, '( [0-9]+)+$', '');
            v_rows := coalesce(pg_catalog.substring(v_told, '[0-9]+$')::bigint, 0);
        exception when others then
            -- Those codes are about the way to the worker, and tell nothing of its end.
            if sqlstate not in ('08006', '42704', '55000') then
                v_error := array[sqlstate, sqlerrm];
            end if;
        end;
    end if;
    if p_redact_details then
        v_error := @schema@.redacted(v_error);
    end if;
    perform @schema@.await_no_standby();
    perform @schema@.end_watch(
        p_owner, p_job_id, p_attempt, p_kept, case when v_read then v_rows end,
        case when v_read then nullif(v_tag, '') end, v_error);
    commit;
    if v_error[1] in ('PB001', 'PB002', 'PB003') then
        raise exception using errcode = v_error[1], message = v_error[2];
    end if;
end $$;
