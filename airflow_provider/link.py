"""The link from a task instance to its job's page (see ``plugin``)."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import quote

from airflow.sdk.bases.operatorlink import BaseOperatorLink

if TYPE_CHECKING:
    from airflow.sdk import BaseOperator
    from airflow.sdk.types import TaskInstanceKey


class BackgroundJobLink(BaseOperatorLink):
    """Leads to the jobs of a task instance; there is none where the page is not switched on for its connection."""

    name = "Background job"

    def get_link(self, operator: BaseOperator, *, ti_key: TaskInstanceKey) -> str:
        """Return the page's address; empty where there is no page.

        Parameters
        ----------
        operator:
            An operator of ours.
        ti_key:
            Names the task instance.
        """
        from pgbg_orchestration.series import of_airflow_task

        from .plugin import path_of, web_conn_ids

        conn_id = getattr(operator, "postgres_conn_id", None)
        if conn_id not in web_conn_ids():
            return ""
        index = None if ti_key.map_index < 0 else ti_key.map_index
        series = of_airflow_task(ti_key.dag_id, ti_key.run_id, ti_key.task_id, index)
        return f"{path_of(str(conn_id))}#find={quote(series, safe='')}"
