-- One worker's life: launched, watched, its results read, forgotten.

CREATE FUNCTION @extschema@._pgbg_launch(sql text, queue_size integer, label text, submitted boolean)
RETURNS @extschema@.pg_background_handle
LANGUAGE plpgsql AS $$
DECLARE
    most integer := @extschema@._pgbg_setting('pg_background.max_workers', '16')::integer;
    queue bigint := coalesce(nullif(greatest(queue_size, 0), 0),
        pg_size_bytes(@extschema@._pgbg_setting('pg_background.default_queue_size', '65536')));
    tracked integer[];
    cookie bigint := ('x' || right(md5(gen_random_uuid()::text), 16))::bit(64)::bigint;
    connection text := 'pgbg worker ' || cookie;
    statements jsonb;
    final jsonb;
    refusal text;
    shape text;
    sent text;
    worker jsonb;
    activity jsonb;
BEGIN
    label := nullif(label, '');
    IF sql IS NULL THEN
        RAISE EXCEPTION USING ERRCODE = '22004', MESSAGE = 'sql parameter cannot be NULL';
    ELSIF queue < 64 THEN
        RAISE EXCEPTION USING ERRCODE = '22023', MESSAGE = 'queue size must be at least 64 bytes';
    ELSIF queue > 268435456 THEN
        RAISE EXCEPTION USING ERRCODE = '22023', MESSAGE = 'queue size must not exceed 268435456 bytes',
            HINT = 'Large result sets should be written to a table instead.';
    ELSIF octet_length(label) > 64 THEN
        RAISE EXCEPTION USING ERRCODE = '22001', MESSAGE = 'label too long',
            DETAIL = format('Label length %s exceeds maximum of 64 bytes.', octet_length(label));
    END IF;
    -- The marks between the statements of a job (walk/location.py) reach nobody here, and an INFO without a reader ends
    -- a worker whose launching session is gone.
    sql := regexp_replace(sql, E'do [$]{2}begin raise info ''\\d+'' using errcode=''PB006'';end[$]{2}\n;', '', 'g');
    PERFORM @extschema@._pgbg_drain_detached();
    tracked := @extschema@._pgbg_tracked();
    IF cardinality(tracked) >= most THEN
        RAISE EXCEPTION USING ERRCODE = '53400', MESSAGE = 'too many background workers',
            DETAIL = format('Current limit is %s concurrent workers per session.', most),
            HINT = 'Wait for existing workers to complete, or increase pg_background.max_workers.';
    END IF;

    BEGIN
        PERFORM @extschema@._pgbg_connect(connection, 'pg_background');
    EXCEPTION WHEN sqlclient_unable_to_establish_sqlconnection THEN
        -- Most often there are no connections left: the real extension is then out of worker slots.
        RAISE EXCEPTION USING ERRCODE = '53000', MESSAGE = 'could not register background process',
            DETAIL = SQLERRM, HINT = 'The stand-in''s workers are connections: see max_connections.';
    END;
    SELECT t.who::jsonb INTO worker FROM @extschema@._pgbg_query(connection, format(
        '/* pg_background */ SELECT @extschema@._pgbg_become(%L, %L)',
        @extschema@._pgbg_inherited(label), current_setting('role'))) AS t (who text);

    sent := sql;
    statements := @extschema@._pgbg_statements(sql);
    refusal := @extschema@._pgbg_refusal(statements);
    final := statements -> -1;
    IF refusal IS NOT NULL THEN
        sent := refusal;
        statements := '[{"kind": "DO"}]';
    ELSIF final ->> 'kind' IN ('SELECT', 'INSERT', 'UPDATE', 'DELETE', 'MERGE') THEN
        IF jsonb_array_length(statements) = 1 THEN
            SELECT t.shape INTO shape FROM @extschema@._pgbg_query(connection, format(
                '/* pg_background */ SELECT @extschema@._pgbg_describe(%L)', sql)) AS t (shape text);
        ELSE
            -- The last statement is described where it stands, since those before it may create what it reads.
            sent := left(sql, (final ->> 'start')::integer - 1)
                || format(E'SELECT @extschema@._pgbg_describe(%L);\n',
                    substr(sql, (final ->> 'start')::integer, (final ->> 'end')::integer - (final ->> 'start')::integer + 1))
                || substr(sql, (final ->> 'start')::integer);
            statements := jsonb_insert(statements, '{-1}', '{"kind": "_DESCRIBE"}');
        END IF;
    ELSIF final ->> 'kind' IN ('SHOW', 'EXPLAIN', 'WAIT') THEN  -- WAIT FOR LSN, of 19
        shape := '["text"]';
    END IF;

    worker := worker || jsonb_build_object(
        'cookie', cookie, 'connection', connection, 'launched_at', clock_timestamp(), 'user_id', current_user::regrole::oid,
        'queue_size', queue, 'label', label, 'sql', left(sql, 65536), 'submitted', submitted, 'next', 0,
        'kinds', jsonb_path_query_array(statements, '$[*].kind'), 'shape', shape::jsonb, 'tags', '[]'::jsonb,
        'completed', false, 'has_error', false, 'row_count', 0, 'command_tag', '');
    IF jsonb_array_length(statements) = 0 THEN
        PERFORM @extschema@._pgbg_disconnect(connection);
        worker := worker || jsonb_build_object(
            'completed', true, 'started_at', clock_timestamp(), 'finished_at', clock_timestamp());
    ELSE
        PERFORM @extschema@._pgbg_send(connection, sent);
        -- A signal that came before the worker has read its SQL would be lost: return only when it has begun.
        FOR look IN 1 .. 2000 LOOP
            activity := @extschema@._pgbg_activity(worker);
            EXIT WHEN activity IS NULL OR activity ->> 'query' NOT LIKE '/* pg_background */%';
            PERFORM pg_sleep(0.0005);
        END LOOP;
        worker := worker || jsonb_build_object('started_at', activity -> 'began');
    END IF;
    PERFORM @extschema@._pgbg_save('tracked', to_jsonb(array_append(tracked, (worker ->> 'pid')::integer)));
    PERFORM @extschema@._pgbg_save('worker_' || (worker ->> 'pid'), worker);
    PERFORM @extschema@._pgbg_count('launched');
    RETURN ROW((worker ->> 'pid')::integer, cookie)::@extschema@.pg_background_handle;
