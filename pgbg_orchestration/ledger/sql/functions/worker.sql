-- In the worker of a job of kind receipt: its receipt, and its rows that are kept.

create or replace function @schema@.begin_work(
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

-- Does what begin_work does, in one statement, which costs a new process the least: its body is stored parsed, and no
-- procedural language has to be loaded. True: the receipt is written. Null: something is against it, or the isolation
-- level is another one: begin_work is called then, and raises the error that says what. The caller gives the digests
-- and the keys of the locks, as digest and lock_key would make them. They are not checked: whoever may call this may
-- write any receipt of that owner, and take any lock, in any case.
--
-- In READ COMMITTED only: in the other levels, a receipt that the snapshot does not show would raise another error. The
-- series is read as it was before the locks were taken. A newer generation that is registered after that is not seen;
-- but whoever registers it then marks the older jobs by their receipts' keys, and that the insert meets.
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

-- What a worker calls first. Its arguments come in the setting pgbg.work, so that pg_stat_activity, which shows the
-- beginning of a worker's text, shows the job's own SQL behind one short line. They are, in this order: owner, job id,
-- series, generation, label, attempt, digest of the SQL, of the job, of the series, lock of the series, of the job,
-- marker (Work.arguments in walk/worker_sql.py writes them). A process that began with version 5 of the schema gives
-- the first seven only. No SET clause is needed: a body that is stored parsed looks up no names.
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

-- Keeps a part of a statement's rows beside the receipt. Only the worker's own transaction can: the one that wrote the
-- receipt. p_rows: of the whole result. p_bytes: of its parts up to the end of this one.
create or replace function @schema@.keep_chunk(
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
create or replace function @schema@.keep_set(
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
