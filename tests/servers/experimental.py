"""PostgreSQL 19 from Debian experimental, with the stand-in, and with pg_background 2.0.3 built for it.

It lives in a tree of its own, made from that of the real server, so that nothing else depends on what experimental has
today. Only the long form builds it. No package has pg_background for 19, so it is built from Debian's source package
of it, where the mirror has source packages, or from a directory that ``PGBG_EXTENSION_SOURCE`` names.
"""

from __future__ import annotations

import filecmp
import os
import shutil
import subprocess
import tarfile
from copy import copy
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
SOURCE_PACKAGE = "pg-background"
SOURCE_VARIABLE = "PGBG_EXTENSION_SOURCE"
SOURCE_DIRECTORY = "usr/src/pg_background"
SOURCE_FILES = {".c", ".h", ".sql", ".control"}
SOURCE_LIST = "sources.list.d/extension.list"
# What experimental's package needs may be in sid only; nothing else is taken from there.
PREFERENCES = "Package: *\nPin: release a=unstable\nPin-Priority: 90\n"
NO_CLUSTER = "create_main_cluster = false\n"
NO_SERVICES = "#!/bin/sh\nexit 101\n"
INSTALL = (
    "export DEBIAN_FRONTEND=noninteractive; apt-get update"
    f" && apt-get install -y --no-install-recommends -t experimental {PACKAGE}"
)
# The source first: a mirror without source packages says so before a compiler is installed.
FETCH = (
    f"cd /{SOURCE_DIRECTORY}"
    f" && apt-get update -o Dir::Etc::SourceList=/etc/apt/{SOURCE_LIST} -o Dir::Etc::SourceParts=-"
    f" && apt-get -o APT::Sandbox::User=root source --download-only {SOURCE_PACKAGE}"
)
TOOLS = (
    "export DEBIAN_FRONTEND=noninteractive; apt-get update"
    " && apt-get install -y --no-install-recommends make gcc libc6-dev dpkg-dev libkrb5-dev libssl-dev"
)
UNPACK = f"cd /{SOURCE_DIRECTORY} && dpkg-source -x *.dsc unpacked"
# The headers' package depends on clang and LLVM, which are for bitcode: hundreds of megabytes that nothing here uses.
HEADERS = (
    "cd /usr/src && apt-get -o APT::Sandbox::User=root download postgresql-server-dev-19/experimental"
    " && dpkg-deb -x postgresql-server-dev-19_*.deb / && rm postgresql-server-dev-19_*.deb"
)
COMPILE = (
    f"make -C /{SOURCE_DIRECTORY}/unpacked with_llvm=no PG_CONFIG=/usr/lib/postgresql/19/bin/pg_config clean install"
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
        self.root, whole = building, self.root
        try:
            self._do(INSTALL, f"{PACKAGE} of experimental cannot be had")
        finally:
            self.root = whole
        shutil.rmtree(building / "var/cache/apt/archives", ignore_errors=True)
        building.rename(self.root)

    def _do(self, script: str, otherwise: str) -> None:
        """Run a script in the tree as its root; `otherwise` is what its failure means."""
        log = self.directory / "experimental.log"
        with log.open("w") as output:
            command = self.command("sh", "-c", script, user="root")
            done = subprocess.run(
                command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, check=False
            )
        if done.returncode != 0:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
            raise ServerUnavailableError(f"{otherwise} ({log}):\n{tail}")

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


class ExtensionTree(ExperimentalTree):
    """The same tree, with pg_background built for its PostgreSQL 19."""

    def is_built(self) -> bool:
        """True when the library is there, and is of the source that is named, where one is."""
        if not super().is_built() or not self._library.exists():
            return False
        chosen = os.environ.get(SOURCE_VARIABLE)
        return not chosen or self._is_of(Path(chosen))

    @property
    def _library(self) -> Path:
        return self.root / "usr/lib/postgresql/19/lib/pg_background.so"

    def _is_of(self, source: Path) -> bool:
        files = [str(file.relative_to(source)) for file in source.rglob("*") if file.suffix in SOURCE_FILES]
        same, _, _ = filecmp.cmpfiles(source, self.root / SOURCE_DIRECTORY / "unpacked", files, shallow=False)
        return len(same) == len(files)

    def _build(self) -> None:
        if not super().is_built():
            super()._build()
        self._library.unlink(missing_ok=True)  # of another source: were it kept, a build that fails would seem whole
        sources = self.root / SOURCE_DIRECTORY
        if sources.exists():
            shutil.rmtree(sources)  # left by a build that failed or was killed; we hold the lock
        sources.mkdir(parents=True)
        (self.root / "etc/apt" / SOURCE_LIST).write_text(
            f"deb-src [check-valid-until=no] {debian.mirror()} {debian.SUITE} main\n"
        )
        if chosen := os.environ.get(SOURCE_VARIABLE):
            shutil.copytree(chosen, sources / "unpacked")
        else:
            self._do(
                FETCH,
                f"pg_background for PostgreSQL 19: {debian.mirror()} does not give the source package {SOURCE_PACKAGE};"
                f" name a directory with the source of 2.0.3 by {SOURCE_VARIABLE}",
            )
        self._do(TOOLS, "pg_background for PostgreSQL 19: no compiler can be had")
        if not chosen:
            self._do(
                UNPACK, f"pg_background for PostgreSQL 19: {SOURCE_PACKAGE} is not what Debian signed, or not whole"
            )
        self._do(HEADERS, "pg_background for PostgreSQL 19: the server's headers cannot be had")
        self._do(COMPILE, "pg_background for PostgreSQL 19 does not compile")
        shutil.rmtree(self.root / "var/cache/apt/archives", ignore_errors=True)


class RealNineteen(RealServer):
    """A cluster of PostgreSQL 19 with pg_background 2.0.3."""

    name = "real19"
    usual_tree = ExtensionTree


class Nineteen(RealServer):
    """A cluster of PostgreSQL 19 with the stand-in."""

    name = "standin_pg19"
    extension = "stand-in 2.0"
    is_standin = True
    usual_tree = ExperimentalTree

    def create_extension(self, dbname: str) -> None:
        """Put the stand-in into a database."""
        install_standin(self.conninfo(dbname), surface="2.0")


class Eighteen(RealServer):
    """A cluster of the PostgreSQL 18 that is in the same tree as 19: what pg_upgrade begins with."""

    def __init__(self, *, standin: bool, tree: DebianTree) -> None:
        eighteen = copy(tree)
        eighteen.binaries = DebianTree.binaries
        super().__init__(tree=eighteen)
        self.is_standin = standin

    def create_extension(self, dbname: str) -> None:
        """Create the extension, or put the stand-in into a database."""
        if self.is_standin:
            install_standin(self.conninfo(dbname), surface="2.0")
        else:
            super().create_extension(dbname)


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
