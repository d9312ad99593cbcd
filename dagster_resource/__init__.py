"""Dagster integration: SQL in PostgreSQL background workers."""
