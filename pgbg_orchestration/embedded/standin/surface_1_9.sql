-- The names and signatures of pg_background 1.9: "_v2" names, no outcome, no view.

CREATE FUNCTION @extschema@._pgbg_names_workers() RETURNS boolean LANGUAGE sql IMMUTABLE AS 'SELECT false';
CREATE FUNCTION @extschema@._pgbg_submit_name() RETURNS text LANGUAGE sql IMMUTABLE AS $$ SELECT 'submit_v2' $$;

CREATE TYPE @extschema@.pg_background_stats AS (
    workers_launched bigint, workers_completed bigint, workers_failed bigint, workers_canceled bigint,
    workers_active integer, avg_execution_ms double precision, max_workers integer);
CREATE TYPE @extschema@.pg_background_progress AS (progress_pct integer, progress_msg text);
CREATE TYPE @extschema@.pg_background_result_info AS (row_count bigint, command_tag text, completed boolean, has_error boolean);
CREATE TYPE @extschema@.pg_background_error AS (sqlstate text, message text, detail text, hint text, context text);

CREATE FUNCTION @extschema@.pg_background_launch_v2(sql text, queue_size integer DEFAULT 0)
RETURNS @extschema@.pg_background_handle LANGUAGE plpgsql STRICT
AS $$ BEGIN RETURN @extschema@._pgbg_launch($1, $2, NULL, false); END $$;

CREATE FUNCTION @extschema@.pg_background_launch_v2(sql text, queue_size integer, label text)
RETURNS @extschema@.pg_background_handle LANGUAGE plpgsql
AS $$ BEGIN RETURN @extschema@._pgbg_launch($1, $2, $3, false); END $$;

CREATE FUNCTION @extschema@.pg_background_submit_v2(sql text, queue_size integer DEFAULT 0)
RETURNS @extschema@.pg_background_handle LANGUAGE plpgsql STRICT
AS $$ BEGIN RETURN @extschema@._pgbg_launch($1, $2, NULL, true); END $$;

CREATE FUNCTION @extschema@.pg_background_submit_v2(sql text, queue_size integer, label text)
RETURNS @extschema@.pg_background_handle LANGUAGE plpgsql
AS $$ BEGIN RETURN @extschema@._pgbg_launch($1, $2, $3, true); END $$;

CREATE FUNCTION @extschema@.pg_background_result_v2(pid integer, cookie bigint)
RETURNS SETOF record LANGUAGE plpgsql STRICT
AS $$
BEGIN
    -- The other functions say 55000, and so does 2.0.
    IF (@extschema@._pgbg_load('worker_' || $1) ->> 'cookie')::bigint <> $2 THEN
        RAISE EXCEPTION USING ERRCODE = '42704',
            MESSAGE = format('PID %s is not attached to this session (cookie mismatch)', $1);
    END IF;
    RETURN QUERY EXECUTE @extschema@._pgbg_result_query($1, $2);
    PERFORM @extschema@._pgbg_close($2);
EXCEPTION
    WHEN datatype_mismatch THEN
        PERFORM @extschema@._pgbg_close($2);
        RAISE EXCEPTION USING ERRCODE = SQLSTATE,
            MESSAGE = 'remote query result rowtype does not match the specified FROM clause rowtype';
    WHEN OTHERS OR query_canceled OR assert_failure THEN
        PERFORM @extschema@._pgbg_close($2);
        RAISE;
END $$;

CREATE FUNCTION @extschema@.pg_background_detach_v2(pid integer, cookie bigint) RETURNS void
LANGUAGE plpgsql STRICT AS $$ BEGIN PERFORM @extschema@._pgbg_detach($1, $2); END $$;

CREATE FUNCTION @extschema@.pg_background_cancel_v2(pid integer, cookie bigint) RETURNS void
LANGUAGE plpgsql STRICT AS $$ BEGIN PERFORM @extschema@._pgbg_cancel($1, $2, 0); END $$;

