-- Version 5: for find_jobs, which leaves out what ended long ago.

create index job_ended on @schema@.job (ended_at);
