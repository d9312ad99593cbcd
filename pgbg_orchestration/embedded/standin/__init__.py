"""A stand-in for pg_background, written in SQL over dblink, for servers where the real extension cannot be had.

It installs as an extension of the same name and version number, so that a client finds it as it finds the real one.
What it cannot do as the real one does stands in :data:`DIFFERENCES`; the contract tests skip by that table alone.
Never for production: its workers are connections of the launching session, and the server has to trust its own
Unix socket.
"""

from pgbg_orchestration.embedded.standin.differences import DIFFERENCES
from pgbg_orchestration.embedded.standin.install import (
    STANDIN_COMMENT,
    StandinUnavailableError,
    Surface,
    extension_settings,
    install_standin,
    write_extension,
)

__all__ = [
    "DIFFERENCES",
    "STANDIN_COMMENT",
    "StandinUnavailableError",
    "Surface",
    "extension_settings",
    "install_standin",
    "write_extension",
]