END $$;

-- The session's own knowledge of a worker, or the error that the real extension raises for this handle.
CREATE FUNCTION @extschema@._pgbg_find(pid integer, cookie bigint) RETURNS jsonb
LANGUAGE plpgsql AS $$
DECLARE
    worker jsonb := @extschema@._pgbg_load('worker_' || pid);
BEGIN
    IF worker IS NULL THEN
        RAISE EXCEPTION USING ERRCODE = '42704', MESSAGE = format('PID %s is not attached to this session', pid);
    ELSIF (worker ->> 'cookie')::bigint <> cookie THEN
        RAISE EXCEPTION USING ERRCODE = '55000', MESSAGE = format('cookie mismatch for PID %s', pid),
            HINT = 'The worker may have been restarted or the handle is stale.';
    ELSIF NOT pg_has_role(current_user, (worker ->> 'user_id')::oid, 'USAGE') THEN
        RAISE EXCEPTION USING ERRCODE = '42501',
            MESSAGE = format('permission denied for background worker with PID "%s"', pid);
    END IF;
    RETURN worker;
END $$;

CREATE FUNCTION @extschema@._pgbg_forget(worker jsonb) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
    PERFORM @extschema@._pgbg_save('tracked',
        to_jsonb(array_remove(@extschema@._pgbg_tracked(), (worker ->> 'pid')::integer)));
    PERFORM @extschema@._pgbg_save('worker_' || (worker ->> 'pid'), NULL);
END $$;

-- Reads one result of the worker's. Returns it as an object: tag and row_count, rows, or error.
CREATE FUNCTION @extschema@._pgbg_read(connection text, kind text, shape jsonb) RETURNS jsonb
LANGUAGE plpgsql AS $$
DECLARE
    columns text;
    rows jsonb;
    status text;
    number bigint;
    context text;
    detail text;
    hint text;
