"""Airflow provider: deferrable SQL in PostgreSQL background workers."""
