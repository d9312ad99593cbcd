"""What takes long with a long text is not done in the event loop's own thread."""

from __future__ import annotations

import threading

import pytest
from pytest_mock import MockerFixture

from pgbg_orchestration import Job, statements
from pgbg_orchestration.threads import LONG
from pgbg_orchestration.walk.worker_sql import bind


@pytest.mark.parametrize("is_long", [False, True])
async def test_a_text_is_read(is_long: bool, mocker: MockerFixture) -> None:
    job = Job("select 1" + "; select 'some text'" * (LONG // 10 if is_long else 1))
    threads: list[threading.Thread] = []
    split = statements.split_again

    def splitting(text: str) -> tuple[statements.Statement, ...]:
        threads.append(threading.current_thread())
        return split(text)

    mocker.patch.object(statements, "split_again", splitting)
    work = await bind(job, None, "me")
    assert (threading.main_thread() in threads) is not is_long
    assert len(work.statements) == (LONG // 10 + 1 if is_long else 2)
