insert into effect (run, pid) values (%(run)s, pg_backend_pid());
select %(deep)s::text[], '{{ run_id }}'
