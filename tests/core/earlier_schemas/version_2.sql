-- Version 2 of the schema: orphans, jobs at work whose launcher is dead and whose caller may have ended otherwise.
-- The functions of version 1 stay as they are, so that processes that run with it go on while this is installed.

alter table @schema@.job add column when_orphaned text check (when_orphaned in ('cancel', 'leave'));
comment on column @schema@.job.when_orphaned is
    'What is to be done with the worker of a launch whose launcher is dead and whose caller has ended otherwise, as '
    'that caller said. Null: nobody said anything, and nobody is to touch it.';

-- Registers a launch as register does, and writes down in the same transaction what is to become of an orphan.
create function @schema@.register_launch(
    p_owner text, p_job_id text, p_series text, p_generation bigint, p_label text, p_kind text, p_sql_digest bytea,
    p_accept_changed_sql boolean, p_launched_by text, p_when_orphaned text, p_only_new boolean default false,
    out verdict text, out generation bigint, out newest bigint, out attempt int, out sql_changed boolean
)
    language plpgsql volatile security definer
    set search_path = pg_catalog, pg_temp
as $$
begin
    select r.verdict, r.generation, r.newest, r.attempt, r.sql_changed
        into verdict, generation, newest, attempt, sql_changed
        from @schema@.register(
            p_owner, p_job_id, p_series, p_generation, p_label, p_kind, p_sql_digest, p_accept_changed_sql,
            p_launched_by, p_only_new) r;
    if verdict = 'registered' then
        -- The newest launch counts, whoever made it.
        update @schema@.job j set when_orphaned = p_when_orphaned
            where j.owner = @schema@.owner_for(p_owner) and j.job_digest = @schema@.digest(p_job_id)
              and j.when_orphaned is distinct from p_when_orphaned;
    end if;
end $$;

-- Jobs of some series (a pattern of LIKE) that are at work, or may begin yet, while the session that registered their
-- launch is gone, and of which somebody said what is to become of them then. Another process may wait for them by now:
-- who asks has to know whether anybody still wants them.
create function @schema@.orphans(p_series text, p_job_id text default null)
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

revoke all on function
    @schema@.register_launch(text, text, text, bigint, text, text, bytea, boolean, text, text, boolean),
    @schema@.orphans(text, text)
    from public;
grant execute on function
    @schema@.register_launch(text, text, text, bigint, text, text, bytea, boolean, text, text, boolean),
    @schema@.orphans(text, text)
    to pgbackground_role;
