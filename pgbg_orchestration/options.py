"""How a job is to be run: what :func:`pgbg_orchestration.arun` takes besides the job."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Literal, TypedDict

from . import pace
from .errors import InvalidJob
from .outcome import Event


class RunOptions(TypedDict, total=False):
    """The options of one call, as keyword arguments; :class:`Options` has their defaults."""

    on_cancel: Literal["cancel", "leave"]
    on_superseded: Literal["cancel", "wait"]
    retry_cancelled: bool
    accept_changed_sql: bool
    slot_timeout: float | None
    poll_interval: float | None
    deadline: datetime | None
    observer: Callable[[Event], None] | None


@dataclass(frozen=True, slots=True)
class Options:
    """The options of one call.

    Parameters
    ----------
    on_cancel:
        What happens to the worker when the awaiting task is cancelled: ``cancel`` it and wait until that is decided
        (at most a minute), or ``leave`` it at work, to be attached to later.
    on_superseded:
        What to do with a worker of an older generation of the series: ``cancel`` it, or ``wait`` for it.
    retry_cancelled:
        Run a job that was cancelled before all the same. One that only met its deadline is run again without it.
    accept_changed_sql:
        Let an id that stands for other SQL pass, with a warning.
    slot_timeout:
        Seconds to wait for a worker slot at most. Default: as long as the job may take.
    poll_interval:
        The longest time between two looks at the job, in seconds, from 0.01. Looks come at a pace of their own (a look
        comes late by at most 4 % of the time that the job has run), and this is where the pauses stop growing. Default:
        5, and 15 for progress and blocked output, which are looked at once a second at most.
    deadline:
        The moment until which the job has time, with time zone; like ``Job.timeout``, but absolute.
    observer:
        Called with each event of the job's way.

    Raises
    ------
    InvalidJob
        One of them cannot be used.
    """

    on_cancel: Literal["cancel", "leave"] = "cancel"
    on_superseded: Literal["cancel", "wait"] = "cancel"
    retry_cancelled: bool = False
    accept_changed_sql: bool = False
    slot_timeout: float | None = None
    poll_interval: float | None = None
    deadline: datetime | None = None
    observer: Callable[[Event], None] | None = None

    def __post_init__(self) -> None:
        if self.on_cancel not in ("cancel", "leave"):
            raise InvalidJob(f"on_cancel must be 'cancel' or 'leave', not {self.on_cancel!r}")
        if self.on_superseded not in ("cancel", "wait"):
            raise InvalidJob(f"on_superseded must be 'cancel' or 'wait', not {self.on_superseded!r}")
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


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
