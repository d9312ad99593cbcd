"""The real pg_background for an embedded server: Debian's files, kept in a cache, loaded without installing them.

PostgreSQL 18 takes extensions from directories of one's choice (``extension_control_path`` and
``dynamic_library_path``; PostgreSQL manual, "Client Connection Defaults"), so the server's own files stay untouched.
The extension has its own licence (PostgreSQL) and is never part of our wheel.
"""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pgbg_orchestration.embedded import debian, elf
from pgbg_orchestration.embedded.cache import cache_directory
from pgbg_orchestration.embedded.claims import file_lock

POSTGRES_MAJOR = 18
PACKAGE = f"postgresql-{POSTGRES_MAJOR}-pg-background"
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
LIBRARY = "pg_background.so"
_MANIFEST = "manifest.json"


class RealExtensionUnavailableError(Exception):
    """The real extension cannot be had on this machine; the message says why."""


@dataclass(frozen=True)
class ExtensionFiles:
    """The real extension's files in the cache.

    Parameters
    ----------
    directory:
        holds ``share/extension`` (control and SQL files) and ``lib``.
    version:
        upstream's version, such as ``2.0.3`` (``extversion`` says ``2.0`` for all of 2.0.0 to 2.0.3).
    """

    directory: Path
    version: str

    def settings(self) -> dict[str, str]:
        """Return the settings with which PostgreSQL 18 finds the extension."""
        return {
            "extension_control_path": f"$system:{self.directory / 'share'}",
            "dynamic_library_path": f"$libdir:{self.directory / 'lib'}",
        }


def real_extension(postgres_major: int) -> ExtensionFiles:
    """Get the real extension, from the cache or else from Debian's archive (0.1 MB, verified).

    Parameters
    ----------
    postgres_major:
        the major version of the server that is to load it.

    Raises
    ------
    RealExtensionUnavailableError
        another version, platform or C library than Debian builds it for, or neither
        cached nor to be downloaded.
    """
    architecture = ARCHITECTURES.get(platform.machine())
    glibc = elf.host_glibc()
    if sys.platform != "linux" or glibc is None:
        raise RealExtensionUnavailableError("Debian's build of pg_background needs Linux with glibc")
    if architecture is None:
        raise RealExtensionUnavailableError(f"no build of pg_background is known for {platform.machine()}")
    if postgres_major != POSTGRES_MAJOR:
        raise RealExtensionUnavailableError(
            f"Debian's build of pg_background is for PostgreSQL {POSTGRES_MAJOR}, this is {postgres_major}"
        )
    cache = cache_directory()
    # The library is edited to fit the C library: a home directory that machines share keeps one copy for each.
    directory = cache / f"pg_background-{architecture}-glibc{'.'.join(map(str, glibc))}"
    if ":" in str(directory):
        raise RealExtensionUnavailableError(f"{directory} cannot stand in a path list, for its colon")
    with file_lock(cache / f"{directory.name}.lock"):
        if files := verified(directory):
            return files
        try:
            package, content = debian.fetch(PACKAGE, architecture)
            unpacked = _select(content, glibc)
        except (debian.PackageUnavailableError, elf.CannotRelaxError) as error:
            raise RealExtensionUnavailableError(str(error)) from error
        return _store(directory, package, unpacked)


def verified(directory: Path) -> ExtensionFiles | None:
    """Return the files of a cache directory when each still has the checksum it was stored with, else None."""
    try:
        manifest = json.loads((directory / _MANIFEST).read_text())
        for name, sha256 in manifest["files"].items():
            if hashlib.sha256((directory / name).read_bytes()).hexdigest() != sha256:
                return None
        return ExtensionFiles(directory, str(manifest["version"]))
    except (OSError, ValueError, KeyError):
        return None  # never stored, or not whole: it is fetched again


def _select(deb: bytes, glibc: tuple[int, ...]) -> dict[str, bytes]:
    """Return the files that a server needs, and the licence, by their path in the cache."""
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


def _store(directory: Path, package: debian.Package, files: dict[str, bytes]) -> ExtensionFiles:
    building = directory.with_name(f"{directory.name}.building")
    shutil.rmtree(building, ignore_errors=True)
    for name, content in files.items():
        target = building / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    manifest = {
        "package": package.name,
        "version": package.upstream_version,
        "package_version": package.version,
        "package_sha256": package.sha256,
        "files": {name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
    }
    (building / _MANIFEST).write_text(json.dumps(manifest, indent=2))
    for path in (building, *building.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)  # whatever the umask: the server may run as another user
    shutil.rmtree(directory, ignore_errors=True)
    building.rename(directory)
    return ExtensionFiles(directory, package.upstream_version)
