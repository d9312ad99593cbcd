-- The stand-in's machinery, the same for both surfaces.
--
-- A worker is an ordinary backend that the launching session reaches through a named dblink connection. Such a
-- connection belongs to one session, and no rollback undoes it: as with the real extension's handles.
-- What the session knows of its workers is kept in a second backend, the "control connection", as settings there:
-- those outlive a rollback in the launching session too, and end with it.

CREATE TYPE @extschema@.pg_background_handle AS (pid integer, cookie bigint);

-- dblink's functions by names of our own, so that neither its extension nor its public names are needed.
CREATE FUNCTION @extschema@._pgbg_dblink_connect(text, text) RETURNS text
    AS '$libdir/dblink', 'dblink_connect' LANGUAGE c STRICT;
CREATE FUNCTION @extschema@._pgbg_disconnect(text) RETURNS text
    AS '$libdir/dblink', 'dblink_disconnect' LANGUAGE c STRICT;
CREATE FUNCTION @extschema@._pgbg_connections() RETURNS text[]
    AS '$libdir/dblink', 'dblink_get_connections' LANGUAGE c;
CREATE FUNCTION @extschema@._pgbg_query(text, text) RETURNS SETOF record
    AS '$libdir/dblink', 'dblink_record' LANGUAGE c STRICT;
CREATE FUNCTION @extschema@._pgbg_send(text, text) RETURNS integer
    AS '$libdir/dblink', 'dblink_send_query' LANGUAGE c STRICT;
CREATE FUNCTION @extschema@._pgbg_is_busy(text) RETURNS integer
    AS '$libdir/dblink', 'dblink_is_busy' LANGUAGE c STRICT;
CREATE FUNCTION @extschema@._pgbg_get_result(text) RETURNS SETOF record
    AS '$libdir/dblink', 'dblink_get_result' LANGUAGE c STRICT;

-- Connects back to this server as the login (session_user cannot be forged). SECURITY DEFINER, since dblink lets only
-- superusers connect without a password; the server has to trust its own Unix socket.
CREATE FUNCTION @extschema@._pgbg_connect(name text, application text) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    sockets text := btrim(split_part(current_setting('unix_socket_directories'), ',', 1), ' "');
    target text := '';
    part record;
