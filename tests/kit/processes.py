"""Look at and kill operating-system processes."""

from __future__ import annotations

import os
import signal
import subprocess
import time

GONE_TIMEOUT = 20.0
"""Seconds that a process killed with SIGKILL gets until it must be gone."""


def running(pid: int) -> bool:
    """True when the process exists and is no zombie."""
    listing = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False)
    state = listing.stdout.strip()
    return bool(state) and not state.startswith("Z")


def children(pid: int) -> list[int]:
    """The process's direct children."""
    listing = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True)
    pairs = (line.split() for line in listing.stdout.splitlines())
    return [int(child) for child, parent in pairs if int(parent) == pid]


def kill_tree(pid: int) -> None:
    """SIGKILL a process and its direct children, and wait until all are gone.

    The parent is stopped first: otherwise it sees its children die and starts new ones, or cleans up after them.
    """
    os.kill(pid, signal.SIGSTOP)
    victims = [pid, *children(pid)]
    for victim in victims:
        try:
            os.kill(victim, signal.SIGKILL)
        except ProcessLookupError:
            continue  # ended by itself meanwhile
    deadline = time.monotonic() + GONE_TIMEOUT
    while left := [victim for victim in victims if running(victim)]:
        if time.monotonic() > deadline:
            raise TimeoutError(f"processes {left} live on after SIGKILL")
        time.sleep(0.02)
