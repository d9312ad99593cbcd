"""PostgreSQL 15 of this machine with pg_background 1.10, built from a directory with its source.

No package has 1.10 for PostgreSQL 15, so ``PGBG_EXTENSION_SOURCE_1_10`` names the directory. PostgreSQL 15 takes
extensions from its own directories only, and those are not ours to write to: what runs is a copy of Debian's server in
the cache, with the extension installed into it. PostgreSQL finds its files by where its programs are, so a copy with
the same directories in the same places is whole.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from pgbg_orchestration.embedded.binaries import Binaries
from pgbg_orchestration.embedded.cache import cache_directory
from pgbg_orchestration.embedded.directories import file_lock
from tests.servers.debian import ServerUnavailableError
from tests.servers.embedded import EmbeddedUnderTest

EXTENSION = "1.10"
SOURCE_VARIABLE = "PGBG_EXTENSION_SOURCE_1_10"
HOME = Path("/usr/lib/postgresql/15")
SHARE = Path("/usr/share/postgresql/15")
PG_CONFIG = HOME / "bin/pg_config"
MAKEFILES = HOME / "lib/pgxs/src/makefiles/pgxs.mk"


class RealFifteen(EmbeddedUnderTest):
    """A server of PostgreSQL 15 with pg_background 1.10, with data of its own.

    Raises
    ------
    ServerUnavailableError
        When its programs are first asked for: it cannot be had here, and the message says why.
    """

    def __init__(self, max_worker_processes: int = 64, settings: Mapping[str, str | int] | None = None) -> None:
        super().__init__("real15", max_worker_processes, settings, extension="real")

    @property
    def binaries(self) -> Binaries:
        """The programs of the copy, which is made when it is not there."""
        if self._binaries is None:
            programs = copy_with_extension() / (HOME / "bin").relative_to("/")
            self._binaries = Binaries(programs, _version(), str(programs))
        return self._binaries


def why_not() -> str | None:
    """Why none can be had here, or None when it can. Builds nothing."""
    if not (chosen := os.environ.get(SOURCE_VARIABLE)):
        return f"set {SOURCE_VARIABLE} to a directory with the source of pg_background {EXTENSION}"
    control = Path(chosen, "pg_background.control")
    if not control.exists():
        return f"{SOURCE_VARIABLE}={chosen}: there is no {control}"
    version = re.search(r"^default_version\s*=\s*'(.*)'", control.read_text(), re.MULTILINE)
    if version is None or version[1] != EXTENSION:
        return f"{SOURCE_VARIABLE}={chosen} is not {EXTENSION}: {control} says {version[1] if version else 'nothing'}"
    if not (HOME / "bin/postgres").exists() or not MAKEFILES.exists():
        return f"needs the packages postgresql-15 and postgresql-server-dev-15: there is no {MAKEFILES}"
    lacking = [program for program in ("make", "gcc") if shutil.which(program) is None]
    return f"needs {' and '.join(lacking)}" if lacking else None


def copy_with_extension() -> Path:
    """Return the copy's root directory, made when it is not there: one for each source and release of the server.

    Raises
    ------
    ServerUnavailableError
        It cannot be had here, or the extension does not compile: the end of make's output is in the message.
    """
    if reason := why_not():
        raise ServerUnavailableError(reason)
    source = Path(os.environ[SOURCE_VARIABLE])
    copied = cache_directory() / f"postgres-15-{EXTENSION}-{_digest(source)}"
    with file_lock(copied.with_name(f"{copied.name}.lock")):
        if not copied.exists():
            _build(source, copied)
    return copied


def _build(source: Path, copied: Path) -> None:
    with tempfile.TemporaryDirectory(dir=cache_directory()) as scratch:
        compiled, whole = Path(scratch, "source"), Path(scratch, "whole")
        shutil.copytree(source, compiled)
        for directory in (HOME, SHARE):
            shutil.copytree(directory, whole / directory.relative_to("/"), symlinks=True)
        # Bitcode needs clang and LLVM, and nothing here uses it.
        make = ["make", "-C", str(compiled), "with_llvm=no", f"PG_CONFIG={PG_CONFIG}", f"DESTDIR={whole}"]
        for goal in ("clean", "install"):
            done = subprocess.run([*make, goal], capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise ServerUnavailableError(f"{source} does not compile: {(done.stdout + done.stderr)[-1500:]}")
        whole.rename(copied)


def _digest(source: Path) -> str:
    """Tell one source and one release of the server from another."""
    digest = hashlib.sha256(_version().encode())
    for file in _files(source):
        digest.update(str(file.relative_to(source)).encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:16]


def _files(source: Path) -> Iterator[Path]:
    return (file for file in sorted(source.rglob("*")) if file.is_file())


def _version() -> str:
    asked = subprocess.run([str(PG_CONFIG), "--version"], capture_output=True, text=True, check=True)
    return asked.stdout.strip().removeprefix("PostgreSQL ")
