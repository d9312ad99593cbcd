"""Directories that belong to a process, and are found again when the process was killed."""

from __future__ import annotations

import fcntl
import os
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file against every other process, for as long as the block runs."""
    with path.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


class OwnedDirectory:
    """One directory that is ours while we live. Its sibling ``<name>.owned`` is locked, which tells others so.

    The lock and not a process id is the sign, because ids are used again.
    """

    def __init__(self, path: Path, stream: IO[str]) -> None:
        self.path = path
        self._stream = stream

    def release(self) -> None:
        """Give it up, once the directory is removed."""
        self.path.with_name(f"{self.path.name}.owned").unlink(missing_ok=True)
        self._stream.close()


def own_directory(parent: Path, remove_abandoned: Callable[[Path], None]) -> OwnedDirectory:
    """Make a new directory of this process's own, after removing those whose owner is gone.

    Parameters
    ----------
    parent:
        an existing directory that holds nothing else.
    remove_abandoned:
        ends what runs in an abandoned directory and deletes it. It is called with the lock on
        ``parent`` held, so for one directory at a time on the whole machine.
    """
    with file_lock(parent / ".lock"):
        for other in parent.glob("*.owned"):
            with other.open("w") as stream:
                try:
                    fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue  # its owner lives
                remove_abandoned(other.with_suffix(""))
                other.unlink(missing_ok=True)
        name = f"{os.getpid()}-{os.urandom(4).hex()}"
        stream = (parent / f"{name}.owned").open("w")
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path = parent / name
        path.mkdir(mode=0o700)
        return OwnedDirectory(path, stream)
