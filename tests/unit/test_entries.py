"""How a job of the ``jobs`` view is told to those who did not run it."""

from __future__ import annotations

from dataclasses import fields
from datetime import UTC, datetime
from typing import Any

import pytest

from airflow_provider import watch
from pgbg_orchestration import errors
from pgbg_orchestration.ledger.history import ENDED_BADLY, STATES, JobEntry, error_of, outcome_of

BEGAN, ENDED = datetime(2013, 1, 1, 4, tzinfo=UTC), datetime(2013, 1, 1, 5, tzinfo=UTC)


def entry(state: str, **known: Any) -> JobEntry:
    values = {field.name: None for field in fields(JobEntry)} | {"owner": "etl", "job_id": "j", "label": "load"}
    return JobEntry(**{**values, "state": state, "kind": "receipt", **known})


@pytest.mark.parametrize("state", STATES)
def test_every_state_that_is_a_bad_end_has_its_error(state: str) -> None:
    error = error_of(entry(state))

    assert (error is not None) == (state in ENDED_BADLY)
    assert error is None or (error.job_id, error.label) == ("j", "load")


def test_a_failure_is_told_as_the_server_told_it() -> None:
    told = {"sqlstate": "23505", "message": "twice", "detail": "(1)", "hint": "once", "context": "PL/pgSQL"}
    error = error_of(entry("failed", **told))

    assert isinstance(error, errors.WorkerError)
    assert {name: getattr(error.fields, name) for name in told} == told


@pytest.mark.parametrize("state", ["failed", "cancelled", "lost"])
@pytest.mark.parametrize(
    ("kind", "data_state"),
    [("receipt", errors.ROLLED_BACK), ("supervised", errors.PARTLY), (None, errors.ROLLED_BACK)],
)
def test_what_is_true_of_the_data(state: str, kind: str | None, data_state: str) -> None:
    error = error_of(entry(state, kind=kind))

    assert error is not None
    assert error.data_state == data_state


def test_a_commit_is_told_with_its_worker_and_times() -> None:
    known = {"worker_pid": 42, "attempt": 2, "row_count": 7, "command_tag": "INSERT"}
    outcome = outcome_of(entry("committed", started_at=BEGAN, ended_at=ENDED, **known))

    assert (outcome.started_at, outcome.finished_at, outcome.launched) == (BEGAN, ENDED, False)
    assert {name: getattr(outcome, name) for name in known} == known


def test_airflow_knows_the_same_bad_ends() -> None:
    """It keeps a list of its own: a DAG file does not import the core."""
    assert set(watch.ENDED_BADLY) == set(ENDED_BADLY)
