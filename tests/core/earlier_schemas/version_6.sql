-- What version 6 of the schema added to version 5: its functions, as they were when version 7 was begun.

create or replace function @schema@.refuse_owner(p_owner text) returns text
    language plpgsql stable
    set search_path = pg_catalog, pg_temp
as $$
begin
    raise exception using errcode = 'insufficient_privilege',
        message = format('%I is not a member of the role %I that owns the job', session_user, p_owner),
        hint = format('GRANT %I TO %I;', p_owner, session_user);
end $$;

-- The owner that is meant, when the login may act for it; raises otherwise. Without a SET clause the planner puts it in
-- place.
create or replace function @schema@.owner_for(p_owner text) returns text
    language sql stable
begin atomic
    select case
        when p_owner is null or p_owner = session_user then session_user::text
        when pg_has_role(session_user, p_owner, 'MEMBER') then p_owner
        else @schema@.refuse_owner(p_owner) end;
end;

-- A backend of this database that works for an owner and bears the marker of a job, or else the process that a claimed
-- receipt names, as long as it runs something as the login that claimed it: SQL can set its own application_name and
-- take the marker off, and the pid of a worker that ended may be another's by now. Anybody can take the name, and the
-- same job may be at work in another database too. p_except: its supervisor, which bears the marker while it launches.
--
-- By the functions below the views: the views' joins cost a new process 2 ms. As a text that is parsed when it is
-- called: a body that is parsed already keeps the columns of a server's function by their places, which a pg_upgrade
-- may change.
create or replace function @schema@.marked(
    p_owner text, p_job_id text, p_pid int default null, p_login text default null, p_except int default null
) returns int
    language sql stable
    set search_path = pg_catalog, pg_temp
as $$
    select a.pid from pg_stat_get_activity(null) a, @schema@.marker(p_owner, p_job_id) as m (marker)
    where case when starts_with(a.application_name, m.marker) or a.pid = p_pid then
        a.datid = (select d.oid from pg_database d where d.datname = current_database())
        and a.pid is distinct from p_except and (
            starts_with(a.application_name, m.marker) and @schema@.is_member(a.usesysid, p_owner)
            or a.pid = p_pid and a.usesysid = to_regrole(quote_ident(p_login)) and exists (
                -- "state" is not for every role to see; who runs a statement holds this lock, and all may see that.
                select from pg_lock_status() l where l.pid = a.pid and l.locktype = 'virtualxid')) end
    order by starts_with(a.application_name, m.marker) desc limit 1
$$;

-- Whether any backend bears that marker, whoever it is and wherever it works: less than marked asks, and quicker.
create or replace function @schema@.is_borne(p_marker text) returns boolean
    language sql volatile
    set search_path = pg_catalog, pg_temp
as $$
    select exists (select from pg_stat_get_activity(null) a where starts_with(a.application_name, p_marker))
$$;

-- Lets whoever listens know, at the commit, that there is something to be read of the job with that marker: a hint,
-- which may be lost, and never a proof. Nobody learns the job's name from it. The setting pgbg.notify turns it off; so
-- does a queue of the server's that some listener keeps from being emptied: full, it would fail the job. Put in place
-- by the planner, and for that without a SET clause.
create or replace function @schema@.notify(p_marker text) returns void
    language sql volatile
begin atomic
    select case when lower(coalesce(current_setting('pgbg.notify', true), '')) not in ('off', 'false', 'no', '0')
        and pg_notification_queue_usage() < 0.5 then pg_notify('pgbg', p_marker) end;
end;

create or replace function @schema@.tell(p_owner text, p_job_id text) returns void
    language sql volatile
begin atomic
    select @schema@.notify(@schema@.marker(p_owner, p_job_id));
end;

-- What begin_work does, in one statement that costs a new process the least: it is parsed already, and no procedural
-- language is loaded for it. True: the receipt is written. Null: something is against it, or this cannot tell;
-- begin_work is called then, and raises the error that says what. Digests and keys of locks come from the caller as
-- digest and lock_key would make them. That they do is not looked at: whoever calls may write any receipt of that
-- owner, and take any lock, in any case.
--
-- In READ COMMITTED only: in the other levels, a receipt that its snapshot does not see would be another error. It sees
-- the series as of before its locks. Who registers a newer generation marks the older ones after that, by the receipt's
-- key, so that whoever has not seen the one meets the other.
create or replace function @schema@.try_begin(
    p_owner text, p_job_id text, p_generation bigint, p_label text, p_attempt int, p_sql_digest bytea, p_job bytea,
    p_series bytea, p_series_lock bigint, p_job_lock bigint
) returns boolean
    language sql volatile security definer
    set search_path = pg_catalog, pg_temp
