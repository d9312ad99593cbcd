"""The embedded server as the suite uses it: it can crash, and it keeps its data over a stop."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pgbg_orchestration.embedded.server import EmbeddedServer
from pgbg_orchestration.embedded.status import StopMode, socket_directory
from tests.kit.processes import kill_tree
from tests.servers.memory import SMALL_WAL, in_memory


class EmbeddedUnderTest(EmbeddedServer):
    """An embedded server with a temporary data directory that a stop does not remove."""

    def __init__(
        self,
        name: str,
        max_worker_processes: int = 64,
        settings: Mapping[str, str | int] | None = None,
        *,
        extension: Literal["real", "stand-in"],
        surface: Literal["2.0", "1.9"] = "2.0",
    ) -> None:
        super().__init__(
            max_worker_processes=max_worker_processes,
            settings={**(SMALL_WAL if in_memory() else {}), **(settings or {})},
            extension=extension,
            surface=surface,
        )
        self.name = name

    def stop(self, mode: StopMode = "fast") -> None:
        """Stop and keep the data."""
        self._stop(mode)

    def crash(self) -> None:
        """Kill the postmaster and every one of its processes with SIGKILL. ``start()`` then recovers from the WAL."""
        pid = self.pid()
        if pid is not None:
            kill_tree(pid)
            # Where process 1 reaps slowly or never (containers), the dead postmaster stays a zombie, which PostgreSQL
            # takes for a running server. All its processes are gone, so its files may go.
            (self.data_dir / "postmaster.pid").unlink(missing_ok=True)
            for lock in socket_directory(self.data_dir).glob(".s.PGSQL.*.lock"):
                lock.unlink()

    def _temporary_parent(self) -> Path:
        return in_memory() or super()._temporary_parent()

    def remove(self) -> None:
        """Stop and delete the data."""
        super().stop("immediate")
