-- The names and signatures of pg_background 2.0, and its deprecated "_v2" aliases.

CREATE FUNCTION @extschema@._pgbg_names_workers() RETURNS boolean LANGUAGE sql IMMUTABLE AS 'SELECT true';
CREATE FUNCTION @extschema@._pgbg_submit_name() RETURNS text LANGUAGE sql IMMUTABLE AS $$ SELECT 'pg_background_submit' $$;

CREATE TYPE @extschema@.pg_background_stats AS (
    workers_launched bigint, workers_completed bigint, workers_failed bigint, workers_canceled bigint,
    workers_timed_out bigint, workers_active integer, avg_execution_ms double precision, max_workers integer);
CREATE TYPE @extschema@.pg_background_progress_info AS (progress_pct integer, progress_msg text);
CREATE TYPE @extschema@.pg_background_result_info AS (
    row_count bigint, command_tag text, completed boolean, has_error boolean, started_at timestamptz, finished_at timestamptz);
CREATE TYPE @extschema@.pg_background_error AS (
    sqlstate text, message text, detail text, hint text, context text,
    schema_name text, table_name text, column_name text, constraint_name text);
CREATE TYPE @extschema@.pg_background_outcome AS (
    pid integer, cookie bigint, state text, consumed boolean, completed boolean, has_error boolean, row_count bigint,
    command_tag text, sqlstate text, error_message text, label text, launched_at timestamptz);
CREATE TYPE @extschema@.pg_background_run_result AS (
    pid integer, cookie bigint, state text, consumed boolean, completed boolean, has_error boolean, row_count bigint,
    command_tag text, sqlstate text, error_message text, label text, launched_at timestamptz,
    timed_out boolean, elapsed_ms bigint);

CREATE FUNCTION @extschema@.pg_background_report_progress(pct integer, msg text DEFAULT NULL) RETURNS void
LANGUAGE sql AS $$ SELECT @extschema@._pgbg_report_progress(pct, msg, 'pg_background_report_progress') $$;

CREATE FUNCTION @extschema@.pg_background_record_timeout() RETURNS void
LANGUAGE sql AS $$ SELECT @extschema@._pgbg_count('timed_out') $$;

-- Each of these exists under two names: the aliases go in 3.0.
DO $surface$
DECLARE
    suffix text;
    statement text;
BEGIN
    FOREACH suffix IN ARRAY ARRAY['', '_v2'] LOOP
        FOREACH statement IN ARRAY ARRAY[
$x$ CREATE FUNCTION @extschema@.pg_background_launch#(sql text, queue_size integer DEFAULT 0)
    RETURNS @extschema@.pg_background_handle LANGUAGE plpgsql STRICT
    AS 'BEGIN RETURN @extschema@._pgbg_launch($1, $2, NULL, false); END' $x$,
$x$ CREATE FUNCTION @extschema@.pg_background_launch#(sql text, queue_size integer, label text)
    RETURNS @extschema@.pg_background_handle LANGUAGE plpgsql
    AS 'BEGIN RETURN @extschema@._pgbg_launch($1, $2, $3, false); END' $x$,
$x$ CREATE FUNCTION @extschema@.pg_background_submit#(sql text, queue_size integer DEFAULT 0)
    RETURNS @extschema@.pg_background_handle LANGUAGE plpgsql STRICT
    AS 'BEGIN RETURN @extschema@._pgbg_launch($1, $2, NULL, true); END' $x$,
$x$ CREATE FUNCTION @extschema@.pg_background_submit#(sql text, queue_size integer, label text)
    RETURNS @extschema@.pg_background_handle LANGUAGE plpgsql
    AS 'BEGIN RETURN @extschema@._pgbg_launch($1, $2, $3, true); END' $x$,
$x$ CREATE FUNCTION @extschema@.pg_background_result#(pid integer, cookie bigint)
    RETURNS SETOF record LANGUAGE plpgsql STRICT
    AS 'BEGIN RETURN QUERY EXECUTE @extschema@._pgbg_result_query($1, $2); PERFORM @extschema@._pgbg_close($2);
        EXCEPTION WHEN datatype_mismatch THEN PERFORM @extschema@._pgbg_close($2); RAISE EXCEPTION USING ERRCODE = SQLSTATE,
        MESSAGE = ''remote query result rowtype does not match the specified FROM clause rowtype'';
        WHEN OTHERS OR query_canceled OR assert_failure THEN PERFORM @extschema@._pgbg_close($2); RAISE; END' $x$,
$x$ CREATE FUNCTION @extschema@.pg_background_detach#(pid integer, cookie bigint)
    RETURNS void LANGUAGE plpgsql STRICT AS 'BEGIN PERFORM @extschema@._pgbg_detach($1, $2); END' $x$,
$x$ CREATE FUNCTION @extschema@.pg_background_cancel#(pid integer, cookie bigint, grace_ms integer DEFAULT 0)
    RETURNS void LANGUAGE plpgsql STRICT AS 'BEGIN PERFORM @extschema@._pgbg_cancel($1, $2, $3); END' $x$,
$x$ CREATE FUNCTION @extschema@.pg_background_wait#(pid integer, cookie bigint, timeout_ms integer DEFAULT 0)
    RETURNS boolean LANGUAGE plpgsql STRICT AS 'BEGIN RETURN @extschema@._pgbg_wait($1, $2, $3); END' $x$,
$x$ CREATE FUNCTION @extschema@.pg_background_list#() RETURNS SETOF record
    LANGUAGE plpgsql AS 'BEGIN RETURN QUERY SELECT * FROM @extschema@._pgbg_list() AS l (
        pid integer, cookie bigint, launched_at timestamptz, user_id oid, queue_size integer, state text,
        sql_preview text, last_error text, consumed boolean, label text); END' $x$,
