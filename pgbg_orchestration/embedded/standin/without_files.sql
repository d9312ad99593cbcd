-- What CREATE EXTENSION does after its script, for a server that does not find the files: the row in pg_extension is
-- written by hand, which a superuser may; ALTER EXTENSION ... ADD enters its members, so that DROP EXTENSION takes all.
-- Members are the objects that _pgbg_before, filled before the script, does not know.

DO $register$
DECLARE
    extension oid := pg_nextoid('pg_extension', 'oid', 'pg_extension_oid_index');
    namespace oid := '@extschema@'::regnamespace;
    member text;
BEGIN
    INSERT INTO pg_extension
    SELECT extension, 'pg_background', r.oid, namespace, false, '@version@', NULL, NULL
      FROM pg_roles AS r WHERE r.rolname = current_user;
    INSERT INTO pg_depend VALUES ('pg_extension'::regclass, extension, 0, 'pg_namespace'::regclass, namespace, 0, 'n');
    FOR member IN
        SELECT 'FUNCTION ' || p.oid::regprocedure FROM pg_proc AS p
         WHERE p.pronamespace = namespace AND ('pg_proc'::regclass, p.oid) NOT IN (SELECT class, oid FROM _pgbg_before)
        UNION ALL
        SELECT 'VIEW ' || c.oid::regclass FROM pg_class AS c
         WHERE c.relkind = 'v' AND c.relnamespace = namespace
           AND ('pg_class'::regclass, c.oid) NOT IN (SELECT class, oid FROM _pgbg_before)
        UNION ALL
        SELECT 'TYPE ' || t.oid::regtype FROM pg_type AS t JOIN pg_class AS c ON c.oid = t.typrelid AND c.relkind = 'c'
         WHERE t.typnamespace = namespace AND ('pg_type'::regclass, t.oid) NOT IN (SELECT class, oid FROM _pgbg_before)
    LOOP
        EXECUTE 'ALTER EXTENSION pg_background ADD ' || member;
    END LOOP;
    EXECUTE format('COMMENT ON EXTENSION pg_background IS %L', '@comment@');
END $register$;
