"""The page in Airflow's own UI, behind Airflow's login and permissions.

It shows the jobs of the connections that ``[pg_background] web_conn_ids`` names, with commas between them
(``AIRFLOW__PG_BACKGROUND__WEB_CONN_IDS``), and nothing where none is named. It is read-only unless ``[pg_background]
web_allow_cancel`` is true.

Who may see a connection in Airflow (``GET``) sees its jobs, since the page shows what that connection's login sees. A
job of an Airflow task is cancelled by whoever may edit its task instance (``PUT``), any other job by whoever may edit
the connection. The SQL of a task's job is shown to whoever may see its task instance, the first of its rows to whoever
may see its XComs; of any other job both are shown to whoever may edit the connection.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from airflow.plugins_manager import AirflowPlugin

from airflow_provider import triggerer_listener

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.types import ASGIApp, Receive, Scope, Send

    from pgbg_orchestration.ledger.history import JobEntry
    from pgbg_orchestration.view.source import Source

PREFIX = "/pg_background"
SECTION = "pg_background"


def web_conn_ids() -> list[str]:
    """Return the ids of the connections whose jobs are shown."""
    from airflow.configuration import conf

    named = conf.get(SECTION, "web_conn_ids", fallback="")
    return [conn_id.strip() for conn_id in named.split(",") if conn_id.strip()]


def path_of(conn_id: str) -> str:
    """Return the path of a connection's page in Airflow's web server."""
    return f"{PREFIX}/{quote(conn_id, safe='')}/"


class ConnectionPage:
    """The page of one connection, built when somebody first asks for it: every process of Airflow's imports plugins.

    Parameters
    ----------
    conn_id:
        Id of a ``postgres`` connection.
    """

    def __init__(self, conn_id: str) -> None:
        self.conn_id = conn_id
        self._app: ASGIApp | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if self._app is None:
            self._app = self._build()
        await self._app(scope, receive, send)

    def _build(self) -> ASGIApp:
        from airflow.configuration import conf

        from pgbg_orchestration.view.web.app import build_app

        return build_app(
            self._source,
            may_see=self.may_see,
            may_cancel=self.may_cancel if conf.getboolean(SECTION, "web_allow_cancel", fallback=False) else None,
            may_see_sql=self.may_see_sql,
            may_see_rows=self.may_see_rows,
            links={"airflow": conf.get("api", "base_url", fallback="") or "/"},
        )

    @asynccontextmanager
    async def _source(self) -> AsyncIterator[Source]:
        from pgbg_orchestration import Launcher
        from pgbg_orchestration.view.source import ServerSource

        from .hook import PgBackgroundHook

        # A function: a connection that is edited, or a token that expires, counts from the next connect on.
        async with Launcher(PgBackgroundHook(self.conn_id).aconninfo) as launcher:
            yield ServerSource(launcher)

    async def may_see(self, request: Request) -> None:
        """Let a request pass of a user who may see the connection.

        Raises
        ------
        HTTPException
            401 or 403: nobody has logged in, or may not.
        """
        from airflow.api_fastapi.auth.managers.models.resource_details import ConnectionDetails

        manager, user = await _asking(request)
        details = ConnectionDetails(conn_id=self.conn_id)
        if not await asyncio.to_thread(
            lambda: manager.is_authorized_connection(method="GET", details=details, user=user)
        ):
            raise _forbidden()

    async def may_cancel(self, request: Request, job: JobEntry) -> None:
        """Let a request cancel a job of a user who may edit its task instance, or else the connection.

        Raises
        ------
        HTTPException
            As :meth:`may_see`.
        """
        if not await self._may(request, job, "PUT", "TASK_INSTANCE"):
            raise _forbidden()

    async def may_see_sql(self, request: Request, job: JobEntry) -> bool:
        """Tell whether a request's user may see a job's SQL.

        Of an Airflow task's job, whoever may see its task instance, whose rendered templates have it too; of any other,
        whoever may edit the connection.
        """
        return await self._may(request, job, "GET", "TASK_INSTANCE")

    async def may_see_rows(self, request: Request, job: JobEntry) -> bool:
        """Tell whether a request's user may see the first of the rows that a job kept.

        Of an Airflow task's job, whoever may see its XComs; of any other, whoever may edit the connection.
        """
        return await self._may(request, job, "GET", "XCOM")

    async def _may(self, request: Request, job: JobEntry, method: Any, entity: str) -> bool:
        """Tell whether a user may do something to a part of a job's task instance, or else edit the connection."""
        from airflow.api_fastapi.auth.managers.models.resource_details import (
            ConnectionDetails,
            DagAccessEntity,
            DagDetails,
        )

        from pgbg_orchestration.series import airflow_task

        manager, user = await _asking(request)
        if task := airflow_task(job.series or ""):
            of_dag = DagDetails(id=task.dag_id)
            part = DagAccessEntity[entity]
            # An auth manager may ask a database or another service.
            return await asyncio.to_thread(
                lambda: manager.is_authorized_dag(method=method, access_entity=part, details=of_dag, user=user)
            )
        details = ConnectionDetails(conn_id=self.conn_id)
        return await asyncio.to_thread(
            lambda: manager.is_authorized_connection(method="PUT", details=details, user=user)
        )


async def _asking(request: Request) -> tuple[Any, Any]:
    """Return the auth manager, and who asks: by the token of Airflow's API, or by the cookie of its UI."""
    from airflow.api_fastapi.app import get_auth_manager
    from airflow.api_fastapi.core_api.security import bearer_scheme, get_user

    bearer = await bearer_scheme(request)
    return get_auth_manager(), await get_user(request, None, bearer)


def _forbidden() -> Exception:
    from starlette.exceptions import HTTPException

    return HTTPException(403, "you may not do this in Airflow")


class PgBackgroundPlugin(AirflowPlugin):
    """What Airflow adds to its web server, and to its triggerers: these look for orphans from their start on."""

    name = "pg_background"
    listeners = [triggerer_listener] if triggerer_listener.in_triggerer() else []
    fastapi_apps = [  # noqa: RUF012  (declared so by Airflow)
        {"app": ConnectionPage(conn_id), "url_prefix": path_of(conn_id).rstrip("/"), "name": f"{SECTION}: {conn_id}"}
        for conn_id in web_conn_ids()
    ]
    external_views = [  # noqa: RUF012
        {
            "name": f"Background jobs ({conn_id})",
            "href": path_of(conn_id),
            "destination": "nav",
            "category": "browse",
            "url_route": f"pg_background_{number}",
        }
        for number, conn_id in enumerate(web_conn_ids())
    ]
