"""The core's retry rules in Airflow's words."""

from __future__ import annotations

import logging
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from airflow.sdk import ExceptionRetryPolicy, RetryRule
from airflow.sdk.definitions.retry_policy import RetryAction

from airflow_provider import SqlStateRetryPolicy
from airflow_provider.retry_policy import tells_decision
from pgbg_orchestration import ErrorFields, errors
from pgbg_orchestration.retry import RETRY, Rule

pytestmark = pytest.mark.airflow


def failed(sqlstate: str, message: str = "what the server said") -> errors.WorkerError:
    return errors.WorkerError("the SQL failed", fields=ErrorFields(sqlstate, message))


@pytest.mark.parametrize(
    ("error", "action"),
    [
        (failed("40001"), RetryAction.RETRY),
        (failed("40P01"), RetryAction.RETRY),
        (failed("22012"), RetryAction.FAIL),
        (failed("57014"), RetryAction.FAIL),
        (failed("45999"), RetryAction.DEFAULT),
        (errors.JobCancelled("cancelled"), RetryAction.FAIL),
        (errors.ExtensionMissing("missing"), RetryAction.FAIL),
        (errors.WorkerLost("lost"), RetryAction.RETRY),
        (ValueError("not ours"), RetryAction.DEFAULT),
    ],
)
def test_what_to_do(error: Exception, action: RetryAction) -> None:
    assert SqlStateRetryPolicy().evaluate(error, 1, 3).action is action


def test_the_reason_names_sqlstate_and_message() -> None:
    reason = SqlStateRetryPolicy().evaluate(failed("22012", "division by zero"), 1, 3).reason

    assert reason is not None
    assert "22012" in reason
    assert "division by zero" in reason


def test_a_retry_brings_its_delay() -> None:
    delay = SqlStateRetryPolicy().evaluate(failed("40001"), 1, 3).retry_delay

    assert delay is not None
    assert delay <= timedelta(seconds=1)


def test_users_rules_come_first() -> None:
    policy = SqlStateRetryPolicy({"23505": Rule(RETRY, "two loads met", first_delay=7, jitter=0)})
    decision = policy.evaluate(failed("23505"), 1, 3)

    assert decision.action is RetryAction.RETRY
    assert decision.retry_delay == timedelta(seconds=7)


def test_a_wrong_key_is_an_error_of_the_dag_file() -> None:
    with pytest.raises(ValueError, match="neither a SQLSTATE"):
        SqlStateRetryPolicy({"unique_violation": Rule(RETRY)})


def test_what_no_rule_knows_goes_to_the_next_policy() -> None:
    other = ExceptionRetryPolicy([RetryRule(exception=ValueError, action=RetryAction.FAIL)])

    assert SqlStateRetryPolicy(otherwise=other).evaluate(ValueError("x"), 1, 3).action is RetryAction.FAIL


def test_tries_are_counted_since_the_last_clear() -> None:
    # 40001 is tried six times by its rule. This is try 9, the second one after a clear at try 7.
    context = {"ti": SimpleNamespace(task=SimpleNamespace(retries=6))}

    assert SqlStateRetryPolicy().evaluate(failed("40001"), 9, 7 + 6, context).action is RetryAction.RETRY
    assert SqlStateRetryPolicy().evaluate(failed("40001"), 9, 9, None).action is RetryAction.FAIL


@pytest.mark.parametrize(("try_number", "max_tries"), [(1, 0), (4, 3)])
def test_the_last_try_promises_no_other(try_number: int, max_tries: int) -> None:
    decision = SqlStateRetryPolicy().evaluate(failed("40001"), try_number, max_tries)

    assert decision.action is RetryAction.FAIL
    assert decision.reason is not None
    assert f"no try is left (try {try_number} of {max_tries + 1})" in decision.reason
    assert decision.reason.startswith("SQLSTATE 40001: ")
    assert "again in" not in decision.reason


def test_an_error_is_decided_once(caplog: pytest.LogCaptureFixture) -> None:
    """What the task's log says beside the error is what Airflow is told: the delay is drawn by lot."""
    operator = SimpleNamespace(retry_policy=SqlStateRetryPolicy(), log=logging.getLogger("task"))
    context = {"ti": SimpleNamespace(try_number=1, max_tries=3, task=SimpleNamespace(retries=3))}
    error = failed("40001")

    for _ in range(2):
        with pytest.raises(errors.WorkerError), tells_decision(operator, context):
            raise error

    decision = operator.retry_policy.evaluate(error, 1, 3, context)
    assert caplog.messages == [f"This task is tried again: {decision.reason}"]


@pytest.mark.parametrize("context", [{}, None, {"ti": None}])
def test_without_a_task_instance_nothing_is_decided(context: Any) -> None:
    operator = SimpleNamespace(retry_policy=SqlStateRetryPolicy())
    with pytest.raises(errors.WorkerError), tells_decision(operator, context):
        raise failed("40001")
