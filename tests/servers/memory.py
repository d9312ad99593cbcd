"""Where the data of the tests' servers is: in memory, where there is enough of it.

A suite makes thousands of databases, of 300 files each. On a disk's file system making one took 0.27 s of a core,
nearly all of it in the kernel, and in memory 0.04 s. Nothing of it has to outlive the machine.
"""

from __future__ import annotations

import re
import shutil
from functools import cache
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")  # also seen inside of the real server's tree
NEEDED = 6 * 2**30
"""Bytes that have to be free: several test processes have several servers each."""
SMALL_WAL = {"max_wal_size": "128MB"}
"""Settings of a server with its data in memory."""


@cache
def in_memory() -> Path | None:
    """Return the directory that is in memory, or None where there is none with enough room: then a disk will do."""
    if not SHARED_MEMORY.is_dir() or shutil.disk_usage(SHARED_MEMORY).free < NEEDED:
        return None
    available = re.search(r"^MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return SHARED_MEMORY if available and int(available[1]) * 1024 >= NEEDED else None
