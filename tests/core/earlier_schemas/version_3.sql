-- Version 3 of the schema: what a job's page tells besides its state. The job's SQL as it was given, before parameters
-- were put in; how its earlier attempts went; the first of the rows that it kept.

alter table @schema@.job add column statement text;
comment on column @schema@.job.statement is
    'The SQL as it was given, without the values of its parameters; null where it is not kept.';

create table @schema@.past_attempt (
    owner       text not null,
    job_digest  bytea not null,
    attempt     int not null,
    launched_by text not null,
    launched_at timestamptz not null,
    worker_pid  int,
    ended_at    timestamptz,
    outcome     text,
    sqlstate    text,
    message     text,
    primary key (owner, job_digest, attempt),
    foreign key (owner, job_digest) references @schema@.job on delete cascade
);
comment on table @schema@.past_attempt is
    'How earlier attempts of a job went, the last 50 of them: the line of the history as it stood when the next one was '
    'registered. job has the latest.';

-- As register of version 1, and writes down in the same step what is to become of an orphan, p_statement, unless the
-- setting pgbg.keep_sql is off, and how the attempt before went. When it registers nothing, it leaves no series either.
drop function @schema@.register_launch(text, text, text, bigint, text, text, bytea, boolean, text, text, boolean);
create function @schema@.register_launch(
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
    v_keeps  boolean := lower(coalesce(current_setting('pgbg.keep_sql', true), '')) not in ('off', 'false', 'no', '0');
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

-- What processes of the releases before call.
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

-- As in version 1; where a later attempt is registered, how an earlier one ended is told of that one too.
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
        -- A launching side knows its supervisor only; that one has written down who its worker was.
        worker_pid = coalesce(p_worker_pid, j.worker_pid),
        started_at = p_started_at, row_count = p_row_count, command_tag = p_command_tag, sqlstate = p_error[1],
        message = @schema@.sendable(p_error[2]), detail = @schema@.sendable(p_error[3]),
        hint = @schema@.sendable(p_error[4]), context = @schema@.sendable(p_error[5]), schema_name = p_error[6],
        table_name = p_error[7], column_name = p_error[8], constraint_name = p_error[9]
    where j.owner = @schema@.owner_for(p_owner) and j.job_digest = @schema@.digest(p_job_id)
      -- A launch that was turned away is a later attempt too, and must not hide how the one at work ended.
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

-- What the history keeps of one job beside its line: the SQL, the attempts before the latest one, and the number of rows
-- that each of its statements kept. No line where there is no such job, or none that the login may see.
create function @schema@.job_detail(p_owner text, p_job_id text)
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

-- The first rows that each statement of a job kept: the names of its columns, and the values, each cut to 200 characters.
create function @schema@.first_rows(p_owner text, p_job_id text, p_limit int)
    returns table (statement int, columns jsonb, cells jsonb)
    language sql stable security definer
    set search_path = pg_catalog, pg_temp
as $$
    select s.statement, (select jsonb_agg(c.value -> 'name' order by c.ordinality)
                         from jsonb_array_elements(s.columns) with ordinality c),
           coalesce((
               select jsonb_agg(line.cells order by line.number)
               from (
                   select r.number, (
                       select jsonb_agg(
                           case when length(v.value) > 200 then left(v.value, 197) || '...' else v.value end
                           order by v.number)
                       from (
                           select n as number, f.cells[(n - 1) * f.row_count + r.number] as value
                           from generate_series(1, jsonb_array_length(s.columns)) as n
                       ) v) as cells
                   from generate_series(1, least(coalesce(f.row_count, 0), p_limit)) as r (number)
               ) line), '[]')
    from @schema@.row_set s
    left join lateral (
        select c.row_count, c.cells from @schema@.row_chunk c
        where c.owner = s.owner and c.job_digest = s.job_digest and c.statement = s.statement
        order by c.chunk limit 1
    ) f on true
    where s.owner = p_owner and s.job_digest = @schema@.digest(p_job_id) and @schema@.is_mine(s.owner)
    order by s.statement
$$;

revoke all on table @schema@.past_attempt from public;
revoke all on all routines in schema @schema@ from public;
grant execute on all routines in schema @schema@ to pgbackground_role;