begin atomic
    insert into @schema@.receipt
        (owner, job_digest, status, job_id, label, attempt, worker_pid, sql_digest, xid, started_at)
    select
        p_owner, p_job, 'committed', p_job_id, p_label, p_attempt, pg_backend_pid(), p_sql_digest, pg_current_xact_id(),
        clock_timestamp()
    where case  -- in this order, which the planner would change
        when current_setting('transaction_isolation') <> 'read committed' then false
        when @schema@.owner_for(p_owner) is null then false  -- which raises for another's owner
        else pg_try_advisory_xact_lock(p_series_lock) and pg_try_advisory_xact_lock(p_job_lock)
            and (select s.newest from @schema@.series s where s.owner = p_owner and s.series_digest = p_series)
                <= p_generation
        end
    on conflict do nothing
    returning true;
end;

-- What a worker calls. Its arguments come as a setting that is launched with it, so that the text which
-- pg_stat_activity shows the beginning of is the job's own SQL, but for a line. They are, in this order: owner, job id,
-- series, generation, label, attempt, digest of the SQL, of the job, of the series, lock of the series, of the job,
-- marker (Work._arguments in walk/worker_sql.py writes them). A process that began with version 5 of the schema gives
-- the first seven only. No SET clause: a body that is parsed already looks up no names.
create or replace function @schema@.begin_job() returns void
    language sql volatile
begin atomic
    select case
        when @schema@.try_begin(
            w ->> 0, w ->> 1, (w ->> 3)::bigint, w ->> 4, (w ->> 5)::int, decode(w ->> 6, 'hex'),
            decode(w ->> 7, 'hex'), decode(w ->> 8, 'hex'), (w ->> 9)::bigint, (w ->> 10)::bigint
        ) then @schema@.notify(w ->> 11)
        else @schema@.begin_work(
            w ->> 0, w ->> 1, w ->> 2, (w ->> 3)::bigint, w ->> 4, (w ->> 5)::int, decode(w ->> 6, 'hex'))
    end
    from (select current_setting('pgbg.work')::jsonb offset 0) as s (w);
end;

-- Keeps what stands in pg_temp.pgbg_rows_<statement>. Runs with the rights of whoever calls it, since the temporary
-- table may be anything of the user's. p_columns: name, type and modifier of each, as a describe told them; null where
-- none could. The output forms are those that every reader can read, whatever the job has set.
create or replace function @schema@.keep_table(
    p_owner text, p_job_id text, p_statement int, p_columns jsonb, p_command_tag text, p_max_rows bigint,
    p_max_bytes bigint
) returns void
    language plpgsql volatile
    set search_path = pg_catalog, pg_temp
    set datestyle = 'ISO, YMD'
    set intervalstyle = 'postgres'
    set bytea_output = 'hex'
    set extra_float_digits = 1
as $$
declare
    v_table   text := format('pg_temp.pgbg_rows_%s', p_statement);
    v_columns jsonb;
    v_values  text;
    v_arrays  text;
    v_sizes   text;
    v_rows    bigint := 0;
    v_blocks  bigint;
    v_span    bigint;
    v_first   bigint;
    v_count   int;
    v_cells   text[];
    v_size    bigint;
    v_bytes   bigint := 0;
