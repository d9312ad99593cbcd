"""Which Airflow this is and what follows from it: the only module that knows one version from another.

What a version promises stands in :data:`PROMISES`, and for users in docs/airflow.md. Importing this module refuses an
Airflow that is too old; ``get_provider_info`` must not, or that Airflow could not start.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from airflow.sdk import BaseHook, RetryPolicy, conf
    from airflow.sdk.bases.decorator import determine_kwargs
    from airflow.sdk.definitions.retry_policy import RetryAction, RetryDecision
    from airflow.sdk.exceptions import (
        AirflowFailException,
        AirflowNotFoundException,
        AirflowSensorTimeout,
        AirflowSkipException,
        AirflowTaskTimeout,
    )
    from airflow.sdk.listener import get_listener_manager

__all__ = [
    "HERE",
    "OLDEST",
    "PROMISES",
    "AirflowFailException",
    "AirflowNotFoundException",
    "AirflowSensorTimeout",
    "AirflowSkipException",
    "AirflowTaskTimeout",
    "BaseHook",
    "Promises",
    "RetryAction",
    "RetryDecision",
    "RetryPolicy",
    "airflow_version",
    "conf",
    "determine_kwargs",
    "fails_for_good",
    "get_listener_manager",
    "in_thread",
    "promises_of",
    "take_retry_policy",
]

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")


@dataclass(frozen=True)
class Promises:
    """What a version of Airflow lets this provider keep.

    Attributes
    ----------
    calls_on_kill:
        Triggers are told that a user ended their task. Otherwise they are only told that they end
        (``BaseTrigger.cleanup``), and ask for the task's state themselves.
    asks_retry_policies:
        Airflow asks a task's retry policy after each error. Otherwise the operators ask it, and what must not be tried
        again they raise as ``AirflowFailException``; the delay is Airflow's own ``retry_delay``.
    keeps_task_state:
        A store outlives retries and clears. Otherwise a DAG run that was deleted and made again under the same run id
        has the identities of the first one, and its SQL counts as committed.
    starts_from_triggers:
        A task can begin in a triggerer and render its templates there.
    answers_any_thread:
        A trigger may ask Airflow (for a connection, a state) from a thread. Before 3.2.2 that reads what was meant for
        the triggerer itself, which then ends with all its triggers (airflow #64620).
    """

    calls_on_kill: bool = True
    asks_retry_policies: bool = True
    keeps_task_state: bool = True
    starts_from_triggers: bool = True
    answers_any_thread: bool = True


_BEFORE_3_3 = Promises(
    calls_on_kill=False,
    asks_retry_policies=False,
    keeps_task_state=False,
    starts_from_triggers=False,
    answers_any_thread=False,
)
PROMISES: Mapping[tuple[int, int], Promises] = {(3, 1): _BEFORE_3_3, (3, 2): _BEFORE_3_3, (3, 3): Promises()}
"""By the first version for which they hold, oldest first; that of the first entry is the oldest that is supported."""
OLDEST = next(iter(PROMISES))

_PLACES = {
    "AirflowFailException": ("airflow.sdk.exceptions", "airflow.exceptions"),
    "AirflowNotFoundException": ("airflow.sdk.exceptions", "airflow.exceptions"),
    "AirflowSensorTimeout": ("airflow.sdk.exceptions", "airflow.exceptions"),
    "AirflowSkipException": ("airflow.sdk.exceptions", "airflow.exceptions"),
    "AirflowTaskTimeout": ("airflow.sdk.exceptions", "airflow.exceptions"),
    "BaseHook": ("airflow.sdk",),
    "RetryAction": ("airflow.sdk.definitions.retry_policy", "airflow_provider.compat_retries"),
    "RetryDecision": ("airflow.sdk.definitions.retry_policy", "airflow_provider.compat_retries"),
    "RetryPolicy": ("airflow.sdk", "airflow_provider.compat_retries"),
    "conf": ("airflow.sdk", "airflow.configuration"),
    "determine_kwargs": ("airflow.sdk.bases.decorator", "airflow.utils.operator_helpers"),
    "get_listener_manager": ("airflow.sdk.listener", "airflow.listeners.listener"),
}
"""Where a name is: first in the newest Airflow, then in older ones."""


def __getattr__(name: str) -> Any:
    for place in _PLACES.get(name, ()):
        try:
            return getattr(import_module(place), name)
        except (ModuleNotFoundError, AttributeError):
            continue
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def airflow_version() -> tuple[int, int]:
    """Return the major and minor version of the Airflow that is installed.

    A worker may have the task SDK only, whose versions are two majors behind: 1.3 is Airflow 3.3's.

    Raises
    ------
    ImportError
        There is none.
    """
    for distribution, ahead in (("apache-airflow-core", 0), ("apache-airflow-task-sdk", 2), ("apache-airflow", 0)):
        try:
            major, minor = version(distribution).split(".")[:2]
        except PackageNotFoundError:
            continue
        return int(major) + ahead, int(minor)
    raise ImportError("airflow_provider needs Apache Airflow, and no distribution of it is installed here")


def promises_of(airflow: tuple[int, int]) -> Promises:
    """Return what an Airflow of this major and minor version lets this provider keep.

    Raises
    ------
    ImportError
        It is too old, told in one sentence: otherwise it would show up as a name that cannot be imported.
    """
    known = [since for since in PROMISES if since <= airflow]
    if not known:
        raise ImportError(
            "airflow_provider of pg-background-orchestration needs Apache Airflow "
            f"{'.'.join(map(str, OLDEST))} or newer, and this is {'.'.join(map(str, airflow))}"
        )
    return PROMISES[known[-1]]


HERE = promises_of(airflow_version())
"""What the Airflow that is installed lets this provider keep."""


async def in_thread(function: Callable[..., T], *arguments: Any, **named: Any) -> T:
    """Run in a thread what blocks and may ask Airflow, and return what it returns.

    Where Airflow answers no thread of its own accord, asgiref hands the question on to the event loop, in which the
    triggerer's own wait for their turn. A question that is broken off would leave its answer to the next one, so it is
    asked to its end whatever becomes of the caller.

    Raises
    ------
    Exception
        Whatever the function raises.
    """
    if HERE.answers_any_thread:
        return await asyncio.to_thread(function, *arguments, **named)
    from asgiref.sync import sync_to_async

    # Not thread_sensitive: that is one thread for all triggers, in which another's SQL may run for long.
    asked = sync_to_async(function, thread_sensitive=False)(*arguments, **named)
    asking = asyncio.get_running_loop().create_task(asked)
    _asking.add(asking)  # the loop itself keeps no task alive
    asking.add_done_callback(_asking.discard)
    return await asyncio.shield(asking)


_asking: set[asyncio.Task[Any]] = set()


def take_retry_policy(arguments: dict[str, Any]) -> Any:
    """Take ``retry_policy`` out of an operator's arguments, where Airflow's own operator knows no such thing.

    Parameters
    ----------
    arguments:
        What is given on to Airflow's operator: changed.
    """
    return None if HERE.asks_retry_policies else arguments.pop("retry_policy", None)


def fails_for_good(method: F) -> F:
    """Let a task's method end the task where its retry policy says that no other try makes sense.

    Changes nothing where Airflow asks the policy itself. The method's first two arguments are the operator and
    Airflow's context.
    """
    if HERE.asks_retry_policies:
        return method

    @functools.wraps(method)
    def deciding(self: Any, context: Any, *arguments: Any, **named: Any) -> Any:
        from airflow.sdk.exceptions import AirflowException

        try:
            return method(self, context, *arguments, **named)
        except AirflowException:
            raise  # Airflow's own: a skip, a timeout, an end that was decided already
        except Exception as error:
            ti = context["ti"]
            decision = self.retry_policy.evaluate(error, ti.try_number, ti.max_tries, context)
            if decision.action is not __getattr__("RetryAction").FAIL:
                raise
            fail: type[Exception] = __getattr__("AirflowFailException")
            raise fail(f"{type(error).__name__}: {error}\nNot tried again: {decision.reason}") from error

    return deciding  # type: ignore[return-value]  # the same signature
