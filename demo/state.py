"""Where the demo keeps what the next run uses again, and who may use it."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from pgbg_orchestration.embedded.cache import cache_directory
from pgbg_orchestration.embedded.server import EmbeddedServer
from pgbg_orchestration.embedded.status import status

ROOT = Path(__file__).resolve().parents[1]
STATE_VARIABLE = "PGBG_DEMO_DIR"
END_SECONDS = 10.0


class DemoError(Exception):
    """What keeps the demo from going on, in words for the person who started it."""


@dataclass(frozen=True)
class State:
    """The demo's folders.

    Parameters
    ----------
    home:
        For all of it; ``.demo`` in the project, or ``PGBG_DEMO_DIR``.
    """

    home: Path

    @property
    def airflow(self) -> Path:
        """Airflow's home."""
        return self.home / "airflow"

    @property
    def dagster(self) -> Path:
        """Dagster's home."""
        return self.home / "dagster"

    @property
    def server(self) -> Path:
        """The data directory of PostgreSQL.

        Root's is elsewhere: PostgreSQL then runs as another user, who may not be able to reach the project's folder.
        """
        if os.geteuid() != 0:
            return self.home / "server"
        return cache_directory() / f"demo-{hashlib.sha256(os.fsencode(self.home)).hexdigest()[:12]}"

    def remove(self) -> None:
        """Delete all of it, for a demo from the beginning."""
        if status(self.server) is not None:
            EmbeddedServer(self.server).start().stop("immediate")
        for directory in (self.airflow, self.dagster, self.server):
            if directory.exists():
                shutil.rmtree(directory)


@contextmanager
def claimed() -> Iterator[State]:
    """Give the demo's folders to this process alone, and end what a demo that was killed left running.

    Raises
    ------
    DemoError
        Another demo uses them.
    """
    home = Path(os.environ.get(STATE_VARIABLE) or ROOT / ".demo").absolute()
    home.mkdir(parents=True, exist_ok=True)
    with (home / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DemoError(
                f"another demo is running here ({home}): wait for its end, or set {STATE_VARIABLE} to another folder"
            ) from None
        state = State(home)
        end_leftovers(state)
        yield state


def end_leftovers(state: State) -> None:
    """End the processes of Airflow and Dagster that have their home here; the demo that started them is gone."""
    homes = {"AIRFLOW_HOME": str(state.airflow), "DAGSTER_HOME": str(state.dagster)}
    left = []
    for process in psutil.process_iter():
        # Other users' processes do not show their environment, nor do those that are about to end.
        with suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and not homes.items().isdisjoint(process.environ().items()):
                process.terminate()
                left.append(process)
    _, stubborn = psutil.wait_procs(left, timeout=END_SECONDS)
    for process in stubborn:
        with suppress(psutil.NoSuchProcess):
            process.kill()
