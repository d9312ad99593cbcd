-- Version 1 of the schema: receipts, series, job history, and the functions that alone touch them.
-- Words between two at-signs stand for the quoted names of the schema and its owner; install.py fills them in. None may
-- stand in a comment, which a name with a line break would end.
--
-- Every function is SECURITY DEFINER with a pinned search_path, runs as the schema's NOLOGIN owner, and lets a login
-- (session_user, which SET ROLE does not change) at the rows of a job's owner only when it is a member of that role.

create table @schema@.meta (
    version    int primary key,
    checksum   text not null,
    applied_at timestamptz not null default clock_timestamp(),
    applied_by text not null default session_user
);

create table @schema@.receipt (
    owner      text not null,
    job_digest bytea not null,
    status     text not null check (status in ('launching', 'committed', 'cancelled')),
    job_id     text not null,
    label      text,
    attempt    int,
    worker_pid int,
    sql_digest bytea,
    xid        xid8,
    started_at timestamptz,
    supervisor_pid int,
    server_started timestamptz,
    cause      text check (cause in
        ('asked', 'deadline', 'given up', 'superseded', 'interrupted', 'failed beside', 'run gone')),
    of_try     text,
    reason     text,
    decided_by text not null default session_user,
    decided_at timestamptz not null default clock_timestamp(),
    found_at   timestamptz,
    primary key (owner, job_digest)
);
comment on column @schema@.receipt.found_at is
    'When prune first found a receipt of the work''s own transaction whose end nobody had written into the history: '
    'decided_at is the start of that transaction.';
comment on table @schema@.receipt is
    'How a job ended: committed (written in the transaction of the work itself, or by its supervisor) or cancelled for '
    'good. launching: a supervisor (supervisor_pid, on the server that was started at server_started) has begun and has '
    'not said how it ended; worker_pid is null until its worker was seen at work. cause decides who may take a cancel '
    'back, of_try names the try of the work that it ended; reason is for people, and nothing is decided by it.';

create table @schema@.series (
    owner         text not null,
    series_digest bytea not null,
    series        text not null,
    newest        bigint not null,
    primary key (owner, series_digest)
);
comment on table @schema@.series is 'The newest generation of each series; an older one never starts any more.';

create table @schema@.job (
    owner           text not null,
    job_digest      bytea not null,
    job_id          text not null,
    series_digest   bytea not null,
    series          text not null,
    generation      bigint not null,
    label           text,
    kind            text not null,
    sql_digest      bytea not null,
    attempt         int not null,
    launched_by     text not null,
    launcher_pid    int not null,
    registered_at   timestamptz not null default clock_timestamp(),
    launched_at     timestamptz not null default clock_timestamp(),
    ended_at        timestamptz,
    reported_at     timestamptz,
    outcome         text check (outcome in ('committed', 'failed', 'cancelled', 'lost', 'unknown')),
    worker_pid      int,
    started_at      timestamptz,
    row_count       bigint,
    command_tag     text,
    sqlstate        text,
    message         text,
    detail          text,
    hint            text,
    context         text,
    schema_name     text,
    table_name      text,
    column_name     text,
    constraint_name text,
    primary key (owner, job_digest)
);
create index job_series on @schema@.job (owner, series_digest, generation);
-- For list_jobs.
create index job_digest on @schema@.job (job_digest);
create index job_launched on @schema@.job (launched_at);
create index job_label on @schema@.job (label text_pattern_ops, launched_at);
create index job_series_name on @schema@.job (series text_pattern_ops, launched_at);
create index receipt_digest on @schema@.receipt (job_digest);
create index receipt_unregistered on @schema@.receipt (decided_at) where attempt is null;
comment on table @schema@.job is
    'History and diagnosis, written by the launching side, which may die at any point: never the proof of anything. '
    'reported_at is null while nobody was told of a failure that a supervisor wrote down.';

