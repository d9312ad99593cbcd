-- Where one statement of a launch ends and the next begins, and what each is.
--
-- The real extension parses the text with the server's own parser. SQL cannot call that parser, and needs three
-- things from it: how many results to expect, which statements the extension refuses, and the last statement's tag.

CREATE FUNCTION @extschema@._pgbg_blank(token text) RETURNS boolean
LANGUAGE sql IMMUTABLE AS $$ SELECT token ~ '^(\s|--|/\*)' $$;

-- The token that `rest` begins with; NULL when its end is not in `rest`, so that the caller has to read on.
CREATE FUNCTION @extschema@._pgbg_token(rest text) RETURNS text
LANGUAGE plpgsql IMMUTABLE AS $$
DECLARE
    found text;
    depth integer := 0;
    place integer := 1;
BEGIN
    found := substring(rest FROM
        '^(?:\s+|--[^\n]*|[eE]''(?:[^''\\]|\\.|'''')*''(?!'')|''(?:[^'']|'''')*''(?!'')|"(?:[^"]|"")*"(?!"))');
    IF found IS NOT NULL THEN
        RETURN found;
    END IF;
    IF rest ~ '^(?:[eE]?''|")' THEN
        RETURN NULL;
    END IF;
    IF left(rest, 2) = '/*' THEN
        LOOP
            found := substring(substr(rest, place) FROM '^(?:[^*/]|\*(?!/)|/(?!\*))*(?:/\*|\*/)');
            IF found IS NULL THEN
                RETURN NULL;
            END IF;
            place := place + length(found);
            depth := depth + CASE right(found, 2) WHEN '/*' THEN 1 ELSE -1 END;
            IF depth = 0 THEN
                RETURN left(rest, place - 1);
            END IF;
        END LOOP;
    END IF;
    found := substring(rest FROM '^\$(?:[A-Za-z_\u0080-\uffff][A-Za-z0-9_\u0080-\uffff]*)?\$');
    IF found IS NOT NULL THEN
        place := strpos(substr(rest, length(found) + 1), found);
        RETURN CASE WHEN place > 0 THEN left(rest, length(found) * 2 + place - 1) END;
    END IF;
    found := substring(rest FROM '^(?:[A-Za-z0-9_\u0080-\uffff][A-Za-z0-9_$\u0080-\uffff]*|[^\s''"$/;()A-Za-z0-9_\u0080-\uffff-]+)');
    RETURN coalesce(found, left(rest, 1));
END $$;

-- A JSON array: for each statement where it starts (1 is the first character) and ends, its kind (the tag that a result
-- with rows has), its first two words, and whether it names STDIN or STDOUT.
CREATE FUNCTION @extschema@._pgbg_statements(sql text) RETURNS jsonb
LANGUAGE plpgsql IMMUTABLE AS $$
DECLARE
    -- The text is read in blocks: cutting a token off a text of many megabytes copies all of it.
    blocks text[] := ARRAY(SELECT m[1] FROM regexp_matches(sql, '.{1,255}', 'g') AS m);
    block integer := 1;
    more integer;
    rest text := '';
    token text;
    word text;
    place integer := 1;
    start integer;
    words text[] := '{}';
    kind text;
    streams text;
    depth integer := 0;
    body integer := 0;
    found jsonb := '[]';
