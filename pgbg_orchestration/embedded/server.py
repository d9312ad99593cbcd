"""A PostgreSQL server of one's own: to try the package with, to test one's DAGs with, and for the demo.

It needs no installation and no root, listens on a Unix socket in a directory that only its user may enter, and never
on the network. Its settings favour speed over surviving a crash of the machine: it is no place for data one must keep.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import pwd
import shutil
import subprocess
import tempfile
import time
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self, get_args

import psycopg
from psycopg import sql

from pgbg_orchestration.embedded.binaries import Binaries, can_read, find_binaries, reachable_copy, unprivileged_user
from pgbg_orchestration.embedded.cache import cache_directory
from pgbg_orchestration.embedded.directories import OwnedDirectory, file_lock, own_directory
from pgbg_orchestration.embedded.extension import RealExtensionUnavailableError, real_extension
from pgbg_orchestration.embedded.status import (
    PORT,
    STATE_FILE,
    SUPERUSER,
    StopMode,
    Surface,
    connection_string,
    socket_directory,
    status,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

START_TIMEOUT = 60
STOP_TIMEOUT = 30
"""Seconds; after this a stop goes on as an immediate one."""

# Without these a crash of the machine can spoil the data; a crash of the server cannot.
FAST_SETTINGS: Mapping[str, str | int] = {"fsync": "off", "full_page_writes": "off"}

ExtensionChoice = Literal["auto", "real", "stand-in"]

_SETTINGS_FILE = "pgbg.conf"
_temporary: weakref.WeakSet[EmbeddedServer] = weakref.WeakSet()


class EmbeddedServerError(Exception):
    """The server could not be made, started or stopped; the message ends with what PostgreSQL said."""


class EmbeddedServer:
    """A PostgreSQL server on a Unix socket, with the real pg_background where it can be had and a stand-in elsewhere.

    As a context manager it is started at the top and stopped at the end, unless it ran already. Without a data
    directory it gets a temporary one, which goes with the process, even a killed one (the next server removes it).

    Parameters
    ----------
    data_dir:
        PostgreSQL's data directory, made when it is not there; its data stay. None for a temporary one.
    max_worker_processes:
        PostgreSQL's setting of that name, from which background workers are taken.
    settings:
        further settings of postgresql.conf, which win over the ones made here.
    extension:
        ``real`` or ``stand-in`` to insist on one; ``auto`` prefers the real one.
    surface:
        which of the extension's surfaces a stand-in offers; the real one has its own.
    """

    def __init__(
        self,
        data_dir: str | Path | None = None,
        *,
        max_worker_processes: int = 64,
        settings: Mapping[str, str | int] | None = None,
        extension: ExtensionChoice = "auto",
        surface: Surface = "2.0",
    ) -> None:
        if extension not in get_args(ExtensionChoice) or surface not in get_args(Surface):
            raise ValueError(
                f"extension={extension!r}, surface={surface!r}: expected auto, real or stand-in, 2.0 or 1.9"
            )
        self.settings: dict[str, str | int] = {
            "max_worker_processes": max_worker_processes,
            "max_connections": 200,
            **FAST_SETTINGS,
            **(settings or {}),
        }
        self.why_standin: str | None = None
        """Why the real extension is not used; None when it is, or when the stand-in was asked for."""
        self._data_dir = Path(data_dir).absolute() if data_dir is not None else None
        self._choice = extension
        self._surface: Surface = surface
        self._extension: str | None = None
        self._extension_settings: dict[str, str] = {}
        self._owned: OwnedDirectory | None = None
        self._user = unprivileged_user()
        self._binaries: Binaries | None = None
        self._started_here = False

    @property
    def data_dir(self) -> Path:
        """The data directory."""
        if self._data_dir is None:
            raise EmbeddedServerError("the server was never started, so it has no data directory yet")
        return self._data_dir

    @property
    def extension(self) -> str:
        """Which pg_background the server has, such as ``real 2.0.3`` or ``stand-in 2.0``."""
        if self._extension is None:
            raise EmbeddedServerError("the server was never started: which extension it has is not known yet")
        return self._extension

    @property
    def is_standin(self) -> bool:
        """True when the extension is the stand-in."""
        return self.extension.startswith("stand-in")

    @property
    def surface(self) -> Surface:
        """Which of the extension's surfaces the server offers: ``2.0`` or ``1.9``."""
        return self._surface

    @property
    def binaries(self) -> Binaries:
        """The PostgreSQL programs that are used."""
        if self._binaries is None:
            found = find_binaries()
            self._binaries = reachable_copy(found, self._user, cache_directory()) if self._user else found
        return self._binaries

    def pid(self) -> int | None:
        """Return the postmaster's process id, or None when it does not run."""
        found = status(self._data_dir) if self._data_dir is not None else None
        return found.pid if found else None

    def is_running(self) -> bool:
        """Tell whether the server runs."""
        return self.pid() is not None

    def start(self) -> Self:
        """Start the server, or attach to the one that runs on this data directory already.

        The first start of a data directory takes a second or two. The extension is created in the database
        ``postgres``; other databases get it by :meth:`create_extension`.

        Raises
        ------
        EmbeddedServerError
            it did not start, with the end of its log.
        NoPostgresError
            no PostgreSQL programs were found.
        RealExtensionUnavailableError
            ``extension="real"`` was asked for and cannot be had.
        """
        if self._data_dir is not None:
            self._start_in(self._data_dir)
            return self
        self._data_dir = self._temporary_directory()
        try:
            self._start_in(self._data_dir)
        except BaseException:
            self.stop("immediate")  # which removes the directory
            raise
        return self

    def stop(self, mode: StopMode = "fast") -> None:
        """Stop the server; a temporary data directory is removed, another one stays.

        Parameters
        ----------
        mode:
            as for ``pg_ctl stop``. A worker that ``fast`` cannot end is ended by ``immediate``.

        Raises
        ------
        EmbeddedServerError
            it did not stop.
        """
        if self._data_dir is None:
            return
        self._stop(mode)
        if self._owned is not None:
            _delete(self._data_dir)
            self._owned.release()
            self._owned = self._data_dir = None
            _temporary.discard(self)

    def restart(self, mode: StopMode = "fast") -> None:
        """Stop and start again on the same data and socket, so that connection strings stay good."""
        self._stop(mode)
        self.start()

    def conninfo(self, dbname: str = "postgres", user: str = SUPERUSER, **parameters: str) -> str:
        """Return a libpq connection string; any further libpq parameter can be given by name."""
        return connection_string(socket_directory(self.data_dir), dbname, user, **parameters)

    def connect(self, dbname: str = "postgres", user: str = SUPERUSER) -> psycopg.Connection:
        """Open an autocommit connection; the caller closes it."""
        return psycopg.connect(self.conninfo(dbname, user), autocommit=True)

    def create_database(self, name: str, *, extension: bool = True) -> str:
        """Create a database, with the extension unless told otherwise, and return its connection string."""
        with self.connect() as connection:
            connection.execute(sql.SQL("create database {}").format(sql.Identifier(name)))
        if extension:
            self.create_extension(name)
        return self.conninfo(name)

    def create_extension(self, dbname: str) -> None:
        """Put pg_background, or its stand-in, into a database; nothing happens when it is there."""
        if self.is_standin:
            from pgbg_orchestration.embedded.standin import install_standin

            install_standin(self.conninfo(dbname), surface=self._surface)
        else:
            with self.connect(dbname) as connection:
                connection.execute("create extension if not exists pg_background")

    def log(self) -> str:
        """Return the server's log so far."""
        path = self.data_dir / "server.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        if self._started_here:
            self.stop()

    def _temporary_directory(self) -> Path:
        parent = self._temporary_parent() / f"pgbg-{os.geteuid()}"
        parent.mkdir(mode=0o700, exist_ok=True)
        if parent.is_symlink() or parent.stat().st_uid != os.geteuid():
            raise EmbeddedServerError(f"{parent} belongs to somebody else: set TMPDIR to a directory of your own")
        if self._user:
            parent.chmod(0o711)  # the server's user passes through; its own directory in there stays closed
        self._owned = own_directory(parent, self._remove_abandoned)
        self._give(self._owned.path)
        _temporary.add(self)
        return self._owned.path

    def _temporary_parent(self) -> Path:
        """Return the directory in which temporary data directories are made."""
        return Path(tempfile.gettempdir())

    def _remove_abandoned(self, directory: Path) -> None:
        if directory.exists():
            self._pg_ctl(directory, "stop", "-m", "immediate")
            _delete(directory)

    def _give(self, directory: Path) -> None:
        """Make a directory the server's user's, when that is another one than ours."""
        if self._user:
            shutil.chown(directory, self._user)

    def _start_in(self, data_dir: Path) -> None:
        with file_lock(_lock_file(data_dir)):
            if running := status(data_dir):
                self._extension, self._surface = running.extension, running.surface
                return
            self._initialise()
            if not self._launch_as_before():
                self._launch()
                self._started_here = True
                try:
                    self._provide_extension()
                except BaseException:
                    self._stop("immediate")
                    raise
                self._write_state()
            self._started_here = True

    def _initialise(self) -> None:
        made_by = self.data_dir / "PG_VERSION"
        if made_by.exists():
            version = made_by.read_text().strip()
            if version != str(self.binaries.major):
                raise EmbeddedServerError(
                    f"{self.data_dir} was made by PostgreSQL {version}, and the one here ({self.binaries.source}) "
                    f"is {self.binaries.version}: choose another data directory, or remove this one"
                )
            return
        self.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        if any(self.data_dir.iterdir()):
            raise EmbeddedServerError(f"{self.data_dir} is not empty and no data directory of PostgreSQL's")
        self._give(self.data_dir)
        if self._user and not can_read(self.data_dir, self._user):
            self.data_dir.rmdir()
            raise EmbeddedServerError(
                f"PostgreSQL refuses to run as root, so it runs as {self._user}, who cannot reach {self.data_dir}: "
                "choose a data directory outside of root's home, or run as an ordinary user"
            )
        made = self._run(
            "initdb", "--no-sync", "-D", str(self.data_dir), "-U", SUPERUSER, "-A", "trust", "-E", "UTF8",
            *self._locale(),
        )  # fmt: skip
        if made.returncode != 0:
            raise EmbeddedServerError(f"initdb failed: {made.stdout}")
        with (self.data_dir / "postgresql.conf").open("a") as stream:
            stream.write(f"\ninclude = '{_SETTINGS_FILE}'\n")

    def _locale(self) -> tuple[str, ...]:
        # C.UTF-8 built into PostgreSQL itself needs no locale of the machine's (initdb manual page, since 17).
        if self.binaries.major >= 17:
            return ("--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8")
        return ("--locale=C",)

    def _launch_as_before(self) -> bool:
        """Start with the extension that this data directory has: its databases hold that one's functions."""
        try:
            state = json.loads((self.data_dir / STATE_FILE).read_text())
        except FileNotFoundError:
            return False
        is_standin = state["extension"].startswith("stand-in")
        refused = self._choice == "real" if is_standin else self._choice == "stand-in"
        if refused or (self._choice == "stand-in" and state["surface"] != self._surface):
            raise EmbeddedServerError(
                f"{self.data_dir} was made with {state['extension']}: choose another data directory, or remove this one"
            )
        self._extension, self._surface = state["extension"], state["surface"]
        if is_standin:
            self._extension_settings = self._write_standin()
        elif state["from_cache"]:
            self._extension_settings = real_extension(self.binaries.major).settings()
        self._launch()
        return True

    def _launch(self) -> None:
        socket_dir = socket_directory(self.data_dir)
        if socket_dir != self.data_dir:
            self._make_socket_directory(socket_dir)
        self._write_settings(socket_dir)
        started = self._pg_ctl(
            self.data_dir, "start", "-t", str(START_TIMEOUT), "-l", str(self.data_dir / "server.log")
        )
        if started.returncode != 0:
            raise EmbeddedServerError(f"PostgreSQL did not start: {started.stdout}\n{self.log()[-2000:]}")

    def _make_socket_directory(self, directory: Path) -> None:
        """Make the directory that stands in for a data directory whose path is too long for a socket."""
        directory.mkdir(mode=0o700, exist_ok=True)
        owner = pwd.getpwnam(self._user).pw_uid if self._user else os.geteuid()
        found = directory.lstat()
        if directory.is_symlink() or found.st_uid not in (owner, os.geteuid()) or found.st_mode & 0o077:
            raise EmbeddedServerError(f"{directory} is not a private directory of ours: remove it")
        self._give(directory)

    def _write_settings(self, socket_dir: Path) -> None:
        settings: dict[str, str | int] = {
            "listen_addresses": "",
            "unix_socket_directories": str(socket_dir),
            "unix_socket_permissions": "0700",
            "port": PORT,
            **self._extension_settings,
            **self.settings,
        }
        lines = ["{} = '{}'\n".format(name, str(value).replace("'", "''")) for name, value in settings.items()]
        path = self.data_dir / _SETTINGS_FILE
        path.write_text("".join(lines))
        self._give(path)

    def _provide_extension(self) -> None:
        """Choose the extension, have the server find it, and create it in the database ``postgres``."""
        if self._choice != "stand-in":
            try:
                self._extension, self._surface = self._load_real()
            except RealExtensionUnavailableError as error:
                if self._choice == "real":
                    raise
                self.why_standin = str(error)
            else:
                return
        self._extension_settings = self._write_standin()
        self._relaunch()
        self._extension = f"stand-in {self._surface}"
        self.create_extension("postgres")

    def _write_standin(self) -> dict[str, str]:
        """Write the stand-in's files, of this package's version, and return the settings that have them found."""
        from pgbg_orchestration.embedded.standin import extension_settings, write_extension

        directory = self.data_dir / "standin"
        for path in (directory, *write_extension(directory).rglob("*"), directory / "extension"):
            self._give(path)
        return extension_settings(directory)

    def _relaunch(self) -> None:
        # A restart and no reload: a reload is seen by new sessions only after a moment that nothing tells.
        self._stop("fast")
        self._launch()

    def _load_real(self) -> tuple[str, Surface]:
        with self.connect() as connection:
            installed = connection.execute(
                "select default_version from pg_available_extensions where name = 'pg_background'"
            ).fetchone()
        # A PostgreSQL of the system's may bring one of its own.
        name = f"real {installed[0]}" if installed else ""
        surface: Surface = "1.9" if name.startswith("real 1.") else "2.0"
        if not installed:
            files = real_extension(self.binaries.major)
            if self._user and not can_read(files.directory / "manifest.json", self._user):
                raise RealExtensionUnavailableError(f"user {self._user} cannot reach {files.directory}")
            name = f"real {files.version}"
            self._extension_settings = files.settings()
            self._relaunch()
        try:
            with self.connect() as connection:
                connection.execute("create extension if not exists pg_background")
                _try_one_job(connection, suffix="_v2" if surface == "1.9" else "")
        except psycopg.Error as error:
            self._drop_broken_extension()
            raise RealExtensionUnavailableError(f"{name} does not work in {self.binaries.source}: {error}") from error
        return name, surface

    def _drop_broken_extension(self) -> None:
        self._extension_settings = {}
        with self.connect() as connection:
            connection.execute("drop extension if exists pg_background")

    def _write_state(self) -> None:
        state = {
            "extension": self._extension,
            "surface": self._surface,
            "from_cache": bool(self._extension_settings),
        }
        path = self.data_dir / STATE_FILE
        path.write_text(json.dumps(state))
        self._give(path)

    def _stop(self, mode: StopMode) -> None:
        if not (self.data_dir / "postmaster.pid").exists():
            return
        output = ""
        for chosen in (mode, "immediate"):
            stopped = self._pg_ctl(self.data_dir, "stop", "-t", str(STOP_TIMEOUT), "-m", chosen)
            output = stopped.stdout
            if stopped.returncode == 0 or not self.is_running():
                break
        else:
            raise EmbeddedServerError(f"PostgreSQL did not stop: {output}\n{self.log()[-2000:]}")
        socket_dir = socket_directory(self.data_dir)
        if socket_dir != self.data_dir:
            shutil.rmtree(socket_dir, ignore_errors=True)

    def _pg_ctl(self, data_dir: Path, action: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self._run("pg_ctl", action, "-w", "-D", str(data_dir), *arguments)

    def _run(self, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run one of PostgreSQL's programs as the server's user; output and errors are in ``stdout``."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
        environment["LC_ALL"] = "C"  # its messages are read by people of every language, and by us
        # A file and no pipe: the postmaster would keep a pipe open, and us reading, for ever.
        with tempfile.TemporaryFile("w+") as output:
            result = subprocess.run(
                [self.binaries.program(program), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd="/",
                env=environment,
                user=self._user,
                group=_group_of(self._user),
                extra_groups=[] if self._user else None,
                check=False,
            )
            output.seek(0)
            return subprocess.CompletedProcess(result.args, result.returncode, output.read(), "")


def _try_one_job(connection: psycopg.Connection, suffix: Literal["", "_v2"]) -> None:
    """Run one worker to its end: a library that loads can still fail in the worker."""
    launch, result = (sql.Identifier(f"pg_background_{name}{suffix}") for name in ("launch", "result"))
    launched = connection.execute(sql.SQL("select pid, cookie from {}('select 1')").format(launch)).fetchone()
    if launched is None:
        raise psycopg.InternalError("pg_background_launch returned no handle")
    connection.execute(sql.SQL("select * from {}(%s, %s) as (one int)").format(result), launched).fetchall()


def _lock_file(data_dir: Path) -> Path:
    """Return a lock file for a data directory that may not exist yet, and must be empty for initdb."""
    directory = cache_directory() / "locks"
    directory.mkdir(exist_ok=True)
    return directory / hashlib.sha256(os.fsencode(data_dir)).hexdigest()[:32]


def _group_of(user: str | None) -> int | None:
    if user is None:
        return None
    return pwd.getpwnam(user).pw_gid


def _delete(directory: Path) -> None:
    """Delete a stopped server's directory; a backend on its way out may still write a file while we do."""
    deadline = time.monotonic() + 10
    while directory.exists() and time.monotonic() < deadline:
        shutil.rmtree(directory, ignore_errors=True)


@atexit.register
def _stop_temporary_servers() -> None:
    for server in list(_temporary):
        server.stop("immediate")
