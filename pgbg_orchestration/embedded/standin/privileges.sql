-- Who may use the stand-in: the role pgbackground_role and those it is granted to, nobody else.

DO $role$
BEGIN
    IF NOT EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname = 'pgbackground_role') THEN
        CREATE ROLE pgbackground_role NOLOGIN INHERIT;
    END IF;
END $role$;

CREATE FUNCTION @extschema@._pgbg_privileges(verb text, preposition text, role_name text, print_commands boolean)
RETURNS boolean
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    command text;
BEGIN
    FOR command IN
        SELECT format('%s %s %s %s %s', verb, o.privilege, o.object, preposition,
                      CASE role_name WHEN 'public' THEN role_name ELSE quote_ident(role_name) END)
          FROM pg_catalog.pg_extension AS e
          JOIN pg_catalog.pg_depend AS d
            ON d.refclassid = 'pg_extension'::regclass AND d.refobjid = e.oid AND d.deptype = 'e'
         CROSS JOIN LATERAL (
               SELECT 'EXECUTE ON FUNCTION', p.oid::regprocedure::text FROM pg_catalog.pg_proc AS p
                WHERE d.classid = 'pg_proc'::regclass AND p.oid = d.objid AND p.proname !~ '_privileges$|_drop_executor_role$'
               UNION ALL
               SELECT 'USAGE ON TYPE', t.oid::regtype::text FROM pg_catalog.pg_type AS t
                 JOIN pg_catalog.pg_class AS c ON c.oid = t.typrelid AND c.relkind = 'c'
                WHERE d.classid = 'pg_type'::regclass AND t.oid = d.objid
               UNION ALL
               SELECT 'SELECT ON TABLE', c.oid::regclass::text FROM pg_catalog.pg_class AS c
                WHERE d.classid = 'pg_class'::regclass AND c.oid = d.objid AND c.relkind = 'v') AS o (privilege, object)
         WHERE e.extname = 'pg_background'
    LOOP
        EXECUTE command;
        IF print_commands THEN
            RAISE INFO '%', command;
        END IF;
    END LOOP;
    RETURN true;
END $$;

CREATE FUNCTION @extschema@.@grant@(role_name text, print_commands boolean DEFAULT false) RETURNS boolean
LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$ SELECT @extschema@._pgbg_privileges('GRANT', 'TO', role_name, print_commands) $$;

CREATE FUNCTION @extschema@.@revoke@(role_name text, print_commands boolean DEFAULT false) RETURNS boolean
LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$ SELECT @extschema@._pgbg_privileges('REVOKE', 'FROM', role_name, print_commands) $$;
