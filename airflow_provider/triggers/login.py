"""The connection that triggers share."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass, field
from typing import Any

from airflow_provider.hook import PgBackgroundHook

logger = logging.getLogger(__name__)

CONNECTION_SECONDS = 60.0
"""How long what Airflow said of a connection is used again in the same process: a triggerer asks for thousands."""

_conninfos: dict[tuple[str, str | None, str | None], tuple[float, asyncio.Task[str]]] = {}


@dataclass(frozen=True, slots=True)
class Login:
    """An Airflow connection, asked anew whenever a connection to the server is opened: tokens (IAM) expire.

    Triggers share their sessions by equal logins: the same connection that leads to the same place.

    Attributes
    ----------
    conn_id, database, endpoint:
        As :class:`~airflow_provider.hook.PgBackgroundHook` takes them.
    place:
        The connection string without its password.
    conninfo:
        The connection string as it was first.
    """

    conn_id: str
    database: str | None
    endpoint: str | None
    place: str
    conninfo: str = field(compare=False, repr=False)

    @classmethod
    async def of(cls, conn_id: str, database: str | None, endpoint: str | None) -> Login:
        """Return the login of a connection.

        Raises
        ------
        AirflowNotFoundException, InvalidJob
            As :meth:`~airflow_provider.hook.PgBackgroundHook.conninfo`.
        """
        conninfo = await _conninfo(conn_id, database, endpoint)
        return cls(conn_id, database, endpoint, _place(conninfo), conninfo)

    async def __call__(self) -> str:
        """Return the connection string of now, for the place where the jobs are."""
        try:
            conninfo = await _conninfo(self.conn_id, self.database, self.endpoint)
        except Exception as error:  # noqa: BLE001 - Airflow or a secrets backend may be away when the server is back
            logger.warning("Airflow does not tell the connection %r (%r): using it as it was.", self.conn_id, error)
            return self.conninfo
        return conninfo if _place(conninfo) == self.place else self.conninfo


def _place(conninfo: str) -> str:
    from psycopg.conninfo import conninfo_to_dict, make_conninfo

    given: dict[str, Any] = conninfo_to_dict(conninfo)
    return make_conninfo(**{**given, "password": None})


async def _conninfo(conn_id: str, database: str | None, endpoint: str | None) -> str:
    """Return the libpq connection string of an Airflow connection; calls within a minute share one answer."""
    key = (conn_id, database, endpoint)
    loop = asyncio.get_running_loop()
    until, finding = _conninfos.get(key, (0.0, None))
    if finding is None or until < time.monotonic() or finding.get_loop() is not loop or _failed(finding):
        hook = PgBackgroundHook(conn_id, database=database, endpoint=endpoint)
        finding = loop.create_task(hook.aconninfo())
        _conninfos[key] = (time.monotonic() + CONNECTION_SECONDS, finding)
    # Others wait for the same answer: a trigger that is cancelled takes it from nobody.
    return await asyncio.shield(finding)


def _failed(finding: asyncio.Task[str]) -> bool:
    return finding.done() and (finding.cancelled() or finding.exception() is not None)