$x$ CREATE FUNCTION @extschema@.pg_background_stats#() RETURNS @extschema@.pg_background_stats
    LANGUAGE plpgsql AS 'BEGIN RETURN jsonb_populate_record(NULL::@extschema@.pg_background_stats, @extschema@._pgbg_statistics()); END' $x$,
$x$ CREATE FUNCTION @extschema@.pg_background_get_progress#(pid integer, cookie bigint)
    RETURNS @extschema@.pg_background_progress_info
    LANGUAGE sql AS 'SELECT progress_pct, progress_msg FROM @extschema@._pgbg_get_progress($1, $2)' $x$,
$x$ CREATE FUNCTION @extschema@.pg_background_result_info#(pid integer, cookie bigint)
    RETURNS @extschema@.pg_background_result_info LANGUAGE plpgsql STRICT
    AS 'BEGIN RETURN jsonb_populate_record(NULL::@extschema@.pg_background_result_info, @extschema@._pgbg_info($1, $2)); END' $x$,
$x$ CREATE FUNCTION @extschema@.pg_background_error_info#(pid integer, cookie bigint)
    RETURNS @extschema@.pg_background_error LANGUAGE plpgsql STRICT
    AS 'BEGIN RETURN jsonb_populate_record(NULL::@extschema@.pg_background_error, @extschema@._pgbg_error($1, $2)); END' $x$,
$x$ CREATE FUNCTION @extschema@.pg_background_detach_all#() RETURNS integer
    LANGUAGE sql AS 'SELECT @extschema@._pgbg_detach_all()' $x$,
$x$ CREATE FUNCTION @extschema@.pg_background_cancel_all#() RETURNS integer
    LANGUAGE sql AS 'SELECT @extschema@._pgbg_cancel_all()' $x$,
$x$ CREATE FUNCTION @extschema@.pg_background_full_sql#(pid integer, cookie bigint) RETURNS text
    LANGUAGE plpgsql STRICT AS 'BEGIN RETURN @extschema@._pgbg_find($1, $2) ->> ''sql''; END' $x$,
$x$ CREATE FUNCTION @extschema@.pg_background_outcome#(p_pid integer, p_cookie bigint)
    RETURNS @extschema@.pg_background_outcome LANGUAGE plpgsql
    AS 'BEGIN RETURN @extschema@._pgbg_outcome($1, $2); END' $x$,
$x$ CREATE FUNCTION @extschema@.pg_background_run#(
        sql text, queue_size integer DEFAULT 0, timeout_ms integer DEFAULT 0, label text DEFAULT NULL)
    RETURNS @extschema@.pg_background_run_result LANGUAGE plpgsql
    AS 'BEGIN RETURN @extschema@._pgbg_run($1, $2, $3, $4); END' $x$,
