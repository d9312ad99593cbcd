"""The core's retry policy in Airflow's words."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

from airflow_provider.compat import RetryAction, RetryDecision, RetryPolicy

if TYPE_CHECKING:
    from collections.abc import Mapping

    from airflow.sdk import Context

    from pgbg_orchestration.retry import Decision, Rule

MESSAGE_CHARACTERS = 200


class SqlStateRetryPolicy(RetryPolicy):
    """Decides by SQLSTATE whether another try makes sense, and when.

    Airflow asks it on the worker for each error of a try. It can end a task early and choose the delay; it cannot give
    more tries than ``retries`` has.

    Parameters
    ----------
    overrides:
        Rules of one's own, by SQLSTATE (``"55P03"``) or class (``"53"``), as
        :class:`pgbg_orchestration.retry.RetryPolicy` takes them.
    otherwise:
        Another policy, asked for errors that no rule knows.

    Examples
    --------
    >>> from pgbg_orchestration.retry import RETRY, Rule
    >>> policy = SqlStateRetryPolicy({"23505": Rule(RETRY, "two loads met", first_delay=1, max_tries=3)})
    """

    def __init__(self, overrides: Mapping[str, Rule] | None = None, *, otherwise: RetryPolicy | None = None) -> None:
        self.overrides = dict(overrides or {})
        self.otherwise = otherwise
        if self.overrides:
            self._rules()  # a wrong key is an error of the DAG file, not of its first failure

    def evaluate(
        self,
        exception: BaseException,
        try_number: int,
        max_tries: int,
        context: Context | None = None,
    ) -> RetryDecision:
        """Decide what to do after a try failed with ``exception``."""
        from pgbg_orchestration.retry import Action

        decision = self._rules().decide(exception, _try_of_generation(try_number, max_tries, context))
        if decision.action is Action.DEFAULT:
            if self.otherwise is not None:
                return self.otherwise.evaluate(exception, try_number, max_tries, context)
            return RetryDecision.default()
        reason = _reason(decision, exception)
        if decision.action is Action.FAIL:
            return RetryDecision.fail(reason)
        # ATTACH is no failure of the job's: the next try finds it, so it need not wait.
        delay = 0.0 if decision.action is Action.ATTACH else decision.delay
        return RetryDecision(RetryAction.RETRY, None if delay is None else timedelta(seconds=delay), reason)

    def serialize(self) -> dict[str, Any]:
        """Return the policy for the serialized DAG; a worker uses the object of its own parsed DAG."""
        from dataclasses import asdict

        return {
            "__type": f"{__name__}.{type(self).__name__}",
            "overrides": {key: asdict(rule) for key, rule in self.overrides.items()},
            "otherwise": self.otherwise.serialize() if self.otherwise is not None else None,
        }

    def _rules(self) -> Any:
        # Made when asked: importing the core costs a DAG file more than this module may.
        from pgbg_orchestration.retry import RetryPolicy as Rules

        return Rules(self.overrides)


def _try_of_generation(try_number: int, max_tries: int, context: Any) -> int:
    """Count from 1 since the task was last cleared, as ``max_tries`` does."""
    task = getattr((context or {}).get("ti"), "task", None)
    retries: int | None = getattr(task, "retries", None)
    if retries is None:
        return max(try_number, 1)
    return max(try_number - (max_tries - retries), 1)


def _reason(decision: Decision, exception: BaseException) -> str:
    """Return the decision's reason with the server's message, for the person who reads it in the UI."""
    told = getattr(exception, "fields", None)
    message = getattr(told, "message", None) or getattr(exception, "message", None) or str(exception)
    first_line = message.strip().splitlines()[0] if message.strip() else ""
    if len(first_line) > MESSAGE_CHARACTERS:
        first_line = f"{first_line[: MESSAGE_CHARACTERS - 1]}…"
    return f"{decision.reason} — {first_line}" if first_line else decision.reason