create table @schema@.row_set (
    owner       text not null,
    job_digest  bytea not null,
    statement   int not null,
    columns     jsonb not null,
    command_tag text not null,
    row_count   bigint not null,
    primary key (owner, job_digest, statement),
    foreign key (owner, job_digest) references @schema@.receipt on delete cascade
);
comment on table @schema@.row_set is
    'The rows that a statement of a committed job gave, where the job was asked for them: written in the transaction of '
    'the work, and gone with its receipt. row_chunk has their values.';

create table @schema@.row_chunk (
    owner      text not null,
    job_digest bytea not null,
    statement  int not null,
    chunk      bigint not null,
    row_count  int not null,
    cells      text[],  -- the values of its first column, then those of its second, and so on
    primary key (owner, job_digest, statement, chunk),
    foreign key (owner, job_digest) references @schema@.receipt on delete cascade
);
-- Compressing them would take longer than all else that is done for them.
alter table @schema@.row_chunk alter column cells set storage external;

-- Keys ---------------------------------------------------------------------------------------------------------

create function @schema@.digest(p_text text) returns bytea
    language sql stable strict parallel safe
    return pg_catalog.sha256(pg_catalog.convert_to(p_text, 'UTF8'));

-- The 64-bit advisory lock of a series ('series') or of a job ('job') of an owner.
create function @schema@.lock_key(p_what text, p_owner text, p_digest bytea) returns bigint
    language sql stable strict parallel safe
    return ('x' || pg_catalog.encode(
        pg_catalog.substr(
            pg_catalog.sha256(pg_catalog.convert_to('pgbg:' || p_what || ':' || p_owner || ':', 'UTF8') || p_digest), 1, 8
        ), 'hex'))::bit(64)::bigint;

-- What the application_name of a worker without a lock begins with, and is found by; its label follows.
create function @schema@.marker(p_owner text, p_job_id text) returns text
    language sql stable strict parallel safe
    return 'pgbg:' || pg_catalog.left(pg_catalog.encode(
        pg_catalog.sha256(pg_catalog.convert_to(p_owner || ':' || p_job_id, 'UTF8')), 'hex'), 12) || ':';

-- False too where the owner was dropped. Without a SET clause the planner puts it in place, and many are asked at once.
create function @schema@.is_member(p_login oid, p_owner text) returns boolean
    language sql stable
    return coalesce(
        pg_catalog.pg_has_role(p_login, pg_catalog.to_regrole(pg_catalog.quote_ident(p_owner)), 'MEMBER'), false);

-- A backend of this database that works for an owner and bears the marker of a job, or else the process that a claimed
-- receipt names, as long as it runs something as the login that claimed it: SQL can set its own application_name and
-- take the marker off, and the pid of a worker that ended may be another's by now. Anybody can take the name, and the
-- same job may be at work in another database too. p_except: its supervisor, which bears the marker while it launches.
create function @schema@.marked(
    p_owner text, p_job_id text, p_pid int default null, p_login text default null, p_except int default null
) returns int
    language sql stable
    set search_path = pg_catalog, pg_temp
as $$
    select a.pid from pg_stat_activity a, @schema@.marker(p_owner, p_job_id) as m (marker)
    where a.datname = current_database() and a.pid is distinct from p_except and (
        starts_with(a.application_name, m.marker) and @schema@.is_member(a.usesysid, p_owner)
        or a.pid = p_pid and a.usename = p_login and exists (
            -- "state" is not for every role to see; who runs a statement holds this lock, and all may see that.
            select from pg_locks l where l.pid = a.pid and l.locktype = 'virtualxid'))
    order by starts_with(a.application_name, m.marker) desc limit 1
$$;

-- A text that every client can be sent. In a database of the encoding SQL_ASCII an error's text may hold any bytes, and
-- the server sends a client none that its own encoding does not have: there, bytes of no character are written out.
create function @schema@.sendable(p_text text) returns text
    language plpgsql immutable strict
    set search_path = pg_catalog, pg_temp
as $$
declare
    v_bytes bytea;