$x$ CREATE FUNCTION @extschema@.pg_background_run_query#(
        sql text, queue_size integer DEFAULT 0, timeout_ms integer DEFAULT 0, label text DEFAULT NULL, col_def text DEFAULT NULL)
    RETURNS SETOF record LANGUAGE plpgsql
    AS 'BEGIN RETURN QUERY EXECUTE @extschema@._pgbg_run_query($1, $2, $3, $4, $5); END' $x$,
$x$ CREATE FUNCTION @extschema@.pg_background_wait_any#(
        handles @extschema@.pg_background_handle[], timeout_ms integer DEFAULT 0)
    RETURNS @extschema@.pg_background_handle LANGUAGE plpgsql
    AS 'BEGIN RETURN @extschema@._pgbg_wait_any($1, $2); END' $x$,
$x$ CREATE FUNCTION @extschema@.pg_background_drain#(
        handles @extschema@.pg_background_handle[], timeout_ms integer DEFAULT 0)
    RETURNS SETOF @extschema@.pg_background_outcome LANGUAGE plpgsql
    AS 'BEGIN RETURN QUERY SELECT * FROM @extschema@._pgbg_drain($1, $2); END' $x$,
$x$ CREATE FUNCTION @extschema@.pg_background_cancel_by_label#(pattern text, grace_ms integer DEFAULT 0) RETURNS integer
    LANGUAGE sql AS 'SELECT count(@extschema@._pgbg_cancel(l.pid, l.cookie, grace_ms)::text)::integer
        FROM @extschema@._pgbg_list() AS l (pid integer, cookie bigint, launched_at timestamptz, user_id oid,
        queue_size integer, state text, sql_preview text, last_error text, consumed boolean, label text)
        WHERE l.label LIKE pattern' $x$,
$x$ CREATE FUNCTION @extschema@.pg_background_purge#() RETURNS integer
    LANGUAGE sql AS 'SELECT count(@extschema@._pgbg_detach(h.pid, h.cookie)::text)::integer
        FROM @extschema@._pgbg_handles() AS h
        WHERE (@extschema@._pgbg_find(h.pid, h.cookie) ->> ''completed'')::boolean' $x$
        ] LOOP
            EXECUTE replace(statement, '#', suffix);
        END LOOP;
    END LOOP;
END $surface$;

CREATE VIEW @extschema@.pg_background_list AS
    SELECT * FROM @extschema@.pg_background_list() AS l (
        pid integer, cookie bigint, launched_at timestamptz, user_id oid, queue_size integer, state text,
        sql_preview text, last_error text, consumed boolean, label text);

CREATE VIEW @extschema@.pg_background_activity AS
    SELECT l.pid, l.cookie, l.launched_at, l.user_id, l.queue_size, l.state AS pgbg_state, l.sql_preview, l.last_error,
           l.consumed, l.label, a.state AS backend_state, a.wait_event_type, a.wait_event, a.xact_start, a.query_start,
           a.backend_start, a.query
      FROM @extschema@.pg_background_list AS l LEFT JOIN pg_catalog.pg_stat_activity AS a ON a.pid = l.pid;

-- Never raises: nulls for a handle that this session does not know, or may not use.
CREATE FUNCTION @extschema@._pgbg_outcome(p_pid integer, p_cookie bigint) RETURNS @extschema@.pg_background_outcome
LANGUAGE plpgsql AS $$
DECLARE
    worker jsonb;
BEGIN
    worker := @extschema@._pgbg_look(p_pid, p_cookie);
    RETURN ROW(p_pid, p_cookie, CASE WHEN (worker ->> 'completed')::boolean THEN 'stopped' ELSE 'running' END, false,
        (worker ->> 'completed')::boolean, (worker ->> 'has_error')::boolean, (worker ->> 'row_count')::bigint,
        worker ->> 'command_tag', worker #>> '{error,sqlstate}', worker #>> '{error,message}', worker ->> 'label',
        (worker ->> 'launched_at')::timestamptz)::@extschema@.pg_background_outcome;
EXCEPTION WHEN undefined_object OR object_not_in_prerequisite_state OR insufficient_privilege THEN
    RETURN ROW(p_pid, p_cookie, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL)::@extschema@.pg_background_outcome;
END $$;