BEGIN
    IF shape IS NOT NULL THEN
        SELECT string_agg(format('c%s text', n), ', ') INTO columns FROM generate_series(1, jsonb_array_length(shape)) AS n;
        EXECUTE format('SELECT jsonb_agg(jsonb_build_array(%s)) FROM @extschema@._pgbg_get_result($1) AS t (%s)',
                       replace(columns, ' text', ''), columns) INTO rows USING connection;
        rows := coalesce(rows, '[]');
        number := jsonb_array_length(rows);
        RETURN jsonb_build_object('rows', rows, 'row_count', number, 'command_tag', kind, 'status', kind || ' ' || number);
    END IF;
    SELECT min(t.status), count(*), jsonb_agg(jsonb_build_array(t.status)) INTO status, number, rows
      FROM @extschema@._pgbg_get_result(connection) AS t (status text);
    IF kind = '_DESCRIBE' THEN
        RETURN jsonb_build_object('shape', status);
    ELSIF kind IN ('SELECT', 'FETCH', 'CALL', 'EXECUTE', 'INSERT', 'UPDATE', 'DELETE', 'MERGE') AND (number <> 1
            OR status !~ '^(CALL|(SELECT|FETCH|INSERT 0|UPDATE|DELETE|MERGE) \d+)$') THEN
        -- Rows of one column, whose type nobody told.
        RETURN jsonb_build_object('rows', coalesce(rows, '[]'), 'shape', '["text"]'::jsonb, 'row_count', number,
            'command_tag', kind, 'status', concat_ws(' ', kind, CASE kind WHEN 'INSERT' THEN '0' END, number));
    ELSIF kind IN ('EXPLAIN', 'SHOW', 'WAIT') THEN
        RETURN jsonb_build_object('rows', coalesce(rows, '[]'), 'shape', '["text"]'::jsonb, 'row_count', 0,
            'command_tag', kind, 'status', kind);
    END IF;
    RETURN jsonb_build_object(
        'row_count', coalesce(substring(status FROM ' (\d+)$')::bigint, 0),
        'command_tag', CASE WHEN kind = 'CREATE' AND status LIKE 'SELECT %' THEN 'CREATE TABLE AS'
                            ELSE coalesce(regexp_replace(status, '( \d+)+$', ''), '') END, 'status', status);
EXCEPTION WHEN OTHERS OR query_canceled OR assert_failure THEN
    GET STACKED DIAGNOSTICS context = PG_EXCEPTION_CONTEXT, detail = PG_EXCEPTION_DETAIL, hint = PG_EXCEPTION_HINT;
    IF SQLERRM IN ('remote query result rowtype does not match the specified FROM clause rowtype',
                   'function return row and query-specified return row do not match') THEN
        -- Rows of a statement that is not the last: the real extension drops them too.
        RETURN jsonb_build_object('row_count', 0, 'command_tag', kind, 'status',
            concat_ws(' ', kind, CASE kind WHEN 'INSERT' THEN '0' END, '0'));
    ELSIF context NOT LIKE '%on dblink connection named%' AND SQLSTATE !~ '^08' THEN
        RAISE;  -- this session's own: someone cancels its query
    END IF;
    RETURN jsonb_build_object('error', jsonb_build_object(
        'sqlstate', SQLSTATE, 'message', SQLERRM, 'detail', nullif(detail, ''), 'hint', nullif(hint, ''),
        'context', regexp_replace(context, '\n?while [^\n]*on dblink connection named.*$', '')));
END $$;

-- Brings what is known of a worker up to date: reads the results that are there, and ends it when it has ended.
CREATE FUNCTION @extschema@._pgbg_refresh(known jsonb) RETURNS jsonb
LANGUAGE plpgsql AS $$
DECLARE
    worker jsonb := known;
    connection text := known ->> 'connection';
    total integer := jsonb_array_length(known -> 'kinds');
    next integer := known ->> 'next';
    activity jsonb;
    running boolean;
    outcome jsonb;
    size bigint;
