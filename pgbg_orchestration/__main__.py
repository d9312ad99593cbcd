"""``pgbg`` begins here; ``python -m pgbg_orchestration`` is the same."""

from __future__ import annotations

import sys
from io import TextIOWrapper

NO_LIBPQ = """\
pgbg needs libpq, PostgreSQL's client library: pip install "psycopg[binary]" brings one, and so does your system's
package (libpq5 on Debian and Ubuntu, libpq on Fedora and Homebrew). What psycopg says:
"""


def main() -> None:
    """Run the command line."""
    try:
        import psycopg  # noqa: F401
    except ImportError as error:
        sys.exit(f"{NO_LIBPQ}{error}")
    from .cli import app

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            # A sign that an old locale lacks must not end a command whose job is committed.
            stream.reconfigure(errors="replace")
    app(prog_name="pgbg")


if __name__ == "__main__":
    main()
