-- Reading the rows that jobs kept; worker.sql has how they are kept.

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

-- What was kept of a job's rows: a line for each part, and one without cells for a statement that gave none.
create or replace function @schema@.kept_rows(p_owner text, p_job_id text)
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