BEGIN
    IF (worker ->> 'completed')::boolean OR worker ? 'held' THEN
        RETURN worker;
    END IF;
    activity := @extschema@._pgbg_activity(worker);
    running := activity IS NOT NULL
        AND (activity ->> 'state' <> 'idle' OR activity ->> 'query' LIKE '/* pg_background */%');
    WHILE next < total LOOP
        IF running AND next = total - 1 THEN
            EXIT;  -- unread rows of the last statement hold the worker up, as a full queue does
        ELSIF running AND @extschema@._pgbg_is_busy(connection) = 1 THEN
            IF activity ->> 'wait' IS DISTINCT FROM 'ClientWrite' THEN
                EXIT;
            END IF;
            activity := @extschema@._pgbg_activity(worker);
            running := activity IS NOT NULL AND activity ->> 'state' <> 'idle';
            CONTINUE;
        END IF;
        outcome := @extschema@._pgbg_read(
            connection, worker -> 'kinds' ->> next, CASE WHEN next = total - 1 THEN nullif(worker -> 'shape', 'null') END);
        IF outcome ? 'error' THEN
            worker := @extschema@._pgbg_failed(worker, outcome -> 'error', activity IS NULL);
            next := total;
        ELSIF worker -> 'kinds' ->> next = '_DESCRIBE' THEN
            worker := worker || jsonb_build_object('shape', nullif(outcome ->> 'shape', '')::jsonb);  -- none where it died there
            next := next + 1;
        ELSE
            IF next < total - 1 THEN
                outcome := outcome - '{rows,shape}'::text[];  -- only the last statement's rows are kept
            END IF;
            worker := jsonb_set((worker - 'rows') || (outcome - 'status'), '{tags}', worker -> 'tags' || (outcome -> 'status'));
            next := next + 1;
        END IF;
    END LOOP;
    IF next <> (worker ->> 'next')::integer THEN
        worker := worker || jsonb_build_object('next', next);
        IF next = total THEN
            -- Its last report of progress goes with its connection.
            worker := worker || jsonb_strip_nulls(jsonb_build_object(
                'progress', @extschema@._pgbg_reported((worker ->> 'pid')::integer)));
            PERFORM @extschema@._pgbg_disconnect(connection);
            worker := worker || jsonb_build_object('completed', true);
            IF NOT worker ? 'died' THEN
                worker := worker || jsonb_build_object('finished_at', coalesce(activity -> 'changed', to_jsonb(clock_timestamp())));
            END IF;
            -- What the queue could not have held blocks the real worker; here it has ended by now.
            SELECT sum(23 + octet_length(r::text)) INTO size FROM jsonb_array_elements(worker -> 'rows') AS r;
            IF size > (worker ->> 'queue_size')::bigint THEN
                worker := worker || '{"held": true, "completed": false, "finished_at": null}' || jsonb_build_object(
                    'row_count', known -> 'row_count', 'command_tag', known -> 'command_tag');
            ELSE
                PERFORM @extschema@._pgbg_account(worker);
            END IF;
        END IF;
        PERFORM @extschema@._pgbg_save('worker_' || (worker ->> 'pid'), worker);
    END IF;
    RETURN worker;
END $$;

-- What the session knows of a worker that reported `error`; `gone` when its process ended by itself (FATAL).
CREATE FUNCTION @extschema@._pgbg_failed(worker jsonb, error jsonb, gone boolean) RETURNS jsonb
LANGUAGE plpgsql AS $$
DECLARE
    code text := error ->> 'sqlstate';
    cancelled jsonb := '{"sqlstate": "57014", "message": "canceling statement due to user request"}';
BEGIN
    IF worker ? 'silent' AND code IN ('57014', '57P01') THEN
        RETURN worker || jsonb_build_object('command_tag', '', 'row_count', 0, 'started_at', NULL, 'died', jsonb_build_object(
            'sqlstate', '08006', 'message', format('lost connection to worker process with PID %s', worker ->> 'pid')));
    ELSIF code = '57P01' OR (gone AND code ~ '^08') THEN
        -- The real worker takes SIGTERM for a cancel. A worker that waits for its reader dies without a word.
        error := cancelled;
    ELSIF gone THEN
        -- A FATAL error bypasses the report: no error, and the tag of the statement before it.
        RETURN worker || jsonb_build_object('died', error);
    END IF;
    RETURN worker || jsonb_build_object('has_error', true, 'command_tag', '', 'row_count', 0, 'error', error || jsonb_build_object(
        'context', concat_ws(E'\n', nullif(error ->> 'context', ''), format('background worker, pid %s', worker ->> 'pid'))));
END $$;

CREATE FUNCTION @extschema@._pgbg_account(worker jsonb) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
    PERFORM @extschema@._pgbg_count(CASE
        WHEN worker ? 'cancelled' THEN 'canceled' WHEN (worker ->> 'has_error')::boolean THEN 'failed' ELSE 'completed' END);
    PERFORM @extschema@._pgbg_count('milliseconds', extract(epoch FROM
        clock_timestamp() - (worker ->> 'launched_at')::timestamptz)::double precision * 1000);
