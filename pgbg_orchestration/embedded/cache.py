"""Where downloaded and copied files are kept between runs."""

from __future__ import annotations

import os
import sys
from pathlib import Path

CACHE_VARIABLE = "PGBG_CACHE_DIR"


def cache_directory() -> Path:
    """Return the cache directory, made if need be: ``PGBG_CACHE_DIR``, else the platform's usual place.

    Root's is the machine-wide one: the server then runs as another user, who cannot look into root's home.
    """
    if chosen := os.environ.get(CACHE_VARIABLE):
        directory = Path(chosen)
    elif sys.platform == "darwin":
        directory = (Path("/Library/Caches") if os.geteuid() == 0 else Path.home() / "Library" / "Caches") / "pgbg"
    elif os.geteuid() == 0:
        directory = Path("/var/cache/pgbg")
    else:
        directory = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pgbg"
    directory.mkdir(parents=True, exist_ok=True)
    return directory
