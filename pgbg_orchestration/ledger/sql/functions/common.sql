-- What the other functions need: digests and keys of locks, who may act for an owner, markers, notifications.
--
-- Words between two at-signs stand for the quoted names of the schema and its owner, and for the values with which a
-- setting is off; install.py fills them in. None may stand in a comment, which a name with a line break would end.
--
-- A function that touches the tables is SECURITY DEFINER with a pinned search_path, runs as the schema's NOLOGIN owner,
-- and lets a login (session_user, which SET ROLE does not change) at the rows of a job's owner only when it is a member
-- of that role.

create or replace function @schema@.digest(p_text text) returns bytea
    language sql stable strict parallel safe
    return pg_catalog.sha256(pg_catalog.convert_to(p_text, 'UTF8'));

-- The 64-bit advisory lock of a series ('series') or of a job ('job') of an owner.
create or replace function @schema@.lock_key(p_what text, p_owner text, p_digest bytea) returns bigint
    language sql stable strict parallel safe
    return ('x' || pg_catalog.encode(
        pg_catalog.substr(
            pg_catalog.sha256(pg_catalog.convert_to('pgbg:' || p_what || ':' || p_owner || ':', 'UTF8') || p_digest), 1, 8
        ), 'hex'))::bit(64)::bigint;

-- What the application_name of a worker without a lock begins with, and is found by; its label follows.
create or replace function @schema@.marker(p_owner text, p_job_id text) returns text
    language sql stable strict parallel safe
    return 'pgbg:' || pg_catalog.left(pg_catalog.encode(
        pg_catalog.sha256(pg_catalog.convert_to(p_owner || ':' || p_job_id, 'UTF8')), 'hex'), 12) || ':';

-- Whether a login may act for an owner; false where the owner was dropped. Asked for many at once, so it has no SET
-- clause: without one the planner puts its body in the place of the call.
create or replace function @schema@.is_member(p_login oid, p_owner text) returns boolean
    language sql stable
    return coalesce(
        pg_catalog.pg_has_role(p_login, pg_catalog.to_regrole(pg_catalog.quote_ident(p_owner)), 'MEMBER'), false);

-- Whether the login may see and prune an owner's jobs. Those of an owner that was dropped are the superusers'.
create or replace function @schema@.is_mine(p_owner text) returns boolean
    language sql stable strict
    set search_path = pg_catalog, pg_temp
as $$
    select coalesce(
        (select pg_has_role(session_user, r.oid, 'MEMBER') from pg_roles r where r.rolname = p_owner),
        (select me.rolsuper from pg_roles me where me.rolname = session_user),
        false)
$$;

create or replace function @schema@.refuse_owner(p_owner text) returns text
    language plpgsql stable
    set search_path = pg_catalog, pg_temp
as $$
begin
    raise exception using errcode = 'insufficient_privilege',
        message = format('%I is not a member of the role %I that owns the job', session_user, p_owner),
        hint = format('GRANT %I TO %I;', p_owner, session_user);
end $$;

-- The owner that is given, or the login; raises where the login may not act for it. No SET clause, as for is_member.
create or replace function @schema@.owner_for(p_owner text) returns text
    language sql stable
begin atomic
    select case
        when p_owner is null or p_owner = session_user then session_user::text
        when pg_has_role(session_user, p_owner, 'MEMBER') then p_owner
        else @schema@.refuse_owner(p_owner) end;
end;

-- The pid of a job's worker that holds no lock; null where none is at work. It is found by the marker in its name. SQL
-- can set its own application_name, and so take the marker off: then by p_pid, which a claimed receipt has, as long as
-- that process runs something as the login that claimed it (p_login), since pids are used again. Anybody can take the
-- name, so the process must work for the owner; and in this database, since the same job may be at work in another.
-- p_except: its supervisor, which bears the marker while it launches.
--
-- It reads the functions that the views are made of: the views' joins cost a new process 2 ms. Its body is a text: one
-- that is stored parsed has the columns of a server's function by their numbers, which a pg_upgrade may change.
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

-- A text that every client can be sent. In a database of the encoding SQL_ASCII an error's text may hold any bytes, and
-- the server sends a client none that its own encoding does not have: there, bytes of no character are written out.
create or replace function @schema@.sendable(p_text text) returns text
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

-- Has this transaction's commit wait for no synchronous standby: where one is away, what a supervisor writes would keep
-- its job from ending.
create or replace function @schema@.await_no_standby() returns void
    language plpgsql volatile
    set search_path = pg_catalog, pg_temp
as $$
begin
    if current_setting('synchronous_commit') <> 'off' then
        perform set_config('synchronous_commit', 'local', true);
    end if;
end $$;

create or replace function @schema@.require_read_committed() returns void
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

-- Lets whoever listens know, at the commit, that there is something to be read of the job with that marker: a hint,
-- which may be lost, and never a proof. Nobody learns the job's name from it. The setting pgbg.notify turns it off; so
-- does a queue of the server's that some listener keeps from being emptied: full, it would fail the job. Put in place
-- by the planner, and for that without a SET clause.
create or replace function @schema@.notify(p_marker text) returns void
    language sql volatile
begin atomic
    select case when lower(coalesce(current_setting('pgbg.notify', true), '')) not in @off_words@
        and pg_notification_queue_usage() < 0.5 then pg_notify('pgbg', p_marker) end;
end;

create or replace function @schema@.tell(p_owner text, p_job_id text) returns void
    language sql volatile
begin atomic
    select @schema@.notify(@schema@.marker(p_owner, p_job_id));
end;
