"""OpenLineage: which tables a job's SQL reads and writes, by the OpenLineage provider's own SQL parser."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from importlib import import_module
from typing import Any

logger = logging.getLogger(__name__)


def facets_of(sql: Sequence[str], conn_id: str, database: str | None) -> Any:
    """Return the ``OperatorLineage`` of statements, or None where OpenLineage's provider is not installed.

    Parameters
    ----------
    sql:
        Rendered statements.
    conn_id, database:
        Where they run: dataset names begin with the server's address, as those of ``SQLExecuteQueryOperator`` do.
    """
    try:
        # By name: the package is optional, and type checkers may or may not find it.
        extractors = import_module("airflow.providers.openlineage.extractors")
        sqlparser = import_module("airflow.providers.openlineage.sqlparser")
        utils = import_module("airflow.providers.openlineage.utils.utils")
    except ImportError as error:
        logger.debug("no lineage: %s", error)
        return None
    from airflow.providers.postgres.hooks.postgres import PostgresHook

    statements = [text for text in sql if text.strip()]
    if not statements:
        return extractors.OperatorLineage()
    hook = PostgresHook(postgres_conn_id=conn_id, database=database)
    connection = hook.get_connection(conn_id)
    external = utils.should_use_external_connection(hook)
    parser = sqlparser.SQLParser(
        dialect=hook.get_openlineage_database_dialect(connection),
        default_schema=hook.get_openlineage_default_schema() if external else "public",
    )
    return parser.generate_openlineage_metadata_from_sql(
        sql=statements,
        hook=hook,
        database_info=hook.get_openlineage_database_info(connection),
        database=database,
        sqlalchemy_engine=hook.get_sqlalchemy_engine() if external else None,
        use_connection=external,
    )
