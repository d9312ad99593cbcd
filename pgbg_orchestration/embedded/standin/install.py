"""Puts the stand-in's control file and scripts where a server finds them, and creates the extension."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeAlias

import psycopg
from psycopg import sql

Surface: TypeAlias = Literal["2.0", "1.9"]
"""The version of pg_background whose names and signatures the stand-in offers."""

STANDIN_COMMENT = "Stand-in for pg_background, in SQL over dblink: for trying out and tests only"
"""What ``pg_extension`` describes the stand-in as: the real extension's comment is another."""

_Connection: TypeAlias = psycopg.Connection[tuple[Any, ...]]

_SURFACES: dict[Surface, tuple[str, str, str]] = {
    "2.0": ("surface_2_0.sql", "pg_background_grant_privileges", "pg_background_revoke_privileges"),
    "1.9": ("surface_1_9.sql", "grant_pg_background_privileges", "revoke_pg_background_privileges"),
}
# The real 2.0 is relocatable. This one names its own schema inside its functions, so that no search_path is needed.
_CONTROL = f"comment = '{STANDIN_COMMENT}'\ndefault_version = '2.0'\nrelocatable = false\nsuperuser = true\n"


class StandinUnavailableError(Exception):
    """The server cannot take the stand-in; the message says what is missing."""


def write_extension(directory: Path) -> Path:
    """Write the control file and the scripts of both surfaces.

    Args:
        directory: where PostgreSQL looks for extensions: the ``share`` directory whose ``extension`` folder is
            filled, readable for the account that the server runs as.

    Returns:
        The ``extension`` folder.
    """
    folder = directory / "extension"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pg_background.control").write_text(_CONTROL, encoding="utf-8")
    for surface in _SURFACES:
        (folder / f"pg_background--{surface}.sql").write_text("\n".join(_script(surface)), encoding="utf-8")
    return folder


def extension_settings(directory: Path) -> dict[str, str]:
    """Return the settings with which PostgreSQL 18 and later find what :func:`write_extension` wrote.

    Args:
        directory: the directory given to :func:`write_extension`. It comes before the server's own extensions, so
            that a real pg_background which is installed there does not win.

    Returns:
        Settings to start the server with.
    """
    return {"extension_control_path": f"{directory}:$system"}


def install_standin(conninfo: str, surface: Surface = "2.0", schema: str = "public") -> None:
    """Create the stand-in in one database, as an extension named ``pg_background``. Idempotent.

    Where the server finds the files of :func:`write_extension`, this is ``CREATE EXTENSION``. Anywhere else, on any
    version and over any connection, the same objects are created by plain SQL and entered as an extension's.

    Args:
        conninfo: a superuser's connection string.
        surface: whose names and signatures to offer.
        schema: where the functions go; created when it is missing.

    Raises:
        StandinUnavailableError: the server has no ``dblink`` library, or does not trust its own Unix socket.
        psycopg.errors.DuplicateObject: another pg_background, or another surface, is installed already.
    """
    with psycopg.connect(conninfo, autocommit=True) as conn:
        found = conn.execute(
            "select extversion, obj_description(oid, 'pg_extension') from pg_extension where extname = 'pg_background'"
        ).fetchone()
        if found == (surface, STANDIN_COMMENT):
            return
        if found is not None:
            raise psycopg.errors.DuplicateObject(
                f"pg_background {found[0]} ({found[1]}) is installed here already; "
                "DROP EXTENSION pg_background first, or use another database"
            )
        offered = conn.execute(
            "select comment from pg_available_extension_versions where name = 'pg_background' and version = %s",
            (surface,),
        ).fetchone()
        name = sql.Identifier(schema)
        try:
            with conn.transaction():
                conn.execute(sql.SQL("create schema if not exists {}").format(name))
                if offered == (STANDIN_COMMENT,):
                    conn.execute(
                        sql.SQL("create extension pg_background schema {} version {}").format(
                            name, sql.Literal(surface)
                        )
                    )
                else:
                    _create_without_files(conn, surface, schema)
        except psycopg.errors.UndefinedFile as missing:
            raise StandinUnavailableError(
                "the server has no dblink library, which the stand-in works through: "
                "install PostgreSQL's contrib modules"
            ) from missing
        _check(conn, surface, schema)


def _create_without_files(conn: _Connection, surface: Surface, schema: str) -> None:
    objects, grants = _script(surface)
    register = _part("without_files.sql").replace("@version@", surface).replace("@comment@", STANDIN_COMMENT)
    conn.execute(
        "create temporary table _pgbg_before on commit drop as"
        " select 'pg_proc'::regclass as class, oid from pg_proc"
        " union all select 'pg_class'::regclass, oid from pg_class"
        " union all select 'pg_type'::regclass, oid from pg_type"
    )
    # As CREATE EXTENSION does it. Bytes, since psycopg takes text only from literals; the schema's name is quoted.
    quoted = sql.Identifier(schema).as_string(None)
    conn.execute("\n".join((objects, register, grants)).replace("@extschema@", quoted).encode())


def _check(conn: _Connection, surface: Surface, schema: str) -> None:
    name = "pg_background_detach_all" + ("_v2" if surface == "1.9" else "")
    try:
        conn.execute(sql.SQL("select {}()").format(sql.Identifier(schema, name)))
    except psycopg.errors.SqlclientUnableToEstablishSqlconnection as refused:
        raise StandinUnavailableError(
            "the stand-in's workers connect back over the server's own Unix socket, and the server refuses that: "
            f"pg_hba.conf needs a line `local all all trust` ({refused.diag.message_detail or refused})"
        ) from refused


def _script(surface: Surface) -> tuple[str, str]:
    """What creates the objects, and what grants their use, once they are members of the extension."""
    names, grant, revoke = _SURFACES[surface]
    parts = map(_part, ("split.sql", "common.sql", "workers.sql", names, "privileges.sql", "grants.sql"))
    *objects, grants = (text.replace("@grant@", grant).replace("@revoke@", revoke) for text in parts)
    return "\n".join(objects), grants


def _part(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
