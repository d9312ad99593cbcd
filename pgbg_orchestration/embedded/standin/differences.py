"""What the stand-in does not do as the real extension does, and why: the only such list."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

DIFFERENCES: Mapping[str, str] = MappingProxyType(
    {
        "backend_type": "A worker is a client connection: pg_stat_activity shows backend_type 'client backend'.",
        "wait_event": (
            "A worker with unread output waits in Client / ClientWrite, not in IPC / MessageQueuePutMessage."
        ),
        "statements_see_rows": (
            "The statements of one launch see each other's rows, as in psql: they are sent as one query."
        ),
        "alone_words": (
            "What cannot run beside another statement fails with 25001 and 'cannot run inside a transaction block', "
            "not 'cannot be executed from a function or procedure'."
        ),
        "exact_queue": (
            "Output up to the size of a socket buffer (some 200 KiB) never blocks the worker's commit. What the "
            "queue could not have held still keeps `completed` false until detach or result()."
        ),
        "error_in_full_queue": (
            "A worker aborts before it reports: its locks are gone even when nobody reads the report."
        ),
        "cancel_blocked": (
            "A worker that waits for its output to be read takes no pg_cancel_backend, only the extension's own "
            "cancel or pg_terminate_backend."
        ),
        "notices": (
            "NOTICEs go to the server's log, not to the session that reads the result, and the marks between the "
            "statements of a job are left out of what the worker runs."
        ),
        "orphan_output": (
            "A worker that has yet to send a message or more than 8 KiB when its launching session ends is rolled back."
        ),
        "lingers": "A worker's connection stays, idle, until its launching session next asks for it or ends.",
        "error_object_names": "error_info has no schema, table, column and constraint names: dblink drops them.",
        "result_context": (
            "The context of an error raised by result() is the stand-in's own; error_info has the worker's, with "
            "one line more for a statement that no worker may run."
        ),
        "column_lists": (
            "A column list that is missing, or has other columns than result() or list() give, gets another message, "
            "and list_v2() of 1.x takes any number of columns only from the real extension."
        ),
        "void_results": "A result of type void is read by a column of type text.",
        "not_alone": "A statement that has to be alone fails beside another with 25001 and another message.",
        "worker_slots": "Workers take no slot of max_worker_processes. 53000 comes when max_connections is reached.",
        "custom_settings": (
            "Settings with a dot in their name stand in no catalogue. A worker inherits pg_background.*, "
            "pgbg.step, pgbg.work, and those that the setting pgbg_standin.inherit lists (pgbg.custom if unset)."
        ),
        "statement_timeout_scope": (
            "statement_timeout counts for each statement of a launch, can be set in the text, and covers the commit."
        ),
        "parallel_select": "A worker's top-level SELECT may be planned with parallel workers.",
        "binary_output": "Results travel as text, so types without binary output can be read.",
        "copy_to_stdout": "COPY ... TO STDOUT fails in the worker with 0A000, not only when its result is read.",
        "settings_known": "SHOW does not know pg_background.* before they are set, and takes any value for them.",
        "early_cancel": (
            "A cancel just after launch never ends silently by chance; SET pgbg_standin.silent_cancel = '1s' "
            "makes every cancel within that time do so."
        ),
        "pids_reused": "A handle's pid is always the worker's own.",
        "launch_cancel": "A launch call that is cancelled on the way leaves no running worker behind.",
        "query_text": "pg_stat_activity may show a worker's text with one more statement in it, before the last.",
        "relocatable": "ALTER EXTENSION ... SET SCHEMA is refused.",
    }
)
"""For each difference its name, which the contract tests give as their reason to skip, and what it is."""
