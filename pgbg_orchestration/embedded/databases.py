"""Fresh databases in a moment: copied from templates that hold the extension and the package's schema."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Literal, Protocol

import psycopg
from psycopg import errors, sql

if TYPE_CHECKING:
    from pgbg_orchestration.embedded.status import StopMode

Contents = Literal["empty", "extension", "schema"]
"""What a new database holds: nothing, pg_background, or pg_background and the package's schema."""

DROP_ATTEMPTS = 3
STRATEGIES_SINCE = 150_000
"""The version of PostgreSQL that lets one choose how a database is copied."""


class DatabaseServer(Protocol):
    """What this module needs of a server."""

    def conninfo(self, dbname: str = ..., user: str = ...) -> str:
        """Return a connection string."""

    def create_extension(self, dbname: str) -> None:
        """Put the extension into a database."""

    def restart(self, mode: StopMode = ...) -> None:
        """Stop and start the server."""


class Databases:
    """Makes and drops databases of one server.

    Parameters
    ----------
    server:
        a running server, on which we are superuser.
    """

    def __init__(self, server: DatabaseServer) -> None:
        self._server = server
        self._templates: dict[Contents, str] = {}

    def create(self, contents: Contents = "schema", *, name: str | None = None) -> str:
        """Create a database and return its name.

        Parameters
        ----------
        contents:
            what is to be in it.
        name:
            its name; a new one by default.
        """
        chosen = name or f"pgbg_{os.urandom(6).hex()}"
        template = self._template(contents)
        with psycopg.connect(self._server.conninfo(), autocommit=True) as connection:
            # Not block by block through the log, the default since 15, which takes half as much again of a processor.
            copied = sql.SQL(" strategy file_copy" if connection.info.server_version >= STRATEGIES_SINCE else "")
            statement = sql.SQL("create database {} template {}").format(*map(sql.Identifier, (chosen, template)))
            connection.execute(statement + copied)
        return chosen

    def drop(self, name: str) -> None:
        """Drop a database, whoever is connected to it and whatever worker runs in it.

        A worker that survives being terminated is ended by an immediate restart of the server.
        """
        statement = sql.SQL("drop database if exists {} with (force)").format(sql.Identifier(name))
        for attempt in range(1, DROP_ATTEMPTS + 1):
            try:
                self._execute(statement)
            except errors.ObjectInUse:
                if attempt == DROP_ATTEMPTS:
                    raise
                self._server.restart("immediate")
            else:
                return

    def _template(self, contents: Contents) -> str:
        if contents == "empty":
            return "template0"
        if contents not in self._templates:
            name = f"pgbg_template_{contents}_{os.urandom(4).hex()}"
            if contents == "schema":
                from pgbg_orchestration.ledger.install import install

                self.create("extension", name=name)
                install(self._server.conninfo(name))
            else:
                self.create("empty", name=name)
                self._server.create_extension(name)
            self._templates[contents] = name
        return self._templates[contents]

    def _execute(self, statement: sql.Composed) -> None:
        with psycopg.connect(self._server.conninfo(), autocommit=True) as connection:
            connection.execute(statement)
