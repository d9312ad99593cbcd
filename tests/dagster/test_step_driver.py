"""A step waits in one thread for what happens in another, and an interruption reaches the right one."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from dagster import DagsterExecutionInterruptedError

from dagster_resource.steps.step_driver import drive, see_through
from pgbg_orchestration.driver import Talk


class Step:
    """A step's side: its log, and what it says about the run."""

    def __init__(self, *, terminated: bool = False, cancel: bool = True) -> None:
        self.lines: list[str] = []
        self.terminated = terminated
        self.cancel = cancel

    def log(self, level: int, message: str) -> None:
        assert level >= logging.INFO
        assert threading.current_thread() is threading.main_thread()
        self.lines.append(message)


def run_in(step: Step, work: object) -> object:
    return drive(
        work,  # type: ignore[arg-type]
        log=step.log,
        is_terminated=lambda: step.terminated,
        should_cancel=lambda: step.cancel,
        interval=0.01,
    )


@contextmanager
def interruptible() -> Iterator[None]:
    """A signal raises what Dagster raises, as within a step."""

    def interrupt(_number: int, _frame: object) -> None:
        raise DagsterExecutionInterruptedError

    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_returns_the_result_and_writes_the_log_in_the_calling_thread() -> None:
    step = Step()

    async def work(talk: Talk) -> int:
        talk.note(logging.INFO, "one")
        await asyncio.sleep(0.01)
        talk.note(logging.WARNING, "two")
        return 7

    assert run_in(step, work) == 7
    assert step.lines == ["one", "two"]


def test_raises_what_the_work_raises() -> None:
    async def work(_talk: Talk) -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        run_in(Step(), work)


@pytest.mark.parametrize("cancel", [True, False])
def test_interrupted_by_a_signal_the_work_is_told_whether_its_workers_are_to_end(cancel: bool) -> None:
    step = Step(cancel=cancel)
    told: list[bool] = []

    async def work(talk: Talk) -> None:
        os.kill(os.getpid(), signal.SIGUSR1)
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            told.append(talk.cancel_workers)
            await asyncio.sleep(0.05)  # what it does about them takes time, and is waited for
            talk.note(logging.INFO, "dealt with")
            raise

    with interruptible(), pytest.raises(DagsterExecutionInterruptedError):
        run_in(step, work)
    assert told == [cancel]
    assert step.lines == ["dealt with"]


def test_a_second_signal_does_not_cut_the_cleaning_up_short() -> None:
    step = Step()

    async def work(talk: Talk) -> None:
        os.kill(os.getpid(), signal.SIGUSR1)
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            for _ in range(3):
                os.kill(os.getpid(), signal.SIGUSR1)
                await asyncio.sleep(0.02)
            talk.note(logging.INFO, "dealt with")
            raise

    with interruptible(), pytest.raises(DagsterExecutionInterruptedError):
        run_in(step, work)
    assert step.lines == ["dealt with"]


def test_without_a_signal_the_runs_status_ends_the_step() -> None:
    step = Step(terminated=True)

    async def work(_talk: Talk) -> None:
        await asyncio.sleep(60)

    with pytest.raises(DagsterExecutionInterruptedError):
        run_in(step, work)


def test_an_error_of_the_steps_own_leaves_workers_alone() -> None:
    told: list[bool] = []

    async def work(talk: Talk) -> None:
        talk.note(logging.INFO, "a line")
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            told.append(talk.cancel_workers)
            raise

    def log(_level: int, _message: str) -> None:
        raise OSError("the event log's storage is gone")

    with pytest.raises(OSError, match="storage"):
        drive(work, log=log, is_terminated=lambda: False, should_cancel=lambda: True, interval=60)
    assert told == [False]


def test_what_has_to_be_done_after_an_interruption_is_done_whatever_comes() -> None:
    step = Step()

    async def work(talk: Talk) -> None:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGUSR1)
            await asyncio.sleep(0.02)
        talk.note(logging.INFO, "dealt with")

    with interruptible():
        see_through(work, log=step.log)
    assert step.lines == ["dealt with"]
