"""What ``airflow providers`` shows of this package."""

from __future__ import annotations

from typing import Any


def get_provider_info() -> dict[str, Any]:
    """Return the provider's metadata, in the form of Airflow's ``provider_info.schema.json``.

    Imports nothing: Airflow calls it at every start.
    """
    return {
        # Airflow refuses a provider whose package-name is not the distribution that the entry point came from.
        "package-name": "pg-background-orchestration",
        "name": "PostgreSQL background workers",
        "description": "SQL in PostgreSQL's background workers (pg_background), waited for by a trigger.",
    }
