-- Nobody but pgbackground_role, as with the real extension. Runs when all objects are members of the extension.

SELECT @extschema@._pgbg_privileges('REVOKE', 'FROM', 'public', false);
SELECT @extschema@._pgbg_privileges('GRANT', 'TO', 'pgbackground_role', false);
REVOKE ALL ON FUNCTION @extschema@._pgbg_privileges(text, text, text, boolean) FROM public;
REVOKE ALL ON FUNCTION @extschema@.@grant@(text, boolean), @extschema@.@revoke@(text, boolean) FROM public;

-- The worker calls these before its SQL, and that SQL's role needs no privilege on the extension.
GRANT EXECUTE ON FUNCTION @extschema@._pgbg_become(jsonb, text), @extschema@._pgbg_describe(text),
    @extschema@._pgbg_describe_by_table(text) TO public;
