"""Rounds go on at their pace whatever becomes of a look, and nobody who waits is forgotten."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, cast

import pytest

from pgbg_orchestration.errors import ServerUnreachable
from pgbg_orchestration.ledger.ledger import Ledger
from pgbg_orchestration.ledger.sighting import AtWork
from pgbg_orchestration.walk.rounds import Rounds


class Failing:
    """A ledger whose looks raise."""

    def __init__(self, error: Exception) -> None:
        self.error = error
        self.looks = 0

    async def changed(self, jobs: Sequence[AtWork]) -> list[int]:
        self.looks += 1
        raise self.error


def at_work(name: str) -> AtWork:
    return AtWork("app", name.encode(), None, 1, None, None)


def soon_then_in_an_hour() -> Any:
    pauses = iter([0.0])
    return lambda: next(pauses, 3600.0)


@pytest.mark.parametrize("error", [RuntimeError("a fault of ours"), ServerUnreachable("nobody answers")])
async def test_after_a_look_that_fails_each_job_looks_by_itself_and_the_next_round_is_an_hour_away(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    ledger = Failing(error)
    rounds = Rounds(cast(Ledger, ledger))
    woken = {name: asyncio.Event() for name in ("a", "b")}
    with ExitStack() as waits:
        for name, event in woken.items():
            waits.enter_context(rounds.waiting(at_work(name), soon_then_in_an_hour(), event.set))
        async with asyncio.timeout(30):
            for event in woken.values():
                await event.wait()
        looks = ledger.looks
        for _ in range(200):
            await asyncio.sleep(0)
        assert ledger.looks == looks <= 2  # one for each that was due
    await rounds.close()
    assert ("a fault of ours" in caplog.text) is isinstance(error, RuntimeError)