END $$;

CREATE FUNCTION @extschema@._pgbg_look(pid integer, cookie bigint) RETURNS jsonb
LANGUAGE plpgsql AS $$
BEGIN
    PERFORM @extschema@._pgbg_drain_detached();
    RETURN @extschema@._pgbg_refresh(@extschema@._pgbg_find(pid, cookie));
END $$;

-- The start of a text: as many whole characters as fit into so many bytes. The real extension cuts error texts between
-- bytes, which no text of SQL can show.
CREATE FUNCTION @extschema@._pgbg_clip(whole text, bytes integer) RETURNS text LANGUAGE sql IMMUTABLE AS $$
    SELECT CASE WHEN octet_length(whole) <= bytes THEN whole ELSE left(whole, (
        SELECT max(n) FROM generate_series(0, bytes) AS n WHERE octet_length(left(whole, n)) <= bytes)) END
$$;

-- What error_info tells.
CREATE FUNCTION @extschema@._pgbg_error(pid integer, cookie bigint) RETURNS jsonb LANGUAGE sql AS $$
    SELECT coalesce(jsonb_object_agg(e.key, @extschema@._pgbg_clip(e.value, 255)), '{}')
      FROM jsonb_each_text(coalesce(@extschema@._pgbg_look($1, $2) -> 'error', '{}')) AS e
$$;

-- What result_info tells. A worker that has committed may not be seen as idle yet, and its last result not be read: then
-- nothing, and not what the statement before it did. One that waits for its reader tells that, as the real one does.
CREATE FUNCTION @extschema@._pgbg_info(pid integer, cookie bigint) RETURNS jsonb
LANGUAGE plpgsql AS $$
DECLARE
    worker jsonb := @extschema@._pgbg_look(pid, cookie);
BEGIN
    IF (worker ->> 'next')::integer < jsonb_array_length(worker -> 'kinds')
            AND @extschema@._pgbg_activity(worker) ->> 'wait' IS DISTINCT FROM 'ClientWrite' THEN
        worker := worker || '{"row_count": 0, "command_tag": ""}';
    END IF;
    RETURN worker;
END $$;

CREATE FUNCTION @extschema@._pgbg_wait(pid integer, cookie bigint, timeout_ms integer) RETURNS boolean
LANGUAGE plpgsql AS $$
DECLARE
    deadline timestamptz := CASE WHEN timeout_ms > 0 THEN clock_timestamp() + timeout_ms * interval '1 ms' END;
BEGIN
    LOOP
        IF (@extschema@._pgbg_look(pid, cookie) ->> 'completed')::boolean THEN
            RETURN true;
        ELSIF clock_timestamp() >= deadline THEN
            RETURN false;
        END IF;
        PERFORM pg_sleep(0.002);
    END LOOP;
END $$;

CREATE FUNCTION @extschema@._pgbg_cancel(pid integer, cookie bigint, grace_ms integer) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    worker jsonb := @extschema@._pgbg_look(pid, cookie);
    early bigint := @extschema@._pgbg_milliseconds(@extschema@._pgbg_setting('pgbg_standin.silent_cancel', '0'));
    age double precision := extract(epoch FROM clock_timestamp() - (worker ->> 'launched_at')::timestamptz) * 1000;
BEGIN
    IF (worker ->> 'completed')::boolean THEN
        RETURN;
    END IF;
    worker := worker || '{"cancelled": true}';
    IF worker ? 'held' THEN
        worker := @extschema@._pgbg_failed((worker - 'held') || '{"completed": true}',
            '{"sqlstate": "57014", "message": "canceling statement due to user request"}', false);
        PERFORM @extschema@._pgbg_account(worker);
    ELSIF age < early THEN
        worker := worker || '{"silent": true}';
    END IF;
    PERFORM @extschema@._pgbg_save('worker_' || pid, worker);
    -- Signalled from the control connection, which is the login: the current role may be no member of it.
    -- A backend that waits for its client to read takes no cancel, only a termination.
    PERFORM @extschema@._pgbg_control(format(
        'SELECT CASE wait_event WHEN ''ClientWrite'' THEN pg_terminate_backend(pid) ELSE pg_cancel_backend(pid) END::text'
        ' FROM pg_catalog.pg_stat_activity WHERE pid = %s AND backend_start = %L', pid, worker ->> 'backend_start'));
    IF grace_ms > 0 THEN
        PERFORM @extschema@._pgbg_wait(pid, cookie, grace_ms);
    END IF;
