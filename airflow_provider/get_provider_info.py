"""What ``airflow providers`` shows of this package."""

from __future__ import annotations

from typing import Any

_NAME = "PostgreSQL background workers"


def get_provider_info() -> dict[str, Any]:
    """Return the provider's metadata, in the form of Airflow's ``provider_info.schema.json``.

    Imports nothing: Airflow calls it at every start.
    """
    return {
        # Airflow refuses a provider whose package-name is not the distribution that the entry point came from.
        "package-name": "pg-background-orchestration",
        "name": _NAME,
        "description": "Labelled SQL in PostgreSQL's background workers: one job, one commit.",
        "integrations": [
            {
                "integration-name": _NAME,
                "external-doc-url": "https://github.com/vibhorkum/pg_background",
                "tags": ["software"],
            }
        ],
        "operators": [
            {
                "integration-name": _NAME,
                "python-modules": ["airflow_provider.operators.job", "airflow_provider.operators.batch"],
            }
        ],
        "sensors": [{"integration-name": _NAME, "python-modules": ["airflow_provider.sensors"]}],
        "hooks": [{"integration-name": _NAME, "python-modules": ["airflow_provider.hook"]}],
        "triggers": [{"integration-name": _NAME, "python-modules": ["airflow_provider.triggers"]}],
        "task-decorators": [
            {"name": "pg_background", "class-name": "airflow_provider.operators.decorated.pg_background_task"}
        ],
    }