begin
    if getdatabaseencoding() <> 'SQL_ASCII' or p_text !~ '[^\x01-\x7f]' then
        return p_text;
    end if;
    v_bytes := convert_to(p_text, 'SQL_ASCII');
    begin
        perform convert_from(v_bytes, 'UTF8');
        return p_text;
    exception when character_not_in_repertoire then
        return (
            select string_agg(case when b < 128 then chr(b) else '\x' || to_hex(b) end, '' order by n)
            from (select n, get_byte(v_bytes, n) as b from generate_series(0, octet_length(v_bytes) - 1) as n) as c);
    end;
end $$;

create function @schema@.owner_for(p_owner text) returns text
    language plpgsql stable
    set search_path = pg_catalog, pg_temp
as $$
declare
    v_owner text := coalesce(p_owner, session_user);
begin
    if v_owner = session_user or pg_has_role(session_user, v_owner, 'MEMBER') then
        return v_owner;
    end if;
    raise exception using errcode = 'insufficient_privilege',
        message = format('%I is not a member of the role %I that owns the job', session_user, v_owner),
        hint = format('GRANT %I TO %I;', v_owner, session_user);
end $$;

-- Whether the login may see and prune what an owner left. What the owner itself left behind when it was dropped is the
-- administrators'.
create function @schema@.is_mine(p_owner text) returns boolean
    language sql stable strict
    set search_path = pg_catalog, pg_temp
as $$
    select coalesce(
        (select pg_has_role(session_user, r.oid, 'MEMBER') from pg_roles r where r.rolname = p_owner),
        (select me.rolsuper from pg_roles me where me.rolname = session_user),
        false)
$$;

-- Has this transaction's commit wait for no synchronous standby: where one is away, what a supervisor writes would keep
-- its job from ending.
create function @schema@.await_no_standby() returns void
    language plpgsql volatile
    set search_path = pg_catalog, pg_temp
as $$
begin
    if current_setting('synchronous_commit') <> 'off' then
        perform set_config('synchronous_commit', 'local', true);
    end if;
end $$;

create function @schema@.require_read_committed() returns void
    language plpgsql stable
    set search_path = pg_catalog, pg_temp
as $$
begin
    -- One snapshot for lock and receipt would call committed jobs lost.
    if current_setting('transaction_isolation') <> 'read committed' then
        raise exception using errcode = 'active_sql_transaction',
            message = 'the state of a job can only be told in the isolation level READ COMMITTED';
    end if;
end $$;

-- Lets whoever listens know, at the commit, that there is something to be read of a job: a hint, which may be lost, and
-- never a proof. Nobody learns the job's name from it. The setting pgbg.notify turns it off; so does a queue of the
-- server's that some listener keeps from being emptied: full, it would fail the job.
create function @schema@.tell(p_owner text, p_job_id text) returns void
    language plpgsql volatile
    set search_path = pg_catalog, pg_temp
as $$
begin
    if lower(coalesce(current_setting('pgbg.notify', true), '')) not in ('off', 'false', 'no', '0')
        and pg_notification_queue_usage() < 0.5
    then
        perform pg_notify('pgbg', @schema@.marker(p_owner, p_job_id));
    end if;
end $$;

-- In the worker --------------------------------------------------------------------------------------------------

