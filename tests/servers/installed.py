"""A PostgreSQL of this machine that has the real pg_background in its own directories, of whatever version.

``PGBG_PG_CONFIG`` names its ``pg_config``, the one that the extension was built and installed with.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from pgbg_orchestration.embedded.binaries import Binaries
from tests.servers.embedded import EmbeddedUnderTest

PG_CONFIG_VARIABLE = "PGBG_PG_CONFIG"


class InstalledUnderTest(EmbeddedUnderTest):
    """A server of the installed PostgreSQL, with data of its own."""

    def __init__(self, max_worker_processes: int = 64, settings: Mapping[str, str | int] | None = None) -> None:
        super().__init__("installed", max_worker_processes, settings, extension="real")

    @property
    def binaries(self) -> Binaries:
        """The programs of the installed PostgreSQL."""
        if self._binaries is None:
            version = _ask("--version").removeprefix("PostgreSQL ").split()[0]
            self._binaries = Binaries(Path(_ask("--bindir")), version, os.environ[PG_CONFIG_VARIABLE])
        return self._binaries


def why_not() -> str | None:
    """Why there is none, or None when there is one."""
    if PG_CONFIG_VARIABLE not in os.environ:
        return f"set {PG_CONFIG_VARIABLE} to the pg_config of a PostgreSQL with pg_background in it"
    try:
        control = Path(_ask("--sharedir"), "extension", "pg_background.control")
    except (OSError, subprocess.CalledProcessError) as error:
        return f"{PG_CONFIG_VARIABLE}={os.environ[PG_CONFIG_VARIABLE]} cannot be run: {error}"
    return None if control.exists() else f"there is no {control}"


@cache
def _ask(option: str) -> str:
    answer = subprocess.run([os.environ[PG_CONFIG_VARIABLE], option], capture_output=True, text=True, check=True)
    return answer.stdout.strip()
