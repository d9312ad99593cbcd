-- Who may use what: the last of all, so that nothing is left out.

revoke all on all tables in schema @schema@ from public;
revoke all on all routines in schema @schema@ from public;
grant usage on schema @schema@ to pgbackground_role;
grant select on @schema@.meta, @schema@.jobs to pgbackground_role;
grant execute on all routines in schema @schema@ to pgbackground_role;
