"""PgBouncer in front of a server, where Debian's package is installed."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo

UNPRIVILEGED = 65534  # nobody: it refuses to run as root


def program() -> str | None:
    """Where it is, or None."""
    return shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin")


@contextmanager
def pooler(conninfo: str, mode: Literal["session", "transaction"]) -> Iterator[str]:
    """Run one in front of a server, and give the connection string that leads through it."""
    given = conninfo_to_dict(conninfo)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    password = f" password={given['password']}" if given.get("password") else ""
    with TemporaryDirectory(prefix="pgbg-pgbouncer-") as name:
        home = Path(name)
        home.chmod(0o755)
        settings = home / "pgbouncer.ini"
        settings.write_text(
            f"[databases]\n* = host={given['host']} port={given['port']} user={given['user']}{password}\n"
            f"[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\nauth_type = any\n"
            f"pool_mode = {mode}\ndefault_pool_size = 10\nclient_login_timeout = 10\n"
        )
        log = (home / "log").open("wb")
        process = subprocess.Popen(
            [str(program()), str(settings)], stdout=log, stderr=subprocess.STDOUT, user=_user(str(given["host"]))
        )
        through = make_conninfo(conninfo, host="127.0.0.1", port=port)
        try:
            _wait_until_it_answers(through, process, home / "log")
            yield through
        finally:
            process.kill()
            process.wait()
            log.close()


def _user(host: str) -> int | None:
    """Who runs it: as root, the owner of the server's socket, which may be closed to others."""
    if os.geteuid() != 0:
        return None
    owner = Path(host).stat().st_uid if host.startswith("/") else 0
    return owner or UNPRIVILEGED


def _wait_until_it_answers(conninfo: str, process: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + 30
    while True:
        try:
            psycopg.connect(conninfo).close()
        except psycopg.OperationalError:
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"pgbouncer does not answer:\n{log.read_text(errors='replace')}") from None
            time.sleep(0.05)
        else:
            return
