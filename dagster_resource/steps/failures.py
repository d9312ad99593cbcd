"""From an error of the core to what Dagster understands: a ``Failure``, or a request to run the step again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from dagster import Failure, MetadataValue, RetryRequested, TableRecord

from pgbg_orchestration.errors import PgbgError, WorkerError
from pgbg_orchestration.outcome import ErrorFields
from pgbg_orchestration.retry import ATTACH, DEFAULT, FAIL, RETRY, Decision, RetryPolicy

from .metadata import page_of, sql_block

NEVER = 1_000_000  # a number of tries that no rule allows


class PgBackgroundFailure(Failure):
    """A job did not commit. Its text and its metadata say what happened, what is true of the data, and what to do.

    Attributes
    ----------
    error:
        The error of the core, of which there is one class for each way to end.
    fields:
        What the server said: ``sqlstate``, ``message``, ``detail``, ``hint``, ``context`` and the names of the schema,
        table, column and constraint concerned; each None where it is not known.
    job_id, label:
        The job, and what a person saw on its worker.
    errors:
        The errors of all jobs of the step that did not commit, ``error`` among them.
    """

    def __init__(
        self,
        error: PgbgError,
        *,
        errors: Sequence[PgbgError] = (),
        sql: str | None = None,
        reason: str | None = None,
        allow_retries: bool = True,
        web_url: str | None = None,
    ) -> None:
        self.error = error
        self.errors = tuple(errors) or (error,)
        self.fields = error.fields if isinstance(error, WorkerError) else ErrorFields(sqlstate=error.sqlstate)
        self.job_id = error.job_id
        self.label = error.label
        super().__init__(
            description=f"{error}\n{reason}" if reason else str(error),
            metadata=_metadata(error, sql, web_url) | _table(self.errors),
            allow_retries=allow_retries,
        )

    @property
    def sqlstate(self) -> str | None:
        """The SQLSTATE behind the error, where there is one."""
        return self.fields.sqlstate

    @property
    def message(self) -> str:
        """The server's message; for an error that the server did not raise, the core's."""
        return _message(self.error)

    @property
    def detail(self) -> str | None:
        """The server's DETAIL."""
        return self.fields.detail

    @property
    def hint(self) -> str | None:
        """The server's HINT; for an error that the server did not raise, what to do next."""
        return self.fields.hint or self.error.todo


class RunTerminated(Failure):
    """The run is being terminated, or has ended: nothing is launched for it any more, and the step is not retried."""

    def __init__(self, description: str) -> None:
        super().__init__(description=description, allow_retries=False)


def raise_for(
    errors: Sequence[PgbgError],
    *,
    policy: RetryPolicy,
    retry_number: int | None,
    max_retries: int,
    sql: Mapping[str, str],
    web_url: str | None = None,
) -> NoReturn:
    """Raise what Dagster is to do about the errors of one step's jobs.

    Parameters
    ----------
    errors:
        At least one. A step can be run again only when every one of them allows it; jobs that committed are not run
        again with it.
    policy:
        The rules by SQLSTATE.
    retry_number:
        How often the step was retried before this try, from 0; None outside of a step, where nobody tries again.
    max_retries:
        How often a step is retried at most where no rule has a number of its own.
    sql:
        The jobs' SQL by job id, for the metadata.
    web_url:
        Address of the jobs' page, for the metadata; None where there is none.

    Raises
    ------
    RetryRequested
        The step is worth another try; its cause is the failure.
    PgBackgroundFailure
        It is not. ``allow_retries`` is True only where no rule knows the error, so that a retry policy of the user's
        decides.
    """
    judged = [(policy.decide(error, (retry_number or 0) + 1), error) for error in errors]
    decision, error = max(judged, key=lambda pair: _weight(pair[0]))
    reason = decision.reason
    if len(errors) > 1:
        labels = ", ".join(sorted(str(error.label) for error in errors))
        reason = f"{reason}\n{len(errors)} jobs of this step did not commit: {labels}"
    failure = PgBackgroundFailure(
        error,
        errors=errors,
        sql=sql.get(error.job_id or ""),
        reason=reason,
        allow_retries=decision.action is DEFAULT,
        web_url=web_url,
    )
    if decision.action in (RETRY, ATTACH) and retry_number is not None:
        delays = [judgement.delay or 0.0 for judgement, _ in judged]
        # A rule that counts tries itself has said yes; where nothing had started, a try does not count at all.
        counted = any(judgement.uses_attempt and not _has_own_count(policy, error) for judgement, error in judged)
        raise RetryRequested(
            max_retries=max_retries if counted else retry_number + 1, seconds_to_wait=max(delays)
        ) from failure
    raise failure from None  # it says all that the error says, and the stack below it tells users nothing


def _has_own_count(policy: RetryPolicy, error: PgbgError) -> bool:
    """Tell whether the rule for this error gives up by itself after a number of tries."""
    return policy.decide(error, NEVER).action is FAIL


def _weight(decision: Decision) -> int:
    """Of several errors, the one that forbids most decides."""
    return {RETRY: 1, ATTACH: 0, DEFAULT: 2}.get(decision.action, 3)


def _metadata(error: PgbgError, sql: str | None, web_url: str | None) -> dict[str, Any]:
    values = error.to_dict()
    del values["notes"]  # they stand in the text
    values |= values.pop("fields", {})  # the server's message among them, where there is one
    metadata: dict[str, Any] = {
        f"pgbg/{name}": MetadataValue.text(str(value)) for name, value in values.items() if value
    }
    if sql:
        metadata["pgbg/sql"] = sql_block(sql)
    if web_url and error.job_id:
        metadata["pgbg/page"] = MetadataValue.url(page_of(web_url, error.job_id))
    return metadata


def _table(errors: Sequence[PgbgError]) -> dict[str, Any]:
    """Show every job of a step that did not commit, where there are several."""
    if len(errors) < 2:
        return {}
    records = [
        TableRecord(
            {
                "label": str(error.label or ""),
                "sqlstate": error.sqlstate or "",
                "message": _message(error),
                "data_state": error.data_state,
                "job_id": str(error.job_id or ""),
            }
        )
        for error in errors
    ]
    return {"pgbg/failed_jobs": MetadataValue.table(records)}


def _message(error: PgbgError) -> str:
    return (error.fields.message if isinstance(error, WorkerError) else None) or error.message
