"""Fixtures of the Dagster tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from dagster import DagsterInstance

from dagster_resource import PgBackgroundResource
from tests.conftest import Database

TIME_WINDOW = "ignore:.*is currently in beta.*"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/dagster" in str(item.path):
            item.add_marker(pytest.mark.dagster)


@pytest.fixture
def pg(database: Database) -> PgBackgroundResource:
    return PgBackgroundResource(conninfo=database.conninfo)


@pytest.fixture
def instance() -> Iterator[DagsterInstance]:
    with DagsterInstance.ephemeral() as made:
        yield made


@pytest.fixture
def sql(database: Database) -> Iterator[psycopg.Connection[Any]]:
    """A connection to the test's database."""
    with database.connect() as connection:
        yield connection
