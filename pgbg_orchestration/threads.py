"""What would hold up the event loop, done in a thread."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
LONG = 200_000  # characters of SQL: reading or quoting them takes tens of milliseconds


async def off_loop(characters: int, question: Callable[[], T]) -> T:
    """Answer a question about SQL: about a short one at once, about a long one in a thread.

    Parameters
    ----------
    characters:
        How many characters of SQL it is about.
    question:
        What is asked.

    Returns
    -------
    T
        What ``question`` returns; it raises what that raises.
    """
    return await asyncio.to_thread(question) if characters > LONG else question()
