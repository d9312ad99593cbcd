"""What Dagster is told about an error."""

from __future__ import annotations

import pytest
from dagster import RetryRequested, TableMetadataValue

from dagster_resource import PgBackgroundFailure
from dagster_resource.steps.failures import raise_for
from pgbg_orchestration.errors import InvalidJob, JobCancelled, NoWorkerSlot, PgbgError, WorkerError
from pgbg_orchestration.outcome import ErrorFields
from pgbg_orchestration.retry import RETRY, RetryPolicy, Rule


def failed(sqlstate: str, message: str = "no") -> WorkerError:
    fields = ErrorFields(sqlstate=sqlstate, message=message, detail="the detail", hint="the hint", table_name="t")
    return WorkerError("the SQL failed in its worker", fields=fields, job_id="a/b#1", label="b")


def judge(
    *errors: PgbgError, retry_number: int = 0, max_retries: int = 3, policy: RetryPolicy | None = None
) -> PgBackgroundFailure | RetryRequested:
    with pytest.raises((PgBackgroundFailure, RetryRequested)) as caught:
        raise_for(
            errors,
            policy=policy or RetryPolicy(),
            retry_number=retry_number,
            max_retries=max_retries,
            sql={"a/b#1": "select secret ``` from t"},
        )
    assert isinstance(caught.value, (PgBackgroundFailure, RetryRequested))
    return caught.value


def test_a_failure_carries_what_the_server_said() -> None:
    failure = judge(failed("22012", "division by zero"))

    assert isinstance(failure, PgBackgroundFailure)
    assert (failure.sqlstate, failure.message, failure.detail, failure.hint) == (
        "22012",
        "division by zero",
        "the detail",
        "the hint",
    )
    assert (failure.job_id, failure.label) == ("a/b#1", "b")
    assert failure.allow_retries is False
    shown = {name: getattr(value, "value", None) for name, value in failure.metadata.items()}
    assert shown["pgbg/sqlstate"] == "22012"
    assert shown["pgbg/table_name"] == "t"
    assert shown["pgbg/data_state"] == "Nothing of this job is committed."
    assert shown["pgbg/sql"] == "````sql\nselect secret ``` from t\n````"
    assert "22012" in str(failure.description)


@pytest.mark.parametrize(
    ("error", "retry_number", "again"),
    [
        (failed("40001"), 0, True),
        (failed("40001"), 4, True),
        (failed("40001"), 5, False),  # six tries in all
        (failed("55P03"), 2, True),
        (failed("23505"), 0, False),
        (failed("57014"), 0, False),
        (JobCancelled("cancelled"), 0, False),
        (InvalidJob("empty"), 0, False),
    ],
)
def test_which_errors_are_worth_another_try(error: PgbgError, retry_number: int, again: bool) -> None:
    judged = judge(error, retry_number=retry_number)

    assert isinstance(judged, RetryRequested) is again
    if isinstance(judged, RetryRequested):
        assert retry_number < judged.max_retries
        assert judged.seconds_to_wait is not None
        assert isinstance(judged.__cause__, PgBackgroundFailure)


def test_without_a_count_of_its_own_a_rule_takes_the_resources() -> None:
    judged = judge(failed("55P03"), retry_number=1, max_retries=4)

    assert isinstance(judged, RetryRequested)
    assert judged.max_retries == 4


def test_waiting_for_a_slot_uses_up_no_try() -> None:
    judged = judge(NoWorkerSlot("no slot", sqlstate="53000"), retry_number=50, max_retries=3)

    assert isinstance(judged, RetryRequested)
    assert judged.max_retries > 50


def test_rules_of_ones_own_win() -> None:
    policy = RetryPolicy({"23505": Rule(RETRY, first_delay=2.0, jitter=0.0, max_tries=2)})
    judged = judge(failed("23505"), policy=policy)

    assert isinstance(judged, RetryRequested)
    assert judged.seconds_to_wait == 2.0
    assert isinstance(judge(failed("23505"), policy=policy, retry_number=1), PgBackgroundFailure)


def test_an_error_that_no_rule_knows_is_left_to_the_users_policy() -> None:
    judged = judge(failed("P1234"))

    assert isinstance(judged, PgBackgroundFailure)
    assert judged.allow_retries is True


def test_of_several_errors_the_hopeless_one_decides() -> None:
    judged = judge(failed("40001"), failed("22012"), failed("40P01"))

    assert isinstance(judged, PgBackgroundFailure)
    assert judged.sqlstate == "22012"
    assert "3 jobs of this step did not commit" in str(judged.description)
    assert [error.sqlstate for error in judged.errors] == ["40001", "22012", "40P01"]
    table = judged.metadata["pgbg/failed_jobs"]
    assert isinstance(table, TableMetadataValue)
    assert [record.data["sqlstate"] for record in table.records] == ["40001", "22012", "40P01"]


def test_several_errors_that_are_all_worth_another_try() -> None:
    assert isinstance(judge(failed("40001"), failed("55P03")), RetryRequested)
