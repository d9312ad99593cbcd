-- Version 5 of the schema: a supervisor is told at once that its worker has ended.
-- The functions of earlier versions keep their arguments, so that processes that run with them go on.

-- As in version 1, but that the history has the beginning of the work too. Says how a supervised job ended, in the supervisor or by whoever found it out: 'committed', or 'failed' and
-- 'unlaunched', which free the receipt for another attempt. Returns whether there was anything to settle.
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

-- As in version 1, but that the server waits for the worker's end between the looks at it, in place of a sleep. p_calls: that
-- wait besides, with the handle and milliseconds; a client of the version before gives none.
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
