"""The pace of polling: the one place that says how often anything is looked at.

Each pause is a share of the time that a job has run already, between two bounds, so a short job is seen to end within
milliseconds. Commits are heard of. Failures, and what nobody heard of, the handle tells (``HANDLE_…``: one cheap query
a session, every quarter of a second at the latest); a job that another process launched is looked at by its lock and
receipt (``SHARE``, ``SOONEST``, ``LATEST``); what is rare or for people less often (``LOOK_…``, ``BLOCKED``). Looks at
jobs at work are made together, some of them before their time (``TOGETHER``: :mod:`.walk.rounds`). A
caller's ``poll_interval`` takes the place of the longest pause, and leaves the rest as it is. All times are in seconds.
"""

from __future__ import annotations

import random

SHARE = 0.04
SOONEST = 0.01
LATEST = 5.0
HANDLE_SHARE = 0.25
HANDLE_SOONEST = 0.01
HANDLE_LATEST = 0.25  # one query tells of all handles of a session, and costs a tenth of asking for each
WAIT_IN_SERVER = 0.05  # for the end of a worker with a session of its own, before it is polled; holds a snapshot there
POLLING = 0.05  # of its time a session polls at most, in the long run
POLLING_AT_ONCE = 0.05  # seconds of polling that a session may do before that counts: its first polls come soon
LOOK_SOONEST = 1.0  # for what the handle does not tell: blocked output, a stalled session
LOOK_LATEST = 15.0
LOOK_BEHIND = 60.0
TOGETHER = 0.25  # of a pause before a look at a job at work is due, from when on another's look takes it along
BLOCKED = 2.0  # output that nobody reads, of all workers of a session
RETRY_SOONEST = 0.05
RETRY_LATEST = 5.0

CALL = 30.0  # one call to the server; then its connection counts as dead
RECONNECT = 300.0  # a server that cannot be reached, after it could be
WARN_AGAIN = 30.0  # that a server cannot be reached
STRANGER = 30.0  # somebody else's session on the lock of a series
CANCEL = 55.0  # all of the way out, once an end is wanted: a minute with BREAK
BREAK = 1.0  # for what is broken off to end by itself; psycopg would take ten behind a peer that is silent
STALLED = 3.0  # a launching session that does not answer
DEADLINE_MARGIN = 30.0  # from a job's deadline to the moment when its worker ends by itself
CONFIRM = 10.0  # for a synchronous standby to confirm a cancel that a person asked for
GRACE = 2.0  # for the launching side of another process to write down how a job ended
STARTING = 3.0  # for a worker to show itself whose supervisor ended just after the launch: then it is attached to
SIGN = 0.3  # for what is unfinished to become whole: a lock alone, a cancel without its mark


def poll(age: float, poll_interval: float | None = None) -> float:
    """Return how long to wait before the next poll of a job that has run for ``age``: at most ``poll_interval``."""
    return min(max(SOONEST, SHARE * age), poll_interval or LATEST)


def poll_handle(age: float, poll_interval: float | None = None) -> float:
    """Return how long to wait before the handle of a job is polled that has run for ``age``: for failures mainly."""
    return min(max(HANDLE_SOONEST, HANDLE_SHARE * age), poll_interval or HANDLE_LATEST)


def polling_left(left: float, since: float, spent: float) -> float:
    """Return for how many seconds a session may poll now; below 0 it waits until it has earned as much again.

    Parameters
    ----------
    left:
        How many there were after its poll before.
    since:
        Seconds from that poll to the one that it has just made: it has earned a share of them (``POLLING``).
    spent:
        Seconds that this one took.
    """
    return min(left + since * POLLING, POLLING_AT_ONCE) - spent


def look(age: float, poll_interval: float | None = None) -> float:
    """Return how long to wait before the next look at a job whose handle is polled besides."""
    return min(max(LOOK_SOONEST, 2 * SHARE * age), max(poll_interval or LOOK_LATEST, LOOK_SOONEST))


def look_behind(age: float, poll_interval: float | None = None) -> float:
    """Return how long to wait before the next look at a job that this process launched, where nothing asks for one.

    Its end is heard of and polled for, and so is blocked output: this is for what neither of them tells.
    """
    return max(look(age, poll_interval), min(age, LOOK_BEHIND))


def backoff(attempt: int, chance: random.Random | None = None) -> float:
    """Return how long to wait before retry number ``attempt`` (from 0), with jitter.

    Exponential with equal jitter, so that contenders spread.
    """
    bound = min(RETRY_SOONEST * 2.0 ** min(attempt, 20), RETRY_LATEST)
    return bound * (0.5 + 0.5 * (chance or random).random())