begin
    with recursive shown as (
        select a.attnum, a.attname, a.atttypid as oid, a.atttypmod as typmod, a.atttypid as given, a.atttypmod as given_typmod
        from pg_attribute a
        where a.attrelid = v_table::regclass and a.attnum > 0 and not a.attisdropped
        union all
        -- A domain is what it is made of, as in any result.
        select s.attnum, s.attname, t.typbasetype, t.typtypmod, s.given, s.given_typmod
        from shown s join pg_type t on t.oid = s.oid and t.typtype = 'd'
    ), last as (
        select s.* from shown s where not exists (select from pg_type t where t.oid = s.oid and t.typtype = 'd')
    )
    select coalesce(jsonb_agg(jsonb_build_object(
               'name', l.attname, 'oid', l.oid::bigint, 'typmod', l.typmod,
               'type', format_type(l.given, l.given_typmod)) order by l.attnum), '[]'),
           -- A cast to text is the type's output form where nobody has defined another one, and the faster way to it.
           string_agg(
               case when l.oid = 'text'::regtype or not exists (
                   select from pg_cast c where c.castsource = l.oid and c.casttarget = 'text'::regtype
               ) then format('t.%I::text as c%s', l.attname, l.attnum)
               else format('case when t.%1$I is distinct from null then format(''%%s'', t.%1$I) end as c%2$s',
                   l.attname, l.attnum) end, ', ' order by l.attnum),
           string_agg(format('array_agg(c%s)', l.attnum), ' || ' order by l.attnum),
           string_agg(format('coalesce(octet_length(c%s), 0)', l.attnum), ' + ' order by l.attnum)
        into v_columns, v_values, v_arrays, v_sizes
        from last l;
    if p_columns is not null then
        -- What the describe knew better: names that a table cannot have twice, and types that a table cannot have.
        select jsonb_agg(t.c || p.c order by p.n) into v_columns
            from jsonb_array_elements(p_columns) with ordinality p (c, n)
            join jsonb_array_elements(v_columns) with ordinality t (c, n) using (n);
        v_columns := coalesce(v_columns, '[]');
    end if;
    if v_values is null then
        execute format('select count(*) from %s', v_table) into v_rows;
        perform @schema@.keep_chunk(
            p_owner, p_job_id, p_statement, 0, v_rows::int, null, v_rows, 0, p_max_rows, p_max_bytes);
    else
        -- Parts of some megabytes, which one array has to hold each: so many blocks of the table, in the rows' own order.
        v_blocks := pg_relation_size(v_table::regclass) / current_setting('block_size')::bigint;
        v_span := greatest(1, least(64, 4194304 * v_blocks / greatest(pg_table_size(v_table::regclass), 1)));
        for v_first in select generate_series(0, v_blocks - 1, v_span) loop
            execute format(
                'select count(*), %s, sum(%s) from ('
                '    select %s from %s as t where t.ctid >= ''(%s,0)'' and t.ctid < ''(%s,0)'' offset 0'
                ') as part', v_arrays, v_sizes, v_values, v_table, v_first, v_first + v_span
            ) into v_count, v_cells, v_size;
            continue when v_count = 0;
            v_rows := v_rows + v_count;
            v_bytes := v_bytes + v_size;
            if v_rows > p_max_rows or v_bytes > p_max_bytes then
                -- Refused, with the number of all. Only here are they counted: it reads the whole table.
                execute format('select count(*) from %s', v_table) into v_rows;
            end if;
            perform @schema@.keep_chunk(
                p_owner, p_job_id, p_statement, v_first, v_count, v_cells, v_rows, v_bytes, p_max_rows, p_max_bytes);
        end loop;
    end if;
    perform @schema@.keep_set(p_owner, p_job_id, p_statement, v_columns, p_command_tag);
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

-- The first rows that each statement of a job kept: the names of its columns, and the values, each cut to 200
-- characters.
create or replace function @schema@.first_rows(p_owner text, p_job_id text, p_limit int)
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

-- For people.
create or replace view @schema@.jobs as select * from @schema@.list_jobs();
comment on view @schema@.jobs is
    'The true state of every job that the login may see: waiting, running, committed, cancelled, failed, lost, unknown.';

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

-- What may be told of an error whose details are withheld: its code and the names of objects (ledger.record has the
-- order).
create or replace function @schema@.redacted(p_error text[]) returns text[]
    language sql immutable strict
    return array[p_error[1], '(withheld: redact_details)', null, null, null] || p_error[6:];

-- In a supervisor, after the launch: polls its worker until it has ended, or waits for its output to be read, and hands
-- a cancel on to it. It commits at each poll: every kind of sleep holds a snapshot, and CREATE INDEX CONCURRENTLY would
-- wait for it for ever. No EXCEPTION block may stand around a COMMIT, here and where this is called.
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
    v_polls   int := 0;  -- bigint % int is no operator of pg_catalog: somebody could make one
begin
    while not p_done and not v_blocked loop
        commit;
        begin
            -- At a quick pace first: a supervisor that ends before it saw its worker leaves the job unknown.
            if p_calls[5] is null then
                perform pg_catalog.pg_sleep(case when v_polls < 4 then 0.001 when v_polls < 20 then 0.01 else 0.05 end);
            else
                execute p_calls[5] using p_pid, p_cookie, case when v_polls < 4 then 1 when v_polls < 20 then 10 else 50 end;
            end if;
            execute p_calls[2] into p_rows, p_tag, p_done, p_failed using p_pid, p_cookie;
            v_polls := v_polls + 1;
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
            v_blocked := not p_done and v_polls % 20 = 0 and exists (
                select from pg_catalog.pg_stat_activity a
                where (pg_catalog.starts_with(a.application_name, p_marker) or a.pid = p_pid)
                  and a.datname = pg_catalog.current_database()
                  and a.wait_event in ('MessageQueuePutMessage', 'ClientWrite'));
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

-- Who may use what: the last of all, so that nothing is left out.

revoke all on all tables in schema @schema@ from public;
revoke all on all routines in schema @schema@ from public;
grant usage on schema @schema@ to pgbackground_role;
grant select on @schema@.meta, @schema@.jobs to pgbackground_role;
grant execute on all routines in schema @schema@ to pgbackground_role;
