"""Tell whether an embedded server runs on a data directory, whoever started it, and how to reach it."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from psycopg.conninfo import make_conninfo

SUPERUSER = "postgres"
PORT = 5432
"""Only a part of the socket's name: the directory is the server's own, so it cannot collide."""
SOCKET_PATH_LIMIT = 103
"""Bytes; 107 on Linux and 103 on macOS (unix(7), unix(4)): the smaller one for both."""
STATE_FILE = "pgbg.json"
"""In the data directory: which extension the server has."""

StopMode = Literal["smart", "fast", "immediate"]
"""As for ``pg_ctl stop``."""
Surface = Literal["2.0", "1.9"]
"""The extension's two sets of names."""


@dataclass(frozen=True)
class ServerStatus:
    """What is known of a server that runs.

    Parameters
    ----------
    data_dir:
        its data directory.
    pid:
        the postmaster's process id.
    socket_dir:
        the directory of its Unix socket.
    extension:
        which pg_background it has, such as ``real 2.0.3`` or ``stand-in 2.0``.
    surface:
        which of the extension's two surfaces it offers, ``2.0`` or ``1.9``.
    """

    data_dir: Path
    pid: int
    socket_dir: Path
    extension: str
    surface: Surface

    def conninfo(self, dbname: str = "postgres", user: str = SUPERUSER, **parameters: str) -> str:
        """Return a libpq connection string; any further libpq parameter can be given by name."""
        return connection_string(self.socket_dir, dbname, user, **parameters)


def status(data_dir: str | Path) -> ServerStatus | None:
    """Look whether a server runs on this data directory and accepts connections.

    Returns
    -------
    The server, or None when none does.
    """
    directory = Path(data_dir).absolute()
    try:
        lines = (directory / "postmaster.pid").read_text().splitlines()
        state = json.loads((directory / STATE_FILE).read_text())
    except FileNotFoundError:
        return None
    # Line 8 says "ready" once connections are accepted (PostgreSQL source, src/include/utils/pidfile.h).
    if len(lines) < 8 or lines[7].strip() != "ready" or not is_postgres(int(lines[0])):
        return None
    return ServerStatus(directory, int(lines[0]), Path(lines[4]), state["extension"], state["surface"])


def socket_directory(data_dir: Path) -> Path:
    """Return where the server on this data directory has its socket, running or not.

    That is the data directory itself, which only its owner may enter, or one of its own when that path is too long.
    """
    if len(os.fsencode(data_dir / f".s.PGSQL.{PORT}")) <= SOCKET_PATH_LIMIT:
        return data_dir
    digest = hashlib.sha256(os.fsencode(data_dir)).hexdigest()[:16]
    # Not TMPDIR, which can be too long itself. The directory is made 0700 and its owner checked.
    return Path("/tmp") / f"pgbg-{digest}"  # noqa: S108


def connection_string(socket_dir: Path, dbname: str, user: str, **parameters: str) -> str:
    """Return a libpq connection string for a server on a Unix socket."""
    return make_conninfo(host=str(socket_dir), port=str(PORT), dbname=dbname, user=user, **parameters)


def is_postgres(pid: int) -> bool:
    """Tell whether the process is a living PostgreSQL: ids are used again, and the dead can stay as zombies."""
    if Path("/proc/self/stat").exists():
        try:
            name, rest = Path(f"/proc/{pid}/stat").read_text().split("(", 1)[1].rsplit(")", 1)
        except (FileNotFoundError, ProcessLookupError):
            return False
        return name.startswith("postgres") and rest.split()[0] not in ("Z", "X")
    listing = subprocess.run(
        ["/bin/ps", "-o", "stat=,comm=", "-p", str(pid)], capture_output=True, text=True, check=False
    )
    state, _, command = listing.stdout.strip().partition(" ")
    return bool(state) and not state.startswith("Z") and Path(command.strip()).name.startswith("postgres")