BEGIN
    LOOP
        IF length(rest) < 1024 AND block <= cardinality(blocks) THEN
            rest := rest || blocks[block];
            block := block + 1;
            CONTINUE;
        END IF;
        token := CASE WHEN rest = '' THEN NULL ELSE @extschema@._pgbg_token(rest) END;
        IF token IS NULL AND block <= cardinality(blocks) THEN
            -- A token longer than what was read: read as much again, or one of megabytes would take for ever.
            more := 1 + length(rest) / 255;
            rest := rest || array_to_string(blocks[block : block + more - 1], '');
            block := block + more;
            CONTINUE;
        END IF;
        IF token IS NULL AND rest <> '' THEN
            token := rest;  -- an unterminated quote: the worker's parser says so
        END IF;
        IF token IS NULL OR (token = ';' AND depth = 0 AND body = 0) THEN
            IF start IS NOT NULL THEN
                found := found || jsonb_build_object(
                    'start', start, 'end', place - 1, 'kind', coalesce(kind, words[1], ''),
                    'words', array_to_string(words[1:2], ' '), 'stream', streams);
            END IF;
            EXIT WHEN token IS NULL;
            start := NULL;
            words := '{}';
            kind := NULL;
            streams := NULL;
        ELSIF NOT @extschema@._pgbg_blank(token) THEN
            IF start IS NULL THEN
                start := place;
                kind := CASE WHEN token = '(' THEN 'SELECT' END;
            END IF;
            IF token = '(' THEN
                depth := depth + 1;
            ELSIF token = ')' THEN
                depth := depth - 1;
            ELSIF token ~ '^[A-Za-z_]' THEN
                word := upper(token);
                IF cardinality(words) < 2 THEN
                    words := words || word;
                END IF;
                IF depth = 0 AND word IN ('STDIN', 'STDOUT') THEN
                    streams := word;
                END IF;
                IF kind IS NULL AND depth = 0 AND word IN ('SELECT', 'VALUES', 'TABLE', 'INSERT', 'UPDATE', 'DELETE', 'MERGE')
                        AND (words[1] IN ('WITH', word)) THEN
                    kind := CASE WHEN word IN ('VALUES', 'TABLE') THEN 'SELECT' ELSE word END;
                END IF;
                -- A routine's BEGIN ATOMIC ... END body has semicolons of its own; its CASE ends with END too.
                IF word = 'ATOMIC' OR (body > 0 AND word = 'CASE') THEN
                    body := body + 1;
                ELSIF word = 'END' AND body > 0 THEN
                    body := body - 1;
                END IF;
            END IF;
        END IF;
        place := place + length(token);
        rest := substr(rest, length(token) + 1);
    END LOOP;
    RETURN found;
END $$;

-- The column types of a statement's rows, without running it; NULL when it has none, or cannot be told.
-- Runs in the worker, so it sees what the statements before it have created.
CREATE FUNCTION @extschema@._pgbg_describe(statement text) RETURNS text
LANGUAGE plpgsql AS $$
DECLARE
    types text;
BEGIN
    IF current_setting('server_version_num')::integer < 160000 THEN
        RETURN coalesce(@extschema@._pgbg_describe_by_table(statement),
                        @extschema@._pgbg_describe_by_table(format('WITH s AS (%s%s) SELECT * FROM s', statement, E'\n')));
    END IF;
    EXECUTE 'PREPARE _pgbg_shape AS ' || statement;
    SELECT CASE WHEN cardinality(p.result_types) > 0 THEN to_jsonb(p.result_types::text[])::text END INTO types
      FROM pg_catalog.pg_prepared_statements AS p WHERE p.name = '_pgbg_shape';
    EXECUTE 'DEALLOCATE _pgbg_shape';
    RETURN types;
EXCEPTION
    WHEN OTHERS THEN
        RETURN NULL;  -- the statement itself fails, with the same error, in a moment
END $$;

-- Before 16 pg_prepared_statements has no result types: a table made of the query has them, and goes away with the block.
CREATE FUNCTION @extschema@._pgbg_describe_by_table(query text) RETURNS text
LANGUAGE plpgsql AS $$
DECLARE
    names text := '';
    types text;
BEGIN
    FOR number IN 1 .. 1600 LOOP
        BEGIN
            EXECUTE concat('CREATE TEMPORARY TABLE _pgbg_shape ', '(' || nullif(names, '') || ')', ' AS ', query,
                           E'\n WITH NO DATA');
            SELECT jsonb_agg(a.atttypid::regtype::text ORDER BY a.attnum)::text INTO types
              FROM pg_catalog.pg_attribute AS a WHERE a.attrelid = 'pg_temp._pgbg_shape'::regclass AND a.attnum > 0;
            RAISE EXCEPTION USING ERRCODE = 'PBSHP', MESSAGE = coalesce(types, '');
        EXCEPTION
            WHEN SQLSTATE 'PBSHP' THEN
                RETURN nullif(SQLERRM, '');
            WHEN duplicate_column THEN
                names := concat_ws(', ', nullif(names, ''), 'c' || number);  -- rows may have them, tables may not
            WHEN OTHERS THEN
                RETURN NULL;
        END;
    END LOOP;
    RETURN NULL;
END $$;
