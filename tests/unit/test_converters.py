"""Every error and every outcome survives JSON, pickle and copy, with nothing lost."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from dataclasses import fields
from datetime import UTC, datetime
from typing import Any

import pytest

from pgbg_orchestration import Cause, ErrorFields, Outcome, errors
from pgbg_orchestration.errors import PgbgError

KINDS = sorted(
    {
        kind
        for name in errors.__all__
        if isinstance(kind := getattr(errors, name), type) and issubclass(kind, PgbgError)
    },
    key=lambda kind: kind.__name__,
)
WAYS: dict[str, Callable[[PgbgError], PgbgError]] = {
    "json": lambda error: PgbgError.from_dict(json.loads(json.dumps(error.to_dict()))),
    "pickle": lambda error: pickle.loads(pickle.dumps(error)),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
}
FIELDS = ErrorFields(**{field.name: f"the {field.name}" for field in fields(ErrorFields)})


def full(kind: type[PgbgError]) -> PgbgError:
    """An error with everything that its class can tell."""
    own: dict[str, Any] = {"sqlstate": "57014"}
    if issubclass(kind, errors.WorkerError):
        own = {"fields": FIELDS}
    elif issubclass(kind, errors.JobCancelled):
        own["cause"] = Cause.FAILED_BESIDE
    elif issubclass(kind, errors.StillRunning):
        own["worker_pid"] = 4711
    error = kind("it «happened»", job_id="j/1", label="load", todo="look", data_state=errors.PARTLY, **own)
    error.add_note("a note")
    return error


def told(error: PgbgError) -> dict[str, Any]:
    return {"type": type(error), "text": str(error), "args": error.args, **error.__dict__}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_an_error_survives(kind: type[PgbgError], way: str) -> None:
    error = full(kind)

    assert told(WAYS[way](error)) == told(error)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_an_error_that_tells_little_survives(kind: type[PgbgError], way: str) -> None:
    own: dict[str, Any] = {"fields": ErrorFields()} if issubclass(kind, errors.WorkerError) else {}
    error = kind("it happened", **own)

    assert told(WAYS[way](error)) == told(error)
    assert WAYS[way](error).data_state == kind.data_state


def test_every_error_class_is_exported() -> None:
    def below(kind: type[PgbgError]) -> set[type[PgbgError]]:
        return {kind}.union(*(below(each) for each in kind.__subclasses__()))

    ours = {kind for kind in below(PgbgError) if kind.__module__ == errors.__name__}
    assert ours == set(KINDS)


def test_an_error_of_a_newer_version_is_the_base_class_and_keeps_its_words() -> None:
    given = {**full(errors.WorkerError).to_dict(), "error": "QuantumError", "phase": 3}
    error = PgbgError.from_dict(given)

    assert type(error) is PgbgError
    assert (error.message, error.sqlstate, error.data_state) == ("it «happened»", "the sqlstate", errors.PARTLY)


@pytest.mark.parametrize("name", ["annotations", "Any", "ROLLED_BACK", "ErrorFields", "shorten"])
def test_only_an_error_class_is_made(name: str) -> None:
    assert type(PgbgError.from_dict({"error": name, "message": "m"})) is PgbgError


def test_what_an_older_version_did_not_tell_is_what_the_class_says() -> None:
    error = PgbgError.from_dict({"error": "OutcomeUnknown", "message": "m"})

    assert (type(error), error.data_state) == (errors.OutcomeUnknown, errors.NOT_KNOWN)


def test_a_cause_of_a_newer_version_is_none() -> None:
    error = PgbgError.from_dict({"error": "JobCancelled", "message": "m", "cause": "a whim"})

    assert isinstance(error, errors.JobCancelled)
    assert error.cause is None


def test_an_outcome_survives() -> None:
    moment = datetime(2013, 1, 1, 4, 0, 0, 123456, tzinfo=UTC)
    outcome = Outcome(
        job_id="j",
        label="load",
        row_count=3,
        command_tag="INSERT",
        started_at=moment,
        finished_at=moment,
        worker_pid=4711,
        attempt=2,
        launched=False,
        proof="verify_sql",
    )

    assert Outcome.from_dict(json.loads(json.dumps(outcome.to_dict()))) == outcome
    assert pickle.loads(pickle.dumps(outcome)) == copy.deepcopy(outcome) == outcome
    assert Outcome.from_dict({"job_id": "j", "label": "l", "colour": "red"}) == Outcome("j", "l")
