"""PostgreSQL 19 from Debian experimental, with the stand-in: no package of pg_background for it can be had yet.

It lives in a tree of its own, made from that of the real server, so that nothing else depends on what experimental has
today. Only the long form builds it.
"""

from __future__ import annotations

import shutil
import subprocess
import tarfile
from collections.abc import Mapping
from pathlib import Path

from pgbg_debian_extension import debian
from pgbg_orchestration.embedded.standin import install_standin
from tests.servers.debian import DebianTree, ServerUnavailableError
from tests.servers.real import RealServer

PACKAGE = "postgresql-19"
# Its suites are released, and their files go out of date, when Debian's archive says so: an old copy is as good here.
SOURCES = "".join(
    f"deb [check-valid-until=no] {{mirror}} {suite} main\n" for suite in (debian.SUITE, "sid", "experimental")
)
# What experimental's package needs may be in sid only; nothing else is taken from there.
PREFERENCES = "Package: *\nPin: release a=unstable\nPin-Priority: 90\n"
NO_CLUSTER = "create_main_cluster = false\n"
NO_SERVICES = "#!/bin/sh\nexit 101\n"
INSTALL = (
    "export DEBIAN_FRONTEND=noninteractive; apt-get update"
    f" && apt-get install -y --no-install-recommends -t experimental {PACKAGE}"
)


class ExperimentalTree(DebianTree):
    """A Debian testing with PostgreSQL 19 from experimental in it."""

    binaries = "/usr/lib/postgresql/19/bin"

    def __init__(self, directory: Path | None = None) -> None:
        super().__init__(directory)
        self._testing = DebianTree(directory)
        self.root = self.directory / "experimental"

    def is_built(self) -> bool:
        """True when the tree is whole: it is renamed into place only then."""
        return (self.root / "usr/lib/postgresql/19/bin/postgres").exists()

    def _build(self) -> None:
        building = self.directory / "experimental.building"
        if building.exists():
            shutil.rmtree(building)  # left by a build that was killed; we hold the lock
        building.mkdir(mode=0o755)
        _copy(self._testing.root, building)
        for name, text in {
            "etc/apt/sources.list": SOURCES.format(mirror=debian.mirror()),
            "etc/apt/preferences.d/sid": PREFERENCES,
            "etc/postgresql-common/createcluster.conf": NO_CLUSTER,
            "usr/sbin/policy-rc.d": NO_SERVICES,
        }.items():
            file = building / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        (building / "usr/sbin/policy-rc.d").chmod(0o755)
        shutil.copy("/etc/resolv.conf", building / "etc/resolv.conf")
        log = self.directory / "experimental.log"
        self.root, whole = building, self.root
        try:
            with log.open("w") as output:
                command = self.command("sh", "-c", INSTALL, user="root")
                done = subprocess.run(
                    command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, check=False
                )
        finally:
            self.root = whole
        if done.returncode != 0:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
            raise ServerUnavailableError(f"{PACKAGE} of experimental cannot be had ({log}):\n{tail}")
        shutil.rmtree(building / "var/cache/apt/archives", ignore_errors=True)
        building.rename(self.root)

    def ensure(self) -> Path:
        """Build the tree unless it is there, and return its root.

        Raises
        ------
        ServerUnavailableError
            it cannot be had here; what apt said last is in the message.
        """
        if not self.is_built():
            self._testing.ensure()
        return super().ensure()


class Nineteen(RealServer):
    """A cluster of PostgreSQL 19 with the stand-in."""

    name = "standin_pg19"
    extension = "stand-in 2.0"
    is_standin = True

    def __init__(
        self,
        max_worker_processes: int = 64,
        settings: Mapping[str, str | int] | None = None,
        *,
        tree: DebianTree | None = None,
    ) -> None:
        super().__init__(max_worker_processes, settings, tree=tree or ExperimentalTree())

    def create_extension(self, dbname: str) -> None:
        """Put the stand-in into a database."""
        install_standin(self.conninfo(dbname), surface="2.0")


def _copy(source: Path, target: Path) -> None:
    """Copy a tree without the clusters of servers that run in it."""
    left_out = {"./srv", "./proc", "./dev"}

    def kept(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
        return None if entry.name in left_out else entry

    with (
        subprocess.Popen(["tar", "-C", str(target), "-xpf", "-"], stdin=subprocess.PIPE) as unpacking,
        tarfile.open(fileobj=unpacking.stdin, mode="w|") as archive,
    ):
        archive.add(source, ".", filter=kept)
    if unpacking.returncode != 0:
        raise ServerUnavailableError(f"{source} cannot be copied to {target}")
    for name in ("srv", "proc", "dev"):
        (target / name).mkdir()
