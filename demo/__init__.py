"""The demo that ``make demo`` runs: real Airflow and real Dagster, on an embedded PostgreSQL, with real data."""
