-- On the launching side: registering a launch, making a cancel final, taking it back.

-- Registers a launch, in a transaction that is committed before it: the series' newest generation, the job, and one
-- more attempt; what the history had of the attempt before moves to past_attempt. The verdict is 'registered', or says
-- why nothing was written, and the caller has to look first: 'reused' (the id stands for other SQL), 'committed',
-- 'cancelled' or 'launching' (there is a receipt), 'superseded', 'untold' (the same work failed, and nobody was told),
-- and, with p_only_new, 'known' (anything is known of the job or its series). p_when_orphaned: what is to become of an
-- orphan. p_statement: kept unless the setting pgbg.keep_sql is off.
create or replace function @schema@.register_launch(
    p_owner text, p_job_id text, p_series text, p_generation bigint, p_label text, p_kind text, p_sql_digest bytea,
    p_accept_changed_sql boolean, p_launched_by text, p_when_orphaned text, p_only_new boolean default false,
    p_statement text default null,
    out verdict text, out generation bigint, out newest bigint, out attempt int, out sql_changed boolean
)
    language plpgsql volatile security definer
    set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
    v_owner  text := @schema@.owner_for(p_owner);
    v_job    bytea := @schema@.digest(p_job_id);
    v_series bytea := @schema@.digest(p_series);
    v_known  @schema@.job;
    v_newest bigint;
    v_digest bytea;
    v_status text;
    v_keeps  boolean := lower(coalesce(current_setting('pgbg.keep_sql', true), '')) not in @off_words@;
    v_is_new boolean := false;
begin
    perform @schema@.require_read_committed();
    -- Whoever registers has others wait behind it: a lock that somebody holds for long is tried again (55P03).
    perform set_config('lock_timeout', '250ms', true);
    loop
        -- The row's lock puts the registrations of one series in order.
        select s.newest into v_newest from @schema@.series s
            where s.owner = v_owner and s.series_digest = v_series for update;
        exit when found;
        insert into @schema@.series (owner, series_digest, series, newest)
            values (v_owner, v_series, p_series, coalesce(p_generation, 0))
            on conflict do nothing;
        v_is_new := found;
    end loop;  -- again: another call may have made it, and prune may have taken it away meanwhile
    select * into v_known from @schema@.job j where j.owner = v_owner and j.job_digest = v_job;
    generation := coalesce(p_generation, v_known.generation);
    if generation is null then
        generation := case when exists (
            select from @schema@.job j where j.owner = v_owner and j.series_digest = v_series
        ) then v_newest + 1 else v_newest end;
    end if;
    newest := greatest(v_newest, generation);
    attempt := coalesce(v_known.attempt, 0);

    select r.sql_digest, r.status into v_digest, v_status from @schema@.receipt r
        where r.owner = v_owner and r.job_digest = v_job;
    sql_changed := coalesce(coalesce(v_digest, v_known.sql_digest) <> p_sql_digest, false);
    verdict := case when p_only_new and (v_known.job_id is not null or v_status is not null or exists (
                        select from @schema@.job j where j.owner = v_owner and j.series_digest = v_series)) then 'known'
                    when sql_changed and not p_accept_changed_sql then 'reused'
                    when v_status is not null then v_status  -- 'launching' too: its outcome is to be found out first
                    when generation < v_newest then 'superseded'
                    when v_known.outcome = 'failed' and v_known.reported_at is null and not sql_changed then 'untold'
                    else 'registered' end;
    if verdict <> 'registered' then
        if v_is_new then  -- a generation that is not registered supersedes none
            delete from @schema@.series s where s.owner = v_owner and s.series_digest = v_series;
        end if;
        return;
    end if;

    if attempt > 0 then
        insert into @schema@.past_attempt
            (owner, job_digest, attempt, launched_by, launched_at, worker_pid, ended_at, outcome, sqlstate, message)
        select j.owner, j.job_digest, j.attempt, j.launched_by, j.launched_at, j.worker_pid, j.ended_at, j.outcome,
               j.sqlstate, j.message
        from @schema@.job j where j.owner = v_owner and j.job_digest = v_job;
        delete from @schema@.past_attempt p
            where p.owner = v_owner and p.job_digest = v_job and p.attempt <= v_known.attempt - 50;
    end if;

    attempt := attempt + 1;
    update @schema@.series s set newest = generation
        where s.owner = v_owner and s.series_digest = v_series and s.newest < generation;
    insert into @schema@.job as j
        (owner, job_digest, job_id, series_digest, series, generation, label, kind, sql_digest, attempt,
         launched_by, launcher_pid, when_orphaned, statement)
    values
        (v_owner, v_job, p_job_id, v_series, p_series, generation, p_label, p_kind, p_sql_digest, attempt, p_launched_by,
         pg_backend_pid(), p_when_orphaned, case when v_keeps then p_statement end)
    on conflict (owner, job_digest) do update set
        series_digest = excluded.series_digest, series = excluded.series, generation = excluded.generation,
        label = excluded.label, kind = excluded.kind, sql_digest = excluded.sql_digest, attempt = excluded.attempt,
        launched_by = excluded.launched_by, launcher_pid = excluded.launcher_pid,
        when_orphaned = excluded.when_orphaned, statement = excluded.statement,
        launched_at = clock_timestamp(), ended_at = null, reported_at = null, outcome = null,
        worker_pid = null, started_at = null, row_count = null, command_tag = null, sqlstate = null, message = null,
        detail = null, hint = null, context = null, schema_name = null, table_name = null, column_name = null,
        constraint_name = null;
