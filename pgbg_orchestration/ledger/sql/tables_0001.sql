-- Tables of version 1 of the schema: receipts, series, job history, rows that are kept.

create table @schema@.meta (
    version    int primary key,
    checksum   text not null,
    applied_at timestamptz not null default clock_timestamp(),
    applied_by text not null default session_user
);

create table @schema@.receipt (
    owner      text not null,
    job_digest bytea not null,
    status     text not null check (status in ('launching', 'committed', 'cancelled')),
    job_id     text not null,
    label      text,
    attempt    int,
    worker_pid int,
    sql_digest bytea,
    xid        xid8,
    started_at timestamptz,
    supervisor_pid int,
    server_started timestamptz,
    cause      text check (cause in
        ('asked', 'deadline', 'given up', 'superseded', 'interrupted', 'failed beside', 'run gone')),
    of_try     text,
    reason     text,
    decided_by text not null default session_user,
    decided_at timestamptz not null default clock_timestamp(),
    found_at   timestamptz,
    primary key (owner, job_digest)
);
comment on column @schema@.receipt.found_at is
    'When prune first found a receipt of the work''s own transaction whose end nobody had written into the history: '
    'decided_at is the start of that transaction.';
comment on table @schema@.receipt is
    'How a job ended: committed (written in the transaction of the work itself, or by its supervisor) or cancelled for '
    'good. launching: a supervisor (supervisor_pid, on the server that was started at server_started) has begun and has '
    'not said how it ended; worker_pid is null until its worker was seen at work. cause decides who may take a cancel '
    'back, of_try names the try of the work that it ended; reason is for people, and nothing is decided by it.';

create table @schema@.series (
    owner         text not null,
    series_digest bytea not null,
    series        text not null,
    newest        bigint not null,
    primary key (owner, series_digest)
);
comment on table @schema@.series is 'The newest generation of each series; an older one never starts any more.';

create table @schema@.job (
    owner           text not null,
    job_digest      bytea not null,
    job_id          text not null,
    series_digest   bytea not null,
    series          text not null,
    generation      bigint not null,
    label           text,
    kind            text not null,
    sql_digest      bytea not null,
    attempt         int not null,
    launched_by     text not null,
    launcher_pid    int not null,
    registered_at   timestamptz not null default clock_timestamp(),
    launched_at     timestamptz not null default clock_timestamp(),
    ended_at        timestamptz,
    reported_at     timestamptz,
    outcome         text check (outcome in ('committed', 'failed', 'cancelled', 'lost', 'unknown')),
    worker_pid      int,
    started_at      timestamptz,
    row_count       bigint,
    command_tag     text,
    sqlstate        text,
    message         text,
    detail          text,
    hint            text,
    context         text,
    schema_name     text,
    table_name      text,
    column_name     text,
    constraint_name text,
    primary key (owner, job_digest)
);
create index job_series on @schema@.job (owner, series_digest, generation);
-- For find_jobs.
create index job_digest on @schema@.job (job_digest);
create index job_launched on @schema@.job (launched_at);
create index job_label on @schema@.job (label text_pattern_ops, launched_at);
create index job_series_name on @schema@.job (series text_pattern_ops, launched_at);
create index receipt_digest on @schema@.receipt (job_digest);
create index receipt_unregistered on @schema@.receipt (decided_at) where attempt is null;
comment on table @schema@.job is
    'History and diagnosis, written by the launching side, which may die at any point: never the proof of anything. '
    'reported_at is null while nobody was told of a failure that a supervisor wrote down.';

create table @schema@.row_set (
    owner       text not null,
    job_digest  bytea not null,
    statement   int not null,
    columns     jsonb not null,
    command_tag text not null,
    row_count   bigint not null,
    primary key (owner, job_digest, statement),
    foreign key (owner, job_digest) references @schema@.receipt on delete cascade
);
comment on table @schema@.row_set is
    'The rows that a statement of a committed job gave, where the job was asked for them: written in the transaction of '
    'the work, and gone with its receipt. row_chunk has their values.';

create table @schema@.row_chunk (
    owner      text not null,
    job_digest bytea not null,
    statement  int not null,
    chunk      bigint not null,
    row_count  int not null,
    cells      text[],  -- the values of its first column, then those of its second, and so on
    primary key (owner, job_digest, statement, chunk),
    foreign key (owner, job_digest) references @schema@.receipt on delete cascade
);
-- Compressing them would take longer than all else that is done for them.
alter table @schema@.row_chunk alter column cells set storage external;
