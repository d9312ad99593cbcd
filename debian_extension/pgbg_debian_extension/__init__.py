"""Debian's build of pg_background for a PostgreSQL of one's own: fetched, verified, and made to load here.

A package of its own, for developers and tests: it downloads native code and edits it, which nobody needs who only runs
jobs. It needs the standard library alone, and writes nothing: what to do with the files is the caller's.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

from pgbg_debian_extension import debian, elf

__all__ = ["Build", "Fetched", "UnavailableError", "build_for"]

POSTGRES_MAJOR = 18
PACKAGE = f"postgresql-{POSTGRES_MAJOR}-pg-background"
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
LIBRARY = "pg_background.so"


class UnavailableError(Exception):
    """The extension cannot be had on this machine; the message says why."""


@dataclass(frozen=True)
class Fetched:
    """The extension's files, and where they are from.

    Attributes
    ----------
    package, package_version, package_sha256:
        Debian's package.
    version:
        Upstream's version, such as ``2.0.3``.
    files:
        Contents by path: ``share/extension/…`` (control and SQL files), ``lib/…`` and ``copyright``. The extension has
        a licence of its own (PostgreSQL).
    """

    package: str
    package_version: str
    package_sha256: str
    version: str
    files: Mapping[str, bytes]


@dataclass(frozen=True)
class Build:
    """The build that fits this machine.

    Attributes
    ----------
    architecture:
        Debian's name of it, such as ``amd64``.
    glibc:
        The C library that the files are made to load under.
    """

    architecture: str
    glibc: tuple[int, ...]

    @property
    def name(self) -> str:
        """A name for a directory: machines with another C library need other files."""
        return f"pg_background-{self.architecture}-glibc{'.'.join(map(str, self.glibc))}"

    def fetch(self) -> Fetched:
        """Download the files (0.1 MB) and verify them.

        Raises
        ------
        UnavailableError
            No mirror or network, nothing trusted vouches for the file, or it cannot be made to load here.
        """
        try:
            package, content = debian.fetch(PACKAGE, self.architecture)
            files = _select(content, self.glibc)
        except (debian.PackageUnavailableError, elf.CannotRelaxError) as error:
            raise UnavailableError(str(error)) from error
        return Fetched(package.name, package.version, package.sha256, package.upstream_version, files)


def build_for(postgres_major: int) -> Build:
    """Return the build that a server of this major version can load on this machine.

    Raises
    ------
    UnavailableError
        Debian builds it for another version, platform or C library.
    """
    architecture = ARCHITECTURES.get(platform.machine())
    glibc = elf.host_glibc()
    if sys.platform != "linux" or glibc is None:
        raise UnavailableError("Debian's build of pg_background needs Linux with glibc")
    if architecture is None:
        raise UnavailableError(f"no build of pg_background is known for {platform.machine()}")
    if postgres_major != POSTGRES_MAJOR:
        raise UnavailableError(
            f"Debian's build of pg_background is for PostgreSQL {POSTGRES_MAJOR}, this is {postgres_major}"
        )
    return Build(architecture, glibc)


def _select(deb: bytes, glibc: tuple[int, ...]) -> dict[str, bytes]:
    """Return the files that a server needs, and the licence, by their path below a directory."""
    selected: dict[str, bytes] = {}
    for path, content in debian.members(deb):
        name = PurePosixPath(path).name
        if name == LIBRARY:
            selected[f"lib/{name}"] = elf.relax_glibc(content, glibc)
        elif name.startswith("pg_background") and name.endswith((".control", ".sql")):
            selected[f"share/extension/{name}"] = content
        elif name == "copyright":
            selected[name] = content
    if f"lib/{LIBRARY}" not in selected or "share/extension/pg_background.control" not in selected:
        raise debian.PackageUnavailableError(
            f"Debian's package does not hold the expected files, but {sorted(selected)}"
        )
    return selected