CREATE FUNCTION @extschema@.pg_background_cancel_v2_grace(pid integer, cookie bigint, grace_ms integer) RETURNS void
LANGUAGE plpgsql STRICT AS $$ BEGIN PERFORM @extschema@._pgbg_cancel($1, $2, $3); END $$;

CREATE FUNCTION @extschema@.pg_background_wait_v2(pid integer, cookie bigint) RETURNS void
LANGUAGE plpgsql STRICT AS $$ BEGIN PERFORM @extschema@._pgbg_wait($1, $2, 0); END $$;

-- A timeout of 0 looks once, unlike 2.0's, which then waits for ever.
CREATE FUNCTION @extschema@.pg_background_wait_v2_timeout(pid integer, cookie bigint, timeout_ms integer) RETURNS boolean
LANGUAGE plpgsql STRICT AS $$ BEGIN RETURN @extschema@._pgbg_wait($1, $2, greatest($3, 1)); END $$;

CREATE FUNCTION @extschema@.pg_background_list_v2() RETURNS SETOF record
LANGUAGE plpgsql AS $$
BEGIN
    RETURN QUERY SELECT * FROM @extschema@._pgbg_list() AS l (
        pid integer, cookie bigint, launched_at timestamptz, user_id oid, queue_size integer, state text,
        sql_preview text, last_error text, consumed boolean, label text);
END $$;

CREATE FUNCTION @extschema@.pg_background_stats_v2() RETURNS @extschema@.pg_background_stats
LANGUAGE plpgsql AS $$
BEGIN
    RETURN jsonb_populate_record(NULL::@extschema@.pg_background_stats, @extschema@._pgbg_statistics());
END $$;

CREATE FUNCTION @extschema@.pg_background_progress(pct integer, msg text DEFAULT NULL) RETURNS void
LANGUAGE plpgsql AS $$ BEGIN PERFORM @extschema@._pgbg_report_progress(coalesce(pct, 0), msg, 'pg_background_progress'); END $$;

CREATE FUNCTION @extschema@.pg_background_get_progress_v2(pid integer, cookie bigint)
RETURNS @extschema@.pg_background_progress
LANGUAGE sql AS $$ SELECT progress_pct, progress_msg FROM @extschema@._pgbg_get_progress($1, $2) $$;

CREATE FUNCTION @extschema@.pg_background_result_info_v2(pid integer, cookie bigint)
RETURNS @extschema@.pg_background_result_info LANGUAGE plpgsql STRICT
AS $$
BEGIN
    RETURN jsonb_populate_record(NULL::@extschema@.pg_background_result_info, @extschema@._pgbg_info($1, $2));
END $$;

CREATE FUNCTION @extschema@.pg_background_error_info_v2(pid integer, cookie bigint)
RETURNS @extschema@.pg_background_error LANGUAGE plpgsql STRICT
AS $$
BEGIN
    RETURN jsonb_populate_record(NULL::@extschema@.pg_background_error, @extschema@._pgbg_error($1, $2));
END $$;

CREATE FUNCTION @extschema@.pg_background_detach_all_v2() RETURNS integer
LANGUAGE sql AS 'SELECT @extschema@._pgbg_detach_all()';

CREATE FUNCTION @extschema@.pg_background_cancel_all_v2() RETURNS integer
LANGUAGE sql AS 'SELECT @extschema@._pgbg_cancel_all()';

-- The oldest API: in 1.x its names are the unsuffixed ones, with another meaning than in 2.0. Present so that nobody
-- tells the version by a name; it works for one who has only the pid.
CREATE FUNCTION @extschema@.pg_background_launch(sql text, queue_size integer DEFAULT 0) RETURNS integer
LANGUAGE plpgsql STRICT AS $$ BEGIN RETURN (@extschema@._pgbg_launch($1, $2, NULL, false)).pid; END $$;

CREATE FUNCTION @extschema@.pg_background_detach(pid integer) RETURNS void
LANGUAGE plpgsql STRICT AS $$
BEGIN
    PERFORM @extschema@._pgbg_detach(h.pid, h.cookie) FROM @extschema@._pgbg_handles() AS h WHERE h.pid = $1;
END $$;
