"""Ctrl-C, SIGTERM and SIGHUP while a job is waited for."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, Self, TypeVar

from .codes import ExitCode

if TYPE_CHECKING:
    from .progress import Display

T = TypeVar("T")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupts:
    """Turns the first signal into a cancel of ``task``; the third ends the process without an answer.

    A signal that is ignored stays ignored: under nohup, or in the background of a script.
    """

    def __init__(self, task: asyncio.Future[Any], display: Display, *, leave: bool) -> None:
        self._task = task
        self._display = display
        self._leave = leave
        self._loop = asyncio.get_running_loop()
        self._handled = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        self.seen = 0

    def __enter__(self) -> Self:
        for number in self._handled:
            self._loop.add_signal_handler(number, self._on_signal, number)
        return self

    def __exit__(self, *_: object) -> None:
        for number in self._handled:
            self._loop.remove_signal_handler(number)

    def _on_signal(self, number: signal.Signals) -> None:
        self.seen += 1
        name = "Ctrl-C" if number is signal.SIGINT else number.name
        if self.seen == 1:
            self._task.cancel()
            self._display.say(
                f"{name}: leaving its worker at work" if self._leave else f"{name}: cancelling its worker"
            )
        elif self.seen == 2:
            self._display.say("waiting until that is decided, a minute at most; once more gives up without an answer")
        else:
            self._display.close()
            os._exit(ExitCode.INTERRUPTED)


async def until_interrupted(work: Coroutine[Any, Any, T], display: Display, *, leave: bool) -> T | None:
    """Await ``work`` and return what it returns; None when a signal cancelled it.

    Parameters
    ----------
    display:
        Where the person is told what the signal does.
    leave:
        Whether the worker is left at work.
    """
    task = asyncio.ensure_future(work)
    with Interrupts(task, display, leave=leave) as interrupts:
        try:
            return await task
        except asyncio.CancelledError:
            if not interrupts.seen:
                raise
            return None
