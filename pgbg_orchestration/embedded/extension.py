"""The real pg_background for an embedded server: its files in a cache, loaded without installing them.

PostgreSQL 18 takes extensions from directories of one's choice (``extension_control_path`` and
``dynamic_library_path``; PostgreSQL manual, "Client Connection Defaults"), so the server's own files stay untouched.
Where the files come from is no matter of this package: ``pgbg-debian-extension`` fetches them, where it is installed.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from pgbg_orchestration.embedded.cache import cache_directory
from pgbg_orchestration.embedded.directories import file_lock

FETCHER = "pgbg_debian_extension"
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
    """Get the real extension, from the cache or else by ``pgbg-debian-extension``.

    Parameters
    ----------
    postgres_major:
        the major version of the server that is to load it.

    Raises
    ------
    RealExtensionUnavailableError
        another version, platform or C library than there is a build for, neither cached nor to be downloaded, or
        nothing is installed that fetches it.
    """
    fetcher = _fetcher()
    try:
        build = fetcher.build_for(postgres_major)
        cache = cache_directory()
        directory = cache / build.name
        if ":" in str(directory):
            raise RealExtensionUnavailableError(f"{directory} cannot stand in a path list, for its colon")
        with file_lock(cache / f"{build.name}.lock"):
            return verified(directory) or _store(directory, build.fetch())
    except fetcher.UnavailableError as error:
        raise RealExtensionUnavailableError(str(error)) from error


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


def _fetcher() -> Any:
    """Return the package that fetches the files, which not everybody has."""
    try:
        return import_module(FETCHER)
    except ModuleNotFoundError as missing:
        raise RealExtensionUnavailableError(
            "pgbg-debian-extension, which fetches it, is not installed: "
            "pip install ./debian_extension in a clone of this project"
        ) from missing


def _store(directory: Path, fetched: Any) -> ExtensionFiles:
    building = directory.with_name(f"{directory.name}.building")
    shutil.rmtree(building, ignore_errors=True)
    for name, content in fetched.files.items():
        target = building / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    manifest = {
        "package": fetched.package,
        "version": fetched.version,
        "package_version": fetched.package_version,
        "package_sha256": fetched.package_sha256,
        "files": {name: hashlib.sha256(content).hexdigest() for name, content in fetched.files.items()},
    }
    (building / _MANIFEST).write_text(json.dumps(manifest, indent=2))
    for path in (building, *building.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)  # whatever the umask: the server may run as another user
    shutil.rmtree(directory, ignore_errors=True)
    building.rename(directory)
    return ExtensionFiles(directory, fetched.version)
