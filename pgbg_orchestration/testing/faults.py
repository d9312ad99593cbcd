"""Named points of the algorithm at which a test can break things.

Off, a point costs one comparison. ``PGBG_FAULT=after_launch:kill`` in the environment makes the process die
(SIGKILL) at that point; tests install a function of their own with :func:`install`.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

POINTS = (
    "before_register",
    "after_register",
    "before_launch",
    "after_launch",
    "while_running",
    "after_end",
    "before_record",
    "after_record",
    "after_detach",
    "before_cancel",
    "before_mark",
    "after_mark",
)

_hook: Callable[[str], None] | None = None


def install(hook: Callable[[str], None] | None) -> None:
    """Call ``hook`` with the name of each point that is passed; None turns it off."""
    global _hook  # noqa: PLW0603  (one process, one set of faults)
    _hook = hook


def point(name: str) -> None:
    """Pass the point ``name``."""
    if _hook is not None:
        _hook(name)


def from_environment(value: str) -> Callable[[str], None]:
    """Return the hook that ``PGBG_FAULT`` asks for: ``point:kill`` or ``point:stop`` (SIGSTOP).

    Raises
    ------
    ValueError
        The point or the fault has another name than those known.
    """
    name, _, fault = value.partition(":")
    signals = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}
    if name not in POINTS or fault not in signals:
        raise ValueError(f"PGBG_FAULT={value!r}: want POINT:kill or POINT:stop, POINT one of {', '.join(POINTS)}")

    def hook(passed: str) -> None:
        if passed == name:
            os.kill(os.getpid(), signals[fault])

    return hook


if os.environ.get("PGBG_FAULT"):
    install(from_environment(os.environ["PGBG_FAULT"]))
