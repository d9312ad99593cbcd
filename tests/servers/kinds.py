"""The kinds of server that the suite runs on, by the names that ``--servers`` takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol, Self

import psycopg

from pgbg_orchestration.embedded.binaries import NoPostgresError, find_binaries
from pgbg_orchestration.embedded.status import StopMode
from tests.servers import fifteen, installed
from tests.servers.debian import DebianTree
from tests.servers.embedded import EmbeddedUnderTest
from tests.servers.experimental import ExperimentalTree, ExtensionTree, Nineteen, RealNineteen
from tests.servers.older import MAJORS, OlderUnderTest
from tests.servers.real import RealServer


class Server(Protocol):
    """What a test may ask of any server. ``conninfo`` stays good over stop, start, restart and crash."""

    name: str
    """Its kind: one of ``KINDS``."""

    @property
    def surface(self) -> str:
        """Which of the extension's surfaces it offers: ``2.0`` or ``1.9``."""

    @property
    def extension(self) -> str:
        """Such as ``real 2.0.3`` or ``stand-in 2.0``."""

    @property
    def is_standin(self) -> bool:
        """True when the extension is the stand-in."""

    def start(self) -> Self:
        """Start it, unless it runs."""

    def stop(self, mode: StopMode = ...) -> None:
        """Stop it and keep its data."""

    def restart(self, mode: StopMode = ...) -> None:
        """Stop and start it."""

    def crash(self) -> None:
        """SIGKILL all its processes and leave it so."""

    def remove(self) -> None:
        """Stop it and delete its data."""

    def is_running(self) -> bool:
        """True when its postmaster is alive."""

    def pid(self) -> int | None:
        """The postmaster's process id."""

    def log(self) -> str:
        """Its log so far."""

    def conninfo(self, dbname: str = ..., user: str = ..., **parameters: str) -> str:
        """A libpq connection string."""

    def connect(self, dbname: str = ..., user: str = ...) -> psycopg.Connection:
        """An autocommit connection; the caller closes it."""

    def create_extension(self, dbname: str) -> None:
        """Put the extension into a database."""


class MakeServer(Protocol):
    """Makes a server of one kind, not started yet."""

    def __call__(self, max_worker_processes: int = ..., settings: Mapping[str, str | int] | None = ...) -> Server:
        """Make it."""


@dataclass(frozen=True)
class Kind:
    """One kind of server: how to make one, and why none can be had here (None when one can)."""

    make: MakeServer
    why_not: Callable[[], str | None]
    everywhere: bool = True
    """False: only tests that ask for it run on it (tests/matrix.py says how), unless ``--servers`` names it."""
    like: str | None = None
    """The kind that it stands for: tests that are meant for that one run on it too."""


def _embedded(max_worker_processes: int = 64, settings: Mapping[str, str | int] | None = None) -> Server:
    return EmbeddedUnderTest("embedded", max_worker_processes, settings, extension="real")


def _standin20(max_worker_processes: int = 64, settings: Mapping[str, str | int] | None = None) -> Server:
    return EmbeddedUnderTest("standin20", max_worker_processes, settings, extension="stand-in", surface="2.0")


def _standin19(max_worker_processes: int = 64, settings: Mapping[str, str | int] | None = None) -> Server:
    return EmbeddedUnderTest("standin19", max_worker_processes, settings, extension="stand-in", surface="1.9")


def _why_no_real() -> str | None:
    return DebianTree().why_not()


def _why_no_experimental() -> str | None:
    return ExperimentalTree().why_not()


def _why_no_extension() -> str | None:
    return ExtensionTree().why_not()


def _why_no_embedded() -> str | None:
    try:
        find_binaries()
    except NoPostgresError as error:
        return str(error)
    return None


KINDS: Mapping[str, Kind] = {
    "real": Kind(RealServer, _why_no_real),
    "embedded": Kind(_embedded, _why_no_embedded),
    "standin20": Kind(_standin20, _why_no_embedded),
    "standin19": Kind(_standin19, _why_no_embedded),
    "installed": Kind(installed.InstalledUnderTest, installed.why_not, everywhere=False, like="embedded"),
    **{name: Kind(partial(OlderUnderTest, name), major.why_not, everywhere=False) for name, major in MAJORS.items()},
    "real15": Kind(fifteen.RealFifteen, fifteen.why_not, everywhere=False, like="embedded"),
    "standin_pg19": Kind(Nineteen, _why_no_experimental, everywhere=False),
    "real19": Kind(RealNineteen, _why_no_extension, everywhere=False, like="real"),
}
