"""Where an embedded server's files are kept: what was downloaded or copied, and its data."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from pgbg_orchestration.embedded.binaries import NoPostgresError

if TYPE_CHECKING:
    from platformdirs import PlatformDirs

CACHE_VARIABLE = "PGBG_CACHE_DIR"
NAME = "pgbg"


def cache_directory() -> Path:
    """Return the cache directory, made if need be: ``PGBG_CACHE_DIR``, else the platform's usual place.

    Root's is the machine-wide one: the server then runs as another user, who cannot look into root's home.

    Raises
    ------
    NoPostgresError
        The extra ``embedded`` is not installed.
    """
    if chosen := os.environ.get(CACHE_VARIABLE):
        directory = Path(chosen)
    elif os.geteuid() == 0:
        directory = _places().site_cache_path
    else:
        directory = _places().user_cache_path
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def default_data_directory() -> Path:
    """Return where ``pgbg server`` keeps its data unless told otherwise: the usual place for a user's data.

    Raises
    ------
    NoPostgresError
        The extra ``embedded`` is not installed.
    """
    if os.geteuid() == 0:
        # As above. The machine-wide place of platformdirs is for data that are shared, and here nobody else's.
        return Path("/var/lib") / NAME / "server"
    return _places().user_data_path / "server"


def _places() -> PlatformDirs:
    try:
        from platformdirs import PlatformDirs
    except ModuleNotFoundError as missing:
        raise NoPostgresError(
            "an embedded server needs the extra: pip install 'pg-background-orchestration[embedded]'"
        ) from missing
    return PlatformDirs(NAME, appauthor=False)
