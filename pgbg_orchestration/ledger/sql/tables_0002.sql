-- Version 2: orphans, jobs at work whose launcher is dead and whose caller may have ended otherwise.

alter table @schema@.job add column when_orphaned text check (when_orphaned in ('cancel', 'leave'));
comment on column @schema@.job.when_orphaned is
    'What is to be done with the worker of a launch whose launcher is dead and whose caller has ended otherwise, as '
    'that caller said. Null: nobody said anything, and nobody is to touch it.';