BEGIN
    FOR part IN
        SELECT * FROM (VALUES
            ('host', coalesce(nullif(sockets, ''), '127.0.0.1')), ('port', current_setting('port')),
            ('dbname', current_database()::text), ('user', session_user::text), ('application_name', application),
            ('connect_timeout', '10'), ('sslmode', 'disable'), ('gssencmode', 'disable')) AS p (key, value)
    LOOP
        target := target || part.key || '=''' || replace(replace(part.value, '\', '\\'), '''', '\''') || ''' ';
    END LOOP;
    PERFORM @extschema@._pgbg_dblink_connect(name, target);
END $$;

-- Runs a query on the control connection and returns its one text value.
CREATE FUNCTION @extschema@._pgbg_control(query text) RETURNS text
LANGUAGE plpgsql AS $$
DECLARE
    answer text;
BEGIN
    FOR attempt IN 1 .. 2 LOOP
        BEGIN
            IF NOT coalesce('pgbg control' = ANY (@extschema@._pgbg_connections()), false) THEN
                PERFORM @extschema@._pgbg_connect('pgbg control', 'pg_background stand-in');
            END IF;
            SELECT t.v INTO answer FROM @extschema@._pgbg_query('pgbg control', query) AS t (v text);
            RETURN answer;
        EXCEPTION WHEN OTHERS THEN
            -- A terminated control connection takes all handles along: the new one knows none of them.
            IF attempt = 2 OR SQLSTATE !~ '^(08|57P0)' OR SQLSTATE = '08001' THEN
                RAISE;
            END IF;
            PERFORM @extschema@._pgbg_disconnect('pgbg control');
        END;
    END LOOP;
END $$;

CREATE FUNCTION @extschema@._pgbg_load(key text) RETURNS jsonb LANGUAGE sql AS $$
    SELECT nullif(@extschema@._pgbg_control(format('SELECT current_setting(%L, true)', 'pgbg_standin.' || key)), '')::jsonb
$$;

CREATE FUNCTION @extschema@._pgbg_save(key text, value jsonb) RETURNS void LANGUAGE sql AS $$
    SELECT @extschema@._pgbg_control(
        format('SELECT left(set_config(%L, %L, false), 1)', 'pgbg_standin.' || key, coalesce(value::text, '')))
$$;

CREATE FUNCTION @extschema@._pgbg_setting(name text, fallback text) RETURNS text LANGUAGE sql STABLE AS $$
    SELECT coalesce(nullif(current_setting(name, true), ''), fallback)
$$;

CREATE FUNCTION @extschema@._pgbg_milliseconds(setting text) RETURNS bigint LANGUAGE sql STABLE AS $$
    SELECT CASE WHEN setting ~ '^\s*\d+\s*$' THEN setting::bigint
                ELSE (extract(epoch FROM setting::interval) * 1000)::bigint END
$$;

CREATE FUNCTION @extschema@._pgbg_count(key text, amount double precision DEFAULT 1) RETURNS void LANGUAGE sql AS $$
    SELECT @extschema@._pgbg_save('stats', s || jsonb_build_object(key, coalesce((s ->> key)::double precision, 0) + amount))
      FROM (SELECT coalesce(@extschema@._pgbg_load('stats'), '{}')) AS l (s)
$$;

CREATE FUNCTION @extschema@._pgbg_tracked() RETURNS integer[] LANGUAGE sql AS $$
    SELECT ARRAY(SELECT jsonb_array_elements_text(coalesce(@extschema@._pgbg_load('tracked'), '[]'))::integer)
$$;

-- What another backend does: NULL when it is gone.
CREATE FUNCTION @extschema@._pgbg_activity(worker jsonb) RETURNS jsonb LANGUAGE sql AS $$
    SELECT @extschema@._pgbg_control(format(
        'SELECT jsonb_build_object(''state'', state, ''wait'', wait_event, ''query'', left(query, 40),'
        ' ''began'', query_start, ''changed'', state_change)::text'
        ' FROM pg_catalog.pg_stat_activity WHERE pid = %s AND backend_start = %L',
        worker ->> 'pid', worker ->> 'backend_start'))::jsonb
$$;

-- In the worker, before its SQL: takes on the launching session's settings, then its role. Returns who the worker is.
CREATE FUNCTION @extschema@._pgbg_become(settings jsonb, role text) RETURNS text
LANGUAGE plpgsql AS $$
DECLARE
    setting record;
    who text;
BEGIN
    SELECT jsonb_build_object('pid', a.pid, 'backend_start', a.backend_start)::text INTO who
      FROM pg_catalog.pg_stat_activity AS a WHERE a.pid = pg_backend_pid();
    FOR setting IN SELECT * FROM jsonb_each_text(settings) LOOP
        BEGIN
            PERFORM set_config(setting.key, replace(setting.value, '%pid%', pg_backend_pid()::text), false);
        EXCEPTION WHEN insufficient_privilege OR cant_change_runtime_param OR invalid_parameter_value THEN
            NULL;  -- the login may not set what a superuser once set for it
        END;
    END LOOP;
    IF role <> 'none' THEN
        PERFORM set_config('role', role, false);
    END IF;
    RETURN who;
END $$;

-- The settings that a worker inherits. Placeholders (names with a dot) stand in no catalogue, so those have to be named.
CREATE FUNCTION @extschema@._pgbg_inherited(label text) RETURNS jsonb
LANGUAGE plpgsql AS $$
DECLARE
    settings jsonb;
    named text;
    worker_timeout bigint := @extschema@._pgbg_milliseconds(@extschema@._pgbg_setting('pg_background.worker_timeout', '0'));
    statement_timeout integer := (SELECT setting FROM pg_catalog.pg_settings WHERE name = 'statement_timeout');
BEGIN
    SELECT coalesce(jsonb_object_agg(s.name, current_setting(s.name)), '{}') INTO settings
      FROM pg_catalog.pg_settings AS s
     WHERE s.context IN ('user', 'superuser')
       AND (s.source = 'session' OR (s.source = 'client' AND s.name <> 'application_name'))
       AND s.name NOT IN ('transaction_isolation', 'transaction_read_only', 'transaction_deferrable', 'client_encoding',
                          'track_activities', 'client_connection_check_interval', 'session_authorization', 'role');
    FOREACH named IN ARRAY string_to_array(
        'pg_background.max_workers,pg_background.default_queue_size,pg_background.worker_timeout,pgbg.step,pgbg.work,'
        || @extschema@._pgbg_setting('pgbg_standin.inherit', 'pgbg.custom'), ',')
    LOOP
        IF current_setting(btrim(named), true) <> '' THEN
            settings := settings || jsonb_build_object(btrim(named), current_setting(btrim(named)));
        END IF;
    END LOOP;
    IF NOT settings ? 'application_name' AND @extschema@._pgbg_names_workers() THEN
        settings := settings || jsonb_build_object('application_name', 'pg_background:' || coalesce(label || ':', '') || '%pid%');
    END IF;
    IF worker_timeout > 0 THEN
        settings := settings || jsonb_build_object(
            'statement_timeout', least(worker_timeout, coalesce(nullif(statement_timeout, 0), worker_timeout))::text);
    END IF;
    RETURN settings || jsonb_build_object('pgbg_standin.worker', 'on');
END $$;

-- The SQL to send, in place of what the real extension refuses in the worker.
CREATE FUNCTION @extschema@._pgbg_refusal(statements jsonb) RETURNS text
LANGUAGE sql IMMUTABLE AS $$
    SELECT format('DO $refused$ BEGIN RAISE EXCEPTION USING ERRCODE = %L, MESSAGE = %L; END $refused$', r.code, r.message)
      FROM jsonb_array_elements(statements) WITH ORDINALITY AS s (statement, number)
     CROSS JOIN LATERAL (VALUES
        (s.statement ->> 'words' ~ '^(BEGIN|COMMIT|END|ROLLBACK|ABORT|SAVEPOINT|RELEASE|START TRANSACTION|PREPARE TRANSACTION)\y',
         '0A000', 'transaction control statements are not allowed in pg_background'),
        (s.statement ->> 'words' ~ '^LISTEN\y', '0A000', 'cannot execute LISTEN within a background process'),
        (s.statement ->> 'words' ~ '^COPY\y' AND s.statement ->> 'stream' = 'STDIN', '08003', 'there is no client connection'),
        (s.statement ->> 'words' ~ '^COPY\y' AND s.statement ->> 'stream' = 'STDOUT', '0A000', 'COPY protocol not allowed in pg_background')
       ) AS r (refused, code, message)
     WHERE r.refused ORDER BY s.number LIMIT 1
$$;
