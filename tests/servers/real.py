"""The real server: PostgreSQL 18 with pg_background 2.0.3 from Debian testing, in a chroot, on 127.0.0.1."""

from __future__ import annotations

import atexit
import os
import shutil
import socket
import subprocess
import tempfile
import time
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Self

import psycopg
from psycopg.conninfo import make_conninfo

from pgbg_orchestration.embedded.directories import OwnedDirectory, own_directory
from pgbg_orchestration.embedded.status import StopMode, is_postgres
from tests.kit.processes import kill_tree
from tests.servers.debian import DebianTree
from tests.servers.memory import SMALL_WAL, in_memory

if TYPE_CHECKING:
    from collections.abc import Mapping

BINARIES = DebianTree.binaries
EXTENSION = "real 2.0.3"
START_ATTEMPTS = 5


# Process crashes lose nothing with these: what a killed PostgreSQL wrote is in the kernel's cache all the same. They
# are unsafe against a crash of the machine only, which no test here can cause.
FAST_SETTINGS: Mapping[str, str | int] = {"fsync": "off", "full_page_writes": "off"}

_alive: weakref.WeakSet[RealServer] = weakref.WeakSet()


class RealServer:
    """One cluster of the real server, with a data directory and a port of its own.

    Any number of clusters, in any number of processes, share one tree. A cluster belongs to the process that made it:
    it is stopped and removed at that process's exit, or, when the process was killed, by the next one that starts any.

    Parameters
    ----------
    max_worker_processes:
        PostgreSQL's setting of that name; 8 is what most users have.
    settings:
        further settings of postgresql.conf, which win over the ones made here.
    tree:
        the Debian tree; default: the one in ``PGBG_SERVERS_DIR``.

    Raises
    ------
    ServerUnavailableError
        this machine cannot have a real server; the message says why.
    """

    name = "real"
    surface = "2.0"
    extension = EXTENSION
    is_standin = False
    usual_tree: type[DebianTree] = DebianTree

    def __init__(
        self,
        max_worker_processes: int = 64,
        settings: Mapping[str, str | int] | None = None,
        *,
        tree: DebianTree | None = None,
    ) -> None:
        self.tree = tree or self.usual_tree()
        self.settings: dict[str, str | int] = {
            "max_worker_processes": max_worker_processes,
            "max_connections": 200,
            **FAST_SETTINGS,
            **(SMALL_WAL if in_memory() else {}),
            **(settings or {}),
        }
        self.port: int | None = None
        self._owned: OwnedDirectory | None = None

    def start(self) -> Self:
        """Start the server, making its data directory first if need be; nothing happens when it runs already."""
        if self.is_running():
            return self
        if self._owned is None:
            self._create()
        output = ""
        for attempt in range(1, START_ATTEMPTS + 1):
            if self.port is None:
                self.port = _free_port()
            self._write_settings()
            result = self._run(
                "pg_ctl", "start", "-w", "-t", "60", "-D", self._inside("data"), "-l", self._inside("log")
            )
            if result.returncode == 0:
                return self
            output = result.stdout
            if "Address already in use" not in self.log() or attempt == START_ATTEMPTS:
                break
            self.port = None  # another process took it between our look and PostgreSQL's bind
        raise RuntimeError(f"the real server did not start: {output}\n{self.log()[-3000:]}")

    def stop(self, mode: StopMode = "fast") -> None:
        """Stop the server and keep its data. A worker that even ``fast`` cannot end is ended by ``immediate``."""
        if not self.is_running():
            return
        output = ""
        for chosen in (mode, "immediate"):
            result = self._run("pg_ctl", "stop", "-w", "-t", "30", "-m", chosen, "-D", self._inside("data"))
            if result.returncode == 0 or not self.is_running():
                return
            output = result.stdout
        raise RuntimeError(f"the real server did not stop: {output}\n{self.log()[-3000:]}")

    def restart(self, mode: StopMode = "fast") -> None:
        """Stop and start on the same port, so that conninfo strings stay good."""
        self.stop(mode)
        self.start()

    def crash(self) -> None:
        """Kill the postmaster and every one of its processes with SIGKILL. ``start()`` then recovers from the WAL."""
        pid = self.pid()
        if pid is not None:
            kill_tree(pid)
            # Where process 1 reaps slowly or never (containers), the dead postmaster stays a zombie, which PostgreSQL
            # takes for a running server. All its processes are gone, so the file may go.
            (self._cluster / "data" / "postmaster.pid").unlink(missing_ok=True)

    def take_over(self, old: RealServer) -> None:
        """Fill this new cluster with another's data by ``pg_upgrade``; both are stopped, and ours is started.

        Parameters
        ----------
        old
            a cluster of an older major version that is in the same tree.
        """
        self.start().stop()  # which makes the data directory and its settings
        old.stop()
        here, programs = self._inside(""), self.tree.binaries
        upgrade = (
            f"cd {here} && {programs}/pg_upgrade -U postgres --no-sync -s {here}"
            f" -b {old.tree.binaries} -B {programs} -d {old._inside('data')} -D {self._inside('data')}"
        )
        result = run_in_tree(self.tree, "sh", "-c", upgrade)
        if result.returncode != 0:
            raise RuntimeError(f"pg_upgrade failed: {result.stdout}")
        self.start()

    def remove(self) -> None:
        """Stop the server and delete its data."""
        self.stop("immediate")
        if self._owned is not None:
            _delete(self._owned.path)
            self._owned.release()
            self._owned = None
        _alive.discard(self)

    def conninfo(self, dbname: str = "postgres", user: str = "postgres", **parameters: str) -> str:
        """A libpq connection string; any further libpq parameter can be given by name."""
        if self.port is None:
            raise RuntimeError("the server was never started")
        return make_conninfo(host="127.0.0.1", port=str(self.port), dbname=dbname, user=user, **parameters)

    def connect(self, dbname: str = "postgres", user: str = "postgres") -> psycopg.Connection:
        """An autocommit connection; the caller closes it."""
        return psycopg.connect(self.conninfo(dbname, user), autocommit=True)

    def create_extension(self, dbname: str) -> None:
        """Create pg_background in a database."""
        with self.connect(dbname) as connection:
            connection.execute("create extension if not exists pg_background")

    def pid(self) -> int | None:
        """The postmaster's process id, or None when it is not running."""
        if self._owned is None:
            return None
        try:
            first = (self._cluster / "data" / "postmaster.pid").read_text().split("\n", 1)[0]
        except FileNotFoundError:
            return None
        pid = int(first)
        return pid if is_postgres(pid) else None

    def is_running(self) -> bool:
        """True when the postmaster is alive."""
        return self.pid() is not None

    def log(self) -> str:
        """The server's log so far."""
        path = self._cluster / "log"
        return path.read_text(errors="replace") if path.exists() else ""

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _create(self) -> None:
        root = self.tree.ensure()
        memory = in_memory()
        clusters = memory / "pgbg-real" if memory else root / "srv" / "pgbg"
        clusters.mkdir(exist_ok=True)
        clusters.chmod(0o711)
        self._owned = own_directory(clusters, self._remove_abandoned)
        os.chown(self._owned.path, *self.tree.user_ids())
        _alive.add(self)
        result = self._run(
            "initdb", "--no-sync", "-D", self._inside("data"), "-U", "postgres", "-A", "trust",
            "-E", "UTF8", "--locale=C.UTF-8",
        )  # fmt: skip
        if result.returncode != 0:
            raise RuntimeError(f"initdb failed: {result.stdout}")
        with (self._cluster / "data" / "postgresql.conf").open("a") as stream:
            stream.write("\ninclude = 'pgbg.conf'\n")

    def _write_settings(self) -> None:
        settings: dict[str, str | int] = {
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": "",
            **self.settings,
            "port": self.port or 0,
        }
        lines = ["{} = '{}'\n".format(name, str(value).replace("'", "''")) for name, value in settings.items()]
        (self._cluster / "data" / "pgbg.conf").write_text("".join(lines))

    @property
    def _cluster(self) -> Path:
        assert self._owned is not None, "the server was never started"
        return self._owned.path

    def _inside(self, name: str) -> str:
        """A path of this cluster as the tree's programs see it."""
        return self._seen_inside(self._cluster / name)

    def _seen_inside(self, path: Path) -> str:
        # The tree has the machine's own /dev, shared memory included.
        return f"/{path.relative_to(self.tree.root)}" if path.is_relative_to(self.tree.root) else str(path)

    def _remove_abandoned(self, cluster: Path) -> None:
        self._run("pg_ctl", "stop", "-w", "-t", "30", "-m", "immediate", "-D", self._seen_inside(cluster / "data"))
        _delete(cluster)

    def _run(self, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return run_in_tree(self.tree, f"{self.tree.binaries}/{program}", *arguments)


def run_in_tree(tree: DebianTree, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run one of the tree's programs as ``postgres`` and wait for it; output and errors are in ``stdout``."""
    # A file and no pipe: a postmaster that kept a pipe's end open would keep us reading for ever.
    with tempfile.TemporaryFile("w+") as output:
        result = subprocess.run(
            tree.command(*arguments),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd="/",
            check=False,
        )
        output.seek(0)
        return subprocess.CompletedProcess(result.args, result.returncode, output.read(), "")


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def _delete(cluster: Path) -> None:
    """Delete a stopped cluster; a backend on its way out may still write a file while we do."""
    deadline = time.monotonic() + 10
    while cluster.exists() and time.monotonic() < deadline:
        shutil.rmtree(cluster, ignore_errors=True)


@atexit.register
def _remove_all() -> None:
    for server in list(_alive):
        server.remove()
