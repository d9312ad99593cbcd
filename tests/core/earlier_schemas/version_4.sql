-- Version 4 of the schema: supervisors of workers that write their own receipt, for jobs that nobody waits for.
-- The functions of earlier versions stay as they are, so that processes that run with them go on.

-- In the supervisor of a worker that writes its own receipt, before the launch: until the end is written down, the job's
-- launcher is this one, so that nobody calls the job lost between the end of its worker and the word of it.
create function @schema@.begin_watch(p_owner text, p_job_id text, p_attempt int) returns void
    language sql volatile security definer
    set search_path = pg_catalog, pg_temp
as $$
    update @schema@.job j set launcher_pid = pg_backend_pid()
        where j.owner = @schema@.owner_for(p_owner) and j.job_digest = @schema@.digest(p_job_id)
          and j.attempt = p_attempt
$$;

-- The worker that holds a job's lock, for its supervisor to hand a cancel on to; null where none is seen. Anybody can
-- take the lock.
create function @schema@.watched(p_owner text, p_job_id text) returns int
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

-- Writes down, in its supervisor, how a worker ended that writes its own receipt: that one is the proof, whatever the
-- worker reported. p_kept: its last statement, where its rows are kept, and counted there. An error that says that the
-- worker was turned away is no end of the job.
create function @schema@.end_watch(
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

-- The supervisor of a worker that writes its own receipt: as supervise, but that it claims nothing, and writes the history
-- only. It fails as a worker does that was turned away, and with PB004 where there is no slot for its worker; whatever
-- else it fails with is about itself, and its worker may be at work.
--
-- p_sql: what the worker runs, behind whose end the tags of its statements can be read. p_calls, p_redact_details: as
-- supervise has them. p_kept: as end_watch has it.
create procedure @schema@.watch(
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
    v_cancel  boolean := false;
    v_blocked boolean := false;
    v_error   text[];
    v_polls   int := 0;
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

    while v_error is null and not v_done loop
        commit;
        begin
            perform pg_catalog.pg_sleep(case when v_polls < 4 then 0.001 when v_polls < 20 then 0.01 else 0.05 end);
            execute p_calls[2] into v_rows, v_tag, v_done, v_failed using v_pid, v_cookie;
            v_polls := v_polls + 1;
            -- Nobody reads its output, and it waits for that: read it now.
            v_blocked := not v_done and v_polls % 20 = 0 and exists (
                select from pg_catalog.pg_stat_activity a
                where a.pid = v_pid and a.datname = pg_catalog.current_database()
                  and a.wait_event in ('MessageQueuePutMessage', 'ClientWrite'));
        exception when query_canceled then
            v_cancel := true;
        end;
        -- Again until it is accepted: a worker that starts does not take it.
        if v_cancel and not v_done then
            begin
                v_cancel := not coalesce(pg_catalog.pg_cancel_backend(@schema@.watched(p_owner, p_job_id)), false);
            exception when insufficient_privilege then
                v_cancel := false;  -- whoever cancelled this one may do more than it may
            end;
        end if;
        exit when v_blocked;
    end loop;
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
    if p_redact_details and v_error is not null then
        v_error[2] := '(withheld: redact_details)';
        for i in 3 .. least(pg_catalog.cardinality(v_error), 5) loop
            v_error[i] := null;
        end loop;
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

revoke all on routine
    @schema@.begin_watch(text, text, int),
    @schema@.watched(text, text),
    @schema@.end_watch(text, text, int, int, bigint, text, text[]),
    @schema@.watch(text, text, text, int, text, int, text[], text[], boolean, int)
    from public;
grant execute on routine
    @schema@.begin_watch(text, text, int),
    @schema@.watched(text, text),
    @schema@.end_watch(text, text, int, int, bigint, text, text[]),
    @schema@.watch(text, text, text, int, text, int, text[], text[], boolean, int)
    to pgbackground_role;
