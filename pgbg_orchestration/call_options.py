"""How a job is to be run: what :func:`pgbg_orchestration.arun` takes besides the job."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import datetime
from typing import Literal, TypedDict

from . import pace
from .errors import InvalidJob
from .outcome import Cause, Event

OnCancel = Literal["cancel", "leave"] | Callable[[], Cause | None]
"""What is done with the worker of a caller that is cancelled; a function tells it at that moment."""


WhenOrphaned = Literal["cancel", "leave"]
"""What is done with a worker that nobody wants any more."""


class RunOptions(TypedDict, total=False):
    """The options of one call, as keyword arguments; :class:`Options` has their defaults."""

    on_cancel: OnCancel
    on_superseded: Literal["cancel", "wait"]
    retry_cancelled: bool | Collection[Cause]
    accept_changed_sql: bool
    slot_timeout: float | None
    poll_interval: float | None
    deadline: datetime | None
    observer: Callable[[Event], None] | None
    of_try: str | None
    notices: bool
    when_orphaned: WhenOrphaned | None
    supervisor: bool


@dataclass(frozen=True, slots=True)
class Options:
    """The options of one call.

    Parameters
    ----------
    on_cancel:
        What happens to the worker when the awaiting task is cancelled: ``cancel`` it and wait until that is decided
        (at most a minute), or ``leave`` it at work, to be attached to later. A function is asked at that moment: it
        returns the :class:`~pgbg_orchestration.outcome.Cause` to cancel it for, or None to leave it.
    on_superseded:
        What to do with a worker of an older generation of the series: ``cancel`` it, or ``wait`` for it.
    retry_cancelled:
        Run a job that was cancelled before all the same: whatever the cause (True), or only where it is one of these.
        One that only met its deadline is run again without it.
    accept_changed_sql:
        Let an id that stands for other SQL pass, with a warning.
    slot_timeout:
        Seconds to wait for a worker slot at most. Default: as long as the job may take.
    poll_interval:
        The longest time between two looks at the job, in seconds, from 0.01: where the pauses stop growing, which begin
        with 10 ms and grow with the time that the job has run. Default: 0.25 for a worker that this call launched, 5
        for one that it is attached to, and 15 for progress, which is looked at once a second at most. A commit that is
        heard of (docs/performance.md) waits for none of them.
    deadline:
        The moment until which the job has time, with time zone; like ``Job.timeout``, but absolute.
    observer:
        Called with each event of the job's way.
    of_try:
        Names the caller's try of the work. It goes into the receipt with a cancel that this call makes, and a cancel
        that this very try made is not taken back by ``retry_cancelled`` when the try goes on elsewhere.
    notices:
        Tell what the SQL raises, from NOTICE up, as it is raised: each as an event and a line of the log. RAISE DEBUG
        too, where the job's settings have ``client_min_messages = debug1``. It costs a connection of the job's own for
        as long as its worker is at work. Not for supervised jobs, nor with ``redact_details``. A single CALL that has
        no kind of its own carries a receipt then, as one transaction: its procedure may not commit (2D000).
    when_orphaned:
        Written down with a launch that this call makes, for those who look for orphans: jobs whose launcher is dead and
        whose caller has ended otherwise, such as a killed triggerer's whose task was marked meanwhile. They ``cancel``
        the worker, or ``leave`` it at work and say so. Default: nothing is said, and none of them touches the job.
    supervisor:
        For a job that nobody waits for. A second worker launches it, stays until it has ended, and writes into the
        history how: row count, command tag and duration, or the error with all its fields. It takes two worker slots.
        The proof of a job of kind receipt is its receipt all the same; one of kind supervised has a supervisor in any
        case. Not for jobs of kind session, nor with ``notices`` or a stream.

    Raises
    ------
    InvalidJob
        One of them cannot be used.
    """

    on_cancel: OnCancel = "cancel"
    on_superseded: Literal["cancel", "wait"] = "cancel"
    retry_cancelled: bool | Collection[Cause] = False
    accept_changed_sql: bool = False
    slot_timeout: float | None = None
    poll_interval: float | None = None
    deadline: datetime | None = None
    observer: Callable[[Event], None] | None = None
    of_try: str | None = None
    notices: bool = False
    when_orphaned: WhenOrphaned | None = None
    supervisor: bool = False

    def __post_init__(self) -> None:
        if self.on_cancel not in ("cancel", "leave") and not callable(self.on_cancel):
            raise InvalidJob(f"on_cancel must be 'cancel', 'leave' or a function, not {self.on_cancel!r}")
        if self.on_superseded not in ("cancel", "wait"):
            raise InvalidJob(f"on_superseded must be 'cancel' or 'wait', not {self.on_superseded!r}")
        if self.when_orphaned not in (None, "cancel", "leave"):
            raise InvalidJob(f"when_orphaned must be 'cancel' or 'leave', not {self.when_orphaned!r}")
        if self.slot_timeout is not None and not (_is_number(self.slot_timeout) and self.slot_timeout > 0):
            raise InvalidJob(f"slot_timeout must be a number of seconds above 0, not {self.slot_timeout!r}")
        if self.poll_interval is not None and not (
            _is_number(self.poll_interval) and pace.SOONEST <= self.poll_interval < float("inf")
        ):
            raise InvalidJob(
                f"poll_interval must be a number of seconds from {pace.SOONEST}, not {self.poll_interval!r}"
            )
        if self.deadline is not None and not (isinstance(self.deadline, datetime) and self.deadline.tzinfo):
            raise InvalidJob(f"deadline must be a datetime with a time zone, not {self.deadline!r}")
        if self.observer is not None and not callable(self.observer):
            raise InvalidJob(f"observer must be callable, not {self.observer!r}")

    def cause_of_cancel(self) -> Cause | None:
        """Return why the job is to end now that its caller is cancelled; None: its worker is left at work."""
        if callable(self.on_cancel):
            return self.on_cancel()
        return Cause.INTERRUPTED if self.on_cancel == "cancel" else None

    def takes_back(self, cause: Cause | None) -> bool:
        """Say whether the caller wants a job run that was cancelled for that cause."""
        if isinstance(self.retry_cancelled, bool):
            return self.retry_cancelled
        return cause in self.retry_cancelled


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