END $$;

CREATE FUNCTION @extschema@._pgbg_detach(pid integer, cookie bigint) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    worker jsonb := @extschema@._pgbg_look(pid, cookie);
BEGIN
    PERFORM @extschema@._pgbg_forget(worker);
    IF NOT (worker ->> 'completed')::boolean AND NOT worker ? 'held' THEN
        -- Closing the connection would end a worker that has yet to send rows, so it stays open, and is drained.
        PERFORM @extschema@._pgbg_save('detached', coalesce(@extschema@._pgbg_load('detached'), '[]')
            || jsonb_build_array(jsonb_build_object('pid', pid, 'connection', worker -> 'connection',
                                                    'backend_start', worker -> 'backend_start')));
        PERFORM @extschema@._pgbg_drain_detached();
    END IF;
END $$;

-- Drops the output of detached workers, and their connections once they have ended.
CREATE FUNCTION @extschema@._pgbg_drain_detached() RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    detached jsonb := coalesce(@extschema@._pgbg_load('detached'), '[]');
    worker jsonb;
    activity jsonb;
    kept jsonb := '[]';
    blocked_at timestamptz;
    bound timestamptz := clock_timestamp() + interval '20 seconds';
BEGIN
    FOR worker IN SELECT jsonb_array_elements(detached) LOOP
        blocked_at := '-infinity';
        LOOP
            activity := @extschema@._pgbg_activity(worker);
            EXIT WHEN activity IS NULL OR activity ->> 'state' = 'idle';
            IF activity ->> 'wait' = 'ClientWrite' THEN
                blocked_at := clock_timestamp();
            END IF;
            -- One that fills its queue faster than it is read here looks busy in between.
            EXIT WHEN clock_timestamp() > least(blocked_at + interval '100 ms', bound);
            FOR part IN 1 .. 100 LOOP
                IF @extschema@._pgbg_is_busy(worker ->> 'connection') = 0 THEN
                    PERFORM @extschema@._pgbg_read(worker ->> 'connection', 'SELECT', NULL);
                END IF;
            END LOOP;
        END LOOP;
        IF activity IS NULL OR activity ->> 'state' = 'idle' THEN
            PERFORM @extschema@._pgbg_disconnect(worker ->> 'connection');
        ELSE
            kept := kept || jsonb_build_array(worker);
        END IF;
    END LOOP;
    IF kept <> detached THEN
        PERFORM @extschema@._pgbg_save('detached', kept);
    END IF;
END $$;

CREATE FUNCTION @extschema@._pgbg_raise(error jsonb) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    code text := error ->> 'sqlstate';
    message text := error ->> 'message';
    detail text := error ->> 'detail';
    hint text := error ->> 'hint';
BEGIN
    -- An option that is null is an error, and an empty one is not the same as none.
    IF detail IS NULL AND hint IS NULL THEN
        RAISE EXCEPTION USING ERRCODE = code, MESSAGE = message;
    ELSIF hint IS NULL THEN
        RAISE EXCEPTION USING ERRCODE = code, MESSAGE = message, DETAIL = detail;
    ELSIF detail IS NULL THEN
        RAISE EXCEPTION USING ERRCODE = code, MESSAGE = message, HINT = hint;
    END IF;
    RAISE EXCEPTION USING ERRCODE = code, MESSAGE = message, DETAIL = detail, HINT = hint;
END $$;

-- Closes a connection that result() read from, if it is still open.
CREATE FUNCTION @extschema@._pgbg_close(cookie bigint) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
    IF NOT coalesce(cookie::text = ANY (
            SELECT split_part(unnest(@extschema@._pgbg_connections()), ' ', 3)), false) THEN
        RETURN;
    ELSIF cookie::text IN (SELECT split_part(w ->> 'connection', ' ', 3) FROM jsonb_array_elements(
            coalesce(@extschema@._pgbg_load('detached'), '[]')) AS w)
            OR cookie IN (SELECT h.cookie FROM @extschema@._pgbg_handles() AS h) THEN
        RETURN;  -- result() was refused: the worker goes on
    END IF;
    PERFORM @extschema@._pgbg_disconnect('pgbg worker ' || cookie);
