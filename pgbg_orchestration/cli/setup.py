"""``pgbg install`` and ``pgbg uninstall``: the package's own schema."""

from __future__ import annotations

from typing import Annotated

import psycopg
import typer
from rich.text import Text

from pgbg_orchestration.ledger import install as schema_of

from .codes import ExitCode
from .screen import Stop, ending, err, out, plain, print_json
from .shared_options import Dsn, Json, Schema

_Owner = Annotated[
    str, typer.Option("--owner", metavar="ROLE", help="NOLOGIN role that owns the schema; created when missing.")
]


def install(
    dsn: Dsn = None,
    schema: Schema = schema_of.DEFAULT_SCHEMA,
    owner: _Owner = schema_of.DEFAULT_OWNER,
    print_: Annotated[
        bool, typer.Option("--print", help="Print the SQL, with version and checksum, instead of running it.")
    ] = False,
    from_version: Annotated[
        int, typer.Option("--from-version", min=0, help="With --print: the version installed so far; 0 for none.")
    ] = 0,
    create_extension: Annotated[
        bool, typer.Option("--create-extension", help="CREATE EXTENSION pg_background too (takes a superuser).")
    ] = False,
    json: Json = False,
) -> None:
    """Install or upgrade the schema that holds receipts and history, in one transaction.

    Does nothing when it is up to date. --print asks no server and is for your DBA.
    """
    with ending(json):
        if print_:
            _print_script(schema_of.plan(from_version, schema=schema, owner=owner), schema, create_extension, json)
            return
        script = schema_of.install(dsn or "", schema=schema, owner=owner, create_extension=create_extension)
        if json:
            print_json(
                {
                    "schema": schema,
                    "from_version": script.from_version,
                    "version": script.to_version,
                    "changed": bool(script.text),
                    "checksum": script.checksum if script.text else None,
                }
            )
        elif not script.text:
            out.print(Text.assemble(("✓ ", "green"), f"{plain(schema)} is up to date (version {script.to_version})"))
        else:
            was = f"upgraded from version {script.from_version}" if script.from_version else "installed"
            out.print(Text.assemble(("✓ ", "green"), f"{plain(schema)} {was}, version {script.to_version}"))
            out.print(Text("  next: pgbg doctor", "dim"))


def _print_script(script: schema_of.Script, schema: str, create_extension: bool, json: bool) -> None:
    if json:
        fields = {"from_version": script.from_version, "version": script.to_version, "checksum": script.checksum}
        print_json({"schema": schema, **fields, "sql": script.text})
        return
    if not script.text:
        typer.echo(f"-- pgbg schema, version {script.to_version}: nothing to do")
        return
    # The checksum is that of the part between the two lines of dashes, byte by byte.
    typer.echo(f"-- pgbg schema, from version {script.from_version} to version {script.to_version}")
    typer.echo(f"-- sha256 {script.checksum}")
    typer.echo("\\set ON_ERROR_STOP on")
    if create_extension:
        typer.echo("create extension if not exists pg_background;")
    typer.echo("begin;\nset local lock_timeout = '5s';\n-- ----")
    typer.echo(script.text, nl=False)
    typer.echo("-- ----\ncommit;")


def uninstall(
    dsn: Dsn = None,
    schema: Schema = schema_of.DEFAULT_SCHEMA,
    owner: _Owner = schema_of.DEFAULT_OWNER,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    json: Json = False,
) -> None:
    """Drop the schema with all receipts and all history.

    A job that is retried afterwards runs again, even one that had committed.
    """
    with ending(json):
        if not yes and not _confirmed(dsn or "", schema):
            raise Stop(ExitCode.REFUSED, "nothing was dropped")
        schema_of.uninstall(dsn or "", schema=schema, owner=owner)
        if json:
            print_json({"schema": schema, "dropped": True})
        else:
            out.print(Text.assemble(("✓ ", "green"), f"{plain(schema)} is gone, with its receipts and history"))


def _confirmed(dsn: str, schema: str) -> bool:
    with psycopg.connect(dsn) as conn:
        where = f"{conn.info.dbname} at {conn.info.host}"
    question = f"Drop {plain(schema)} in the database {plain(where)}, with all receipts and history?"
    try:
        return typer.confirm(question, err=True)
    except typer.Abort:
        err.print("no answer: --yes drops without asking")
        return False
