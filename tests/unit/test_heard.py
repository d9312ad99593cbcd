"""Which messages of the session that reads a worker's result are told as the job's (the servers: test_notices.py)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from pgbg_orchestration.postgres import handles

WORKERS = "PL/pgSQL function inline_code_block line 1 at RAISE\nbackground worker, pid 42\nbackground worker, pid 42"


@pytest.mark.parametrize(
    ("severity", "context", "told"),
    [
        ("DEBUG", WORKERS, True),
        ("DEBUG", None, False),  # pg_background 1.10: "reset WorkerInfoMemoryContext after last worker cleanup"
        ("NOTICE", WORKERS, True),
        ("INFO", WORKERS, True),
        ("WARNING", None, True),
    ],
)
def test_what_the_reading_session_says_by_itself_is_not_the_jobs(
    severity: str, context: str | None, told: bool
) -> None:
    heard: list[Any] = []
    diag: Any = SimpleNamespace(severity_nonlocalized=severity, context=context)
    handles._of_the_worker(heard.append)(diag)
    assert (heard == [diag]) is told