create function @schema@.begin_work(
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
    -- The locks are taken outside of the block with EXCEPTION: a rolled back subtransaction would drop them.
    if not pg_try_advisory_xact_lock(@schema@.lock_key('series', v_owner, v_series)) then
        raise exception using errcode = 'PB002', message = 'another worker holds the series of this job';
    end if;
    -- The second lock tells observers which job of the series is at work.
    if not pg_try_advisory_xact_lock(@schema@.lock_key('job', v_owner, v_job)) then
        raise exception using errcode = 'PB002', message = 'another worker holds this job';
    end if;
    if exists (
        select from @schema@.series s
        where s.owner = v_owner and s.series_digest = v_series and s.newest > p_generation
    ) then
        raise exception using errcode = 'PB003', message = 'a newer generation of this job is registered';
    end if;
    -- No look before the insert: it would cost serializable jobs false serialization failures.
    begin
        insert into @schema@.receipt
            (owner, job_digest, status, job_id, label, attempt, worker_pid, sql_digest, xid, started_at)
        values
            (v_owner, v_job, 'committed', p_job_id, p_label, p_attempt, pg_backend_pid(), p_sql_digest,
             pg_current_xact_id(), clock_timestamp());
    exception when unique_violation then
        select r.status into v_status from @schema@.receipt r where r.owner = v_owner and r.job_digest = v_job;
        if v_status = 'cancelled' then
            raise exception using errcode = 'PB003', message = 'this job was cancelled';
        end if;
        -- Under REPEATABLE READ the row may be invisible; the launching side looks at the receipt in any case.
        raise exception using errcode = 'PB001', message = 'this job has a receipt';
    end;
    perform @schema@.tell(v_owner, p_job_id);
end $$;

-- What a worker calls. Its arguments come as a setting that is launched with it, so that the text which
-- pg_stat_activity shows the beginning of is the job's own SQL, but for a line.
create function @schema@.begin_job() returns void
    language plpgsql volatile
    set search_path = pg_catalog, pg_temp
as $$
declare
    v_work constant jsonb := current_setting('pgbg.work');
begin
    perform @schema@.begin_work(
        v_work ->> 0, v_work ->> 1, v_work ->> 2, (v_work ->> 3)::bigint, v_work ->> 4, (v_work ->> 5)::int,
        decode(v_work ->> 6, 'hex'));
end $$;

-- Rows, in the worker ---------------------------------------------------------------------------------------------

-- Keeps a part of a statement's rows beside the receipt. Only the worker's own transaction can: the one that wrote the
-- receipt. p_rows: of the whole result. p_bytes: of its parts up to the end of this one.
create function @schema@.keep_chunk(
    p_owner text, p_job_id text, p_statement int, p_chunk bigint, p_row_count int, p_cells text[],
    p_rows bigint, p_bytes bigint, p_max_rows bigint, p_max_bytes bigint
) returns void
    language plpgsql volatile security definer
    set search_path = pg_catalog, pg_temp
as $$
declare
    v_owner text := @schema@.owner_for(p_owner);
    v_job   bytea := @schema@.digest(p_job_id);
begin
    if not exists (
        select from @schema@.receipt r
        where r.owner = v_owner and r.job_digest = v_job and r.xid = pg_current_xact_id_if_assigned()
    ) then
        raise exception using errcode = 'insufficient_privilege',
            message = 'rows are kept by the transaction that writes the receipt';
    end if;
    if p_rows > p_max_rows then
        raise exception using errcode = 'PB005',
            message = format('the result has more rows than this job may keep (%s)', p_max_rows),
            detail = format('%s rows were seen, and there may be more.', p_rows),
            hint = format('Raise max_rows (fetch={"max_rows": %s}), or have the SQL write to a table.', 10 * p_max_rows);
    end if;
    if p_bytes > p_max_bytes then
        raise exception using errcode = 'PB005',
            message = format('the result has more bytes than this job may keep (%s)', p_max_bytes),
            detail = format('%s bytes were seen, and there may be more; the result has %s rows.', p_bytes, p_rows),
            hint = format('Raise max_bytes (fetch={"max_bytes": %s}), or have the SQL write to a table.', 10 * p_max_bytes);
    end if;
    insert into @schema@.row_chunk (owner, job_digest, statement, chunk, row_count, cells)
        values (v_owner, v_job, p_statement, p_chunk, p_row_count, p_cells);
end $$;

-- Says what the parts that were kept of a statement's rows are: after them, in the same transaction.
create function @schema@.keep_set(
    p_owner text, p_job_id text, p_statement int, p_columns jsonb, p_command_tag text
) returns void
    language plpgsql volatile security definer
    set search_path = pg_catalog, pg_temp
as $$
declare
    v_owner text := @schema@.owner_for(p_owner);
    v_job   bytea := @schema@.digest(p_job_id);
begin
    if not exists (
        select from @schema@.receipt r
        where r.owner = v_owner and r.job_digest = v_job and r.xid = pg_current_xact_id_if_assigned()
    ) then
        raise exception using errcode = 'insufficient_privilege',
            message = 'rows are kept by the transaction that writes the receipt';
    end if;
    insert into @schema@.row_set (owner, job_digest, statement, columns, command_tag, row_count)
        select v_owner, v_job, p_statement, p_columns, p_command_tag, coalesce(sum(c.row_count), 0)
        from @schema@.row_chunk c
        where c.owner = v_owner and c.job_digest = v_job and c.statement = p_statement;
end $$;

-- Keeps what stands in pg_temp.pgbg_rows_<statement>. Runs with the rights of whoever calls it, since the temporary
-- table may be anything of the user's. p_columns: name, type and modifier of each, as a describe told them; null where
-- none could. The output forms are those that every reader can read, whatever the job has set.
create function @schema@.keep_table(
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
    v_rows    bigint;
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
    execute format('select count(*) from %s', v_table) into v_rows;
    if v_values is null or v_rows > p_max_rows then
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
            v_bytes := v_bytes + v_size;
            perform @schema@.keep_chunk(
                p_owner, p_job_id, p_statement, v_first, v_count, v_cells, v_rows, v_bytes, p_max_rows, p_max_bytes);
        end loop;
    end if;
    perform @schema@.keep_set(p_owner, p_job_id, p_statement, v_columns, p_command_tag);
end $$;

-- Supervision: a worker that launches another one, for SQL that can carry no receipt -------------------------------

-- In the supervisor, before the launch: takes the locks for as long as its session lives, and claims the receipt.
-- Committed before the launch, so that a supervisor that dies leaves a trace, and nothing is launched twice.
create function @schema@.begin_supervision(
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
    if not pg_try_advisory_lock(@schema@.lock_key('series', v_owner, v_series))
        or not pg_try_advisory_lock(@schema@.lock_key('job', v_owner, v_job))
    then
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

-- Once the worker was seen at work, by its supervisor or by whoever came after that: names it in the claimed receipt.
-- Until then the worker of a supervisor that is gone may begin at any time, so nobody launches another beside it.
create function @schema@.follow(p_owner text, p_job_id text, p_attempt int, p_worker_pid int) returns void
    language sql volatile security definer
    set search_path = pg_catalog, pg_temp
as $$
    update @schema@.receipt r set worker_pid = p_worker_pid
        where r.owner = @schema@.owner_for(p_owner) and r.job_digest = @schema@.digest(p_job_id)
          and r.attempt = p_attempt and r.status = 'launching' and r.supervisor_pid <> p_worker_pid
$$;

-- The worker of a claimed job that is at work, for whoever wants to cancel it; null where none is seen.
create function @schema@.supervised(p_owner text, p_job_id text) returns int
    language sql volatile security definer
    set search_path = pg_catalog, pg_temp
as $$
    select @schema@.marked(r.owner, r.job_id, r.worker_pid, r.decided_by, r.supervisor_pid) from @schema@.receipt r
        where r.owner = @schema@.owner_for(p_owner) and r.job_digest = @schema@.digest(p_job_id)
          and r.status = 'launching'
$$;

-- Says how a supervised job ended, in the supervisor or by whoever found it out: 'committed', or 'failed' and
-- 'unlaunched', which free the receipt for another attempt. Returns whether there was anything to settle.
create function @schema@.end_supervision(
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
begin
    perform @schema@.require_read_committed();
    if p_outcome = 'committed' then
        update @schema@.receipt r set status = 'committed', worker_pid = coalesce(p_worker_pid, r.worker_pid),
               decided_at = clock_timestamp(), decided_by = session_user
            where r.owner = v_owner and r.job_digest = v_job and r.attempt is not distinct from p_attempt
              and r.status = 'launching';
    else
        delete from @schema@.receipt r
            where r.owner = v_owner and r.job_digest = v_job and r.attempt is not distinct from p_attempt
              and r.status = 'launching';
    end if;
    v_found := found;
    if v_found and p_outcome <> 'unlaunched' then
        perform @schema@.record(
            p_owner, p_job_id, p_attempt, p_outcome, p_worker_pid, null, p_row_count, p_command_tag, p_error, null);
        perform @schema@.tell(v_owner, p_job_id);
    end if;
    return v_found;
end $$;

-- The supervisor itself: the single statement of a worker, so that it can commit. It can be neither SECURITY DEFINER
-- nor have a SET clause (2D000), so every name is qualified. It commits at each poll: every kind of sleep holds a
-- snapshot, and CREATE INDEX CONCURRENTLY would wait for it for ever. No EXCEPTION block may stand around a COMMIT.
--
-- p_calls: the statements of pg_background that it uses, as the client knows their names: launch, result_info,
-- error_info, result (read to its end: the number of rows, and the last tag or null). p_name: the application_name of the
-- worker, which begins with the marker of its job. p_settings: names and values for the worker, in turn.
-- p_redact_details: keep of an error its code and the names of objects only.
--
-- A cancel of this one is meant for the job: it is handed on to the worker, and the job ends as the worker does.
create procedure @schema@.supervise(
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
            perform pg_catalog.pg_sleep(case when v_polls < 4 then 0.001 when v_polls < 20 then 0.01 else 0.05 end);
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

-- On the launching side ------------------------------------------------------------------------------------------

-- Registers a launch: the series' newest generation, the job, and one more attempt of it, in one transaction that is
-- committed before the launch. Writes nothing when the launch must not be: 'reused' (the id stands for other SQL),
-- 'committed' or 'cancelled' (there is a receipt), 'superseded', 'untold' (the same work failed, and nobody was told); nor,
-- with p_only_new, when anything of the job or of its series is known: 'known'. Then there is something to look at first.
create function @schema@.register(
    p_owner text, p_job_id text, p_series text, p_generation bigint, p_label text, p_kind text, p_sql_digest bytea,
    p_accept_changed_sql boolean, p_launched_by text, p_only_new boolean default false,
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
        return;
    end if;

    attempt := attempt + 1;
    update @schema@.series s set newest = generation
        where s.owner = v_owner and s.series_digest = v_series and s.newest < generation;
    insert into @schema@.job as j
        (owner, job_digest, job_id, series_digest, series, generation, label, kind, sql_digest, attempt,
         launched_by, launcher_pid)
    values
        (v_owner, v_job, p_job_id, v_series, p_series, generation, p_label, p_kind, p_sql_digest, attempt, p_launched_by,
         pg_backend_pid())
    on conflict (owner, job_digest) do update set
        series_digest = excluded.series_digest, series = excluded.series, generation = excluded.generation,
        label = excluded.label, kind = excluded.kind, sql_digest = excluded.sql_digest, attempt = excluded.attempt,
        launched_by = excluded.launched_by, launcher_pid = excluded.launcher_pid,
        launched_at = clock_timestamp(), ended_at = null, reported_at = null, outcome = null,
        worker_pid = null, started_at = null, row_count = null, command_tag = null, sqlstate = null, message = null,
        detail = null, hint = null, context = null, schema_name = null, table_name = null, column_name = null,
        constraint_name = null;
end $$;

-- What can be seen of jobs: first the locks, and only then, with a later snapshot, the receipts. A commit becomes
-- visible before its locks go, so in this order a committed job is never seen without both.
create function @schema@.look(p_owners text[], p_jobs bytea[], p_series bytea[])
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
create function @schema@.committed(
    p_owner text, p_job_id text, out attempt int, out worker_pid int, out started_at timestamptz
) returns setof record
    language sql stable security definer
    set search_path = pg_catalog, pg_temp
as $$
    select r.attempt, r.worker_pid, r.started_at from @schema@.receipt r
        where r.owner = @schema@.owner_for(p_owner) and r.job_digest = @schema@.digest(p_job_id)
          and r.status = 'committed'
$$;

-- Makes a cancel final: after it the job is 'cancelled', or it was 'committed' before. Waits for a worker that is at
-- work (no longer than lock_timeout, then 55P03): signal it first.
create function @schema@.mark_cancelled(
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
        -- A mark that a later call could take back becomes one that it does not: the next call's own, then a try's.
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
create function @schema@.mark_older(p_owner text, p_series text, p_generation bigint) returns text[]
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
create function @schema@.lift_cancel(p_owner text, p_job_id text) returns boolean
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

-- Writes an attempt's outcome into the history, unless a later attempt has begun. p_reported_at: null, where nobody is
-- told of it yet.
create function @schema@.record(
    p_owner text, p_job_id text, p_attempt int, p_outcome text, p_worker_pid int, p_started_at timestamptz,
    p_row_count bigint, p_command_tag text, p_error text[], p_reported_at timestamptz default clock_timestamp()
) returns boolean
    language plpgsql volatile security definer
    set search_path = pg_catalog, pg_temp
as $$
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
      and (j.attempt = p_attempt or j.outcome is null or p_outcome = 'committed');
    return found;
end $$;

-- Says that somebody was told how an attempt ended.
create function @schema@.reported(p_owner text, p_job_id text, p_attempt int) returns void
    language sql volatile security definer
    set search_path = pg_catalog, pg_temp
as $$
    update @schema@.job j set reported_at = clock_timestamp()
        where j.owner = @schema@.owner_for(p_owner) and j.job_digest = @schema@.digest(p_job_id)
          and j.attempt = p_attempt and j.reported_at is null
$$;

-- Forgets what ended longer ago than p_older_than. A retry that comes later than that runs the job again. A receipt's age
-- counts from the end of its job as somebody wrote it down, or from when this found that nobody had; it never goes before
-- its line of the history is as old.
create function @schema@.prune(p_older_than interval, out receipts bigint, out jobs bigint)
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

-- Reading rows ---------------------------------------------------------------------------------------------------

-- What was kept of a job's rows: a line for each part, and one without cells for a statement that gave none.
create function @schema@.kept_rows(p_owner text, p_job_id text)
    returns table (statement int, columns jsonb, command_tag text, total bigint, chunk bigint, row_count int, cells text[])
    language sql stable security definer
    set search_path = pg_catalog, pg_temp
as $$
    select s.statement, case when c.chunk is not distinct from first.chunk then s.columns end, s.command_tag, s.row_count,
           c.chunk, c.row_count, c.cells
    from (select @schema@.owner_for(p_owner) as owner, @schema@.digest(p_job_id) as job_digest) k
    join @schema@.row_set s on s.owner = k.owner and s.job_digest = k.job_digest
    left join @schema@.row_chunk c
        on c.owner = s.owner and c.job_digest = s.job_digest and c.statement = s.statement
    cross join lateral (
        select min(f.chunk) as chunk from @schema@.row_chunk f
        where f.owner = s.owner and f.job_digest = s.job_digest and f.statement = s.statement
    ) first
    order by s.statement, c.chunk
$$;

-- For people ---------------------------------------------------------------------------------------------------

-- The true state of jobs, newest launch first. Filters that are null are none; p_label and p_series are patterns of LIKE.
-- What is registered is found by an index, whatever the history's length. With p_limit, a receipt of a worker's whose line
-- of the history somebody deleted is left out: to find such takes a look at every receipt.
create function @schema@.list_jobs(
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
    language plpgsql volatile security definer
    set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
    v_keys   bigint[];
    v_pids   int[];
    v_logins oid[];
    v_here   oid := (select d.oid from pg_database d where d.datname = current_database());
    v_job    bytea := @schema@.digest(p_job_id);
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
              and @schema@.is_mine(j.owner)
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
              and @schema@.is_mine(r.owner)
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

create view @schema@.jobs as select * from @schema@.list_jobs();
comment on view @schema@.jobs is
    'The true state of every job that the login may see: waiting, running, committed, cancelled, failed, lost, unknown.';

-- Privileges -----------------------------------------------------------------------------------------------------

revoke all on all tables in schema @schema@ from public;
revoke all on all routines in schema @schema@ from public;
grant usage on schema @schema@ to pgbackground_role;
grant select on @schema@.meta, @schema@.jobs to pgbackground_role;
grant execute on all routines in schema @schema@ to pgbackground_role;
