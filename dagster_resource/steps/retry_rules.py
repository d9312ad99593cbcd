"""Which errors are worth another try, as a resource's configuration tells it."""

from __future__ import annotations

from collections.abc import Mapping

from dagster import Config
from pydantic import Field

from pgbg_orchestration.retry import Action, RetryPolicy, Rule


class RetryRule(Config):
    """What to do about one SQLSTATE or class, as configuration; see :class:`pgbg_orchestration.retry.Rule`."""

    action: str = Field(description="'retry' or 'fail'.")
    first_delay: float = Field(default=5.0, description="Seconds before the second try.")
    factor: float = Field(default=2.0, description="By what the delay grows with each further try.")
    max_delay: float = Field(default=60.0, description="Seconds that no delay exceeds.")
    max_tries: int | None = Field(default=None, description="Tries in all; without it, the resource's max_retries.")


def policy_of(rules: Mapping[str, RetryRule]) -> RetryPolicy:
    """Return the core's policy with these rules in front of its own.

    Raises
    ------
    ValueError
        A key is no SQLSTATE and no class of them, or a rule's action is unknown.
    """
    return RetryPolicy(
        {
            key: Rule(
                Action(rule.action),
                "a rule of the resource",
                first_delay=rule.first_delay,
                factor=rule.factor,
                max_delay=rule.max_delay,
                max_tries=rule.max_tries,
            )
            for key, rule in rules.items()
        }
    )
