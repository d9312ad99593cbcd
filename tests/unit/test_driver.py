"""One driver of jobs from blocking code: whatever interrupts the waiting thread, the work ends first."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from pgbg_orchestration.driver import Driver, Talk


class Interruption(BaseException):
    """What a signal's handler raises, such as an orchestrator's timeout."""


@contextmanager
def interruptible() -> Iterator[None]:
    def interrupt(_number: int, _frame: object) -> None:
        raise Interruption

    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, before)


def interrupt_main() -> None:
    main = threading.main_thread().ident
    assert main is not None
    signal.pthread_kill(main, signal.SIGUSR1)


async def interrupted(talk: Talk, *, times: int = 1, result: str | None = None) -> str:
    """Interrupt the thread that waits, and either end by itself or be cancelled, with something left to do."""
    for _ in range(times):
        interrupt_main()
    try:
        await asyncio.sleep(0.05 if result else 60)
    except asyncio.CancelledError:
        interrupt_main()  # again, in the middle of its way out
        await asyncio.sleep(0.05)
        talk.note(logging.INFO, f"cancels: {talk.cancel_workers}")
        raise
    return result or ""


def test_the_log_is_written_in_the_calling_thread_and_the_context_is_the_callers() -> None:
    lines: list[tuple[str, str]] = []
    variable = contextvars.ContextVar("variable", default="?")
    variable.set("mine")

    async def work(talk: Talk) -> str:
        talk.note(logging.INFO, "one")
        await asyncio.sleep(0)
        talk.note(logging.INFO, "two")
        return variable.get()

    result = Driver(work).run(log=lambda _level, text: lines.append((threading.current_thread().name, text)))

    here = threading.current_thread().name
    assert (result, lines) == ("mine", [(here, "one"), (here, "two")])


def test_an_interruption_is_raised_when_the_work_has_ended() -> None:
    lines: list[str] = []
    driver = Driver(interrupted)

    def on_interrupt(error: BaseException) -> float:
        assert isinstance(error, Interruption)
        driver.talk.cancel_workers = False
        return 0.0

    with interruptible(), pytest.raises(Interruption):
        driver.run(log=lambda _level, text: lines.append(text), on_interrupt=on_interrupt)
    assert driver.ended.is_set()
    assert lines == ["cancels: False"]


def test_work_that_may_end_by_itself_is_not_stopped_and_its_end_counts() -> None:
    driver = Driver(lambda talk: interrupted(talk, result="done"))
    with interruptible():
        assert driver.run(on_interrupt=lambda _error: 60.0) == "done"
    assert not driver.was_stopped


def test_the_patience_with_work_that_was_interrupted_has_an_end() -> None:
    with interruptible(), pytest.raises(Interruption):
        Driver(interrupted).run(on_interrupt=lambda _error: 0.01)


def test_the_decision_is_taken_again_when_it_was_interrupted() -> None:
    asked: list[BaseException] = []

    def on_interrupt(error: BaseException) -> float:
        asked.append(error)
        if len(asked) == 1:
            raise Interruption
        return 0.0

    with interruptible(), pytest.raises(Interruption):
        Driver(interrupted).run(on_interrupt=on_interrupt)
    assert len(asked) == 2


def test_a_look_interrupts_too() -> None:
    def look() -> None:
        raise Interruption

    async def work(_talk: Talk) -> None:
        await asyncio.sleep(60)

    driver = Driver(work)
    with pytest.raises(Interruption):
        driver.run(look=look, interval=0.0)
    assert driver.was_stopped


@pytest.mark.parametrize("when", ["before", "after"])
def test_it_can_be_stopped_whenever(when: str) -> None:
    """Dagster's driver once said "Event loop is closed" there, in place of the interruption."""

    async def work(_talk: Talk) -> int:
        return 7

    driver = Driver(work)
    if when == "after":
        assert driver.run() == 7
    driver.stop()
    driver.stop()
    assert driver.ended.is_set()


def test_it_can_be_stopped_at_any_moment_of_a_short_life() -> None:
    async def work(_talk: Talk) -> int:
        await asyncio.sleep(0)
        return 7

    for number in range(200):
        driver = Driver(work)
        stopper = threading.Thread(target=_stop_after, args=(driver, number * 1e-5))
        stopper.start()
        try:
            assert driver.run() == 7
        except asyncio.CancelledError:
            assert driver.was_stopped
        stopper.join()
        assert driver.ended.is_set()


def _stop_after(driver: Driver[int], seconds: float) -> None:
    time.sleep(seconds)
    driver.stop()


def test_stopped_from_elsewhere_the_work_was_cancelled() -> None:
    async def work(_talk: Talk) -> None:
        threading.Thread(target=driver.stop).start()
        await asyncio.sleep(60)

    driver = Driver(work)
    with pytest.raises(asyncio.CancelledError):
        driver.run()


def test_seen_through_however_often_it_is_interrupted() -> None:
    with interruptible():
        assert Driver(lambda talk: interrupted(talk, times=3, result="done")).see_through() == "done"