end $$;

-- What processes call that began with version 1 of the schema.
create or replace function @schema@.register(
    p_owner text, p_job_id text, p_series text, p_generation bigint, p_label text, p_kind text, p_sql_digest bytea,
    p_accept_changed_sql boolean, p_launched_by text, p_only_new boolean default false,
    out verdict text, out generation bigint, out newest bigint, out attempt int, out sql_changed boolean
)
    language sql volatile security definer
    set search_path = pg_catalog, pg_temp
as $$
    select r.verdict, r.generation, r.newest, r.attempt, r.sql_changed
    from @schema@.register_launch(
        p_owner, p_job_id, p_series, p_generation, p_label, p_kind, p_sql_digest, p_accept_changed_sql, p_launched_by,
        null, p_only_new) r
$$;

-- Makes a cancel final: returns 'cancelled', or 'committed' where the job was before. Waits for a worker that is at
-- work (no longer than lock_timeout, then 55P03): signal it first.
create or replace function @schema@.mark_cancelled(
    p_owner text, p_job_id text, p_cause text, p_reason text, p_of_try text default null
) returns text
    language plpgsql volatile security definer
    set search_path = pg_catalog, pg_temp
as $$
declare
    v_owner text := @schema@.owner_for(p_owner);
    v_job   bytea := @schema@.digest(p_job_id);
begin
    perform @schema@.require_read_committed();
    insert into @schema@.receipt (owner, job_digest, status, job_id, cause, reason, of_try)
        values (v_owner, v_job, 'cancelled', p_job_id, p_cause, p_reason, p_of_try)
        -- A mark that the next call lifts gives way to one that it does not; one that a later try lifts, to a person's.
        on conflict (owner, job_digest) do update set
            cause = excluded.cause, reason = excluded.reason, of_try = excluded.of_try,
            decided_by = excluded.decided_by, decided_at = excluded.decided_at
            where receipt.status = 'cancelled' and (
                receipt.cause in ('deadline', 'given up') and excluded.cause not in ('deadline', 'given up', 'superseded')
                or receipt.cause in ('interrupted', 'failed beside', 'run gone') and excluded.cause = 'asked');
    return (select r.status from @schema@.receipt r where r.owner = v_owner and r.job_digest = v_job);
end $$;

-- Makes sure that no older generation of the series starts any more. Waits like mark_cancelled. Returns the ids of
-- older jobs that are at work without a lock, since their supervisors are gone.
create or replace function @schema@.mark_older(p_owner text, p_series text, p_generation bigint) returns text[]
    language plpgsql volatile security definer
    set search_path = pg_catalog, pg_temp
as $$
declare
    v_owner  text := @schema@.owner_for(p_owner);
    v_series bytea := @schema@.digest(p_series);
begin
    perform @schema@.require_read_committed();
    insert into @schema@.receipt (owner, job_digest, status, job_id, label, cause, reason)
        select j.owner, j.job_digest, 'cancelled', j.job_id, j.label, 'superseded',
               format('generation %s is registered', p_generation)
        from @schema@.job j
        where j.owner = v_owner and j.series_digest = v_series and j.generation < p_generation
          and not exists (
              select from @schema@.receipt r
              where r.owner = j.owner and r.job_digest = j.job_digest
                and (r.status <> 'cancelled' or r.cause = 'superseded'))
        -- Any other cancel could be lifted again.
        on conflict (owner, job_digest) do update set cause = excluded.cause, reason = excluded.reason
            where receipt.status = 'cancelled';
    return array(
        select j.job_id
        from @schema@.job j
        join @schema@.receipt r on r.owner = j.owner and r.job_digest = j.job_digest and r.status = 'launching'
        where j.owner = v_owner and j.series_digest = v_series and j.generation < p_generation
          and @schema@.marked(r.owner, r.job_id, r.worker_pid, r.decided_by, r.supervisor_pid) is not null);
end $$;

-- Takes a cancel back, for a retry of the same job; a superseded job stays cancelled.
create or replace function @schema@.lift_cancel(p_owner text, p_job_id text) returns boolean
    language plpgsql volatile security definer
    set search_path = pg_catalog, pg_temp
as $$
begin
    perform @schema@.require_read_committed();
    delete from @schema@.receipt r
        where r.owner = @schema@.owner_for(p_owner) and r.job_digest = @schema@.digest(p_job_id)
          and r.status = 'cancelled' and r.cause is distinct from 'superseded';
    return found;
end $$;
