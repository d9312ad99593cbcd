"""Who wants a job: a step of a run, which may be terminated and tried again, or code that no run is behind."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Coroutine, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from dagster import DagsterExecutionInterruptedError, DagsterRunStatus

from pgbg_orchestration.driver import Talk

from . import contexts, identity
from .failures import RunTerminated
from .step_driver import drive, see_through

if TYPE_CHECKING:
    from dagster import (
        AssetCheckExecutionContext,
        AssetExecutionContext,
        HookContext,
        InputContext,
        OpExecutionContext,
        OutputContext,
        ScheduleEvaluationContext,
        SensorEvaluationContext,
    )

    StepContext = AssetExecutionContext | OpExecutionContext | AssetCheckExecutionContext
    BesideContext = HookContext | InputContext | OutputContext
    AnyContext = StepContext | BesideContext | SensorEvaluationContext | ScheduleEvaluationContext | None

T = TypeVar("T")
logger = logging.getLogger("dagster_resource")

CANCELLED = (DagsterRunStatus.CANCELING, DagsterRunStatus.CANCELED)
INTERRUPTIONS = (RunTerminated, DagsterExecutionInterruptedError, KeyboardInterrupt)
ENDED = (*CANCELLED, DagsterRunStatus.FAILURE, DagsterRunStatus.SUCCESS)


class Caller:
    """The code that wants a job, seen through its context.

    Parameters
    ----------
    context:
        Of an asset, an op, an asset check, a hook, an IO manager, a sensor or a schedule, or one built by hand; None
        where there is none.
    cancel_on_termination:
        As :class:`PgBackgroundResource` takes it.
    """

    def __init__(self, context: AnyContext, cancel_on_termination: str) -> None:
        self._context: Any = contexts.of_step(context)
        self._tried_again = contexts.is_tried_again(context)
        self._cancel_on_termination = cancel_on_termination
        self._has_run = identity.has_run(self._context)
        self._decision: bool | None = None
        self._taken_back = False

    @property
    def retry_number(self) -> int | None:
        """How often the step was retried before this try; None where nobody tries anything again."""
        if not self._tried_again:
            return None
        if self._has_run:
            return int(self._context.retry_number)
        return 0 if identity.is_step(self._context) else None

    def add_output_metadata(self, metadata: Mapping[str, Any]) -> None:
        """Add metadata to what the step puts out; where there is no step, nobody would see it.

        Raises
        ------
        DagsterInvariantViolationError
            The step has several outputs, or has metadata of these names already.
        """
        if identity.is_step(self._context):
            self._context.add_output_metadata(metadata)

    def refuse_in_ended_run(self) -> None:
        """Refuse to launch anything for a run that is being terminated, or has ended without this step's knowledge.

        Raises
        ------
        RunTerminated
            It is, or has.
        """
        status = self._status()
        if status in ENDED:
            raise RunTerminated(f"The run is {status.value}: nothing is launched for it any more.")

    def drive(self, work: Callable[[Talk], Coroutine[Any, Any, T]], *, interval: float) -> T:
        """Run ``work`` and wait for it, as :func:`dagster_resource.steps.step_driver.drive` does.

        Raises
        ------
        RunTerminated, DagsterExecutionInterruptedError, KeyboardInterrupt
            The step was interrupted.
        """
        return self._drive(work, interval=interval)

    def _drive(self, work: Callable[[Talk], Coroutine[Any, Any, T]], *, interval: float, look_again: bool = False) -> T:
        try:
            result = drive(
                work,
                log=self.log,
                is_terminated=self.is_terminated,
                should_cancel=self.cancels,
                interval=interval if self._has_run else math.inf,
            )
            if look_again and self._status() in CANCELLED:
                raise DagsterExecutionInterruptedError  # noqa: TRY301  (as if Dagster had sent it)
        except DagsterExecutionInterruptedError as interruption:
            self.raise_terminated(interruption)
            raise
        else:
            return result

    def is_terminated(self) -> bool:
        """Tell whether the run is being terminated, or was."""
        return self._status() in CANCELLED

    def raise_terminated(self, interruption: DagsterExecutionInterruptedError) -> None:
        """Raise `RunTerminated` where Dagster would let a retry policy run an interrupted step again."""
        if self._has_retry_policy() and self.is_terminated():
            raise RunTerminated("The run is being terminated; the step's jobs have been dealt with.") from interruption

    def hand_over(
        self,
        work: Callable[[Talk], Coroutine[Any, Any, T]],
        withdraw: Callable[[Talk], Coroutine[Any, Any, None]],
        *,
        interval: float,
    ) -> T:
        """Run ``work``, which launches what nobody is to wait for, and take it back if the step is interrupted.

        There is no moment of an interruption that leaves a worker which was to be cancelled: whenever it comes before
        this returns, ``withdraw`` is run after ``work`` has ended, in whatever way it has. A termination that was
        asked for meanwhile, and has not reached this process yet, counts too.

        Raises
        ------
        RunTerminated, DagsterExecutionInterruptedError, KeyboardInterrupt
            The step was interrupted.
        """
        try:
            try:
                return self._drive(work, interval=interval, look_again=True)
            except INTERRUPTIONS:
                self._take_back(withdraw)
                raise
        except INTERRUPTIONS:
            # The signal may come after the run's status has told: on the way into what is done about that.
            self._take_back(withdraw)
            raise

    def _take_back(self, withdraw: Callable[[Talk], Coroutine[Any, Any, None]]) -> None:
        """Withdraw what was launched, once, if it is to end, however often the step is interrupted meanwhile."""
        while not self._taken_back:
            try:
                if self.cancels():
                    see_through(withdraw, log=self.log)
                self._taken_back = True
            except INTERRUPTIONS:
                continue

    def cancels(self) -> bool:
        """Tell whether an interruption of this code is to end its workers; decided once."""
        if self._decision is None:
            self._decision = self._should_cancel()
        return self._decision

    def _should_cancel(self) -> bool:
        if self._cancel_on_termination != "requested":
            return self._cancel_on_termination == "always"
        if not self._has_run:
            return True  # the interruption is the user's own, and nobody will come back for these workers
        terminated = self._status() in CANCELLED
        if not terminated:
            self.log(
                logging.WARNING,
                "The step was interrupted and nobody asked for the run to be terminated: its workers go on, and a "
                "retry of it attaches to them.",
            )
        return terminated

    def _status(self) -> DagsterRunStatus | None:
        """Return the run's status as it is stored; None outside of a run, or when the storage does not answer."""
        if not self._has_run:
            return None
        try:
            run = self._context.instance.get_run_by_id(self._context.run.run_id)
        except Exception as error:  # noqa: BLE001  (any storage may stand behind it)
            self.log(logging.WARNING, f"The run's status cannot be read: {error}")
            return None
        return run.status if run else None

    def _has_retry_policy(self) -> bool:
        return self._has_run and self._context.get_step_execution_context().op_retry_policy is not None

    def log(self, level: int, message: str) -> None:
        """Write a line into the step's log."""
        (self._context.log if self._context is not None else logger).log(level, message)