CREATE FUNCTION @extschema@._pgbg_run(sql text, queue_size integer, timeout_ms integer, label text)
RETURNS @extschema@.pg_background_run_result
LANGUAGE plpgsql AS $$
DECLARE
    began timestamptz := clock_timestamp();
    handle @extschema@.pg_background_handle := @extschema@._pgbg_launch(sql, queue_size, label, false);
    ended boolean := @extschema@._pgbg_wait(handle.pid, handle.cookie, timeout_ms);
    outcome @extschema@.pg_background_outcome;
BEGIN
    IF NOT ended THEN
        PERFORM @extschema@._pgbg_cancel(handle.pid, handle.cookie, 1000);
        PERFORM @extschema@._pgbg_count('timed_out');
    END IF;
    outcome := @extschema@._pgbg_outcome(handle.pid, handle.cookie);
    PERFORM @extschema@._pgbg_detach(handle.pid, handle.cookie);
    RETURN jsonb_populate_record(NULL::@extschema@.pg_background_run_result, to_jsonb(outcome) || jsonb_build_object(
        'timed_out', NOT ended, 'elapsed_ms', (extract(epoch FROM clock_timestamp() - began) * 1000)::bigint));
END $$;

CREATE FUNCTION @extschema@._pgbg_run_query(sql text, queue_size integer, timeout_ms integer, label text, col_def text)
RETURNS text
LANGUAGE plpgsql AS $$
DECLARE
    handle @extschema@.pg_background_handle := @extschema@._pgbg_launch(sql, queue_size, label, false);
BEGIN
    IF NOT @extschema@._pgbg_wait(handle.pid, handle.cookie, timeout_ms) THEN
        PERFORM @extschema@._pgbg_cancel(handle.pid, handle.cookie, 1000);
        PERFORM @extschema@._pgbg_count('timed_out');
        PERFORM @extschema@._pgbg_detach(handle.pid, handle.cookie);
        RAISE EXCEPTION USING ERRCODE = '57014',
            MESSAGE = format('pg_background_run_query: worker did not complete within %s ms', timeout_ms);
    END IF;
    RETURN format('SELECT * FROM @extschema@.pg_background_result(%s, %s) AS r (%s)', handle.pid, handle.cookie, col_def);
END $$;

CREATE FUNCTION @extschema@._pgbg_wait_any(handles @extschema@.pg_background_handle[], timeout_ms integer)
RETURNS @extschema@.pg_background_handle
LANGUAGE plpgsql AS $$
DECLARE
    deadline timestamptz := CASE WHEN timeout_ms > 0 THEN clock_timestamp() + timeout_ms * interval '1 ms' END;
    handle @extschema@.pg_background_handle;
BEGIN
    WHILE cardinality(handles) > 0 LOOP
        FOREACH handle IN ARRAY handles LOOP
            IF (@extschema@._pgbg_outcome(handle.pid, handle.cookie)).completed THEN
                RETURN handle;
            END IF;
        END LOOP;
        EXIT WHEN clock_timestamp() >= deadline;
        PERFORM pg_sleep(0.01);
    END LOOP;
    RETURN NULL;
END $$;

CREATE FUNCTION @extschema@._pgbg_drain(handles @extschema@.pg_background_handle[], timeout_ms integer)
RETURNS SETOF @extschema@.pg_background_outcome
LANGUAGE plpgsql AS $$
DECLARE
    deadline timestamptz := clock_timestamp() + timeout_ms * interval '1 ms';
    remaining integer;
    handle @extschema@.pg_background_handle;
    outcome @extschema@.pg_background_outcome;
BEGIN
    FOREACH handle IN ARRAY coalesce(handles, '{}') LOOP
        CONTINUE WHEN handle IS NULL;
        remaining := CASE WHEN timeout_ms > 0 THEN extract(epoch FROM deadline - clock_timestamp()) * 1000 ELSE 0 END;
        outcome := @extschema@._pgbg_outcome(handle.pid, handle.cookie);
        IF outcome.state IS NOT NULL AND (timeout_ms <= 0 OR remaining > 0) THEN
            PERFORM @extschema@._pgbg_wait(handle.pid, handle.cookie, remaining);
            outcome := @extschema@._pgbg_outcome(handle.pid, handle.cookie);
            PERFORM @extschema@._pgbg_detach(handle.pid, handle.cookie);
        END IF;
        RETURN NEXT outcome;
    END LOOP;
END $$;
