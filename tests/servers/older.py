"""Debian 12's PostgreSQL 15 with the stand-in, so that the suite runs on more than one major version."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pgbg_orchestration.embedded.binaries import Binaries
from tests.servers.embedded import EmbeddedUnderTest

PROGRAMS = Path("/usr/lib/postgresql/15/bin")
"""Where Debian's package ``postgresql-15`` puts them."""


class OlderUnderTest(EmbeddedUnderTest):
    """A server of an older major version: extensions in directories of our own are not found there."""

    def __init__(
        self,
        name: str,
        max_worker_processes: int = 64,
        settings: Mapping[str, str | int] | None = None,
        *,
        surface: Literal["2.0", "1.9"] = "1.9",
    ) -> None:
        super().__init__(name, max_worker_processes, settings, extension="stand-in", surface=surface)

    @property
    def binaries(self) -> Binaries:
        """The programs of the distribution's package."""
        return Binaries(PROGRAMS, "15", str(PROGRAMS))

    def _write_standin(self) -> dict[str, str]:
        return {}  # its objects are created by plain SQL


def why_not() -> str | None:
    """Why none can be had here, or None when one can."""
    if not (PROGRAMS / "postgres").exists():
        return "needs Debian 12's package postgresql-15"
    if not (PROGRAMS.parent / "lib" / "dblink.so").exists():
        return f"{PROGRAMS.parent} has no dblink"
    return None
