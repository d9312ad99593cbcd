"""The Debian testing tree that the real server lives in, built once and shared by every run on this machine.

PostgreSQL 18 and pg_background 2.0.3 from Debian testing need a newer C library than many hosts have, so they run
in a chroot. As a script: ``python -m tests.servers.debian`` builds the tree and prints its path.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from platformdirs import user_cache_path

from pgbg_debian_extension import debian
from pgbg_orchestration.embedded.directories import file_lock

DIRECTORY_VARIABLE = "PGBG_SERVERS_DIR"
PACKAGES = ("postgresql-18", "postgresql-18-pg-background")
KEYRING = debian.ARCHIVE_KEYRING

# Mounts of /proc and /dev (PostgreSQL needs /dev/shm) live in a mount namespace of the command's own: nothing is left
# mounted when the last process has ended, and no other user of the tree can have it unmounted under its feet.
_ENTER = """
root=$1 user=$2; shift 2
mount -t proc proc "$root/proc" 2>/dev/null || mount --rbind /proc "$root/proc" || exit 125
mount --rbind /dev "$root/dev" || exit 125
exec chroot --userspec="$user" "$root" "$@"
"""


class ServerUnavailableError(Exception):
    """The tree cannot be had on this machine; the message says why."""


def servers_directory() -> Path:
    """Where the tree is kept: ``PGBG_SERVERS_DIR``, else in the user's cache: only we ourselves enter it."""
    chosen = os.environ.get(DIRECTORY_VARIABLE)
    return Path(chosen) if chosen else user_cache_path("pgbg", appauthor=False) / "servers"


class DebianTree:
    """A debootstrapped Debian testing with PostgreSQL and pg_background in it."""

    binaries = "/usr/lib/postgresql/18/bin"
    """Where PostgreSQL's programs are in it."""

    def __init__(self, directory: Path | None = None) -> None:
        self.directory = directory or servers_directory()
        self.root = self.directory / debian.SUITE

    def why_not(self) -> str | None:
        """Why no such tree can be used here, or None when it can. Builds nothing."""
        if sys.platform != "linux":
            return "needs Linux"
        if os.geteuid() != 0:
            return "needs root (chroot, mount)"
        if subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode != 0:
            return "needs the right to mount (unshare --mount is refused here)"
        if self.is_built():
            return None
        if shutil.which("debootstrap") is None and shutil.which("apt-get") is None:
            return "needs debootstrap, and there is no apt-get to install it with"
        try:
            debian.mirror()
        except debian.PackageUnavailableError as error:
            return str(error)
        return None

    def is_built(self) -> bool:
        """True when the tree is whole. It is renamed into place only then, so a look at its files is enough."""
        return (self.root / "usr/lib/postgresql/18/lib/pg_background.so").exists()

    def ensure(self) -> Path:
        """Build the tree unless it is there (about a minute), and return its root.

        Raises
        ------
        ServerUnavailableError
            it cannot be had here, or debootstrap failed; its last lines are in the message.
        """
        if reason := self.why_not():
            raise ServerUnavailableError(reason)
        self.directory.mkdir(parents=True, exist_ok=True)
        with file_lock(self.directory / "build.lock"):
            if not self.is_built():
                self._build()
        return self.root

    def command(self, *arguments: str, user: str = "postgres") -> list[str]:
        """The command line that runs a program inside the tree as one of the tree's users."""
        who = f"{user}:{user}"
        return [
            "unshare",
            "--mount",
            "--propagation",
            "private",
            "sh",
            "-c",
            _ENTER,
            "sh",
            str(self.root),
            who,
            *arguments,
        ]

    def user_ids(self, user: str = "postgres") -> tuple[int, int]:
        """The numeric (uid, gid) that a user of the tree has; the host's may differ."""
        for line in (self.root / "etc/passwd").read_text().splitlines():
            name, _, uid, gid, *_ = line.split(":")
            if name == user:
                return int(uid), int(gid)
        raise ServerUnavailableError(f"{self.root} has no user {user}")

    def _build(self) -> None:
        _install_debootstrap()
        building = self.directory / f"{debian.SUITE}.building"
        if building.exists():
            shutil.rmtree(building)  # left by a build that was killed; we hold the lock
        command = ["debootstrap", "--variant=minbase", f"--include={','.join(PACKAGES)}"]
        if KEYRING.exists():
            command.append(f"--keyring={KEYRING}")
        # The script is named outright: a stable host's debootstrap does not know the testing suite's name yet, and
        # `sid` is what every newer suite's script is a link to.
        command += [debian.SUITE, str(building), debian.mirror(), "/usr/share/debootstrap/scripts/sid"]
        log = self.directory / "debootstrap.log"
        with log.open("w") as output:
            # Its own mount namespace again: debootstrap mounts /proc and, when killed, leaves it mounted.
            result = subprocess.run(
                ["unshare", "--mount", "--propagation", "private", *command],
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                check=False,
            )
        if result.returncode != 0:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
            raise ServerUnavailableError(
                f"debootstrap of {debian.SUITE} failed with {result.returncode} ({log}):\n{tail}"
            )
        shutil.rmtree(building / "var/cache/apt/archives", ignore_errors=True)
        building.rename(self.root)


def _install_debootstrap() -> None:
    if shutil.which("debootstrap") is not None:
        return
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    install = ["apt-get", "install", "-y", "--no-install-recommends", "debootstrap"]
    if subprocess.run(install, env=environment, capture_output=True, check=False).returncode == 0:
        return
    # A fresh machine has no package lists yet.
    for command in (["apt-get", "update"], install):
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            raise ServerUnavailableError(f"{' '.join(command)} failed: {result.stderr.strip()[-500:]}")


if __name__ == "__main__":
    print(DebianTree().ensure())
