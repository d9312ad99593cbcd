"""A worker that this process launched, as its launching session follows it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pgbg_orchestration.outcome import ErrorFields

from .opening import Claim, Proof
from .pg_background import Handle, ResultInfo

if TYPE_CHECKING:
    from .session import LaunchingSession


@dataclass(slots=True, eq=False)
class Worker:
    """A worker that this process launched: its handle, and the future of how it ended.

    ``ended`` gets the last ``ResultInfo``, or None when the handle is lost.
    """

    session: LaunchingSession
    handle: Handle
    launched_at: float  # seconds of the event loop's clock
    ended: asyncio.Future[ResultInfo | None]
    poll_interval: float | None = None  # the longest time between two polls; None for the usual one
    claim: Claim | None = None  # the launch that its receipt would prove, where it writes one
    proof: Proof | None = None  # that receipt, read after its commit was heard of; it is in the history then
    nudged: asyncio.Event = field(default_factory=asyncio.Event)  # somebody should look at it before its time

    @property
    def gone(self) -> bool:
        """Whether the handle is lost."""
        return self.ended.done() and self.ended.result() is None

    async def error(self) -> ErrorFields | None:
        """Return the worker's error; None without one, or with the session lost."""
        return await self.session.error_info(self.handle)

    async def detach(self) -> None:
        """Forget the handle: the worker goes on, its output is dropped."""
        await self.session.detach(self)

    def release(self) -> None:
        """Forget the handle, in the session's own time."""
        self.session.release(self)
