"""The core's retry policy in Airflow's words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from airflow_provider.compat import RetryAction, RetryDecision, RetryPolicy

if TYPE_CHECKING:
    from collections.abc import Mapping

    from airflow.sdk import Context

    from pgbg_orchestration.retry import Rule

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
        key = (try_number, max_tries)
        if (known := _decided(exception).get(key)) is not None:
            return known  # as the task's log has told it: another look at the dice would give another delay
        decided = self._decide(exception, try_number, max_tries, context)
        _decided(exception)[key] = decided
        return decided

    def _decide(self, exception: BaseException, try_number: int, max_tries: int, context: Any) -> RetryDecision:
        from pgbg_orchestration.retry import Action

        decision = self._rules().decide(exception, _try_of_generation(try_number, max_tries, context))
        if decision.action is Action.DEFAULT:
            if self.otherwise is not None:
                return self.otherwise.evaluate(exception, try_number, max_tries, context)
            return RetryDecision.default()
        if decision.action is Action.FAIL:
            return RetryDecision.fail(_reason(decision.reason, exception))
        if try_number > max_tries:
            # Airflow asks on the last try too, and starts none after it, whatever is decided.
            left = f"worth another try, but no try is left (try {try_number} of {max_tries + 1})"
            return RetryDecision.fail(_reason(f"{decision.why or decision.reason}; {left}", exception))
        reason = _reason(decision.reason, exception)
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


def _decided(exception: BaseException) -> dict[tuple[int, int], RetryDecision]:
    """Return what was decided of this very error already, by the try and how many there may be."""
    decided: dict[tuple[int, int], RetryDecision] = exception.__dict__.setdefault("_pgbg_decided", {})
    return decided


@contextmanager
def tells_decision(operator: Any, context: Any) -> Iterator[None]:
    """Write to the task's log, beside an error of ours, what the task's retry policy decides of it.

    Airflow writes the decision too, below "Post Execute", which its UI shows collapsed.
    """
    from pgbg_orchestration.errors import PgbgError

    try:
        yield
    except PgbgError as error:
        policy, ti = operator.retry_policy, (context or {}).get("ti")
        if isinstance(policy, SqlStateRetryPolicy) and ti is not None and not _decided(error):
            decision = policy.evaluate(error, ti.try_number, ti.max_tries, context)
            word = {RetryAction.RETRY: "tried again", RetryAction.FAIL: "not tried again"}.get(decision.action)
            if word is not None:
                operator.log.error("This task is %s: %s", word, decision.reason)  # noqa: TRY400 - Airflow shows the rest
        raise


def _reason(reason: str, exception: BaseException) -> str:
    """Return the decision's reason with the server's message, for the person who reads it in the UI."""
    fields = getattr(exception, "fields", None)
    message = getattr(fields, "message", None) or getattr(exception, "message", None) or str(exception)
    first_line = message.strip().splitlines()[0] if message.strip() else ""
    if len(first_line) > MESSAGE_CHARACTERS:
        first_line = f"{first_line[: MESSAGE_CHARACTERS - 1]}…"
    return f"{reason} — {first_line}" if first_line else reason
