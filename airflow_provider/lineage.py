"""OpenLineage: which tables a job's SQL reads and writes, by the OpenLineage provider's own SQL parser.

That parser gives up a whole text for one statement that it does not know, knows no placeholder, and does not look into
common table expressions. So it is given one statement at a time, a null for each placeholder, and the query of each
common table expression as a statement of its own.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pgbg_orchestration.statements.lexer import Token

logger = logging.getLogger(__name__)

PLACEHOLDER = re.compile(r"%(?:\(\w+\))?[sbt]|%%")  # as psycopg reads them


def facets_of(sql: Sequence[str], conn_id: str, database: str | None, *, has_parameters: bool = False) -> Any:
    """Return the ``OperatorLineage`` of statements, or None where OpenLineage's provider is not installed.

    Parameters
    ----------
    sql:
        Rendered statements, or texts of several; none: an empty lineage.
    conn_id, database:
        Where they run: dataset names begin with the server's address, as those of ``SQLExecuteQueryOperator`` do.
    has_parameters:
        Whether ``%s`` and ``%(name)s`` in them are placeholders.
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

    texts = [text for text in sql if text.strip()]
    if not texts:
        return extractors.OperatorLineage()
    hook = PostgresHook(postgres_conn_id=conn_id, database=database)
    connection = hook.get_connection(conn_id)
    external = utils.should_use_external_connection(hook)
    parser = sqlparser.SQLParser(
        dialect=hook.get_openlineage_database_dialect(connection),
        default_schema=hook.get_openlineage_default_schema() if external else "public",
    )
    metadata = parser.generate_openlineage_metadata_from_sql(
        sql=readable(texts, has_parameters=has_parameters),
        hook=hook,
        database_info=hook.get_openlineage_database_info(connection),
        database=database,
        sqlalchemy_engine=hook.get_sqlalchemy_engine() if external else None,
        use_connection=external,
    )
    job_facets = import_module("openlineage.client.facet_v2").sql_job
    metadata.job_facets["sql"] = job_facets.SQLJobFacet(query=sqlparser.SQLParser.normalize_sql(texts))
    return metadata


def readable(texts: Sequence[str], *, has_parameters: bool) -> list[str]:
    """Return statements that the parser can read, which name the same tables as these texts."""
    from pgbg_orchestration.statements import split

    if has_parameters:
        texts = [PLACEHOLDER.sub(lambda found: "%" if found[0] == "%%" else "null", text) for text in texts]
    pieces: list[str] = []
    for text in texts:
        try:
            statements = [statement.text for statement in split(text)]
        except ValueError:
            statements = [text]  # a string or a comment that does not end: the parser says so in its error
        for statement in statements:
            pieces += [statement, *_common_table_expressions(statement)]
    return pieces


def _common_table_expressions(statement: str) -> list[str]:
    """Return the queries of a statement's ``WITH`` lists, each as a statement that knows the names before it."""
    from pgbg_orchestration.statements.lexer import UnterminatedSql, tokens

    try:
        found = list(tokens(statement))
    except UnterminatedSql:
        return []
    queries: list[str] = []
    known: list[str] = []
    for number, token in enumerate(found):
        if token.text != "WITH" or token.end - token.start != len("WITH"):
            continue
        place = number + 1
        recursive = place < len(found) and found[place].text == "RECURSIVE"
        place += recursive
        while (query := _query_of(found, place)) is not None:
            opened, closed = query
            name = statement[found[place].start : found[place].end]
            body = statement[found[opened].end : found[closed].start]
            # Not recursive, a name inside of its own query is a table's.
            names = [*known, name] if recursive else [other for other in known if other != name]
            queries.append(_with(names, body, found[opened + 1].text))
            known.append(name)
            place = closed + 1
            if place >= len(found) or found[place].text != ",":
                break
            place += 1
    return queries


def _query_of(found: Sequence[Token], place: int) -> tuple[int, int] | None:
    """Return where the query of the common table expression opens and closes whose name stands at ``place``."""
    place += 1
    if place < len(found) and found[place].text == "(":  # the names of its columns
        place = _closing(found, place) + 1
    words = [token.text for token in found[place : place + 3]]
    if not words or words[0] != "AS":
        return None
    place += 1 + (words[1:2] == ["NOT"]) + ("MATERIALIZED" in words[1:3])
    if place + 1 >= len(found) or found[place].text != "(":
        return None
    closed = _closing(found, place)
    return (place, closed) if closed < len(found) else None


def _closing(found: Sequence[Token], opened: int) -> int:
    depth = 0
    for place in range(opened, len(found)):
        depth += {"(": 1, ")": -1}.get(found[place].text, 0)
        if depth == 0:
            return place
    return len(found)


def _with(names: Sequence[str], query: str, verb: str) -> str:
    head = ", ".join(f"{name} as (select 1)" for name in names)
    head = f"with {head} " if head else ""
    reads = verb in ("SELECT", "WITH", "VALUES", "TABLE", "(")  # a further WITH can stand in a subquery only
    return "".join([head, "select * from (", query, ") q"] if reads else [head, query])