END $$;

-- The query that gives a worker's result to the caller of result(). Forgets the handle, as the real result() does,
-- before anything can fail: its caller's column list, or the worker.
CREATE FUNCTION @extschema@._pgbg_result_query(pid integer, cookie bigint) RETURNS text
LANGUAGE plpgsql AS $$
DECLARE
    worker jsonb := @extschema@._pgbg_find(pid, cookie);
    activity jsonb;
    live boolean := false;
    columns text;
BEGIN
    IF (worker ->> 'submitted')::boolean THEN
        RAISE EXCEPTION USING ERRCODE = '0A000',
            MESSAGE = format('results are disabled for PID %s (submitted via %s)', pid, @extschema@._pgbg_submit_name());
    END IF;
    LOOP
        worker := @extschema@._pgbg_look(pid, cookie);
        EXIT WHEN (worker ->> 'completed')::boolean OR worker ? 'held';
        activity := @extschema@._pgbg_activity(worker);
        live := activity ->> 'wait' = 'ClientWrite' AND (worker ->> 'next')::integer = jsonb_array_length(worker -> 'kinds') - 1;
        EXIT WHEN live;
        PERFORM pg_sleep(0.002);
    END LOOP;
    PERFORM @extschema@._pgbg_forget(worker);
    IF worker ? 'died' OR (worker ->> 'has_error')::boolean THEN
        PERFORM @extschema@._pgbg_raise(coalesce(worker -> 'died', worker -> 'error'));
    END IF;
    IF live THEN
        SELECT string_agg(format('c%s %s', n, type), ', ') INTO columns
          FROM jsonb_array_elements_text(worker -> 'shape') WITH ORDINALITY AS s (type, n);
        RETURN format('SELECT * FROM @extschema@._pgbg_get_result(%L) AS t (%s)', worker ->> 'connection', coalesce(columns, 'status text'));
    ELSIF worker ? 'rows' THEN
        SELECT string_agg(format('(r ->> %s)::%s', n - 1, type), ', ') INTO columns
          FROM jsonb_array_elements_text(worker -> 'shape') WITH ORDINALITY AS s (type, n);
        RETURN format('SELECT %s FROM jsonb_array_elements(%L::jsonb) AS r', columns, worker -> 'rows');
    END IF;
    RETURN format('SELECT t FROM jsonb_array_elements_text(%L::jsonb) AS t', worker -> 'tags');
END $$;

CREATE FUNCTION @extschema@._pgbg_list() RETURNS SETOF record
LANGUAGE plpgsql AS $$
DECLARE
    tracked integer;
    worker jsonb;
BEGIN
    FOREACH tracked IN ARRAY @extschema@._pgbg_tracked() LOOP
        worker := @extschema@._pgbg_load('worker_' || tracked);
        CONTINUE WHEN worker IS NULL OR NOT pg_has_role(current_user, (worker ->> 'user_id')::oid, 'USAGE');
        worker := @extschema@._pgbg_refresh(worker);
        RETURN QUERY SELECT tracked, (worker ->> 'cookie')::bigint, (worker ->> 'launched_at')::timestamptz,
            (worker ->> 'user_id')::oid, (worker ->> 'queue_size')::integer,
            CASE WHEN (worker ->> 'completed')::boolean THEN 'stopped' ELSE 'running' END,
            left(worker ->> 'sql', 120), NULL::text, false, worker ->> 'label';
    END LOOP;
END $$;

-- The handles that this role may use: for what acts on all workers of the session.
CREATE FUNCTION @extschema@._pgbg_handles() RETURNS SETOF @extschema@.pg_background_handle LANGUAGE sql AS $$
    SELECT l.pid, l.cookie FROM @extschema@._pgbg_list() AS l (
        pid integer, cookie bigint, launched_at timestamptz, user_id oid, queue_size integer, state text,
        sql_preview text, last_error text, consumed boolean, label text)
$$;

CREATE FUNCTION @extschema@._pgbg_detach_all() RETURNS integer LANGUAGE sql AS $$
    SELECT count(@extschema@._pgbg_detach(h.pid, h.cookie)::text)::integer FROM @extschema@._pgbg_handles() AS h
