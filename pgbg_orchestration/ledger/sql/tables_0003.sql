-- Version 3: the job's SQL as it was given, before parameters were put in, and how its earlier attempts went.

alter table @schema@.job add column statement text;
comment on column @schema@.job.statement is
    'The SQL as it was given, without the values of its parameters; null where it is not kept.';

create table @schema@.past_attempt (
    owner       text not null,
    job_digest  bytea not null,
    attempt     int not null,
    launched_by text not null,
    launched_at timestamptz not null,
    worker_pid  int,
    ended_at    timestamptz,
    outcome     text,
    sqlstate    text,
    message     text,
    primary key (owner, job_digest, attempt),
    foreign key (owner, job_digest) references @schema@.job on delete cascade
);
comment on table @schema@.past_attempt is
    'How earlier attempts of a job went, the last 50 of them: the line of the history as it stood when the next one was '
    'registered. job has the latest.';

-- Version 2 had one with fewer arguments, beside which calls would be ambiguous.
drop function if exists @schema@.register_launch(text, text, text, bigint, text, text, bytea, boolean, text, text, boolean);
