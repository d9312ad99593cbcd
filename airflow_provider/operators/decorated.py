"""``@task.pg_background``: a function that returns SQL, or SQL and parameters."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from airflow.sdk.bases.decorator import DecoratedOperator, TaskDecorator, task_decorator_factory
from airflow.sdk.definitions._internal.types import SET_DURING_EXECUTION

from airflow_provider import parse_checks
from airflow_provider.compat import fails_for_good
from airflow_provider.operators.end import is_listened_to

from .job import PgBackgroundOperator

if TYPE_CHECKING:
    from airflow.sdk import Context


class PgBackgroundDecoratedOperator(DecoratedOperator, PgBackgroundOperator):
    """Calls a function and runs the SQL that it returns.

    Parameters
    ----------
    python_callable:
        Returns SQL (one text, the name of a ``.sql`` file, or a list of them), or a tuple of SQL and parameters. The
        SQL is rendered by Jinja, as that of ``@task.sql`` is; the parameters are not.
    op_args, op_kwargs:
        What it is called with.
    kwargs:
        As :class:`PgBackgroundOperator` takes them, without ``sql``.
    """

    # Not `sql`, which the function returns: it is rendered then, and its parameters, which are data, never.
    template_fields: Sequence[str] = (
        *DecoratedOperator.template_fields,
        *(name for name in PgBackgroundOperator.template_fields if name != "sql"),
    )
    template_fields_renderers: ClassVar[dict[str, str]] = {
        **DecoratedOperator.template_fields_renderers,
        **PgBackgroundOperator.template_fields_renderers,
    }
    can_start_from_trigger = False
    custom_operator_name = "@task.pg_background"
    _is_called = False
    _had_parameters = False  # in the process that called the function

    def __init__(
        self,
        *,
        python_callable: Callable[..., Any],
        op_args: Collection[Any] | None = None,
        op_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        parse_checks.check(
            type(self),
            {"task_id": kwargs.get("task_id"), "op_args": op_args, "op_kwargs": op_kwargs},
        )
        super().__init__(
            python_callable=python_callable, op_args=op_args, op_kwargs=op_kwargs, sql=SET_DURING_EXECUTION, **kwargs
        )

    @fails_for_good
    def execute(self, context: Context) -> Any:
        """Call the function, and run what it returned."""
        from airflow.sdk.definitions.context import context_merge

        from airflow_provider.compat import determine_kwargs

        context_merge(context, self.op_kwargs)
        returned = self.python_callable(*self.op_args, **determine_kwargs(self.python_callable, self.op_args, context))
        if isinstance(returned, tuple):
            returned, self.parameters = returned
        if not isinstance(returned, str | list) or not returned:
            raise TypeError(
                "a function of @task.pg_background returns SQL, a list of statements, or a tuple of one of them and "
                f"its parameters, not a {type(returned).__name__}"
            )
        self.sql = self.render_template(returned, context)
        self._is_called = True
        # Not DecoratedOperator's, which takes the outcome for the function's own value.
        return PgBackgroundOperator.execute(self, context)

    def execute_complete(
        self,
        context: Any,
        event: dict[str, Any] | None = None,
        sql: list[str] | None = None,
        has_parameters: bool = False,
    ) -> Any:
        """Return what the trigger found; ``sql`` is what the function had returned, in another process."""
        if sql is not None:
            self.sql, self._is_called = sql, True
            self._had_parameters = has_parameters
        return PgBackgroundOperator.execute_complete(self, context, event)

    def _kept_for_resuming(self) -> dict[str, Any] | None:
        # The function is not called again, and lineage is asked for at the end.
        if not is_listened_to():
            return None
        return {"sql": self._statements(), "has_parameters": self._has_parameters()}

    def _statements(self) -> list[str]:
        return super()._statements() if self._is_called else []

    def _has_parameters(self) -> bool:
        return self._had_parameters or super()._has_parameters()


def pg_background_task(
    python_callable: Callable[..., Any] | None = None, multiple_outputs: bool | None = None, **kwargs: Any
) -> TaskDecorator:
    """Wrap a function that returns SQL into a task; Airflow calls this for ``@task.pg_background``."""
    return task_decorator_factory(
        python_callable=python_callable,
        multiple_outputs=multiple_outputs,
        decorated_operator_class=PgBackgroundDecoratedOperator,
        **kwargs,
    )