$$;

CREATE FUNCTION @extschema@._pgbg_cancel_all() RETURNS integer LANGUAGE sql AS $$
    SELECT count(@extschema@._pgbg_cancel(h.pid, h.cookie, 0)::text)::integer FROM @extschema@._pgbg_handles() AS h
     WHERE NOT (@extschema@._pgbg_find(h.pid, h.cookie) ->> 'completed')::boolean
$$;

-- Called in the worker. It cannot change what others see before it commits, except through another backend: the text
-- of that one's last query carries the report.
CREATE FUNCTION @extschema@._pgbg_report_progress(pct integer, msg text, called text) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
    IF pct IS NULL THEN
        RAISE EXCEPTION USING ERRCODE = '22004', MESSAGE = 'pct must not be NULL';
    ELSIF current_setting('pgbg_standin.worker', true) IS DISTINCT FROM 'on' THEN
        RAISE EXCEPTION USING ERRCODE = '0A000',
            MESSAGE = format('%s can only be called from a background worker', called);
    END IF;
    IF NOT coalesce('pgbg progress' = ANY (@extschema@._pgbg_connections()), false) THEN
        PERFORM @extschema@._pgbg_connect('pgbg progress', 'pg_background progress ' || pg_backend_pid());
    END IF;
    PERFORM t.v FROM @extschema@._pgbg_query('pgbg progress', format('SELECT %L', encode(convert_to(jsonb_build_object(
        'pct', greatest(0, least(100, pct)), 'msg', @extschema@._pgbg_clip(coalesce(msg, ''), 63))::text, 'UTF8'), 'hex'))) AS t (v text);
END $$;

CREATE FUNCTION @extschema@._pgbg_reported(pid integer) RETURNS jsonb LANGUAGE sql AS $$
    SELECT convert_from(decode(substring(@extschema@._pgbg_control(format(
        'SELECT query FROM pg_catalog.pg_stat_activity WHERE application_name = %L', 'pg_background progress ' || pid))
        FROM '''([0-9a-f]+)'''), 'hex'), 'UTF8')::jsonb
$$;

CREATE FUNCTION @extschema@._pgbg_get_progress(pid integer, cookie bigint, OUT progress_pct integer, OUT progress_msg text)
LANGUAGE plpgsql AS $$
DECLARE
    worker jsonb := @extschema@._pgbg_load('worker_' || pid);
    report jsonb;
BEGIN
    IF worker IS NULL OR (worker ->> 'cookie')::bigint <> cookie THEN
        RETURN;
    END IF;
    PERFORM @extschema@._pgbg_find(pid, cookie);
    report := @extschema@._pgbg_reported(pid);
    -- The report goes with the worker's own connection: keep the last that was seen.
    IF report IS NULL THEN
        report := worker -> 'progress';
    ELSE
        PERFORM @extschema@._pgbg_save('worker_' || pid, worker || jsonb_build_object('progress', report));
    END IF;
    progress_pct := report ->> 'pct';
    progress_msg := report ->> 'msg';
END $$;

CREATE FUNCTION @extschema@._pgbg_statistics() RETURNS jsonb
LANGUAGE plpgsql AS $$
DECLARE
    s jsonb := '{"launched": 0, "completed": 0, "failed": 0, "canceled": 0, "timed_out": 0, "milliseconds": 0}'
        || coalesce(@extschema@._pgbg_load('stats'), '{}');
    ended bigint := (s ->> 'completed')::bigint + (s ->> 'failed')::bigint + (s ->> 'canceled')::bigint;
BEGIN
    RETURN jsonb_build_object(
        'workers_launched', s -> 'launched', 'workers_completed', s -> 'completed', 'workers_failed', s -> 'failed',
        'workers_canceled', s -> 'canceled', 'workers_timed_out', s -> 'timed_out',
        'workers_active', (SELECT count(*) FROM @extschema@._pgbg_handles() AS h
                            WHERE NOT (@extschema@._pgbg_find(h.pid, h.cookie) ->> 'completed')::boolean),
        'avg_execution_ms', coalesce((s ->> 'milliseconds')::double precision / nullif(ended, 0), 0),
        'max_workers', @extschema@._pgbg_setting('pg_background.max_workers', '16')::integer);
END $$;
