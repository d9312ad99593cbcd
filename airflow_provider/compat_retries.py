"""What a retry policy is, for an Airflow that has none (before 3.3): the operators ask it themselves.

The names are those of ``airflow.sdk.definitions.retry_policy``, as far as this package uses them.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from enum import Enum
from typing import Any, Self


class RetryAction(Enum):
    """What to do after a try failed."""

    RETRY = "retry"
    FAIL = "fail"
    DEFAULT = "default"


@dataclass(frozen=True)
class RetryDecision:
    """What a policy decided, and why."""

    action: RetryAction
    retry_delay: timedelta | None = None
    reason: str | None = None

    @classmethod
    def default(cls) -> Self:
        """Leave it to the task's ``retries`` and ``retry_delay``."""
        return cls(RetryAction.DEFAULT)

    @classmethod
    def fail(cls, reason: str | None = None) -> Self:
        """End the task."""
        return cls(RetryAction.FAIL, reason=reason)


class RetryPolicy:
    """Decides what to do after a try failed."""

    def evaluate(self, exception: BaseException, try_number: int, max_tries: int, context: Any = None) -> RetryDecision:
        """Decide."""
        raise NotImplementedError

    def serialize(self) -> dict[str, Any]:
        """Return what is shown of it in the serialized DAG."""
        return {}
